"""What makes a training step faster without moving its numbers.

In: a model and its batches. Out: packs, fused layers and captured CUDA graphs.
"""
