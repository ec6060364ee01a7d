"""What the stages train and benchmark recorded of a run, read back from their result.json.

What a record holds beside the fields here is kept, so that it reaches comparison.json as it was written.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from pydantic_core import from_json

from workflow.runtime.errors import damaged, missing

AnyRecord = TypeVar("AnyRecord", bound="Record")


class Record(BaseModel):
    """A result, or a part of one."""

    model_config = ConfigDict(extra="allow", frozen=True)


class PrecisionRecord(Record):
    """The numbers in which a base was held and multiplied, on which device."""

    base: str  # its name in the table of precisions
    double_quantization: bool
    storage: str  # of the linear layers
    compute: str
    device: str  # cpu or cuda
    device_name: str
    quantized_modules: int
    linear_modules: int
    weights_gib: float


class RowsRecord(Record):
    """What the rows that a run learned from, or was validated on, held as tokens."""

    rows: int
    rows_dropped: int  # no response token is left within max_length
    rows_cut: int  # end at max_length
    tokens_in_loss: int


class RunRecord(Record):
    """Where a result was made, and with which libraries."""

    precision: PrecisionRecord
    versions: dict[str, str]


class FormRecord(RunRecord):
    """One evaluated serving form."""

    harness: dict[str, Any]  # how it was scored; every entry must be the same in all forms


class TrainingRecord(RunRecord):
    """One training."""

    variant: str
    seed: int
    deterministic: bool  # the same params on the same machine give the same bits
    rows: RowsRecord
    validation_rows: RowsRecord
    order_sha256: str  # of the rows in the order of the steps
    trainable_parameters: int
    trainable_dtype: str
    adapted_modules: int
    steps: int
    tokens_seen: int  # without padding
    seconds: float
    # The step whose weights were saved, and the validation losses of these and of the last; None if not recorded.
    kept_step: int | None = None
    validation_loss_kept: float | None = None
    validation_loss_after: float | None = None
    learning_rate: float | None = None  # the highest of the schedule; None if not recorded
    speed_ups: dict[str, bool] = {}  # by name, whether it was in force; empty if that was not recorded


class Measurement(Record):
    """One measured cost with its definition.

    `low` and `high` are quartiles over the counted steps of one process, None for a mean over processes.
    """

    model_config = ConfigDict(extra="forbid")

    metric: str
    value: PositiveFloat
    unit: str
    higher_is_better: bool
    definition: str
    low: float | None
    high: float | None


class LoadRecord(Record):
    """How busy the machine was while a benchmark ran."""

    cores: int  # that the benchmark may use
    cores_of_others: float  # that other processes kept busy, on average


class ProcessRecord(Record):
    """What one process of a benchmark measured."""

    measurements: list[Measurement]
    seconds_per_step: list[float]
    load: LoadRecord | None = None  # None if it was not recorded

    def value_of(self, metric: str) -> float | None:
        """One of the measured costs; None if it was not measured."""
        return next((m.value for m in self.measurements if m.metric == metric), None)


class BenchmarkRecord(RunRecord):
    """The memory and speed of one variant's training."""

    micro_batch_rows: int
    warmup_steps: int
    steps: int  # counted, of each process
    measurements: list[Measurement]  # means over the processes
    epoch_longest_pass_tokens: int | None = None  # None if that pass was not run
    processes: Annotated[list[ProcessRecord], Field(min_length=1)]

    @property
    def load(self) -> LoadRecord | None:
        """The load of the machine during the process that others disturbed most; None if none was recorded."""
        loads = [process.load for process in self.processes if process.load]
        return max(loads, key=lambda load: load.cores_of_others, default=None)

    def value_of(self, metric: str) -> float | None:
        """The mean of one of the measured costs; None if it was not measured."""
        return next((m.value for m in self.measurements if m.metric == metric), None)

    def values_of(self, metric: str) -> list[float]:
        """One of the measured costs, of each process that measured it."""
        return [value for process in self.processes if (value := process.value_of(metric)) is not None]


class PointRecord(Record):
    """One point of a grid; without memory and time if it was not measured."""

    outcome: str
    micro_batch_rows: int
    length: int  # tokens of each row
    vocabulary: int | None = None  # tokens, in place of the shape's own
    gradient_checkpointing: bool
    precision: PrecisionRecord | None = None
    memory_gib: dict[str, float] = {}
    step_seconds: dict[str, float] = {}  # median and quartiles over the steps of one process

    @property
    def key(self) -> tuple[int, int, bool]:
        """What two variants' points must share to be compared."""
        return self.micro_batch_rows, self.length, self.gradient_checkpointing

    @property
    def peak_gib(self) -> float:
        """The peak memory: allocated on a GPU, resident on a CPU."""
        return self.memory_gib.get("peak_allocated") or self.memory_gib["peak_resident"]


class GridRecord(Record):
    """One variant's grid at one model shape."""

    variant: str
    shape: str
    versions: dict[str, str]
    points: list[PointRecord]

    @property
    def measured(self) -> dict[tuple[int, int, bool], PointRecord]:
        """The points that were measured."""
        return {point.key: point for point in self.points if point.outcome == "measured"}


def read_record(file: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Read the result of a stage. What the stage read is left out; comparable.py compares that with dvc.lock.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not file.is_file():
        raise missing(file)
    try:
        content = from_json(file.read_bytes())
        return kind.model_validate({key: value for key, value in content.items() if key != "inputs"})
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    except (ValueError, AttributeError) as error:  # not JSON, or not an object
        reason = str(error)
    raise damaged(file, reason)
