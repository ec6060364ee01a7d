"""LoRA: a product of two small matrices is added to each linear layer of a frozen base (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
        )

    def wrap(self, model: nn.Module, settings: Settings) -> nn.Module:
        from peft import get_peft_model

        return get_peft_model(model, self.peft_config(settings))

    def expected(self, model: nn.Module, linears: Iterable[str]) -> set[str]:
        return {f"{name}.{part}" for name in linears for part in self.parts}

    def adapter_layers(self, model: nn.Module) -> list[nn.Module]:
        from peft.tuners.lora import LoraLayer

        return [module for module in model.modules() if isinstance(module, LoraLayer)]

    def adapter_parameters(self, shape: Shape, settings: Settings) -> int:
        return adapter_parameters(shape, settings)

    def trained_parameters(self, shape: Shape, settings: Settings) -> int:
        return self.adapter_parameters(shape, settings)

    def learns_at_once(self, name: str) -> bool:
        # B begins at zero, so A has no gradient in the first step.
        return "lora_B" in name

    def check_learned(self, weights: dict[str, Tensor], second_moment: Callable[[str], Tensor]) -> None:
        for name, weight in weights.items():
            # B begins at zero, so a number in it is the trace of a gradient, which A then gets as well.
            if "lora_B" in name and not weight.any():
                raise CheckError(f"{name} is still zero after training: no gradient reached it")

    def save(self, model: nn.Module, folder: Path, weights: dict[str, Tensor], *, gathered: bool) -> None:
        for config in model.peft_config.values():
            if not isinstance(config.target_modules, str):
                # A set, whose order is another in each process.
                config.target_modules = sorted(config.target_modules)
        model.save_pretrained(folder, **({"state_dict": weights} if gathered else {}))

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
    may_graph=True,
    passes=2,
    peft_type="LORA",
    recorded=(("rank", "r"), ("alpha", "lora_alpha")),
)
