"""One run, as it travels from params to the training, the benchmark and the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workflow import methods
from workflow.methods import Method
from workflow.runtime.paths import weights_folder

if TYPE_CHECKING:
    from pathlib import Path

    from workflow.params.model import Hardware, Training, Variant


@dataclass(frozen=True)
class Run:
    """A variant with a seed, or its untouched base.

    Attributes:
        name: of the variant.
        seed: of the adapter's initial weights, of dropout and of the order of the rows; None for the untouched base.
        training: the variant's own settings put over the shared ones.
    """

    name: str
    variant: Variant
    seed: int | None
    training: Training
    hardware: Hardware

    @property
    def method(self) -> Method:
        return methods.get(self.variant.method)

    @property
    def weights(self) -> Path | None:
        """The folder of what the run trained; None for the untouched base."""
        return None if self.seed is None else weights_folder(self.name, self.seed)

    def alone(self) -> Run:
        """The run in one process."""
        return replace(self, variant=self.variant.model_copy(update={"processes": 1}))

    def with_training(self, **changes: object) -> Run:
        """The run with other training settings."""
        return replace(self, training=self.training.model_copy(update=changes))
