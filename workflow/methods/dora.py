"""DoRA: LoRA changes a weight's direction, and its magnitude is trained by itself (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from workflow.methods.base import Settings, Shape
from workflow.methods.lora import LORA, Lora, adapted

if TYPE_CHECKING:
    from peft import LoraConfig

BYTES_OF_AN_OUTPUT = 16  # read and written to scale an output, and for the two gradients of that


@dataclass(frozen=True)
class Dora(Lora):
    """DoRA, by PEFT: each output of W + s B A is scaled by magnitude / norm (section 4.1, equation 5).

    The norm of a weight's row is a constant for the gradient (section 4.3).
    """

    def peft_config(self, settings: Settings) -> LoraConfig:
        config = super().peft_config(settings)
        config.use_dora = True
        return config

    def no_fused_adapters(self, settings: Settings) -> str:
        if settings.dropout:
            return "with dropout, DoRA multiplies the base's weight with a second input"
        return super().no_fused_adapters(settings)

    def adapter_parameters(self, shape: Shape, settings: Settings) -> int:
        """Those of LoRA, and a magnitude for each output of an adapted layer."""
        return super().adapter_parameters(shape, settings) + shape.layers * outputs(shape, settings)

    def kept_outputs(self, shape: Shape, settings: Settings) -> int:
        # The gradient of a magnitude needs each output as it was before it was scaled.
        return outputs(shape, settings)

    def moved_bytes(self, shape: Shape, settings: Settings) -> int:
        return BYTES_OF_AN_OUTPUT * shape.layers * outputs(shape, settings)

    def recorded(self, settings: Settings) -> dict[str, tuple[str, float]]:
        return super().recorded(settings) | {"use_dora": ("a magnitude", True)}


def outputs(shape: Shape, settings: Settings) -> int:
    """Outputs of all adapted layers of a decoder layer."""
    return sum(out for _, out in adapted(shape, settings).values())


DORA = Dora(
    **{field.name: getattr(LORA, field.name) for field in fields(LORA)}
    | {
        "name": "dora",
        "label": "DoRA",
        "label_on_4_bits": "QDoRA",
        "short": "DoRA",
        "tag": "dora",
        "tag_on_4_bits": "qdora",
        "product": "A DoRA adapter",
        "may_share_inputs": False,
        "needs_weights": True,  # their norms
        "may_shard": False,  # the magnitudes of sharded weights were not tried
        "parts": (*LORA.parts, "lora_magnitude_vector.default.weight"),
    }
)
