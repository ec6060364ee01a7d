"""Scores of a model in each form in which it may be served.

In: a base, an adapter and tasks. Out: one row per item and seed, from lm-evaluation-harness.
"""
