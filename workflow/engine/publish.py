"""Publish a study in this repository, from the archive that `python -m workflow.study run` made of it.

    python -m workflow.publish reference_study studies/reference_study.tar.gz

The study is checked first: the params are valid and are those of dvc.lock, every result has its digest in dvc.lock,
every number on the page is that of the result which it names, and the environment is the one that the runs recorded.
It is then stored in results/studies/NAME/, laid out like results/. Its page, as the run rendered it, is
report/studies/NAME.html, and README.md shows its headline. The tests check every published study again in the same way.
"""

import argparse
import io
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from workflow import params
from workflow.comparison.model import ALL
from workflow.engine import study
from workflow.engine.study import ITEMS
from workflow.report.drawing import INK, MUTED, PAPER, RULE, SETTINGS
from workflow.report.english import cut_of, healing_of, move_of
from workflow.report.figure_forms import SHORT_FORMS
from workflow.report.formatting import number, percent, signed
from workflow.report.labels import dataset_name, model_name
from workflow.report.origins import table_numbers
from workflow.runtime import dvc_lock, markdown
from workflow.runtime.dvc_lock import LockedStage
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import md5, read_json, read_yaml, whole_folder, write_text
from workflow.runtime.forms import AS_TRAINED
from workflow.runtime.markdown import Code, escaped
from workflow.runtime.paths import (
    COMPARE,
    DVC_LOCK,
    ENVIRONMENT,
    MODEL_SOURCE,
    PARAMS,
    REPORT,
    RESULTS,
    SAMPLE,
    SUMMARY_TABLE,
    train_folder,
)
from workflow.runtime.stage import say

PUBLISHED, PAGES, README = Path("results/studies"), Path("report/studies"), Path("README.md")
MOST_ITEMS = 10 * 2**20  # bytes; larger files of the items' scores are not for git
RECORDED = ("finished", "python", "gpus", "driver", "packages")  # keys of environment.json that are used here
ABOVE = {PARAMS, DVC_LOCK, ENVIRONMENT}  # files of a study outside of its results/
BEGIN, END = "<!-- studies: written by workflow/engine/publish.py -->", "<!-- end of studies -->"
NONE = "No study has been published here yet: [docs/method.md](docs/method.md) says how the reference study is made."
SHOWN = ("torch", "transformers", "peft", "trl", "bitsandbytes", "lm_eval")
STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")  # of a place in a JSON file
ROW, WIDTH = 19, 640  # units of the figure, about one CSS pixel each

Files = Mapping[Path, Path]  # where each file of a study lies, by its path in the study


def check(files: Files) -> params.Params:
    """Check that a study's files agree with each other, and return its params.

    Raises:
        UserError: a file is missing or cannot be read.
        CheckError: two files do not agree. The sentence says which.
    """
    for path in (PARAMS, DVC_LOCK, ENVIRONMENT, REPORT):
        _existing(files, path)
    try:
        settings = params.load(files[PARAMS], published=True)
    except UserError as error:
        raise UserError(str(error).replace(str(files[PARAMS]), PARAMS.name)) from None
    stages = study.read_lock(files[DVC_LOCK])
    _check_lock(stages, settings)
    for path in study.small_results(stages):
        if path != ITEMS:  # they may be too large for git
            _existing(files, path)
    _check_files(stages, files)
    _check_page(files)
    _check_environment(files, settings)
    return settings


def _existing(files: Files, path: Path) -> Path:
    if path not in files:
        raise UserError(f"{path} is missing.")
    return files[path]


def _json(files: Files, path: Path) -> Any:
    try:
        return read_json(_existing(files, path))
    except ValueError:
        raise UserError(f"{path} is not sound JSON.") from None


def _check_lock(stages: Mapping[str, LockedStage], settings: params.Params) -> None:
    """Check that dvc.lock has every run that params name, and that every stage read what another one wrote."""
    experiment = settings.experiment
    for name in experiment.variants:
        for seed in experiment.seeds:
            for stage in ("train", "evaluate"):
                if f"{stage}@{name}-{seed}" not in stages:
                    raise CheckError(f"dvc.lock has no {stage}@{name}-{seed}, which params.yaml names.")
    outs = {path: digest for stage in stages.values() for path, digest in stage.outs.items()}
    for name, stage in stages.items():
        for path, digest in stage.deps.items():
            if outs.get(path, digest) != digest:
                raise CheckError(f"by dvc.lock, {name} read another {path} than was written.")


def _check_files(stages: Mapping[str, LockedStage], files: Files) -> None:
    """Check that params.yaml and every file that is here are what the stages were run with, read and wrote."""

    def digest_of(path: str) -> str | None:
        return md5(files[Path(path)]) if Path(path) in files else None

    differences = [
        difference
        for difference in dvc_lock.differences(stages, read_yaml(files[PARAMS]), digest_of)
        if not difference.missing  # models, data and adapters stay where they were made
    ]
    # params.yaml itself is read by a stage: the key says more.
    for difference in sorted(differences, key=lambda difference: difference.kind != "param"):
        name, stage = difference.name, difference.stage
        if difference.kind == "param":
            raise CheckError(f"params.yaml has another value of {name} than {stage} was run with.")
        raise CheckError(f"{name} is not what dvc.lock says: its md5 is not that in the entry of {stage}.")


class _Page(HTMLParser):
    """The numbers of a page's text, with the places that they are from."""

    def __init__(self, text: str):
        super().__init__()
        self.numbers: list[tuple[str, str]] = []  # place, value
        self.has_warning = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.has_warning |= "banner" in (attributes.get("class") or "").split()
        if tag == "data":
            self.numbers.append((attributes["data-key"], attributes["value"]))


def _check_page(files: Files) -> None:
    """Check that every number on the page is the one that stands at the place that it names."""
    text = files[REPORT].read_text(encoding="utf-8")
    page = _Page(text)
    if page.has_warning:
        raise CheckError(
            "the page says that it does not match dvc.lock: `dvc repro` mends it where it was run."
        )
    try:
        numbers = [*page.numbers, *table_numbers(text)]
    except (ValueError, LookupError, TypeError):
        raise CheckError("the numbers of the page's tables cannot be read.") from None
    if not numbers:
        raise CheckError("the page has no numbers.")
    contents: dict[Path, Any] = {}
    for key, value in numbers:
        name, _, place = key.partition("#")
        path = Path(name)
        if path not in contents:
            contents[path] = _json(files, path)
        try:
            stored = float(_value_at(contents[path], place))
        except (KeyError, IndexError, TypeError, ValueError):
            raise CheckError(f"the page has a number from {key}, where there is none.") from None
        if stored != float(value):
            raise CheckError(f"the page has {value} from {key}, where {stored:g} stands.")


def _value_at(content: Any, place: str) -> Any:
    """The value at a place in a JSON file, such as scores[3].per_seed.1."""
    for match in STEP.finditer(place):
        content = content[int(match[1])] if match[1] is not None else content[match[2]]
    return content


def _check_environment(files: Files, settings: params.Params) -> None:
    """Check that every training recorded the versions and the GPU that environment.json names."""
    environment = _json(files, ENVIRONMENT)
    for key in RECORDED:
        if key not in environment:
            raise UserError(f"{ENVIRONMENT} lacks {key}.")
    versions = {"Python": environment["python"], **_by_name(environment["packages"])}
    gpus = {gpu["name"] for gpu in environment["gpus"]}
    for name in settings.experiment.variants:
        for seed in settings.experiment.seeds:
            path = train_folder(name, seed) / "result.json"
            result = _json(files, path)
            for package, version in result["versions"].items():
                other = versions.get(_normalized(package))
                if other != version:
                    raise CheckError(
                        f"{path} was made with {package} {version}, and environment.json has {other}."
                    )
            precision = result["precision"]
            if precision["device"] == "cuda" and precision["device_name"] not in gpus:
                raise CheckError(
                    f"{path} was made on {precision['device_name']}, which environment.json does not name."
                )


def _by_name(packages: dict[str, str]) -> dict[str, str]:
    return {_normalized(name): version for name, version in packages.items()}


def _normalized(package: str) -> str:
    return package if package == "Python" else package.lower().replace("-", "_")


def published(name: str) -> dict[Path, Path]:
    """Where the files of a published study lie, by their paths in the study."""
    folder = PUBLISHED / name
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    files = {path if path in ABOVE else RESULTS / path: folder / path for path in paths}
    page = PAGES / f"{name}.html"
    return files | ({REPORT: page} if page.is_file() else {})


def names() -> list[str]:
    """The published studies."""
    return sorted(path.name for path in PUBLISHED.glob("[!.]*") if path.is_dir())


def publish(name: str, packed: Path) -> None:
    """Check an archive, and write the published part of it. If the archive is refused, nothing is written.

    Raises:
        UserError: the archive cannot be read.
        CheckError: its files do not agree.
    """
    if not study.NAME.fullmatch(name):
        raise UserError(f"a study cannot be called {name}: small letters, digits and _ make its name.")
    with tempfile.TemporaryDirectory() as scratch:
        files = unpacked(packed, Path(scratch))
        settings = check(files)
        figure = forest(files, settings)
        readme = README.read_text(encoding="utf-8")
        _between_marks(readme)
        with whole_folder(PUBLISHED / name) as folder:
            for path, file in files.items():
                result = path.is_relative_to(RESULTS)
                small = path != ITEMS or file.stat().st_size <= MOST_ITEMS
                if (result or path in ABOVE) and small:
                    target = folder / (path.relative_to(RESULTS) if result else path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)
        write_text(PAGES / f"{name}.html", files[REPORT].read_text(encoding="utf-8"))
        write_text(PAGES / f"{name}.svg", figure)
    write_text(README, with_studies(readme))


def unpacked(packed: Path, folder: Path) -> dict[Path, Path]:
    """Unpack an archive of a study. No member may be written outside of the folder.

    Raises:
        UserError: the archive is missing, or is not the archive of a study.
    """
    try:
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
    except FileNotFoundError:
        raise UserError(f"{packed} is missing.") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{packed} is no archive of a study: {error}.") from None
    return {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}


def with_studies(readme: str) -> str:
    """A README whose block shows the published studies."""
    before, after = _between_marks(readme)
    sections = [section(name) for name in sorted(names(), key=_finished)] or [NONE]
    return f"{before}{BEGIN}\n" + "\n\n".join(sections) + f"\n{END}{after}"


def _finished(name: str) -> str:
    """When a published study was finished, so that a text order is one in time."""
    return read_json(PUBLISHED / name / ENVIRONMENT)["finished"]


def _between_marks(readme: str) -> tuple[str, str]:
    if (readme.count(BEGIN), readme.count(END)) != (1, 1):
        raise UserError(f"{README} must have the lines {BEGIN} and {END} once each.")
    return readme.partition(BEGIN)[0], readme.partition(END)[2]


def section(name: str) -> str:
    """A published study's headline in Markdown, from its files alone."""
    files = published(name)
    settings = params.load(files[PARAMS], published=True)
    environment = read_json(files[ENVIRONMENT])
    rows = read_json(files[SAMPLE / "counts.json"])
    table = pd.read_csv(files[SUMMARY_TABLE])
    model = read_json(files[MODEL_SOURCE])
    quantized_before = model["quantized_before"]
    packages = _by_name(environment["packages"])
    versions = ", ".join(f"{package} {packages[package]}" for package in SHOWN if package in packages)
    driver = f", driver {environment['driver']}" if environment["driver"] else ""
    seeds = len(settings.experiment.seeds)
    drawn = " for each seed, drawn anew" if settings.sample.per_seed else ""
    parts = [
        f"**{escaped(settings.report.title)}**",
        f"{escaped(model_name(settings.model))} on {escaped(dataset_name(settings.dataset))}: {rows['train_rows']:,} rows to train on{drawn}, "
        f"{rows['test_rows']:,} to test on, {seeds} {'seed' if seeds == 1 else 'seeds'}. {environment['finished']}, "
        f"{escaped(', '.join(dict.fromkeys(table['device'])))}{driver}; {versions}."
        + (
            f" The base had already been quantized once ({escaped(quantized_before)}; [what that does](docs/mechanism.md))."
            if quantized_before
            else ""
        )
        + (f" This base was moved off its grid: {move_of(model['moved'])}." if model.get("moved") else "")
        + (f" This base was cut: {cut_of(model['cut'])}." if model.get("cut") else "")
        + (f" This base was healed: {healing_of(model['healed'])}." if model.get("healed") else ""),
        f"![Each variant’s difference to {settings.experiment.baseline}, with its interval]({PAGES / f'{name}.svg'})",
        _headline_table(table, settings),
        *_caveats(files, settings),
        _costs_were_measured(settings),
        f"{_verdicts(files)} [Page]({PAGES / f'{name}.html'}), [numbers]({PUBLISHED / name}), [method](docs/method.md).",
    ]
    return "\n\n".join(parts)


def _costs_were_measured(settings: params.Params) -> str:
    measured, processes = settings.benchmark.variants, settings.benchmark.processes
    if not measured:
        return "Memory and time were not measured."
    whose = "each variant"
    if len(measured) < len(settings.experiment.variants):
        whose = "each variant that has them"
    if processes == 1:
        return f"Memory and time were measured once, in one process for {whose}."
    return f"Memory and time are means over {processes:,} processes for {whose}."


def _headline_table(table: pd.DataFrame, settings: params.Params) -> str:
    """A row for each variant as it was trained."""
    task, metric = settings.comparison.primary.split("/")
    primary = table[(table["task"] == task) & (table["metric"] == metric)]
    costs = [
        (name, title, decimals)
        for name, title, decimals in (
            ("peak_memory", "peak memory, GiB", 2),
            ("training_speed", "training, tokens/s", 0),
        )
        if (table["metric"] == name).any()
    ]
    head = [
        "variant",
        primary["unit"].iloc[0],
        f"difference ({percent(settings.comparison.confidence)} interval)",
        "verdict",
        *(title for _, title, _ in costs),
    ]
    rows = []
    for variant in settings.experiment.variants:
        own = table[table["variant"] == variant]
        row = primary[(primary["variant"] == variant) & (primary["form"] == AS_TRAINED)].iloc[0]
        difference, verdict = "", "baseline"
        if pd.notna(row["difference"]):
            value, low, high = (signed(row[key], 3) for key in ("difference", "low", "high"))
            difference, verdict = f"{value} ({low} to {high})", row["verdict"]
        values = (
            number(found.iloc[0], decimals)
            if len(found := own[own["metric"] == name]["value"])
            else "not measured"
            for name, _, decimals in costs
        )
        rows.append([Code(variant), number(row["value"], 3), difference, verdict, *values])
    return markdown.table(head, rows, right=[1, 2, *range(4, len(head))])


def _caveats(files: Files, settings: params.Params) -> list[str]:
    """What the verdicts of the headline depend on, by variant."""
    contrasts = pd.read_csv(files[COMPARE / "contrasts.csv"])
    if "caveat" not in contrasts:  # compared before caveats were written
        return []
    headline = (contrasts["kind"] == "to_baseline") & (contrasts["form"] == AS_TRAINED)
    headline &= contrasts["subset"] == ALL
    primary = contrasts["task"] + "/" + contrasts["metric"] == settings.comparison.primary
    chosen = contrasts[headline & primary & contrasts["caveat"].notna()]
    return [
        f"`{row.variant}` is {row.verdict} by this table. {escaped(row.caveat)}"
        for row in chosen.itertuples()
    ]


def _verdicts(files: Files) -> str:
    """The count of each verdict in the family of tests, and the names of the undecided differences."""
    contrasts = pd.read_csv(files[COMPARE / "contrasts.csv"])
    family = contrasts[contrasts["in_family"]]
    counts = family["verdict"].value_counts()
    decided = ", ".join(
        f"{counts[word]} {word}" for word in ("equivalent", "worse", "better") if word in counts
    )
    undecided = [
        f"`{row.variant}/{row.form}` less `{row.other}`"
        for row in family[family["verdict"] == "undecided"].itertuples()
    ]
    tail = f"{len(undecided)} undecided ({', '.join(undecided)})" if undecided else "none undecided"
    return f"Of {len(family)} differences tested together: {', '.join(filter(None, [decided, tail]))}."


def forest(files: Files, settings: params.Params) -> str:
    """The figure of the README: every variant's difference to the baseline in each form, as an SVG of its own."""
    task, metric = settings.comparison.primary.split("/")
    table = pd.read_csv(files[SUMMARY_TABLE])
    rows = table[(table["task"] == task) & (table["metric"] == metric) & table["difference"].notna()]
    margin = settings.comparison.margins.get(settings.comparison.primary)
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": "forest"}):
        drawing = Figure(
            figsize=(WIDTH / 72, (ROW * len(rows) + 60) / 72), layout="constrained", facecolor=PAPER
        )
        axes = drawing.add_subplot()
        if margin:
            axes.axvspan(-margin, margin, color=RULE, alpha=0.7, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, row in enumerate(rows.itertuples()):
            bold = row.form == AS_TRAINED
            axes.plot([row.low, row.high], [place, place], color=INK, linewidth=1.8 if bold else 1)
            axes.plot(row.difference, place, "o", color=INK, markersize=5 if bold else 3.5)
        labels = [f"{row.variant}, {SHORT_FORMS.get(row.form, row.form)}" for row in rows.itertuples()]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False, axis="y")
        band = f"; gray: within the margin of {margin:g}" if margin else ""
        axes.set_xlabel(f"{rows['unit'].iloc[0]} less {settings.experiment.baseline}’s{band}")
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def main() -> None:
    """Parse the command line and do as it says; exit 1 with one sentence on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m workflow.publish", description=__doc__)
    parser.add_argument("name", help="what the study is called here")
    parser.add_argument("packed", type=Path, help="its archive")
    options = parser.parse_args()
    try:
        publish(options.name, options.packed)
    except UserError as error:
        sys.exit(f"publish: {options.name} was refused: {error}")
    say(f"{PUBLISHED / options.name}, {PAGES / options.name}.html and {README} show it.")


if __name__ == "__main__":
    main()
