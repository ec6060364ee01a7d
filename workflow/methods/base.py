"""What the pipeline asks of a method of fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # torch takes seconds to import, and params are read without it
    from pathlib import Path

    from torch import Tensor, dtype, nn


class Settings(Protocol):
    """The training params that a method reads."""

    rank: int
    alpha: int
    dropout: float
    target_modules: Literal["all-linear"] | list[str]
    initialization: str
    rank_stabilized: bool
    b_rate_factor: float

    def model_copy(self, *, update: dict[str, Any]) -> Settings: ...


class Quantizer(Protocol):
    """The precision of a base, as far as a method that trains through its quantizer needs it."""

    dequantized_weight: Callable[[nn.Linear, dtype], Tensor]
    quantized_weight: Callable[[nn.Module, Tensor], Any] | None
    stored_weight: Callable[[Any, dtype], Tensor] | None
    spread_weight: Callable[[nn.Module], Tensor] | None
    spreading_bytes: Callable[[int], int] | None
    parameter: Callable[[nn.Parameter, Tensor, nn.Module], nn.Parameter]


class Shape(Protocol):
    """The sizes of a model that a method counts with."""

    layers: int
    linears: dict[str, tuple[int, int]]  # (in, out) of each linear layer of a decoder layer
    linear_parameters: int
    embedding_parameters: int
    norm_parameters: int
    parameters: int


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning: one file of this room, or one entry that `register` adds.

    A subclass says how a model is wrapped, what must be trained and how it is saved.

    Attributes:
        name: in params.yaml.
        label: in a sentence, after the precision of the base.
        label_on_4_bits: the same on a base in 4 bits.
        short: where there is little room; empty for the method that needs no mention.
        tag, tag_on_4_bits: of a model card; the second is added to the first.
        trains: what it trains, as the object of a sentence.
        product: what it leaves, as the subject of a sentence.
        leaves_adapter: whether it leaves a PEFT adapter, which can be merged; else a whole model.
        master_weights: whether unquantized weights are held in float32 while it trains.
        quantized_bases: whether it trains on a quantized base.
        needs_weights: whether it computes with the base's weights, so that its layers must multiply with these and no others.
        may_shard: whether several processes can share a training.
        may_fuse_adapters: whether the adapters compute what `AdaptedLinear` does.
        may_share_inputs: whether adapted layers that read one input can be computed in one step.
        may_graph: whether a step can be captured in a CUDA graph.
        passes: passes of a base weight's products in a step: forward, for the gradient of the input, and (3) for its own.
        through_quantizer: whether a step multiplies by weights that are quantized with the adapter in them.
        merging_bytes: read and written for each weight before a product, beyond what its precision takes.
        peft_type: in the adapter's configuration; None without an adapter.
    """

    name: str
    label: str
    label_on_4_bits: str
    short: str
    tag: str
    tag_on_4_bits: str | None
    trains: str
    product: str
    leaves_adapter: bool
    master_weights: bool
    quantized_bases: bool
    may_shard: bool
    may_fuse_adapters: bool
    may_graph: bool
    passes: Literal[2, 3]
    through_quantizer: bool = False
    merging_bytes: float = 0.0
    may_share_inputs: bool = False
    peft_type: str | None = None
    needs_weights: bool = False

    # The model.

    def wrap(self, model: nn.Module, settings: Settings) -> nn.Module:
        """The model with what is to be trained in it, and that alone set to be trained."""
        raise NotImplementedError

    def attach(self, model: nn.Module, quantizer: Quantizer) -> None:
        """Let a model with an adapter, new or read from files, compute as the method trains it; PEFT's way is kept.

        Args:
            quantizer: the precision of the base.
        """

    def fold(self, model: nn.Module, quantizer: Quantizer) -> nn.Module:
        """The base with the adapter in its weights, quantized again if they were."""
        return model.merge_and_unload()

    def expected(self, model: nn.Module, linears: Iterable[str]) -> set[str]:
        """The names of the weights that must be trained, no more and no fewer.

        Args:
            linears: names of the base's linear layers that `settings.target_modules` selects.
        """
        raise NotImplementedError

    def adapter_layers(self, model: nn.Module) -> list[nn.Module]:
        """The modules that have an adapter on them."""
        return []

    def traits(self, settings: Settings) -> list[str]:
        """What sets the method's adapter apart from a plain one, for a label."""
        return []

    def rate_factor(self, name: str, settings: Settings) -> float:
        """By what the learning rate of a trained weight is multiplied."""
        return 1.0

    # Its speed-ups.

    def no_fused_adapters(self, settings: Settings) -> str:
        """Why the adapters cannot be fused, as a clause; empty where they can."""
        return "" if self.may_fuse_adapters else "its layers have no fused form"

    def no_graphs(self, settings: Settings) -> str:
        """Why a step cannot be captured in a CUDA graph, as a clause; empty where it can."""
        return "" if self.may_graph else "its step was never captured"

    # Its size.

    def adapter_parameters(self, shape: Shape, settings: Settings) -> int:
        """Parameters that are added to the base."""
        return 0

    def trained_parameters(self, shape: Shape, settings: Settings) -> int:
        """Parameters that have a gradient and an optimizer state, each in float32."""
        raise NotImplementedError

    def folding_bytes(self, weights: int, quantizer: Quantizer) -> int:
        """Bytes that a layer of so many weights takes while its adapter is folded in for a product."""
        return 0

    def activation_settings(self, settings: Settings) -> Settings:
        """The settings of an adapter that keeps the activations that this method keeps."""
        return settings

    def kept_outputs(self, shape: Shape, settings: Settings) -> int:
        """Numbers that a decoder layer keeps of each token for its backward pass, beyond those of plain LoRA."""
        return 0

    def moved_bytes(self, shape: Shape, settings: Settings) -> int:
        """Bytes that a pass reads and writes for each token, forward and backward, beyond those of plain LoRA."""
        return 0

    # Its checks.

    def learns_at_once(self, name: str) -> bool:
        """Whether a trained weight has a gradient other than zero in the first step."""
        return True

    def check_learned(self, weights: dict[str, Tensor], second_moment: Callable[[str], Tensor]) -> None:
        """Raise a CheckError if a weight has not learned.

        Args:
            weights: what was trained, by name, after the training.
            second_moment: a weight's name to Adam's running mean of its squared gradients.
        """
        raise NotImplementedError

    # Its files.

    def portable(self, weights: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is saved of the trained weights, so that it belongs to the base as it was published.

        Args:
            weights: what was trained, by name.
            initial: the same before the training; empty unless it was taken out of the base.
        """
        return weights

    def save(self, model: nn.Module, folder: Path, weights: dict[str, Tensor], *, gathered: bool) -> None:
        """Write the adapter, or the model in 16 bits.

        Args:
            weights: what is to be saved, by name.
            gathered: whether the model holds only a part of each, or others.
        """
        raise NotImplementedError

    def recorded(self, settings: Settings) -> dict[str, tuple[str, float]]:
        """What a saved adapter's configuration must hold: by PEFT's key, what it is called and its value."""
        return {}

    def saved(
        self, model: nn.Module, folder: Path, weights: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the files hold of the trained weights, and what they must hold, under the same names."""
        raise NotImplementedError

    def saved_adapters(self, names: Iterable[str]) -> int:
        """The number of modules that a saved adapter is for, by the names of its weights."""
        return 0
