"""LoRA: a product of two small matrices is added to each linear layer of a frozen base (Hu et al. 2021)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workflow.methods import initializations
from workflow.methods.base import Method, Settings, Shape
from workflow.runtime.errors import CheckError

if TYPE_CHECKING:
    from pathlib import Path

    from peft import LoraConfig
    from torch import Tensor, nn


@dataclass(frozen=True)
class Lora(Method):
    """LoRA, by PEFT."""

    parts: tuple[str, ...] = ("lora_A.default.weight", "lora_B.default.weight")  # of each adapted layer

    def peft_config(self, settings: Settings) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            use_rslora=settings.rank_stabilized,  # the scale is alpha / sqrt(rank) (Kalajdzievski 2023)
            init_lora_weights=initializations.get(settings.initialization).peft,
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
        )

    def wrap(self, model: nn.Module, settings: Settings) -> nn.Module:
        from peft import get_peft_model

        return get_peft_model(model, self.peft_config(settings))

    def expected(self, model: nn.Module, linears: Iterable[str]) -> set[str]:
        return {f"{name}.{part}" for name in linears for part in self.parts}

    def traits(self, settings: Settings) -> list[str]:
        label = initializations.get(settings.initialization).label
        return [
            *([label] if label else []),
            *(["rank-stabilized"] if settings.rank_stabilized else []),
            *([f"LoRA+ {settings.b_rate_factor:g}"] if settings.b_rate_factor != 1 else []),
        ]

    def rate_factor(self, name: str, settings: Settings) -> float:
        # LoRA+ (Hayou et al. 2024): B learns at another rate than A.
        return settings.b_rate_factor if "lora_B" in name else 1.0

    def adapter_layers(self, model: nn.Module) -> list[nn.Module]:
        from peft.tuners.lora import LoraLayer

        return [module for module in model.modules() if isinstance(module, LoraLayer)]

    def adapter_parameters(self, shape: Shape, settings: Settings) -> int:
        return adapter_parameters(shape, settings)

    def trained_parameters(self, shape: Shape, settings: Settings) -> int:
        return self.adapter_parameters(shape, settings)

    def learns_at_once(self, name: str) -> bool:
        # B may begin at zero, and then A has no gradient in the first step.
        return "lora_A" not in name

    def check_learned(self, weights: dict[str, Tensor], second_moment: Callable[[str], Tensor]) -> None:
        for name, weight in weights.items():
            # B begins at zero, so a number in it is the trace of a gradient, which A then gets as well.
            if "lora_B" in name and not weight.any():
                raise CheckError(f"{name} is still zero after training: no gradient reached it")
            if "lora_A" not in name and not second_moment(name).any():
                raise CheckError(f"{name} was not trained: no gradient reached it")

    def portable(self, weights: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
        return difference(weights, initial) if initial else weights

    def save(self, model: nn.Module, folder: Path, weights: dict[str, Tensor], *, gathered: bool) -> None:
        (trained,) = model.peft_config.values()
        if not isinstance(trained.target_modules, str):
            # A set, whose order is another in each process.
            trained.target_modules = sorted(trained.target_modules)
        model.peft_config["default"] = config_of(trained, weights)
        try:
            model.save_pretrained(folder, **({"state_dict": weights} if gathered else {}))
        finally:
            model.peft_config["default"] = trained

    def recorded(self, settings: Settings) -> dict[str, tuple[str, float]]:
        doubled = initializations.get(settings.initialization).changes_base
        rank, alpha = saved_sizes(settings.rank, settings.alpha, settings.rank_stabilized, doubled=doubled)
        return {
            "r": ("rank", rank),
            "lora_alpha": ("alpha", alpha),
            "use_rslora": ("rank stabilization", settings.rank_stabilized),
        }

    def saved(
        self, model: nn.Module, folder: Path, weights: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from peft import get_peft_model_state_dict
        from safetensors.torch import load_file

        trained = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
        return load_file(folder / "adapter_model.safetensors"), trained

    def saved_adapters(self, names: Iterable[str]) -> int:
        return sum("lora_A" in name for name in names)


def adapted(shape: Shape, settings: Settings) -> dict[str, tuple[int, int]]:
    """(in, out) of the layers of a decoder layer that get an adapter, by name."""
    targets = settings.target_modules
    return {name: size for name, size in shape.linears.items() if targets == "all-linear" or name in targets}


def adapter_parameters(shape: Shape, settings: Settings) -> int:
    """rank x (in + out) for each adapted layer (Hu et al. 2021, section 4)."""
    return shape.layers * settings.rank * sum(a + b for a, b in adapted(shape, settings).values())


def difference(weights: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of twice the rank whose product is B A less the initial product: [B, -B0] [A; A0].

    The base lost the initial product when the training began, so this is what belongs on the published base
    (`subtract_mutated_init` of PEFT, which would drop the magnitudes of DoRA).

    Args:
        weights: by name, A [rank, in] and B [out, rank] of each adapted layer, and others, which stay.
        initial: the same before the training.
    """
    import torch

    result = dict(weights)
    for name, weight in weights.items():
        start = initial[name].to(weight.device)
        if "lora_A" in name:
            result[name] = torch.cat([weight, start])
        elif "lora_B" in name:
            result[name] = torch.cat([weight, -start], dim=1)
    return result


def saved_sizes(rank: int, alpha: float, rank_stabilized: bool, *, doubled: bool) -> tuple[int, float]:
    """Rank and alpha of a saved adapter; one of twice the rank keeps the scale of its product."""
    if not doubled:
        return rank, alpha
    return 2 * rank, alpha * 2**0.5 if rank_stabilized else 2 * alpha


def config_of(trained: LoraConfig, weights: dict[str, Tensor]) -> LoraConfig:
    """The configuration of an adapter that begins as LoRA does, so that loading it leaves the base alone."""
    saved = copy.copy(trained)
    doubled = any("lora_A" in name and weight.shape[0] == 2 * trained.r for name, weight in weights.items())
    saved.r, saved.lora_alpha = saved_sizes(
        trained.r, trained.lora_alpha, trained.use_rslora, doubled=doubled
    )
    saved.init_lora_weights = True
    return saved


LORA = Lora(
    name="lora",
    label="LoRA",
    label_on_4_bits="QLoRA",
    short="",
    tag="lora",
    tag_on_4_bits="qlora",
    trains="an adapter",
    product="A LoRA adapter",
    leaves_adapter=True,
    master_weights=False,
    quantized_bases=True,
    may_shard=True,
    may_fuse_adapters=True,
    may_share_inputs=True,
    may_graph=True,
    passes=2,
    peft_type="LORA",
)
