"""What changed between a commit and the workspace in params, versions and headline metrics, as Markdown.

    python -m workflow.diff main > diff.md

The change of a metric is paired over the items and seeds that both sides have. It has an interval if the commit's items
are in DVC's cache or remote and equal those of the workspace.
"""

import argparse
import io
import sys
from dataclasses import dataclass, field
from typing import Any

import dvc.api
import numpy as np
import pandas as pd
from dvc.exceptions import DvcException
from ruamel.yaml import YAML

from workflow import params
from workflow.comparison.contrasts import bootstrap, span_of
from workflow.comparison.inference import Difference, difference, equivalence, verdict
from workflow.comparison.model import ALL, Arm
from workflow.comparison.results import table_of
from workflow.report.formatting import decimals_of, number, quantity, ratio, signed
from workflow.runtime import environment, faults, markdown, outputs
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json
from workflow.runtime.forms import AS_TRAINED
from workflow.runtime.git import parsed_at, read_at, resolved
from workflow.runtime.markdown import Code
from workflow.runtime.paths import COMPARE, COMPARISON, DVC_LOCK, PARAMS

ITEMS = COMPARE / "items.parquet"
COSTS = ("peak_memory", "training_speed")
NOTHING, UNPAIRED = "-", "no interval"
# The keys of comparison.json that are read here.
PARTS = {"primary", "margins", "baseline", "scores", "contrasts", "cost", "precisions"}


@dataclass(frozen=True)
class State:
    """One side of the comparison: params, locked versions, and any results with their items."""

    name: str
    params: dict[str, Any]
    versions: dict[str, str]
    comparison: dict | None
    items: pd.DataFrame | None


@dataclass(frozen=True)
class Changes:
    """Changes of one kind: a table, which may be empty, and a note."""

    title: str
    head: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""
    code: bool = False  # whether the cells are set as code


def at_revision(revision: str) -> State:
    """The state at a commit.

    Raises:
        UserError: the revision is unknown, it has no params.yaml or lock file, or its items are damaged.
    """
    commit = resolved(revision)
    comparison = _readable(parsed_at(commit, COMPARISON))
    items = None
    if comparison is not None:
        try:
            content = dvc.api.read(str(ITEMS), rev=commit, mode="rb")
        except (DvcException, OSError):
            pass  # neither in the cache nor in a remote, so the change gets no interval
        else:
            outputs.check_content(content, ITEMS, _lock_at(commit), of=revision)
            items = pd.read_parquet(io.BytesIO(content))
    return State(
        name=f"{revision} ({commit[:9]})" if revision != commit else commit[:9],
        params=YAML(typ="safe", pure=True).load(read_at(commit, PARAMS)),
        versions=environment.locked_at(commit),
        comparison=comparison,
        items=items,
    )


def _lock_at(commit: str) -> str:
    """The text of dvc.lock at a commit. Empty if there was none."""
    try:
        return read_at(commit, DVC_LOCK)
    except UserError:
        return ""


def in_workspace() -> State:
    """The state of the working directory.

    Raises:
        UserError: params.yaml is not valid, or there is no lock file.
    """
    params.load()
    return State(
        name="workspace",
        params=YAML(typ="safe", pure=True).load(PARAMS.read_text(encoding="utf-8")),
        versions=environment.locked_at(None),
        comparison=_readable(read_json(COMPARISON)) if COMPARISON.exists() else None,
        items=pd.read_parquet(ITEMS) if ITEMS.exists() else None,
    )


def _readable(comparison: dict | None) -> dict | None:
    """The comparison. None if an early version of this project wrote it in another format."""
    return comparison if comparison is not None and set(comparison) >= PARTS else None


def diff(before: State, after: State) -> str:
    """All changes as Markdown."""
    blocks = [f"## What changed: {before.name} to {after.name}"]
    for part in changes(before, after):
        blocks += [f"### {part.title}", _table(part), part.note]
    return "\n\n".join(block for block in blocks if block) + "\n"


def changes(before: State, after: State) -> list[Changes]:
    """Changes of params and locked versions, and of quality, differences and cost if both sides have results."""
    settings = [
        _params(before.params, after.params),
        _versions(before.versions, after.versions),
    ]
    missing = [state.name for state in (before, after) if state.comparison is None]
    if missing:
        return [
            *settings,
            Changes("Results", note=f"There are none that can be read in {' and '.join(missing)}."),
        ]
    return [*settings, _scores(before, after), _contrasts(before, after), _costs(before, after)]


def _params(before: dict, after: dict) -> Changes:
    old, new = _flat(before), _flat(after)
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return Changes(
        "Params",
        ("key", "before", "after"),
        [(key, _value(old, key), _value(new, key)) for key in changed],
        "" if changed else "No param changed.",
        code=True,
    )


def _versions(before: dict[str, str], after: dict[str, str]) -> Changes:
    rows = environment.changed(before, after)
    return Changes("Locked versions", environment.HEAD, rows, "" if rows else environment.NOTHING_CHANGED)


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level with dotted keys, as in `dvc params diff`."""
    values = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def _value(flat: dict, key: str) -> str:
    return str(flat[key]) if key in flat else NOTHING


def _scores(before: State, after: State) -> Changes:
    primary = after.comparison["primary"]
    old, new = (
        {score["variant"]: score for score in state.comparison["scores"] if _is_headline(score, primary)}
        for state in (before, after)
    )
    rows = []
    for variant in dict.fromkeys([*old, *new]):
        scores = old.get(variant), new.get(variant)
        change, outcome = NOTHING, NOTHING
        if all(scores):
            difference = scores[1]["value"] - scores[0]["value"]
            change, outcome = _change(variant, before, after, difference, scores[1]["higher_is_better"])
        values = (NOTHING if score is None else number(score["value"], 3) for score in scores)
        rows.append((variant, *values, change, outcome))
    first_score = next(iter(new.values()))
    better = "higher" if first_score["higher_is_better"] else "lower"
    return Changes(
        f"Quality: {primary}, {first_score['unit']}, {better} is better",
        ("variant, as trained", "before", "after", "change", "verdict"),
        rows,
        _notes(
            after.comparison["margins"].get(primary),
            first_score["unit"],
            unpaired=any(row[3].endswith(UNPAIRED) for row in rows),
        ),
    )


def _is_headline(score: dict, primary: str) -> bool:
    return (f"{score['task']}/{score['metric']}", score["form"], score["subset"]) == (
        primary,
        AS_TRAINED,
        ALL,
    )


def _change(
    variant: str, before: State, after: State, value: float, higher_is_better: bool
) -> tuple[str, str]:
    """A variant's change with its interval, and the verdict. Both are left out if the items cannot be paired."""
    settings = params.Comparison.model_validate(after.params["comparison"])
    change = paired_change(variant, before, after, settings)
    if change is None:
        return f"{signed(value, 3)}, {UNPAIRED}", NOTHING
    margin = settings.margins.get(settings.primary)
    outcome = verdict(
        change,
        p_adjusted=change.p_value,
        p_equivalence=equivalence(change, margin=margin).p_value if margin else None,
        higher_is_better=higher_is_better,
    )
    return _interval(change.value, change.low, change.high, change.confidence), outcome


def paired_change(
    variant: str, before: State, after: State, settings: params.Comparison
) -> Difference | None:
    """The change of a variant's primary metric, paired over items and shared seeds. None if nothing can be paired."""
    if before.items is None or after.items is None:
        return None
    task, metric = settings.primary.split("/")
    arm = {"variant": variant, "form": AS_TRAINED, "task": task, "metric": metric}
    tables = []
    for state in (before, after):
        frame = state.items[(state.items[list(arm)] == pd.Series(arm)).all(axis=1)]
        if frame.empty:
            return None
        tables.append(table_of(frame, Arm(variant, AS_TRAINED)))
    old, new = tables
    seeds = [seed for seed in new.seeds if seed in old.seeds]
    if not seeds or not new.items.equals(old.items) or (new.denominators != old.denominators).any():
        return None
    numerators = [table.numerators[[table.seeds.index(seed) for seed in seeds]] for table in (old, new)]
    return difference(
        numerators[1] - numerators[0],
        new.denominators,
        new.items["group"].to_numpy(),
        span=span_of(np.concatenate(numerators), new.denominators, metric),
        bootstrap=bootstrap(settings),
    )


def _contrasts(before: State, after: State) -> Changes:
    primary, baseline = after.comparison["primary"], after.comparison["baseline"]
    by_variant = [
        {
            contrast["variant"]: contrast
            for contrast in state.comparison["contrasts"]
            if contrast["kind"] == "to_baseline" and _is_headline(contrast, primary)
        }
        for state in (before, after)
    ]
    rows = []
    for variant in dict.fromkeys([*by_variant[0], *by_variant[1]]):
        contrasts = (contrasts.get(variant) for contrasts in by_variant)
        rows.append((variant, *map(_contrast_text, contrasts)))
    notes = [] if rows else ["There is the baseline alone."]
    if before.comparison["baseline"] != baseline:
        notes.append(f"Before, the baseline was {before.comparison['baseline']}.")
    return Changes(
        f"Difference to {baseline}, as trained", ("variant", "before", "after"), rows, " ".join(notes)
    )


def _contrast_text(contrast: dict | None) -> str:
    if contrast is None:
        return NOTHING
    difference = contrast["difference"]
    interval = _interval(*(difference[key] for key in ("value", "low", "high", "confidence")))
    return f"{interval}, {contrast['verdict']}"


def _interval(value: float, low: float, high: float, confidence: float) -> str:
    decimals = max(3, decimals_of(low, high))
    return (
        f"{signed(value, decimals)} ({confidence:.0%}: {signed(low, decimals)} to {signed(high, decimals)})"
    )


def _costs(before: State, after: State) -> Changes:
    old, new = (
        {
            (cost["variant"], cost["metric"]): cost
            for cost in state.comparison["cost"]
            if cost["metric"] in COSTS
        }
        for state in (before, after)
    )
    rows = []
    for key in dict.fromkeys([*old, *new]):
        costs = [old.get(key), new.get(key)]
        values = [NOTHING if cost is None else quantity(cost["value"], cost["unit"]) for cost in costs]
        change = NOTHING if None in costs else ratio(costs[1]["value"] / costs[0]["value"])
        variant, metric = key
        rows.append((variant, metric.replace("_", " "), *values, change))
    devices = [_devices(state.comparison) for state in (before, after)]
    note = "" if devices[0] == devices[1] else f"Before on {devices[0]}, after on {devices[1]}."
    return Changes("Cost", ("variant", "measured", "before", "after", "after / before"), rows, note)


def _devices(comparison: dict) -> str:
    names = (precision["device_name"] for precision in comparison["precisions"].values())
    return " and ".join(dict.fromkeys(names))


def _notes(margin: float | None, unit: str, *, unpaired: bool) -> str:
    notes = ["Verdicts here are tests of their own, not corrected for their number."]
    if margin is not None:
        notes.append(f"Equivalent means shown to be smaller than {margin:g} {unit}.")
    if unpaired:
        notes.append(
            "A change has no interval where the two have no items and seeds in common, or where the items of a "
            "commit are not in DVC's cache (`dvc fetch --all-commits` gets them from a remote)."
        )
    return " ".join(notes)


def _table(changes: Changes) -> str:
    if not changes.rows:
        return ""
    rows = [
        [Code(cell) if changes.code and cell != NOTHING else cell for cell in row] for row in changes.rows
    ]
    return markdown.table(changes.head, rows)


def main() -> None:
    """Print the changes. Exit with one sentence and code 1 on a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.diff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("revision", help="a commit, tag or branch")
    parser.add_argument("to", nargs="?", help="another one, in place of the workspace")
    options = parser.parse_args()
    try:
        with faults.as_user_errors():
            after = at_revision(options.to) if options.to else in_workspace()
            print(diff(at_revision(options.revision), after), end="")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
