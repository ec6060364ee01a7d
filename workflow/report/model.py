"""The facts of a run as data classes: all that the page is made from."""

from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd

from workflow.comparison.model import ALL, Claim, Comparison, Contrast, Cost, Divergence, Part, Score, Share
from workflow.comparison.records import BenchmarkRecord, PrecisionRecord, TrainingRecord
from workflow.params import Params, Training
from workflow.report.answers import Answers
from workflow.report.changes import Changes
from workflow.report.formatting import Number
from workflow.report.lock import Lock
from workflow.report.planned import Planned
from workflow.runtime.forms import AS_TRAINED, BASE
from workflow.runtime.paths import COMPARISON
from workflow.tuning.records import Choice

Cited = (
    Score | Contrast | Part | Claim | Cost | Share | Divergence
)  # the rows of a comparison that numbers are from
CATEGORY = "category/"  # prefix of the name of a category's subset
GRID = "grid"  # the setting of points on random rows; all others are on rows of a dataset
OWN_SHAPE = "own"
GPU_SIZES = (12, 16, 24, 40, 48, 80)  # GB of 10^9 bytes, as GPUs are sold


@dataclass(frozen=True)
class Variant:
    """A variant: its display names, and what its runs recorded."""

    name: str
    label: str
    compact: str  # the label where a row has room for one line
    short: str  # the label in figures
    position: int  # in experiment.variants; decides its color and marker
    is_baseline: bool
    precision: PrecisionRecord
    trained: list[TrainingRecord]  # one per seed


@dataclass(frozen=True)
class Commands:
    """The shell commands that reproduce the scores of a run in a form."""

    variant: str
    seed: int | None
    form: str
    commands: list[str]


@dataclass(frozen=True)
class ServedForm:
    """A serving form of a variant, as it was found after loading."""

    variant: str
    form: str
    precision: PrecisionRecord
    adapters: int
    adapter_dtype: str | None
    key: str = field(compare=False)  # its place, as file#key
    gguf: dict | None = field(default=None, compare=False)  # the file that it was read from


@dataclass(frozen=True)
class MeasuredVariant:
    """A variant that was measured on a device. It may be absent from the experiment."""

    name: str
    label: str
    position: int  # decides its color and marker; the experiment's variants come first


@dataclass(frozen=True)
class Point:
    """A training that was measured on a device, or that could not be. Memory is in GiB."""

    setting: str
    variant: str
    loop: str
    batch_rows: int
    micro_batch_rows: int
    length: int
    checkpointing: bool
    rank: int
    rows: int | None  # of the training sample; None if they are random or not known
    warmup_steps: int
    steps: int  # counted
    outcome: str
    detail: str  # why it was not measured
    requested: float | None  # size of the allocation that failed
    speed: dict[str, float]  # median, low, high of the useful tokens/s
    overall: float | None  # useful tokens of all steps over their seconds
    peak: float | None  # of allocated memory; on a CPU, of the resident set
    reserved: float | None
    predicted: dict[str, float] | None  # by component; None if the allocator was not measured
    share: float | None  # of the matrix rate
    nominal_share: float | None  # of the data sheet's rate; None for a device whose data sheet is not known
    joules: float | None  # per 1,000 useful tokens
    longest: int | None  # tokens of an epoch's longest forward pass; None if that was not run
    key: str  # its place, as file#key

    @property
    def measured(self) -> bool:
        return self.outcome == "measured"

    @property
    def tokens(self) -> int:
        """Tokens in a forward pass."""
        return self.micro_batch_rows * self.length

    @property
    def deviation(self) -> float | None:
        """The predicted peak divided by the measured one, minus one. None if either is missing."""
        return self.predicted["total"] / self.peak - 1 if self.predicted and self.peak else None


@dataclass(frozen=True)
class Device:
    """The measurements of one device at one model shape."""

    device: str
    on_cpu: bool
    shape: str
    own: bool  # the run's own model; otherwise a shape with random weights
    own_run: bool  # measured by the run's own stage
    versions: dict[str, str]
    files: list[str]
    variants: list[MeasuredVariant]
    points: list[Point]

    def of(self, variant: MeasuredVariant) -> list[Point]:
        return [point for point in self.points if point.variant == variant.name]

    @property
    def grid(self) -> list[Point]:
        return [point for point in self.points if point.setting == GRID]

    @property
    def settings(self) -> list[Point]:
        return [point for point in self.points if point.setting != GRID]

    def plain(self, point: Point) -> Point | None:
        """The measured plain loop of a point's variant and rows. None if there is none."""
        key = (point.variant, point.rows, "plain")
        points = (p for p in self.settings if (p.variant, p.rows, p.loop) == key and p.measured)
        return next(points, None)

    @property
    def shared(self) -> list[Point]:
        """The largest grid point that all variants with predictions have in common, once per variant."""
        by_size: dict[tuple, dict[str, Point]] = {}
        for point in self.grid:
            if point.measured and point.predicted:
                key = (point.tokens, not point.checkpointing, point.micro_batch_rows, point.rank)
                by_size.setdefault(key, {})[point.variant] = point
        variants = {variant for points in by_size.values() for variant in points}
        largest = max((key for key, points in by_size.items() if points.keys() == variants), default=None)
        return (
            [] if largest is None else [by_size[largest][v.name] for v in self.variants if v.name in variants]
        )


@dataclass(frozen=True)
class Fit:
    """The most tokens that fit in a forward pass, by the GB of a GPU. 0 means that nothing fits."""

    shape: str
    variant: MeasuredVariant
    checkpointing: bool
    rank: int
    tokens: dict[int, int]


@dataclass(frozen=True)
class Work:
    """The time that a stage recorded, over all its runs."""

    stage: str
    runs: int
    seconds: float
    measured: str  # the part of a run that was timed


@dataclass(frozen=True)
class Facts:
    """The facts of a run."""

    params: Params
    params_text: str
    model: dict
    dataset: dict
    rows: dict[str, int]  # per split; those that the first seed trains on
    train_rows: dict[str, int]  # by seed
    rows_to_draw_from: int | None  # by each seed but the first; None where all seeds share a draw
    near_duplicates: int  # test rows with a near-duplicate in another split
    variants: list[Variant]
    compared: Comparison
    benchmarks: dict[str, BenchmarkRecord]  # of the variants whose costs were measured
    history: pd.DataFrame
    validation: pd.DataFrame
    choices: dict[str, Choice]  # of learning rates, by the variant whose candidates they are
    answers: Answers
    served: list[ServedForm]
    commands: list[Commands]
    tasks: list[dict]
    harness: str
    versions: dict[str, str]
    locked: dict[str, str]  # every package's version in the lock file
    digests: dict[str, str]
    hardware: list[Device]
    fits: list[Fit]
    planned: Planned | None  # None if the training's memory cannot be predicted
    work: list[Work]
    lock: Lock
    repository: str | None  # its address, if pyproject.toml names one
    before: str | None  # the commit of report.compare_to
    changes: list["Changes"]  # since then

    @property
    def baseline(self) -> Variant:
        return next(variant for variant in self.variants if variant.is_baseline)

    @property
    def others(self) -> list[Variant]:
        return [variant for variant in self.variants if not variant.is_baseline]

    @property
    def unmeasured(self) -> list[Variant]:
        """The variants whose memory and time were not measured."""
        return [variant for variant in self.variants if variant.name not in self.benchmarks]

    @property
    def lettered(self) -> bool:
        """Whether the variants' short labels are letters."""
        return all(len(variant.short) == 1 for variant in self.variants)

    def training_of(self, name: str) -> Training:
        """A variant's training params, at the learning rate that its runs recorded."""
        trained = next(variant.trained for variant in self.variants if variant.name == name)
        return self.params.training_of(name, learning_rate=trained[0].learning_rate)

    @property
    def on_cpu(self) -> bool:
        return any(variant.precision.device == "cpu" for variant in self.variants)

    @property
    def devices(self) -> list[str]:
        return list(dict.fromkeys(variant.precision.device_name for variant in self.variants))

    @property
    def primary(self) -> tuple[str, str]:
        task, metric = self.compared.primary.split("/")
        return task, metric

    @cached_property
    def _scores(self) -> dict[tuple, Score]:
        return {(s.variant, s.form, s.task, s.metric, s.subset): s for s in self.compared.scores}

    @cached_property
    def _contrasts(self) -> dict[tuple, Contrast]:
        return {(c.kind, c.variant, c.form, c.task, c.metric, c.subset): c for c in self.compared.contrasts}

    def score(self, variant: str, form: str, metric: tuple[str, str], subset: str = ALL) -> Score | None:
        """A variant's score in a form. None if it was not scored."""
        return self._scores.get((variant, form, *metric, subset))

    def contrast(
        self, kind: str, variant: str, form: str, metric: tuple[str, str], subset: str = ALL
    ) -> Contrast | None:
        """A difference by its kind, or None. Of repairs, a form can have several."""
        return self._contrasts.get((kind, variant, form, *metric, subset))

    def to_baseline(self, variant: str, form: str, metric: tuple[str, str]) -> Contrast | None:
        """A form's difference to the baseline as trained, also for the baseline's other forms."""
        kind = "form" if variant == self.baseline.name else "to_baseline"
        return self.contrast(kind, variant, form, metric)

    def forms_of(self, variant: str) -> list[str]:
        """The forms in which a variant's runs were scored, as trained first."""
        forms = dict.fromkeys(s.form for s in self.compared.scores if s.variant == variant)
        return sorted(forms.keys() - {BASE}, key=lambda form: (form != AS_TRAINED, list(forms).index(form)))

    @property
    def compared_metrics(self) -> list[tuple[str, str]]:
        """Each (task, metric) with differences, the primary one first."""
        metrics = dict.fromkeys((c.task, c.metric) for c in self.compared.contrasts)
        return sorted(metrics, key=lambda metric: metric != self.primary)

    @property
    def other_metrics(self) -> list[tuple[str, str]]:
        """Each (task, metric) with values but no differences."""
        metrics = dict.fromkeys((s.task, s.metric) for s in self.compared.scores)
        return [metric for metric in metrics if metric not in self.compared_metrics]

    @cached_property
    def _places(self) -> dict[int, str]:
        lists = {
            part: getattr(self.compared, part)
            for part in ("scores", "contrasts", "decomposition", "claims", "cost", "shares", "divergences")
        }
        return {
            id(item): f"{part}[{index}]" for part, items in lists.items() for index, item in enumerate(items)
        }

    def key_of(self, item: Cited, *names: str) -> str:
        """The place of a number of the comparison, for example `results/compare/comparison.json#scores[3].value`."""
        return f"{COMPARISON.as_posix()}#{'.'.join([self._places[id(item)], *names])}"

    def cite(self, text: str, item: Cited, *names: str) -> Number:
        """A number of the comparison as `text`, with its value and its place.

        Args:
            text: the number as the page writes it.
            item: the row of the comparison that holds it.
            names: the attributes or keys that lead from the row to the number.
        """
        value = item
        for name in names:
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        return Number(text, value, self.key_of(item, *names))

    def weights_of(self, variant: str, form: str) -> float | None:
        """GiB of a variant's weights in a form. None if the form was not loaded."""
        served = self.served_as(variant, form)
        return served.precision.weights_gib if served else None

    def served_as(self, variant: str, form: str) -> ServedForm | None:
        """A form as it was loaded with the first seed's adapter. None if it was not loaded."""
        return next(
            (served for served in self.served if (served.variant, served.form) == (variant, form)), None
        )

    @cached_property
    def energy(self) -> dict[str, Point]:
        """The run's largest grid point at which the energy of each measured variant was read, by variant."""
        by_size: dict[tuple, dict[str, Point]] = {}
        for block in self.hardware:
            for point in block.grid if block.own_run and block.own else []:
                if point.joules is not None:
                    key = (point.tokens, not point.checkpointing, point.micro_batch_rows)
                    by_size.setdefault(key, {})[point.variant] = point
        names = list(self.benchmarks)
        shared = [key for key, points in by_size.items() if set(names) <= points.keys()]
        return {name: by_size[max(shared)][name] for name in names} if shared else {}

    @property
    def processes(self) -> int:
        """Number of processes that measured each variant's costs; the smallest, if they differ."""
        return min((cost.processes for cost in self.compared.cost), default=1)

    def cost_of(self, variant: str, metric: str) -> Cost | None:
        """A variant's measured cost. None if it was not measured."""
        return next((c for c in self.compared.cost if (c.variant, c.metric) == (variant, metric)), None)

    @property
    def cost_metrics(self) -> list[str]:
        return list(dict.fromkeys(c.metric for c in self.compared.cost))
