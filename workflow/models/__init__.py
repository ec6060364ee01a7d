"""A base model in memory.

In: a model folder and a variant. Out: the loaded base, with the proof that it is in the variant's precision.
"""
