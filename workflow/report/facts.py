"""Read the facts of the page from params.yaml and the stages' files."""

import itertools
import re
from pathlib import Path

import pandas as pd
from pydantic import TypeAdapter

from workflow import params
from workflow.comparison.model import Comparison
from workflow.comparison.records import BenchmarkRecord, PrecisionRecord, TrainingRecord, read_record
from workflow.cost import memory
from workflow.cost.cards import nominal_share
from workflow.report import answers, lock
from workflow.report.formatting import clean
from workflow.report.labels import compact_labels, model_name, short_labels, variant_label, variant_labels
from workflow.report.model import (
    GPU_SIZES,
    GRID,
    OWN_SHAPE,
    Commands,
    Device,
    Facts,
    Fit,
    MeasuredVariant,
    Point,
    ServedForm,
    Variant,
    Work,
)
from workflow.report.planned import plan, shape_of
from workflow.runtime import environment
from workflow.runtime.errors import UserError, missing
from workflow.runtime.files import read_json, sha256
from workflow.runtime.paths import (
    COMPARISON,
    DATASET_SOURCE,
    HARDWARE,
    MODEL_SOURCE,
    PARAMS,
    RATE_CHOICES,
    RESULTS,
    SAMPLE_COUNTS,
    benchmark_file,
    divergence_folder,
    evaluate_base_folder,
    evaluate_folder,
    grid_file,
    train_folder,
    tune_folder,
)
from workflow.tuning.records import Choice

ENVIRONMENT = Path("requirements.lock")
SPLITS = ("train", "validation", "test")


def _changes(revision: str | None) -> dict:
    """The fields of `Facts` that hold the changes since a revision. Empty if it is None."""
    if revision is None:
        return {"before": None, "changes": []}
    from workflow.report.changes import at_revision, changes, in_workspace

    before = at_revision(revision)
    return {"before": before.name, "changes": changes(before, in_workspace())}


def gather(settings: params.Params) -> Facts:
    """Read what the stages wrote for the runs named in the params.

    Raises:
        UserError: a file is missing, or the comparison is of other runs. The sentence names the file.
    """
    files = inputs(settings)
    for path in files:
        if not path.is_file():
            raise missing(path) if path.is_relative_to(RESULTS) else UserError(f"{path} is missing.")
    experiment = settings.experiment
    compared = TypeAdapter(Comparison).validate_python(read_json(COMPARISON))
    _check_same_runs(compared, settings)
    labels = variant_labels(settings)
    runs = [(variant, seed) for variant in experiment.variants for seed in experiment.seeds]
    results = {run: read_json(evaluate_folder(*run) / "result.json") for run in runs}
    trained = {
        name: [
            read_record(train_folder(name, seed) / "result.json", TrainingRecord) for seed in experiment.seeds
        ]
        for name in experiment.variants
    }
    benchmarks = {
        name: read_record(benchmark_file(name), BenchmarkRecord) for name in settings.benchmark.variants
    }
    bases = [read_json(evaluate_base_folder(name) / "result.json") for name in experiment.variants]
    evaluated = [*bases, *results.values()]
    hardware = _hardware(settings, labels)
    counts = read_json(SAMPLE_COUNTS)
    choices = _choices(settings)
    return Facts(
        params=settings,
        params_text=PARAMS.read_text(encoding="utf-8"),
        model=read_json(MODEL_SOURCE),
        dataset=read_json(DATASET_SOURCE),
        rows={split: counts[f"{split}_rows"] for split in SPLITS},
        train_rows=counts["train_rows_by_seed"],
        rows_to_draw_from=counts["rows_to_draw_from"],
        near_duplicates=counts["near_duplicate_test_rows"],
        variants=_variants(settings, compared, trained),
        compared=compared,
        benchmarks=benchmarks,
        history=_curves(runs, "history.csv"),
        validation=_curves(runs, "validation.csv"),
        choices=choices,
        answers=answers.read(settings, labels),
        served=_served(evaluated),
        commands=[
            Commands(result["variant"], result["seed"], form["form"], form["harness"]["commands"])
            for result in evaluated
            for form in result["forms"]
        ],
        tasks=bases[0]["forms"][0]["harness"]["tasks"],
        harness=_harness(evaluated),
        versions=_versions(
            [result["versions"] for result in evaluated]
            + [result.versions for result in itertools.chain(benchmarks.values(), *trained.values())]
        ),
        locked=environment.versions(environment.LOCK.read_text(encoding="utf-8")),
        digests={path.as_posix(): sha256(path) for path in files},
        hardware=hardware,
        fits=_fits(settings, hardware),
        planned=plan(settings),
        work=_work(trained, bases, list(results.values()), benchmarks)
        + _divergence_work([read_json(path) for path in _divergence_files(settings)])
        + _tuning_work(choices),
        lock=lock.read(files),
        repository=environment.repository(),
        **_changes(settings.report.compare_to),
    )


def _variants(
    settings: params.Params, compared: Comparison, trained: dict[str, list[TrainingRecord]]
) -> list[Variant]:
    """The variants of the experiment, in its order."""
    labels, compact, shorts = (make(settings) for make in (variant_labels, compact_labels, short_labels))
    return [
        Variant(
            name=name,
            label=labels[name],
            compact=compact[name],
            short=shorts[name],
            position=position,
            is_baseline=name == settings.experiment.baseline,
            precision=PrecisionRecord(**compared.precisions[name]),
            trained=trained[name],
        )
        for position, name in enumerate(settings.experiment.variants)
    ]


def inputs(settings: params.Params) -> list[Path]:
    """The files that the page is made from."""
    experiment = settings.experiment
    files = [PARAMS, ENVIRONMENT, MODEL_SOURCE, DATASET_SOURCE, SAMPLE_COUNTS, COMPARISON]
    files += [benchmark_file(name) for name in settings.benchmark.variants]
    for name in experiment.variants:
        files.append(evaluate_base_folder(name) / "result.json")
        for seed in experiment.seeds:
            files += [
                train_folder(name, seed) / file for file in ("result.json", "history.csv", "validation.csv")
            ]
            files.append(evaluate_folder(name, seed) / "result.json")
    files += answers.files(settings)
    files += [environment.PROJECT] if environment.PROJECT.is_file() else []
    files += _tuning_files(settings)
    return files + _divergence_files(settings) + _grid_files(settings) + _hardware_files()


def _tuning_files(settings: params.Params) -> list[Path]:
    """The choices of learning rates and the results that they rest on; none where nothing is tuned."""
    tried = [tune_folder(name) / "result.json" for name in settings.tuning.candidates]
    return [RATE_CHOICES, *tried] if tried else []


def _divergence_files(settings: params.Params) -> list[Path]:
    """The records of stage divergence, which older studies do not have."""
    experiment = settings.experiment
    files = [
        divergence_folder(name, seed) / "result.json"
        for name in experiment.variants
        for seed in experiment.seeds
    ]
    return [path for path in files if path.is_file()]


def _grid_files(settings: params.Params) -> list[Path]:
    """The measured grids of this run."""
    shapes = settings.benchmark.grid.shapes
    files = [grid_file(variant, shape) for shape in shapes for variant in settings.benchmark.variants]
    return [path for path in files if path.is_file()]


def _hardware_files() -> list[Path]:
    """The measurements of devices in results/hardware/, which belong to no run."""
    return sorted(HARDWARE.glob("*.json"))


def _check_same_runs(compared: Comparison, settings: params.Params) -> None:
    experiment, comparison = settings.experiment, settings.comparison
    runs = (list(compared.precisions), compared.baseline, compared.seeds)
    if runs != (experiment.variants, experiment.baseline, experiment.seeds):
        difference = (
            f"compares {', '.join(runs[0])} to {runs[1]} over the seeds {', '.join(map(str, runs[2]))}, "
            "which is not what params.yaml names"
        )
    elif (compared.primary, compared.margins, compared.confidence) != (
        comparison.primary,
        comparison.margins,
        comparison.confidence,
    ):
        difference = "has another primary metric, margin or confidence than params.yaml names"
    else:
        return
    raise UserError(f"{COMPARISON} {difference}; `dvc repro compare` mends it.")


def _hardware(settings: params.Params, labels: dict[str, str]) -> list[Device]:
    """The measurements by device and shape: those of results/hardware/ first, then the run's own grids."""
    blocks: dict[tuple, dict] = {}
    for path in [*_hardware_files(), *_grid_files(settings)]:
        file, own_run = read_json(path), not path.is_relative_to(HARDWARE)
        measured = [point["precision"] for point in file["points"] if point["outcome"] == "measured"]
        names = [precision["device_name"] for precision in measured]
        device = clean(file.get("device") or (names or ["a device that could measure nothing"])[0])
        on_cpu = any(precision["device"] == "cpu" for precision in measured)
        for index, point in enumerate(file["points"]):
            block = blocks.setdefault(
                (own_run, device, point["shape"]),
                {"on_cpu": on_cpu, "versions": [], "files": [], "points": []},
            )
            if path.as_posix() not in block["files"]:
                block["files"].append(path.as_posix())
                block["versions"].append(file["versions"])
            block["points"].append(_point(point, f"{path.as_posix()}#points[{index}]"))
    variants = _measured_variants(settings, labels, [p for block in blocks.values() for p in block["points"]])
    return [
        Device(
            device=device,
            on_cpu=block["on_cpu"],
            shape=model_name(settings.model) if shape == OWN_SHAPE else clean(shape),
            own=shape == OWN_SHAPE,
            own_run=own_run,
            versions={clean(name): clean(v) for name, v in _versions(block["versions"]).items()},
            files=block["files"],
            variants=[v for v in variants if any(point.variant == v.name for point in block["points"])],
            points=block["points"],
        )
        for (own_run, device, shape), block in blocks.items()
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
        nominal_share=nominal_share(point) if point["outcome"] == "measured" else None,
        joules=point.get("joules_per_1000_tokens"),
        longest=point.get("epoch_longest_pass_tokens"),
        key=key,
    )


def _measured_variants(
    settings: params.Params, labels: dict[str, str], points: list[Point]
) -> list[MeasuredVariant]:
    """The variants of the points: those of the experiment first, then the others in alphabetical order."""
    known = list(labels)
    others = sorted({point.variant for point in points} - labels.keys())
    all_labels = dict(labels)
    for name in others:
        in_words = clean(name).replace("_", " ")
        own = variant_label(settings, name) if name in settings.variants else in_words
        all_labels[name] = f"{own}, {in_words}" if own in all_labels.values() else own
    return [MeasuredVariant(name, all_labels[name], index) for index, name in enumerate([*known, *others])]


def _fits(settings: params.Params, hardware: list[Device]) -> list[Fit]:
    """Predict what fits on GPUs of several sizes, for each named shape and each variant measured with it."""
    configs = {}
    for block in hardware:
        config = params.SHAPES / f"{block.shape}.json"
        if not block.own and not block.on_cpu and re.fullmatch(r"\w+", block.shape) and config.is_file():
            for variant in block.variants:
                ranks = [point.rank for point in block.of(variant)]
                if variant.name in settings.variants:
                    configs.setdefault((block.shape, variant), (config, ranks[0]))
    fits = []
    for (shape, variant), (config, rank) in configs.items():
        sizes = shape_of(config)
        own = settings.variants[variant.name].training
        for checkpointing in (False, True):
            changes = own | {"rank": rank, "gradient_checkpointing": checkpointing}
            training = params.Training.model_validate(settings.training.model_dump() | changes)
            tokens = {
                gb: memory.largest_fit(
                    sizes, settings.variants[variant.name], training, gib=memory.usable_gib(gb)
                )
                for gb in GPU_SIZES
            }
            fits.append(Fit(shape, variant, checkpointing, rank, tokens))
    return fits


def _curves(runs: list[tuple[str, int]], file: str) -> pd.DataFrame:
    return pd.concat(
        [pd.read_csv(train_folder(*run) / file).assign(variant=run[0], seed=run[1]) for run in runs],
        ignore_index=True,
    )


def _work(
    trained: dict[str, list[TrainingRecord]],
    bases: list[dict],
    results: list[dict],
    benchmarks: dict[str, BenchmarkRecord],
) -> list[Work]:
    """The recorded times by stage. Stages that fetch, draw rows or compare record none."""
    trainings = list(itertools.chain(*trained.values()))
    processes = list(itertools.chain.from_iterable(b.processes for b in benchmarks.values()))
    loading = [seconds for p in processes if (seconds := p.value_of("load_time")) is not None]

    def scoring(evaluated: list[dict]) -> float:
        return sum(form["seconds"] for result in evaluated for form in result["forms"])

    work = [
        Work(
            "train",
            len(trainings),
            sum(run.seconds for run in trainings),
            "the optimizer steps and validations",
        ),
        Work("evaluate_base", len(bases), scoring(bases), "loading and scoring"),
        Work("evaluate", len(results), scoring(results), "loading and scoring, every serving form"),
        Work(
            "benchmark",
            len(benchmarks),
            sum(loading) + sum(sum(p.seconds_per_step) for p in processes),
            "loading and the counted steps",
        ),
    ]
    return [each for each in work if each.runs]


def _divergence_work(results: list[dict]) -> list[Work]:
    """The recorded time of stage divergence; none if nothing was compared."""
    seconds = sum(form["seconds"] for result in results for form in result["forms"])
    text = "loading and comparing, every serving form"
    return [Work("divergence", len(results), seconds, text)] if seconds else []


def _choices(settings: params.Params) -> dict[str, Choice]:
    """The choices of learning rates; none where nothing is tuned."""
    if not settings.tuning.candidates:
        return {}
    return TypeAdapter(dict[str, Choice]).validate_python(read_json(RATE_CHOICES)["choices"])


def _tuning_work(choices: dict[str, Choice]) -> list[Work]:
    """The recorded time of the trainings of stage tune; none if nothing was tuned."""
    runs = [run for choice in choices.values() for candidate in choice.candidates for run in candidate.runs]
    seconds = sum(run.seconds or 0 for run in runs)
    return (
        [Work("tune", len(runs), seconds, "the optimizer steps of those that did not diverge")]
        if runs
        else []
    )


def _served(evaluated: list[dict]) -> list[ServedForm]:
    """The serving forms of each variant as they were loaded. Seeds with equal forms share one entry."""
    forms = []
    for result in evaluated:
        variant, seed = result["variant"], result["seed"]
        folder = evaluate_base_folder(variant) if seed is None else evaluate_folder(variant, seed)
        for index, form in enumerate(result["forms"]):
            key = f"{folder.as_posix()}/result.json#forms[{index}].precision"
            forms.append(
                ServedForm(
                    variant,
                    form["form"],
                    PrecisionRecord(**form["precision"]),
                    form["adapters"],
                    form["adapter_dtype"],
                    key,
                    form.get("gguf"),
                )
            )
    return [form for index, form in enumerate(forms) if form not in forms[:index]]


def _harness(evaluated: list[dict]) -> str:
    """Name and version of the evaluation harness, from the results."""
    used = [form["harness"] for result in evaluated for form in result["forms"]]
    return ", ".join(dict.fromkeys(f"{harness['name']} {harness['version']}" for harness in used))


def _versions(installed: list[dict[str, str]]) -> dict[str, str]:
    """Each library's version from those of several results. Different versions are joined by `and`."""
    by_library: dict[str, dict[str, None]] = {}
    for versions in installed:
        for library, version in versions.items():
            by_library.setdefault(library, {})[version] = None
    return {library: " and ".join(versions) for library, versions in by_library.items()}
