"""The learning rates of the runs: each candidate trained and scored on the validation rows, and the best one chosen.

In: params, and the training and validation rows. Out: a result for each candidate, and a rate for each variant.
"""
