"""Rows and model files: what is read, split, rendered and recorded.

In: instructions, tokenizers and model folders. Out: rows with their splits, chat text, cards and lineage.
"""
