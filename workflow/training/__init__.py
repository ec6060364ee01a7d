"""Fine-tuning of one run, from rows to an adapter.

In: a base, rows and settings. Out: weights, loss curves and counts.
"""
