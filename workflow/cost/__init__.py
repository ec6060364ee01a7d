"""Memory, throughput and their prediction.

In: a shape, a variant and a device. Out: measured or computed bytes, tokens per second, and whether a run fits.
"""
