"""What keys of params and of measurements are called on the page."""

SHAPES = {  # the models whose shapes stand in workflow/cost/shapes/
    "llama2_13b": "Llama-2-13B",
    "llama2_70b": "Llama-2-70B",
    "llama2_7b": "Llama-2-7B",
    "llama3_1_70b": "Llama-3.1-70B",
    "llama3_1_8b": "Llama-3.1-8B",
    "llama3_70b": "Llama-3-70B",
    "llama3_8b": "Llama-3-8B",
    "mistral_7b": "Mistral-7B",
    "qwen2_5_0_5b": "Qwen2.5-0.5B",
    "qwen2_5_14b": "Qwen2.5-14B",
    "qwen2_5_1_5b": "Qwen2.5-1.5B",
    "qwen2_5_32b": "Qwen2.5-32B",
    "qwen2_5_3b": "Qwen2.5-3B",
    "qwen2_5_72b": "Qwen2.5-72B",
    "qwen2_5_7b": "Qwen2.5-7B",
    "qwen3_0_6b": "Qwen3-0.6B",
    "qwen3_14b": "Qwen3-14B",
    "qwen3_1_7b": "Qwen3-1.7B",
    "qwen3_32b": "Qwen3-32B",
    "qwen3_4b": "Qwen3-4B",
    "qwen3_8b": "Qwen3-8B",
    "smollm2_135m": "SmolLM2-135M",
    "smollm2_1_7b": "SmolLM2-1.7B",
    "smollm2_360m": "SmolLM2-360M",
    "tinyllama_1b": "TinyLlama-1.1B",
}
SPEED_UPS = {
    "packing": "packing",
    "fused_adapters": "fused adapters",
    "shared_inputs": "shared inputs",
    "fused_layers": "fused layers",
    "fused_loss": "fused loss",
    "cuda_graphs": "CUDA graphs",
}
OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "fused AdamW",
    "paged_adamw_32bit": "paged AdamW",
    "paged_adamw_8bit": "paged 8-bit AdamW",
}
METRICS = {"rouge_l": "ROUGE-L", "chrf": "chrF"}


def shape_name(shape: str) -> str:
    """The name of the model that a shape is of."""
    return SHAPES.get(shape, shape)


def setting_name(setting: str) -> str:
    """A benchmark's setting, for example `without fused loss`."""
    for key, name in SPEED_UPS.items():
        setting = setting.replace(key, name)
    return setting
