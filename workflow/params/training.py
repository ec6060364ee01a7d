"""The section `training` of params: what a step computes, and the schedule of the steps."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PlainSerializer, PositiveFloat, model_validator

from workflow.params import problems
from workflow.params.values import (
    Count,
    Fraction,
    InitializationName,
    LearningRate,
    Length,
    Line,
    Size,
    Strict,
)


class TrainingStep(Strict):
    """What a step computes, and so what it costs: the benchmarks depend on these keys."""

    max_length: Length
    length_window: Count
    packing: bool
    fused_adapters: bool
    shared_inputs: bool
    fused_layers: bool
    fused_loss: bool
    cuda_graphs: bool
    gradient_checkpointing: bool
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit"]
    max_gradient_norm: PositiveFloat
    rank: Size
    alpha: Count
    dropout: Fraction
    target_modules: Literal["all-linear"] | Annotated[list[Line], Field(min_length=1)]
    initialization: InitializationName
    rank_stabilized: bool
    use_context: bool
    loss_on: Literal["response", "prompt_and_response"]
    learn_end_token: bool
    second_bos: bool

    @model_validator(mode="after")
    def _graphs_need_packs(self):
        if self.cuda_graphs and not self.packing:
            raise ValueError(
                "cuda_graphs is true and packing false: a graph needs packs of a few fixed lengths"
            )
        return self


class TrainingSchedule(Strict):
    """How long a run learns, from how many rows a step, at which rate."""

    epochs: Annotated[float, Field(gt=0, le=10**6)] | None
    steps: Count | None
    batch_rows: Count
    micro_batch_rows: Count
    learning_rate: LearningRate
    b_rate_factor: Annotated[float, Field(gt=0, le=1000)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_fraction: Fraction
    weight_decay: NonNegativeFloat
    validations: Count
    keep: Literal["last", "best"]
    rows: Count | None
    left_out_categories: list[str]
    log_every_steps: Count

    @model_validator(mode="after")
    def _consistent(self):
        problems.refuse(self._problems())
        return self

    def _problems(self) -> Iterator[str]:
        if (self.epochs is None) == (self.steps is None):
            yield (f"epochs is {self.epochs} and steps is {self.steps}: exactly one of the two must be null")
        if self.batch_rows % self.micro_batch_rows:
            yield (
                f"batch_rows is {self.batch_rows}, "
                f"which must be a multiple of micro_batch_rows ({self.micro_batch_rows})"
            )
        if self.steps and math.ceil(self.steps * self.warmup_fraction) >= self.steps:
            yield (
                f"warmup_fraction is {self.warmup_fraction} and steps {self.steps}, which leaves no step after the warm-up"
            )


class Training(TrainingStep, TrainingSchedule):
    """All settings of a training, as they travel through the code and as a variant changes them."""


class TrainingSections(Strict):
    """What every run does, unless its variant changes it under `training`."""

    step: TrainingStep
    schedule: TrainingSchedule

    def merged(self) -> Training:
        return Training(**self.step.model_dump(), **self.schedule.model_dump())


def in_sections(training: dict) -> dict:
    """Return the two sections of a `training` from before they were told apart; any other stays as it is."""
    if not training.keys() >= Training.model_fields.keys():
        return training
    step = {key: value for key, value in training.items() if key in TrainingStep.model_fields}
    return {"step": step, "schedule": {key: value for key, value in training.items() if key not in step}}


# Two sections in a file, one object in the code.
MergedTraining = Annotated[
    TrainingSections,
    AfterValidator(TrainingSections.merged),
    PlainSerializer(lambda training: in_sections(training.model_dump())),
]
