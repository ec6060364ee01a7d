"""Begin an adapter with what quantization took from its base (LoftQ)."""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from workflow.models.load import base_linears
from workflow.training.speed.fused import base_weight


def correct_quantization(model: PeftModel) -> None:
    """Begin every adapter with the best approximation, of its rank, of what quantization took from its layer.

    The base stays as it was quantized (Li et al. 2023, algorithm 1 with one step). PEFT's
    `replace_lora_weights_loftq` needs a GPU, knows NF4 alone, and leaves out that the product is scaled.
    """
    base = model.get_base_model()
    published = AutoModelForCausalLM.from_pretrained(
        base.name_or_path, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    originals = base_linears(published)
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            _begin(layer, originals[name].weight)


@torch.no_grad()
def _begin(layer: LoraLayer, original: Tensor) -> None:
    """Set A and B of a layer, and the magnitudes that begin as the norms of their sum with the base.

    Args:
        original: the weight [out, in] before it was quantized.
    """
    ((name, rank),) = layer.r.items()
    base, scaling = layer.get_base_layer(), layer.scaling[name]
    held = base_weight(base, torch.float32)
    lost = original.to(held.device, torch.float32) - held
    a, b = low_rank(lost / scaling, rank)
    layer.lora_A[name].weight.copy_(a)
    layer.lora_B[name].weight.copy_(b)
    if layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[name].weight
        magnitude.copy_(torch.linalg.norm(held + scaling * b @ a, dim=1))


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product is the best approximation of a matrix [out, in] of that rank.

    Both get the root of each singular value (Eckart and Young 1936).
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots
