"""Everything that the page says, read from params.yaml and the stages' files."""

import itertools
import re
import string
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pandas as pd

from workflow import methods, params, precisions
from workflow.comparison.inference import Difference, Equivalence
from workflow.comparison.model import ALL, Claim, Comparison, Contrast, Cost, Part, Rise, Score
from workflow.cost import memory
from workflow.report import answers, lock
from workflow.report.answers import Answers
from workflow.report.formatting import Number, clean
from workflow.report.lock import Lock
from workflow.runtime import environment
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, sha256
from workflow.runtime.forms import AS_TRAINED, BASE
from workflow.runtime.paths import (
    COMPARE,
    DATASET_SOURCE,
    HARDWARE,
    MODEL_SOURCE,
    RESULTS,
    SAMPLE,
    benchmark_file,
    evaluate_base_folder,
    evaluate_folder,
    grid_file,
    train_folder,
)

if TYPE_CHECKING:
    from workflow.report.changes import Changes

COMPARISON = COMPARE / "comparison.json"
SAMPLE_COUNTS = SAMPLE / "counts.json"
ENVIRONMENT = Path("requirements.lock")
SPLITS = ("train", "validation", "test")
CATEGORY = "category/"  # a subset of one category is called so, and then by the category's name
GRID = "grid"  # the setting of a point on random rows; any other is on the run's rows
OWN_SHAPE = "own"
LONGEST_SHORT = 14  # characters of a variant's name within a figure
GPU_SIZES = (12, 16, 24, 40, 48, 80)  # GB of 10^9 bytes, as GPUs are sold


@dataclass(frozen=True)
class Variant:
    """One variant: what it is called on the page, and what its runs recorded."""

    name: str
    label: str
    short: str  # where there is little room
    position: int  # in experiment.variants; decides its color and marker
    is_baseline: bool
    precision: dict
    trained: list[dict]  # one per seed


@dataclass(frozen=True)
class Commands:
    """The shell commands that give the numbers of one run in one form."""

    variant: str
    seed: int | None
    form: str
    commands: list[str]


@dataclass(frozen=True)
class ServedForm:
    """A form of a variant as it was found when it was loaded."""

    variant: str
    form: str
    precision: dict
    adapters: int
    adapter_dtype: str | None
    key: str = field(compare=False)  # where it stands


@dataclass(frozen=True)
class MeasuredVariant:
    """A variant of a measured device, which need not be one of the experiment's."""

    name: str
    label: str
    position: int  # as in the experiment; after its variants where it is none of them


@dataclass(frozen=True)
class Point:
    """One training that was measured on a device, or that could not be; memory is in GiB."""

    setting: str
    variant: str
    loop: str
    batch_rows: int
    micro_batch_rows: int
    length: int
    checkpointing: bool
    rank: int
    rows: int | None  # of the sample that it trained on; None where they are random, or not known
    warmup_steps: int
    steps: int  # counted
    outcome: str
    detail: str  # of the outcome, where it was not measured
    requested: float | None  # the allocation that failed
    speed: dict[str, float]  # median, low, high of the useful tokens/s
    overall: float | None  # useful tokens of all steps over their seconds
    peak: float | None  # allocated; on a CPU the resident set
    reserved: float | None
    predicted: dict[str, float] | None  # None too where what was measured is no allocator's peak
    share: float | None  # of the matrix rate
    joules: float | None  # per 1,000 useful tokens
    longest: (
        int | None
    )  # tokens of an epoch's largest forward pass, which the peak is of; None where that was not run
    key: str  # where it stands

    @property
    def measured(self) -> bool:
        return self.outcome == "measured"

    @property
    def tokens(self) -> int:
        """Tokens in a forward pass."""
        return self.micro_batch_rows * self.length

    @property
    def deviation(self) -> float | None:
        """Predicted over measured peak, less one."""
        return self.predicted["total"] / self.peak - 1 if self.predicted and self.peak else None


@dataclass(frozen=True)
class Device:
    """What was measured on one device at one shape."""

    device: str
    on_cpu: bool
    shape: str
    own: bool  # the shape is the run's own model; else the weights are random
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

    def plain(self, beside: Point) -> Point | None:
        """The plain loop of the same variant on the same rows."""
        wanted = (beside.variant, beside.rows, "plain")
        found = (p for p in self.settings if (p.variant, p.rows, p.loop) == wanted and p.measured)
        return next(found, None)

    @property
    def shared(self) -> list[Point]:
        """One grid point of each variant that has predictions: the largest that all of these measured."""
        found: dict[tuple, dict[str, Point]] = {}
        for point in self.grid:
            if point.measured and point.predicted:
                key = (point.tokens, not point.checkpointing, point.micro_batch_rows, point.rank)
                found.setdefault(key, {})[point.variant] = point
        everyone = {variant for points in found.values() for variant in points}
        largest = max((key for key, points in found.items() if points.keys() == everyone), default=None)
        return (
            [] if largest is None else [found[largest][v.name] for v in self.variants if v.name in everyone]
        )


@dataclass(frozen=True)
class Fit:
    """The most tokens that a forward pass can have, by the GB of a GPU; 0 where nothing fits."""

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
    measured: str  # what the time is of


@dataclass(frozen=True)
class Facts:
    """What the page is made from."""

    asked: params.Params
    params_text: str
    model: dict
    dataset: dict
    rows: dict[str, int]  # per split
    near_duplicates: int  # test rows that have one among the other splits
    variants: list[Variant]
    compared: Comparison
    benchmarks: dict[str, dict]
    history: pd.DataFrame
    validation: pd.DataFrame
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
    work: list[Work]
    lock: Lock
    before: str | None  # the commit of report.compare_to
    changes: list["Changes"]  # since then

    @property
    def baseline(self) -> Variant:
        return next(variant for variant in self.variants if variant.is_baseline)

    @property
    def others(self) -> list[Variant]:
        return [variant for variant in self.variants if not variant.is_baseline]

    @property
    def lettered(self) -> bool:
        """Whether the figures call the variants by letters."""
        return all(len(variant.short) == 1 for variant in self.variants)

    @property
    def on_cpu(self) -> bool:
        return any(variant.precision["device"] == "cpu" for variant in self.variants)

    @property
    def devices(self) -> list[str]:
        return list(dict.fromkeys(variant.precision["device_name"] for variant in self.variants))

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
        """A variant's score in a form, or None where it was not scored so."""
        return self._scores.get((variant, form, *metric, subset))

    def contrast(
        self, kind: str, variant: str, form: str, metric: tuple[str, str], subset: str = ALL
    ) -> Contrast | None:
        """A difference by its kind (repairs apart, of which one form can have several), or None."""
        return self._contrasts.get((kind, variant, form, *metric, subset))

    def to_baseline(self, variant: str, form: str, metric: tuple[str, str]) -> Contrast | None:
        """A form's difference to the baseline as it was trained; for the baseline's own other forms too."""
        kind = "form" if variant == self.baseline.name else "to_baseline"
        return self.contrast(kind, variant, form, metric)

    def forms_of(self, variant: str) -> list[str]:
        """The forms in which a variant's runs were scored, as trained first."""
        forms = dict.fromkeys(s.form for s in self.compared.scores if s.variant == variant)
        return sorted(forms.keys() - {BASE}, key=lambda form: (form != AS_TRAINED, list(forms).index(form)))

    @property
    def compared_metrics(self) -> list[tuple[str, str]]:
        """Every (task, metric) in which differences were taken, the primary one first."""
        found = dict.fromkeys((c.task, c.metric) for c in self.compared.contrasts)
        return sorted(found, key=lambda metric: metric != self.primary)

    @property
    def other_metrics(self) -> list[tuple[str, str]]:
        """Every (task, metric) that has values alone."""
        found = dict.fromkeys((s.task, s.metric) for s in self.compared.scores)
        return [metric for metric in found if metric not in self.compared_metrics]

    @cached_property
    def _places(self) -> dict[int, str]:
        lists = {
            part: getattr(self.compared, part)
            for part in ("scores", "contrasts", "decomposition", "claims", "cost")
        }
        return {
            id(one): f"{part}[{index}]" for part, found in lists.items() for index, one in enumerate(found)
        }

    def key_of(self, found: Score | Contrast | Part | Claim | Cost, *names: str) -> str:
        """Where a number of the comparison stands, for example `results/compare/comparison.json#scores[3].value`."""
        return f"{COMPARISON.as_posix()}#{'.'.join([self._places[id(found)], *names])}"

    def shown(self, text: str, found: Score | Contrast | Part | Claim | Cost, *names: str) -> Number:
        """A number of the comparison as the page writes it, with its value and the place that it is from."""
        value = found
        for name in names:
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        return Number(text, value, self.key_of(found, *names))

    def weights_of(self, variant: str, form: str) -> float | None:
        """GiB of a variant's weights as a form was loaded, or None where it was not."""
        served = self.served_as(variant, form)
        return served.precision["weights_gib"] if served else None

    def served_as(self, variant: str, form: str) -> ServedForm | None:
        """A form as it was loaded, with the first seed's adapter."""
        return next((one for one in self.served if (one.variant, one.form) == (variant, form)), None)

    @cached_property
    def energy(self) -> dict[str, Point]:
        """By variant, the run's own grid point with the most tokens at which energy was measured of every variant."""
        found: dict[tuple, dict[str, Point]] = {}
        for block in self.hardware:
            for point in block.grid if block.own_run and block.own else []:
                if point.joules is not None:
                    key = (point.tokens, not point.checkpointing, point.micro_batch_rows)
                    found.setdefault(key, {})[point.variant] = point
        names = [variant.name for variant in self.variants]
        shared = [key for key, points in found.items() if set(names) <= points.keys()]
        return {name: found[max(shared)][name] for name in names} if shared else {}

    def cost_of(self, variant: str, metric: str) -> Cost | None:
        """A variant's measured cost, or None where it was not measured."""
        return next((c for c in self.compared.cost if (c.variant, c.metric) == (variant, metric)), None)

    @property
    def cost_metrics(self) -> list[str]:
        return list(dict.fromkeys(c.metric for c in self.compared.cost))


def _changes(revision: str | None) -> dict:
    """What changed since a revision; nothing where none is named."""
    if revision is None:
        return {"before": None, "changes": []}
    from workflow.report import changes as diff

    before = diff.at_revision(revision)
    return {"before": before.name, "changes": diff.changes(before, diff.in_workspace())}


def gather(asked: params.Params) -> Facts:
    """Read what the stages wrote for the runs that params name.

    Raises:
        UserError: a file is missing (the sentence names it), or the comparison is of other runs.
    """
    files = inputs(asked)
    for path in files:
        if not path.is_file():
            how = "; `dvc repro` makes it" if path.is_relative_to(RESULTS) else ""
            raise UserError(f"{path} is missing{how}.")
    experiment = asked.experiment
    compared = _compared(read_json(COMPARISON))
    _check_same_runs(compared, asked)
    labels, shorts = variant_labels(asked), short_labels(asked)
    runs = [(variant, seed) for variant in experiment.variants for seed in experiment.seeds]
    results = {run: read_json(evaluate_folder(*run) / "result.json") for run in runs}
    trained = {
        name: [read_json(train_folder(name, seed) / "result.json") for seed in experiment.seeds]
        for name in experiment.variants
    }
    benchmarks = {name: read_json(benchmark_file(name)) for name in experiment.variants}
    bases = [read_json(evaluate_base_folder(name) / "result.json") for name in experiment.variants]
    evaluated = [*bases, *results.values()]
    hardware = _hardware(asked, labels)
    counts = read_json(SAMPLE_COUNTS)
    return Facts(
        asked=asked,
        params_text=params.PARAMS_FILE.read_text(encoding="utf-8"),
        model=read_json(MODEL_SOURCE),
        dataset=read_json(DATASET_SOURCE),
        rows={split: counts[f"{split}_rows"] for split in SPLITS},
        near_duplicates=counts["near_duplicate_test_rows"],
        variants=[
            Variant(
                name=name,
                label=labels[name],
                short=shorts[name],
                position=position,
                is_baseline=name == experiment.baseline,
                precision=compared.precisions[name],
                trained=trained[name],
            )
            for position, name in enumerate(experiment.variants)
        ],
        compared=compared,
        benchmarks=benchmarks,
        history=_curves(runs, "history.csv"),
        validation=_curves(runs, "validation.csv"),
        answers=answers.read(asked, labels),
        served=_served(evaluated),
        commands=[
            Commands(result["variant"], result["seed"], form["form"], form["harness"]["commands"])
            for result in evaluated
            for form in result["forms"]
        ],
        tasks=bases[0]["forms"][0]["harness"]["tasks"],
        harness=_harness(evaluated),
        versions=_versions([*evaluated, *benchmarks.values(), *itertools.chain(*trained.values())]),
        locked=environment.versions(environment.LOCK.read_text(encoding="utf-8")),
        digests={path.as_posix(): sha256(path) for path in files},
        hardware=hardware,
        fits=_fits(asked, hardware),
        work=_work(trained, bases, list(results.values()), benchmarks),
        lock=lock.read(files),
        **_changes(asked.report.compare_to),
    )


def inputs(asked: params.Params) -> list[Path]:
    """Every file that the page is made from."""
    experiment = asked.experiment
    files = [params.PARAMS_FILE, ENVIRONMENT, MODEL_SOURCE, DATASET_SOURCE, SAMPLE_COUNTS, COMPARISON]
    for name in experiment.variants:
        files += [benchmark_file(name), evaluate_base_folder(name) / "result.json"]
        for seed in experiment.seeds:
            files += [
                train_folder(name, seed) / file for file in ("result.json", "history.csv", "validation.csv")
            ]
            files.append(evaluate_folder(name, seed) / "result.json")
    files += answers.files(asked)
    return files + _grid_files(asked) + _hardware_files()


def _grid_files(asked: params.Params) -> list[Path]:
    """The run's own grids, as far as they were measured."""
    shapes = asked.benchmark.grid.shapes
    files = [grid_file(variant, shape) for shape in shapes for variant in asked.experiment.variants]
    return [path for path in files if path.is_file()]


def _hardware_files() -> list[Path]:
    """What was measured on devices of all kinds, whatever the run."""
    return sorted(HARDWARE.glob("*.json"))


def _compared(found: dict) -> Comparison:
    """The comparison from its file, as workflow/comparison/compare.py made it."""
    made = {
        "scores": [Score(**row) for row in found["scores"]],
        "contrasts": [
            Contrast(
                **row
                | {
                    "difference": Difference(**row["difference"]),
                    "equivalence": row["equivalence"] and Equivalence(**row["equivalence"]),
                    "by_rows": row["by_rows"] and Difference(**row["by_rows"]),
                }
            )
            for row in found["contrasts"]
        ],
        "decomposition": [Part(**row) for row in found["decomposition"]],
        "claims": [
            Claim(**row | {"difference": row["difference"] and Difference(**row["difference"])})
            for row in found["claims"]
        ],
        "cost": [Cost(**row) for row in found["cost"]],
        "rises": [Rise(**row) for row in found["rises"]],
    }
    return Comparison(**found | made)


def _check_same_runs(compared: Comparison, asked: params.Params) -> None:
    experiment, wanted = asked.experiment, asked.comparison
    found = (list(compared.precisions), compared.baseline, compared.seeds)
    if found != (experiment.variants, experiment.baseline, experiment.seeds):
        raise UserError(
            f"{COMPARISON} compares {', '.join(found[0])} to {found[1]} over the seeds "
            f"{', '.join(map(str, found[2]))}, which is not what params.yaml names; "
            "`dvc repro compare` mends it."
        )
    if (compared.primary, compared.margins, compared.confidence) != (
        wanted.primary,
        wanted.margins,
        wanted.confidence,
    ):
        raise UserError(
            f"{COMPARISON} has another primary metric, margin or confidence than params.yaml names; "
            "`dvc repro compare` mends it."
        )


def variant_labels(asked: params.Params) -> dict[str, str]:
    """What each variant of the experiment is called in a sentence; no two share a label."""
    labels = {name: _label(asked.variants[name]) for name in asked.experiment.variants}
    taken = list(labels.values())
    return {name: label if taken.count(label) == 1 else f"{label}, {name}" for name, label in labels.items()}


def short_labels(asked: params.Params) -> dict[str, str]:
    """What each variant is called where there is little room; no two share a label.

    Where one would be long, all get letters, of which the page has a key.
    """
    found = {}
    for name in asked.experiment.variants:
        variant = asked.variants[name]
        method = methods.get(variant.method)
        precision = precisions.get(variant.precision).short(variant.double_quantization)
        found[name] = f"{precision}{', ' + method.short if method.short else ''}"
    taken = list(found.values())
    unlike = {name: short if taken.count(short) == 1 else name for name, short in found.items()}
    if max(map(len, unlike.values())) > LONGEST_SHORT:
        return dict(zip(unlike, string.ascii_uppercase, strict=False))
    return unlike


def _label(variant: params.Variant) -> str:
    method = methods.get(variant.method)
    precision = precisions.get(variant.precision)
    name = method.label_on_4_bits if precision.is_4_bit else method.label
    return precision.label(name, variant.double_quantization)


def _hardware(asked: params.Params, labels: dict[str, str]) -> list[Device]:
    """By device and shape: the files of results/hardware/, then the run's own grids."""
    found: dict[tuple, dict] = {}
    for path in [*_hardware_files(), *_grid_files(asked)]:
        file, own_run = read_json(path), not path.is_relative_to(HARDWARE)
        measured = [point["precision"] for point in file["points"] if point["outcome"] == "measured"]
        names = [precision["device_name"] for precision in measured]
        device = clean(file.get("device") or (names or ["a device that could measure nothing"])[0])
        on_cpu = any(precision["device"] == "cpu" for precision in measured)
        for index, point in enumerate(file["points"]):
            block = found.setdefault(
                (own_run, device, point["shape"]),
                {"on_cpu": on_cpu, "versions": [], "files": [], "points": []},
            )
            if path.as_posix() not in block["files"]:
                block["files"].append(path.as_posix())
                block["versions"].append(file)
            block["points"].append(_point(point, f"{path.as_posix()}#points[{index}]"))
    variants = _measured_variants(asked, labels, [p for block in found.values() for p in block["points"]])
    return [
        Device(
            device=device,
            on_cpu=block["on_cpu"],
            shape=model_name(asked.model) if shape == OWN_SHAPE else clean(shape),
            own=shape == OWN_SHAPE,
            own_run=own_run,
            versions={clean(name): clean(v) for name, v in _versions(block["versions"]).items()},
            files=block["files"],
            variants=[v for v in variants if any(point.variant == v.name for point in block["points"])],
            points=block["points"],
        )
        for (own_run, device, shape), block in found.items()
    ]


def _point(point: dict, key: str) -> Point:
    memory = point.get("memory_gib") or {}
    allocated = memory.get("peak_allocated")
    return Point(
        setting=clean(point.get("setting", GRID)),
        variant=point["variant"],
        loop=point["loop"],
        batch_rows=point["batch_rows"],
        micro_batch_rows=point["micro_batch_rows"],
        length=point["length"],
        checkpointing=point["gradient_checkpointing"],
        rank=point["rank"],
        rows=point.get("rows"),
        warmup_steps=point["warmup_steps"],
        steps=point["steps"] * point["repeats"],
        outcome=clean(point["outcome"]),
        detail=clean(point.get("detail") or ""),
        requested=point.get("requested_gib"),
        speed=point.get("useful_tokens_per_second") or {},
        overall=point.get("useful_tokens_per_second_overall"),
        peak=memory.get("peak_resident") if allocated is None else allocated,
        reserved=memory.get("peak_reserved"),
        predicted=None if allocated is None else point.get("predicted_gib"),
        share=point.get("model_flop_utilisation"),
        joules=point.get("joules_per_1000_tokens"),
        longest=point.get("epoch_longest_pass_tokens"),
        key=key,
    )


def _measured_variants(
    asked: params.Params, labels: dict[str, str], points: list[Point]
) -> list[MeasuredVariant]:
    """The variants of the points: those of the experiment first, then the others by name."""
    known = list(labels)
    others = sorted({point.variant for point in points} - labels.keys())
    taken = dict(labels)
    for name in others:
        label = _label(asked.variants[name]) if name in asked.variants else clean(name)
        taken[name] = f"{label}, {clean(name)}" if label in taken.values() else label
    return [MeasuredVariant(name, taken[name], index) for index, name in enumerate([*known, *others])]


def _fits(asked: params.Params, hardware: list[Device]) -> list[Fit]:
    """What fits into GPUs of several sizes, at every named shape that was measured, of what was measured there."""
    wanted = {}
    for block in hardware:
        config = params.SHAPES / f"{block.shape}.json"
        if not block.own and not block.on_cpu and re.fullmatch(r"\w+", block.shape) and config.is_file():
            for variant in block.variants:
                ranks = [point.rank for point in block.of(variant)]
                if variant.name in asked.variants:
                    wanted.setdefault((block.shape, variant), (config, ranks[0]))
    found = []
    for (shape, variant), (config, rank) in wanted.items():
        sizes = shape_of(config)
        own = asked.variants[variant.name].training
        for checkpointing in (False, True):
            changes = own | {"rank": rank, "gradient_checkpointing": checkpointing}
            training = params.Training.model_validate(asked.training.model_dump() | changes)
            tokens = {
                gb: memory.largest_fit(
                    sizes, asked.variants[variant.name], training, gib=memory.usable_gib(gb)
                )
                for gb in GPU_SIZES
            }
            found.append(Fit(shape, variant, checkpointing, rank, tokens))
    return found


@dataclass(frozen=True)
class _Config:
    """A configuration file with the names and defaults of transformers, whose own reader imports torch."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False

    def get_text_config(self) -> "_Config":
        return self


def shape_of(config: Path) -> memory.Shape:
    """The shape of a Llama-like model from its config.json."""
    known = {field.name for field in fields(_Config)}
    return memory.Shape.of(_Config(**{k: v for k, v in read_json(config).items() if k in known}))


def model_name(model: params.Model) -> str:
    """A model's short name, from where it comes."""
    match model:
        case params.HubModel():
            return model.repository
        case params.WheelModel():
            return PurePosixPath(model.member).name.removesuffix(".gguf")
        case params.FileModel():
            return PurePosixPath(model.path).name
        case params.RandomModel():
            return "Llama with random weights"


def dataset_name(dataset: params.Dataset) -> str:
    """A dataset's short name, from where it comes."""
    match dataset:
        case params.HubDataset():
            return dataset.repository
        case params.WheelDataset():
            return dataset.package
        case params.FileDataset():
            return PurePosixPath(dataset.path).name


def _curves(runs: list[tuple[str, int]], file: str) -> pd.DataFrame:
    return pd.concat(
        [pd.read_csv(train_folder(*run) / file).assign(variant=run[0], seed=run[1]) for run in runs],
        ignore_index=True,
    )


def _work(
    trained: dict[str, list[dict]], bases: list[dict], results: list[dict], benchmarks: dict[str, dict]
) -> list[Work]:
    """The recorded times; what only fetches, draws rows or adds up records none."""
    trainings = list(itertools.chain(*trained.values()))
    loading = [
        m["value"] for b in benchmarks.values() for m in b["measurements"] if m["metric"] == "load_time"
    ]

    def scoring(evaluated: list[dict]) -> float:
        return sum(form["seconds"] for result in evaluated for form in result["forms"])

    return [
        Work(
            "train",
            len(trainings),
            sum(run["seconds"] for run in trainings),
            "the optimizer steps and validations",
        ),
        Work("evaluate_base", len(bases), scoring(bases), "loading and scoring"),
        Work("evaluate", len(results), scoring(results), "loading and scoring, every serving form"),
        Work(
            "benchmark",
            len(benchmarks),
            sum(loading) + sum(sum(b["seconds_per_step"]) for b in benchmarks.values()),
            "loading and the counted steps",
        ),
    ]


def _served(evaluated: list[dict]) -> list[ServedForm]:
    """Each variant's forms as they were found, once where the seeds' are alike."""
    found = []
    for result in evaluated:
        variant, seed = result["variant"], result["seed"]
        folder = evaluate_base_folder(variant) if seed is None else evaluate_folder(variant, seed)
        for index, form in enumerate(result["forms"]):
            key = f"{folder.as_posix()}/result.json#forms[{index}].precision"
            found.append(
                ServedForm(
                    variant, form["form"], form["precision"], form["adapters"], form["adapter_dtype"], key
                )
            )
    return [form for index, form in enumerate(found) if form not in found[:index]]


def _harness(evaluated: list[dict]) -> str:
    """Name and version of what scored the models, as its results recorded it."""
    used = [form["harness"] for result in evaluated for form in result["forms"]]
    return ", ".join(dict.fromkeys(f"{one['name']} {one['version']}" for one in used))


def _versions(results: list[dict]) -> dict[str, str]:
    """Each library's version as the results recorded it; several where the results were not made alike."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for library, version in result["versions"].items():
            found.setdefault(library, {})[version] = None
    return {library: " and ".join(versions) for library, versions in found.items()}
