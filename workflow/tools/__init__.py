"""Commands that are no stage: what somebody asks of two logs, of a trained run, or of a model before any training.

In: files that the harness or the stages wrote. Out: a table on the terminal and, if asked for, CSV or JSON.
"""
