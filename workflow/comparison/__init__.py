"""Verdicts on differences between variants.

In: scored items and measurements. Out: differences with their uncertainty, and the claims that they support.
"""
