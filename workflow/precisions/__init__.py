"""The number formats in which a base model is stored and multiplied.

In: a model folder and a variant. Out: a loaded base, with the proof that it holds what was asked.
"""
