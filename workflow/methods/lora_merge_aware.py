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
    """LoRA whose layers multiply by dequantize(quantize(D + s B A)), where D is the base in 4 bits.

    The form `requantized` folds the adapter into the same D, so it computes what was trained. Where every weight of D
    is on its level, an adapter that moves it by less than half a cell is rounded away, in training as in serving. So D
    is spread over the cells: as numbers that quantize to the base, and do not lie all in the middle.

    Attributes:
        spread: whether D is spread; else it is the dequantized base.
    """

    spread: bool = True

    def attach(self, model: nn.Module, quantizer: Quantizer) -> None:
        from workflow.methods.merged_layers import merge_in_forward

        merge_in_forward(model, quantizer, spread=self.spread)

    def fold(self, model: nn.Module, quantizer: Quantizer) -> nn.Module:
        from workflow.methods.merged_layers import fold

        return fold(model, quantizer, spread=self.spread)

    def folding_bytes(self, weights: int, quantizer: Quantizer) -> int:
        if self.spread:
            return 4 * weights + quantizer.spreading_bytes(weights)
        return (2 + 4) * weights  # dequantized in 16 bits, and that in 32


SHARED = asdict(LORA) | {
    "product": "A LoRA adapter, trained through the quantizer of its base",
    "may_shard": False,
    "may_share_inputs": False,
    # bitsandbytes quantizes on the default stream, and a graph is captured on another.
    "may_graph": False,
    "through_quantizer": True,
}
LORA_MERGE_AWARE = LoraMergeAware(
    **SHARED
    | {
        "name": "lora_merge_aware",
        "label": "merge-aware LoRA",
        "label_on_4_bits": "merge-aware QLoRA",
        "short": "aware",
        # Numbers of levels (8), two bounds (16), a place between them (16), times the constant (16), the adapter added
        # (8), quantized (4 and 0.5) and dequantized again (0.5 and 2).
        "merging_bytes": 71.0,
    }
)
LORA_MERGE_AWARE_ON_LEVELS = LoraMergeAware(
    **SHARED
    | {
        "name": "lora_merge_aware_on_levels",
        "label": "merge-aware LoRA on levels",
        "label_on_4_bits": "merge-aware QLoRA on levels",
        "short": "on levels",
        # Copied from 16 bits to 32 (2 and 4), the adapter added (8), quantized (4.5) and dequantized again (2.5).
        "merging_bytes": 21.0,
        "spread": False,
    }
)
