"""Serve a run as llama.cpp does: as a GGUF file. Its packages are an extra, which `make gguf` installs.

In: a 16-bit model. Out: a GGUF file, what it holds, and the log-probabilities that llama.cpp computes with it.
"""
