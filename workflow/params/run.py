"""One run, as it travels from params to the training, the benchmark and the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workflow import methods
from workflow.methods import Method

if TYPE_CHECKING:
    from workflow.params.model import Hardware, Training, Variant


@dataclass(frozen=True)
class Run:
    """A variant with a seed.

    Attributes:
        name: of the variant.
        seed: of the adapter's initial weights, of dropout and of the order of the rows.
        training: the variant's own settings put over the shared ones.
    """

    name: str
    variant: Variant
    seed: int
    training: Training
    hardware: Hardware

    @property
    def method(self) -> Method:
        return methods.get(self.variant.method)

    def alone(self) -> Run:
        """The run in one process."""
        return replace(self, variant=self.variant.model_copy(update={"processes": 1}))

    def with_training(self, **changes: object) -> Run:
        """The run with other training settings."""
        return replace(self, training=self.training.model_copy(update=changes))
