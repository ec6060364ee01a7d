"""Verdicts on differences between variants.

In: scored items and measurements. Out: differences with their uncertainty, and the claims that they support.
`compare.py` tells the story; `docs/statistics.md` derives the statistics.
"""
