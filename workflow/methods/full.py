"""Full fine-tuning: every weight of the base is trained, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workflow.methods.base import Method, Settings, Shape
from workflow.runtime.errors import CheckError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning, by transformers alone."""

    def wrap(self, model: nn.Module, settings: Settings) -> nn.Module:
        return model

    def expected(self, model: nn.Module, linears: Iterable[str]) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    def trained_parameters(self, shape: Shape, settings: Settings) -> int:
        return shape.parameters

    def activation_settings(self, settings: Settings) -> Settings:
        # The gradient of each weight needs the input of its layer, as that of an adapter without dropout does.
        return settings.model_copy(update={"target_modules": "all-linear", "dropout": 0.0})

    def no_fused_adapters(self, settings: Settings) -> str:
        return "it has no adapter"

    def check_learned(self, weights: dict[str, Tensor], second_moment: Callable[[str], Tensor]) -> None:
        for name in weights:
            if not second_moment(name).any():
                raise CheckError(f"{name} was not trained: no gradient reached it")

    def save(self, model: nn.Module, folder: Path, weights: dict[str, Tensor], *, gathered: bool) -> None:
        import torch

        model.to(torch.bfloat16).save_pretrained(folder, **({"state_dict": weights} if gathered else {}))

    def saved(
        self, model: nn.Module, folder: Path, weights: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        import torch
        from transformers import AutoModelForCausalLM

        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        files = {name: weight for name, weight in read.named_parameters() if name not in frozen}
        return files, {name: weight.bfloat16() for name, weight in weights.items()}


FULL = Full(
    name="full",
    label="full fine-tuning",
    label_on_4_bits="full fine-tuning",
    short="full",
    tag="full-fine-tuning",
    tag_on_4_bits=None,
    trains="every weight",
    product="A model with all of its weights trained",
    leaves_adapter=False,
    master_weights=True,
    quantized_bases=False,
    may_shard=False,
    may_fuse_adapters=False,
    may_graph=True,
    passes=3,
)
