"""Precisions that people ask for and that cannot be trained on here, each with the reason and what to use instead."""

REASONS = {
    "mxfp4": "transformers' MXFP4 kernels pass no gradient; use mxfp4_emulated, which has its quality and not its speed",
    "nvfp4": "transformers' NVFP4 layers pass no gradient; use nvfp4_emulated, which has its quality and not its speed",
    "int4": "torchao's int4 layers pass no gradient: transformers trains those of 8 bits alone; use nf4 or fp4",
    "gptq": "it needs a base that was quantized with calibration data before, and no locked library trains on one; use nf4",
    "awq": "it needs a base that was quantized with calibration data before, and no locked library trains on one; use nf4",
    "gguf": "transformers dequantizes GGUF files as it loads them, and trains on none; name the file as the model, and use nf4",
    "higgs": "transformers' HIGGS kernels pass no gradient; use nf4",
    "spqr": "transformers' SpQR kernels pass no gradient; use nf4",
    "vptq": "transformers' VPTQ kernels pass no gradient; use nf4",
    "auto_round": "transformers' AutoRound layers are for inference alone; use nf4",
}
