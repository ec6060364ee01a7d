"""The parameters of the experiment: one strict model of params.yaml.

An unknown key, a wrong type or an impossible combination is an error. There are no defaults: a params
file is complete, so it is the whole record of a run.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, StringConstraints, model_validator

from workflow import methods, precisions
from workflow.params import checks, problems
from workflow.params.run import Run
from workflow.params.sources import Dataset, Model
from workflow.params.training import MergedTraining, Training
from workflow.params.tuning import Tuning
from workflow.params.values import (
    OWN_TASKS,
    Count,
    Kind,
    LayerPattern,
    Length,
    Line,
    MethodName,
    MetricName,
    Name,
    PrecisionName,
    Seed,
    Served,
    Sha256,
    Strict,
    TaskName,
    Vocabulary,
)
from workflow.precisions.base import Precision, Quantization
from workflow.runtime.errors import suggestion
from workflow.runtime.forms import AS_TRAINED, GGUF_FORMS, MERGED_16BIT, REQUANTIZED, Form

SHAPES = Path(__file__).parents[1] / "cost" / "shapes"


class Experiment(Strict):
    """Which runs exist: one run = one variant x one seed."""

    variants: Annotated[list[Name], Field(min_length=1)]
    baseline: Name
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Hardware(Strict):
    """Where the runs compute, and in which number format."""

    device: Literal["auto", "cpu", "cuda"]
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"]
    data_workers: Annotated[int, Field(ge=0, le=256)]


class Sample(Strict):
    """Which rows are used, and how they are split."""

    rows: Count
    seed: Seed
    per_seed: bool
    split_seed: Seed
    validation_rows: Count
    test_rows: Count
    held_out_categories: list[str]
    longest_response: Count | None
    choice_seed: Seed
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)]
    near_duplicates: Literal["report", "drop"]


class Variant(Strict):
    """A training method and the precision of its frozen base."""

    method: MethodName
    precision: PrecisionName
    double_quantization: bool
    block_size: Count | None
    layers_in_16_bits: list[LayerPattern]
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None
    processes: Annotated[int, Field(gt=0, le=1024)]
    training: dict[str, Any]

    @model_validator(mode="after")
    def _possible(self):
        method, precision = methods.get(self.method), precisions.get(self.precision)
        if not method.quantized_bases and not precision.can_be_trained:
            raise ValueError(
                f"precision is {self.precision}, but method {method.name} trains {method.trains} and allows "
                f"{_listed(precisions.TABLE, 'can_be_trained', 'and')} alone"
            )
        if method.needs_weights and not precision.can_be_fused:
            raise ValueError(
                f"precision is {self.precision}, whose layers do not multiply with their dequantized weight alone, and "
                f"method {method.name} needs the norms of what they multiply with; it allows "
                f"{_listed(precisions.TABLE, 'can_be_fused', 'and')}"
            )
        if method.through_quantizer and not precision.can_be_trained_through:
            raise ValueError(
                f"precision is {self.precision}, but method {method.name} trains through the quantizer of its base, which "
                f"{_listed(precisions.TABLE, 'can_be_trained_through', 'and')} alone let it do"
            )
        if method.through_quantizer and self.layers_in_16_bits:
            raise ValueError(
                f"layers_in_16_bits names {self.layers_in_16_bits[0]}, but method {method.name} trains every layer through "
                "the quantizer; it must be []"
            )
        if self.double_quantization and not precision.can_be_double_quantized:
            raise ValueError(
                f"double_quantization is true, which precision {self.precision} does not have; "
                f"only {_listed(precisions.TABLE, 'can_be_double_quantized', 'and')} do"
            )
        self._check_blocks(precision)
        if self.layers_in_16_bits and not precision.is_quantized:
            raise ValueError(
                f"layers_in_16_bits names {self.layers_in_16_bits[0]}, and precision {self.precision} quantizes no layer: "
                "it must be []"
            )
        if self.processes > 1 and self.why_not_shared:
            raise ValueError(f"processes is {self.processes} and {self.why_not_shared}")
        return self

    @property
    def why_not_shared(self) -> str:
        """Why no processes can share a training of this method and precision, as a clause; empty where they can."""
        method, precision = methods.get(self.method), precisions.get(self.precision)
        if method.may_shard and precision.can_be_sharded:
            return ""
        reason = f"precision is {self.precision}" if method.may_shard else f"method is {method.name}"
        return (
            f"{reason}, which is not sharded: method {_listed(methods.TABLE, 'may_shard', 'or')} on a base in "
            f"{_listed(precisions.TABLE, 'can_be_sharded', 'or')} is"
        )

    def _check_blocks(self, precision: Precision) -> None:
        """Raise a ValueError if the precision does not have this block size."""
        sizes = precision.block_sizes
        if self.block_size not in (sizes or (None,)):
            value = "null" if self.block_size is None else self.block_size
            allowed = (
                f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
                if len(sizes) > 1
                else "".join(map(str, sizes))
            )
            raise ValueError(
                f"block_size is {value}; precision {self.precision} allows {allowed or 'null alone, as it has no choice'}"
            )

    @property
    def quantization(self) -> Quantization:
        """What the variant chooses within its precision."""
        return Quantization(self.double_quantization, self.block_size, tuple(self.layers_in_16_bits))

    def keeping(self, names: Iterable[str]) -> Self:
        """The variant with these layers in 16 bits: the whole names of those that its own stand for."""
        return self.model_copy(update={"layers_in_16_bits": list(names)})


def _listed(table: dict[str, Any], ability: str, conjunction: str) -> str:
    """The entries of a table that have an ability, as `16bit, nf4 or fp4`."""
    names = [name for name, entry in table.items() if getattr(entry, ability)]
    return f" {conjunction} ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def can_be_served(variant: Variant | None, form: str) -> bool:
    """Whether a variant has this serving form: an adapter can be merged, a quantized base dequantized.

    A GGUF file is of a 16-bit model: the merged one, or the one that was trained.
    """
    if variant is None or form == AS_TRAINED:
        return variant is not None
    if not methods.get(variant.method).leaves_adapter:
        return form in GGUF_FORMS
    precision = precisions.get(variant.precision)
    if form == REQUANTIZED:
        return precision.can_be_requantized
    return precision.can_be_merged and (form in (MERGED_16BIT, *GGUF_FORMS) or precision.is_quantized)


class LocalFile(Strict):
    """One split of a task's data as a local file: JSON lines, CSV or parquet, by its suffix."""

    path: Annotated[Line, StringConstraints(pattern=r"\.(jsonl|json|csv|parquet)$")]
    sha256: Sha256


class Task(Strict):
    """A task of lm-evaluation-harness: one of workflow/evaluation/tasks/, or any of the harness' own."""

    items: Count | None
    few_shot: Annotated[int, Field(ge=0, le=10**6)] | None
    chat_template: bool
    files: dict[str, LocalFile] | None


class Evaluation(Strict):
    """How the base and every run are scored, and in which serving forms."""

    tasks: Annotated[dict[TaskName, Task], Field(min_length=1)]
    forms: Annotated[list[Form], Field(min_length=1)]
    batch_rows: Count
    batch_tokens: Count | None
    answer_tokens: Count
    divergence_items: Count | None

    @model_validator(mode="after")
    def _consistent(self):
        problems.refuse(self._problems())
        return self

    def _problems(self) -> Iterator[str]:
        twice = [form for form in self.forms if self.forms.count(form) > 1]
        if twice:
            yield f"forms names {twice[0]} more than once"
        if AS_TRAINED not in self.forms:
            yield f"forms is {', '.join(self.forms)}, which must have as_trained among them"
        for name in OWN_TASKS:
            if name in self.tasks and (
                self.tasks[name].files is not None or not self.tasks[name].chat_template
            ):
                yield (
                    f"tasks.{name} scores the test split in the form that runs are trained in: "
                    "its files must be null and its chat_template true"
                )


class Grid(Strict):
    """The points at which memory and throughput are measured with rows of one length."""

    shapes: Annotated[list[Name], Field(min_length=1)]
    vocabulary: Vocabulary | None
    micro_batch_rows: Annotated[list[Count], Field(min_length=1)]
    lengths: Annotated[list[Length], Field(min_length=1)]
    gradient_checkpointing: Annotated[list[bool], Field(min_length=1)]
    warmup_steps: Count
    steps: Annotated[int, Field(ge=2, le=10**9)]
    repeats: Count
    time_limit: Count
    memory_limit_gib: PositiveFloat | None

    @model_validator(mode="after")
    def _shapes_are_known(self):
        known = ["own", *sorted(path.stem for path in SHAPES.glob("*.json"))]
        problems.refuse(
            f"shapes names {name}; allowed is one of {', '.join(known)}{suggestion(name, known)}"
            for name in self.shapes
            if name not in known
        )
        return self

    @property
    def named_shapes(self) -> list[str]:
        """The shapes that are not the run's own model."""
        return [shape for shape in self.shapes if shape != "own"]


class Benchmark(Strict):
    """How memory and throughput are measured, and of which variants."""

    variants: list[Name]
    micro_batch_rows: Count
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)]
    steps: Annotated[int, Field(ge=3, le=10**9)]
    processes: Annotated[int, Field(ge=1, le=1000)]
    seed: Seed
    grid: Grid


class Family(Strict):
    """The tests that Holm's correction spans: every difference of these kinds in these metrics."""

    kinds: list[Kind]
    metrics: list[MetricName]


class Repair(Strict):
    """One fault, switched alone: the run that has it and the one that does not."""

    faulty: Served
    repaired: Served


class Claims(Strict):
    """When a claim of the recipe holds."""

    far_less: Annotated[float, Field(gt=0, lt=1)]


class Comparison(Strict):
    """How differences get their uncertainty and their verdict."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    power: Annotated[float, Field(gt=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=200, le=10**7)]
    seed: Seed
    primary: MetricName
    margins: dict[MetricName, PositiveFloat]
    family: Family
    claims: Claims
    repairs: dict[Name, Repair]


class Report(Strict):
    """What the page shows."""

    title: Line
    compare_to: Line | None
    device_hour_price: NonNegativeFloat | None


class Checkpoints(Strict):
    """When a training keeps what it needs to go on after it was ended."""

    every_steps: Count | None


class Params(Strict):
    experiment: Experiment
    hardware: Hardware
    checkpoints: Checkpoints
    model: Model = Field(description="The base model: where it comes from, and how its prompts look.")
    dataset: Dataset = Field(
        description="The instructions: where they come from, and which column holds what."
    )
    sample: Sample
    training: MergedTraining
    tuning: Tuning
    variants: dict[Name, Variant]
    evaluation: Evaluation
    benchmark: Benchmark
    comparison: Comparison
    report: Report

    @model_validator(mode="after")
    def _sections_fit(self):
        problems.refuse(checks.check(self))
        return self

    def forms_of(self, variant: str) -> list[str]:
        """The serving forms in which a variant's runs are scored, in the order of evaluation.forms."""
        return [form for form in self.evaluation.forms if can_be_served(self.variants[variant], form)]

    @property
    def trained_variants(self) -> list[str]:
        """The variants that a stage trains: those of the experiment, and those that a rate is tried for."""
        return list(
            dict.fromkeys([*self.experiment.variants, *(c.variant for c in self.tuning.candidates.values())])
        )

    def run(self, variant: str, seed: int | None, *, learning_rate: float | None = None) -> Run:
        """One run of the experiment with all its settings, or with no seed the untouched base of a variant.

        Args:
            learning_rate: as for `training_of`.
        """
        training = self.training_of(variant, learning_rate=learning_rate)
        return Run(variant, self.variants[variant], seed, training, self.hardware)

    def training_of(self, variant: str, *, learning_rate: float | None = None) -> Training:
        """The shared training params with the variant's own put over them.

        Args:
            learning_rate: that is trained at. By default the one of params; where params name a variant, its first
                candidate's stands in, for what does not depend on the rate, such as the cost of a step.
        """
        training = Training.model_validate(self.training.model_dump() | self.variants[variant].training)
        if learning_rate is None and isinstance(training.learning_rate, str):
            candidates = self.tuning.of(training.learning_rate).values()
            learning_rate = next((each.learning_rate for each in candidates), None)
        return (
            training
            if learning_rate is None
            else training.model_copy(update={"learning_rate": learning_rate})
        )

    def rate_of(self, variant: str) -> float | str:
        """A variant's learning rate as params have it: a number, or the variant whose tuned rate it takes."""
        return self.variants[variant].training.get("learning_rate", self.training.learning_rate)
