"""What every stage stands on: how it starts, speaks, fails and leaves whole files behind.

In: paths, the environment, signals. Out: streams, locks, digests, messages; nothing here knows a model.
"""
