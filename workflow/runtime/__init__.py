"""What every stage relies on: how it starts, logs, fails, locks and writes files.

In: paths, the environment, signals. Out: logs, locks, digests, messages; nothing here knows a model.
"""
