"""Merge-aware LoRA: it trains through the quantizer, so that what is served in 4 bits is what was trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from workflow.methods.base import Quantizer
from workflow.methods.lora import LORA, Lora

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LoraMergeAware(Lora):
    """LoRA whose layers multiply by dequantize(quantize(W + s B A)).

    W is the dequantized base, which is what an adapter is folded into when the result is served in 4 bits. So the
    form `requantized` computes what was trained. `merged_layers` has the arithmetic.
    """

    def attach(self, model: nn.Module, quantizer: Quantizer) -> None:
        from workflow.methods.merged_layers import merge_in_forward

        merge_in_forward(model, quantizer)

    def fold(self, model: nn.Module, quantizer: Quantizer) -> nn.Module:
        from workflow.methods.merged_layers import fold

        return fold(model, quantizer)


LORA_MERGE_AWARE = LoraMergeAware(
    **asdict(LORA)
    | {
        "name": "lora_merge_aware",
        "label": "merge-aware LoRA",
        "label_on_4_bits": "merge-aware QLoRA",
        "short": "merge-aware",
        "product": "A LoRA adapter, trained through the quantizer of its base",
        "may_shard": False,
        # bitsandbytes quantizes on the default stream, and a graph is captured on another.
        "may_graph": False,
        "through_quantizer": True,
        "folding_bytes": 6.0,  # dequantized in 16 bits, and a copy of that in 32
        # The copy (2 and 4), the adapter added to it (4 and 4), quantized (4 and 0.5) and dequantized again (0.5 and 2).
        "moved_bytes": 21.0,
    }
)
