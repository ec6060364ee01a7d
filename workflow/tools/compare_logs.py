"""Compare two models item by item, from the logs of lm-evaluation-harness.

    lm_eval run --model_args pretrained=ONE --tasks piqa --output_path a --log_samples
    lm_eval run --model_args pretrained=OTHER --tasks piqa --output_path b --log_samples
    python -m workflow.compare_logs a b --margin 0.02

For each task and metric: the difference a - b with its paired interval, a test, and a verdict on a by the rule of
docs/statistics.md. Scores of 0 or 1 are tested with McNemar's exact test, all others with a paired t test whose standard
error and degrees of freedom are bootstrapped. Items of one document (--cluster: of one value of a document's field) are drawn
together. Holm's correction is over everything that is compared. Several runs of each, such as one for each training seed:
--a A1 A2 --b B1 B2, paired in this order.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from scipy import special

from workflow.comparison.inference import (
    Bootstrap,
    Difference,
    Equivalence,
    difference,
    equivalence,
    holm,
    level_of,
    paired_accuracy_test,
    verdict,
)
from workflow.comparison.more_data import items_to_detect
from workflow.comparison.sentences import p_text
from workflow.runtime import markdown
from workflow.runtime.errors import UserError, first_of
from workflow.runtime.files import write_json, write_text
from workflow.runtime.stage import offline_command
from workflow.tools import logs
from workflow.tools.arguments import at_least
from workflow.tools.logs import Log, TaskLog
from workflow.tools.totals import scores_of

MCNEMAR, SIGN_FLIPS, PAIRED_T = "McNemar, exact", "sign flips over documents", "paired t, bootstrapped"
MOST_FACTOR = 10**6  # a difference that needs more than so many times the items counts as none


@dataclass(frozen=True)
class Setting:
    """How the logs are compared.

    Attributes:
        margins: of equivalence, by metric, in the metric's unit; the one of "" is for every other metric.
        other_prompts: whether the same items may have been asked in other words.
    """

    bootstrap: Bootstrap
    margins: dict[str, float]
    metrics: list[str]
    other_prompts: bool

    def margin(self, metric: str) -> float | None:
        return self.margins.get(metric, self.margins.get(""))


@dataclass(frozen=True)
class MeasuredDifference:
    """The difference a - b in one metric, before its p values are corrected."""

    task: str
    metric: str
    filter: str
    unit: str
    higher_is_better: bool | None
    a: float  # mean over the runs, in `unit`
    b: float
    difference: Difference
    p_exact: float | None  # of scores of 0 or 1
    equivalence: Equivalence | None

    @property
    def test(self) -> str:
        """What tested it; with one run and one item per document, flips of signs are McNemar's test."""
        if self.p_exact is None:
            return PAIRED_T
        is_mcnemar = self.difference.seeds is None and self.difference.items == self.difference.groups
        return MCNEMAR if is_mcnemar else SIGN_FLIPS

    @property
    def p_value(self) -> float:
        """The larger one of the test and the interval, so that a verdict never contradicts its interval."""
        return max(self.difference.p_value, self.p_exact or 0.0)


@dataclass(frozen=True)
class ComparedMetric:
    """A difference with its verdict on a."""

    measured: MeasuredDifference
    p_adjusted: float
    p_equivalence_adjusted: float | None
    verdict: str
    items_for_difference: int | None  # of an undecided one: see `_items_needed`
    items_for_equivalence: int | None


def compare(a: list[Log], b: list[Log], setting: Setting) -> tuple[list[ComparedMetric], list[str]]:
    """Compare the logs of two models, run by run.

    Args:
        a, b: the runs of each model: as many of one as of the other, or a single run of one of them.

    Returns:
        A difference for each task and metric that both have, and sentences on what was left out.

    Raises:
        UserError: they have no task in common, or other items or prompts in a task.
    """
    every = [*a, *b]
    tasks = [task for task in a[0].tasks if all(task in log.tasks for log in every)]
    if not tasks:
        raise UserError(
            f"{a[0].path} and {b[0].path} have no task in common: "
            f"{first_of(list(a[0].tasks))} and {first_of(list(b[0].tasks))}."
        )
    notes = [note for log in every for note in log.notes]
    alone = {task: None for log in every for task in log.tasks if task not in tasks}
    notes += [f"{task} is left out: not every log has it." for task in alone]
    measured = []
    for task in tasks:
        task_logs = [log.tasks[task] for log in every]
        logs.check_same_items(task_logs, [log.path for log in every], other_prompts=setting.other_prompts)
        for key in dict.fromkeys(key for log in task_logs for key in log.totals):
            if setting.metrics and key[0] not in setting.metrics:
                continue
            result = _measure(task_logs[: len(a)], task_logs[len(a) :], key, setting)
            if isinstance(result, str):
                notes.append(result)
            else:
                measured.append(result)
    if not measured:
        raise UserError(f"there is nothing to compare. {' '.join(notes)}")
    return _judge(measured, setting), list(dict.fromkeys(notes))


def _measure(a: list[TaskLog], b: list[TaskLog], key: logs.Key, setting: Setting) -> MeasuredDifference | str:
    """Take the difference in one metric, or say in a sentence why there is none."""
    name = f"{a[0].task}: {_name(*key)}"
    every = [*a, *b]
    if missing := [log for log in every if key not in log.totals or key not in log.scores]:
        return f"{name} is left out: {len(missing)} of the {len(every)} logs have no score of each item."
    scores = scores_of([(log.scores[key], log.totals[key]) for log in every], key[0])
    if scores is None:
        return f"{name} is left out: it is no mean of the items' scores."
    items = a[0].items
    if items["cluster"].nunique() < 2:
        return f"{name} is left out: an interval needs at least two documents."
    rows, other_rows = scores.numerators[: len(a)], scores.numerators[len(a) :]
    differences = rows - other_rows  # a single run of one model is subtracted from, or by, each of the other
    measured = difference(
        differences,
        scores.denominators,
        items["cluster"].to_numpy(),
        setting.bootstrap,
        trained=len(differences) > 1,
        span=scores.span,
    )
    p_exact = None
    if scores.is_accuracy:
        p_exact = paired_accuracy_test(
            differences,
            items["cluster"].to_numpy(),
            resamples=setting.bootstrap.resamples,
            seed=setting.bootstrap.seed,
        )
    margin = setting.margin(key[0])
    total = scores.denominators.sum()
    return MeasuredDifference(
        task=a[0].task,
        metric=key[0],
        filter=key[1],
        unit=scores.unit,
        higher_is_better=a[0].higher_is_better.get(key[0]),
        a=float(rows.sum(axis=1).mean() / total),
        b=float(other_rows.sum(axis=1).mean() / total),
        difference=measured,
        p_exact=p_exact,
        equivalence=equivalence(measured, margin=margin) if margin else None,
    )


def _name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def _judge(measured: list[MeasuredDifference], setting: Setting) -> list[ComparedMetric]:
    """Correct the p values for each other, and give each difference its verdict."""
    adjusted = holm([one.p_value for one in measured])
    tests = [one.equivalence for one in measured]
    corrected = iter(holm([test.p_value for test in tests if test]))
    compared = []
    for one, p_adjusted, test in zip(measured, adjusted, tests, strict=True):
        p_equivalence = next(corrected) if test else None
        word = verdict(
            one.difference,
            p_adjusted=p_adjusted,
            p_equivalence=p_equivalence,
            higher_is_better=one.higher_is_better is not False,
        )
        if one.higher_is_better is None:  # the harness does not say which direction is the better one
            word = {"better": "higher", "worse": "lower"}.get(word, word)
        needed = _items_needed(one, setting, len(measured)) if word == "undecided" else (None, None)
        compared.append(ComparedMetric(one, p_adjusted, p_equivalence, word, *needed))
    return compared


def _items_needed(
    measured: MeasuredDifference, setting: Setting, tests: int
) -> tuple[int | None, int | None]:
    """How many items like these would decide with the set power.

    Each of `tests` is taken at its share of the level, which is as strict as Holm's correction can be. A standard error falls
    with the square root of the number of items. Runs are left as they are, so there is no number where their variance was
    measured.

    Returns:
        The items to find a difference of the measured size; and those to find equivalence if there is no difference, which
        needs margin = (z of 1 - level, plus z of (1 + power) / 2) standard errors (Schuirmann 1987).
    """
    d, power, level = measured.difference, setting.bootstrap.power, level_of(measured.difference) / tests
    if d.seed_share or not d.standard_error:
        return None, None
    items = None
    if d.value:
        items = items_to_detect(d, abs(d.value), power=power, level=level, most_factor=MOST_FACTOR)
    if not measured.equivalence:
        return items, None
    errors = special.ndtri(1 - level) + special.ndtri((1 + power) / 2)
    return items, math.ceil(d.items * (d.standard_error * errors / measured.equivalence.margin) ** 2)


HEAD = ["task", "metric", "items", "a", "b", "a - b", "interval", "test", "p", "p (Holm)", "verdict on a", "what would decide"]  # fmt: skip


def table(compared: list[ComparedMetric], setting: Setting) -> str:
    """The comparison as a Markdown table."""
    head = [*HEAD]
    head[6] = f"{100 * setting.bootstrap.confidence:.4g} % interval"
    return markdown.table(head, map(_cells, compared), right=[2, 3, 4, 5, 8, 9])


def _cells(compared: ComparedMetric) -> list[str]:
    one, d = compared.measured, compared.measured.difference
    direction = {True: ", more is better", False: ", less is better", None: ""}[one.higher_is_better]
    alpha = level_of(d)
    items = f"{d.items:,}" if d.items == d.groups else f"{d.items:,} of {d.groups:,} documents"
    word = compared.verdict
    if word == "equivalent":
        word += f" within {one.equivalence.margin:g}"
    return [
        one.task,
        f"{_name(one.metric, one.filter)}, {one.unit}{direction}",
        items,
        f"{one.a:.4f}",
        f"{one.b:.4f}",
        f"{d.value:+.4f}",
        f"{d.low:+.4f} to {d.high:+.4f}",
        one.test,
        *(
            p_text(p, alpha).removeprefix("= ").replace("<", "below")
            for p in (one.p_value, compared.p_adjusted)
        ),
        word,
        what_decides(compared),
    ]


def what_decides(compared: ComparedMetric) -> str:
    """What would decide an undecided difference; empty for a decided one."""
    if compared.verdict != "undecided":
        return ""
    ways = []
    if compared.items_for_difference:
        ways.append(f"{_about(compared.items_for_difference)} items, if this is the true difference")
    if compared.items_for_equivalence:
        ways.append(f"{_about(compared.items_for_equivalence)} items for equivalence, if there is none")
    if not ways:
        return (
            "more items or runs"
            if compared.measured.difference.seed_share
            else "a --margin: the two do not differ"
        )
    return "; ".join(ways)


def _about(items: int) -> str:
    """A number of items with two significant figures, as no more are known."""
    return f"{float(f'{items:.2g}'):,.0f}"


def flat_rows(compared: list[ComparedMetric]) -> Iterator[dict]:
    """Yield a flat row for each difference, for CSV and JSON."""
    for result in compared:
        one, d, test = result.measured, result.measured.difference, result.measured.equivalence
        yield {
            "task": one.task,
            "metric": one.metric,
            "filter": one.filter,
            "unit": one.unit,
            "higher_is_better": one.higher_is_better,
            "items": d.items,
            "documents": d.groups,
            "runs": d.seeds or 1,
            "a": one.a,
            "b": one.b,
            "difference": d.value,
            "low": d.low,
            "high": d.high,
            "confidence": d.confidence,
            "standard_error": d.standard_error,
            "degrees_of_freedom": d.degrees_of_freedom,
            "test": one.test,
            "p_interval": d.p_value,
            "p_exact": one.p_exact,
            "p_adjusted": result.p_adjusted,
            "margin": test and test.margin,
            "p_equivalence": test and test.p_value,
            "p_equivalence_adjusted": result.p_equivalence_adjusted,
            "verdict": result.verdict,
            "detectable": d.detectable,
            "items_for_difference": result.items_for_difference,
            "items_for_equivalence": result.items_for_equivalence,
        }


def _margin(text: str) -> tuple[str, float]:
    metric, _, number = text.rpartition("=")
    try:
        margin = float(number)
    except ValueError:
        margin = math.nan
    if not 0 < margin < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]} is neither a number above 0 nor METRIC=NUMBER")
    return metric, margin


def _confidence(text: str) -> float:
    try:
        confidence = float(text)
    except ValueError:
        confidence = math.nan
    if not 0.5 < confidence < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]} is no number between 0.5 and 1")
    return confidence


def _paths(options: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[list[Path], list[Path]]:
    """The logs of a and of b; anything that is no pair ends the command."""
    if len(options.logs) == 2 and not (options.a or options.b):
        return options.logs[:1], options.logs[1:]
    if options.logs or not (options.a and options.b):
        parser.error("name two logs, A and B, or several of each with --a and --b")
    if len(options.a) != len(options.b) and 1 not in (len(options.a), len(options.b)):
        parser.error(
            f"--a names {len(options.a)} runs and --b {len(options.b)}: they are paired in this order, so name as many of "
            "each, or one of either"
        )
    return options.a, options.b


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.compare_logs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "logs", nargs="*", type=Path, help="A and B: folders that lm_eval wrote, or results files"
    )
    parser.add_argument("--a", nargs="+", type=Path, default=[], help="runs of the first model")
    parser.add_argument("--b", nargs="+", type=Path, default=[], help="runs of the other model")
    parser.add_argument("--tasks", nargs="+", default=[], help="to compare (default: all that both have)")
    parser.add_argument("--metrics", nargs="+", default=[], help="to compare (default: all)")
    parser.add_argument(
        "--margin",
        type=_margin,
        action="append",
        default=[],
        help="differences within it are equivalent: a number in the metric's unit, or METRIC=NUMBER; can be given again",
    )
    parser.add_argument(
        "--cluster", help="field of a document by which items are clustered (default: the document)"
    )
    parser.add_argument(
        "--other-prompts", action="store_true", help="compare items that were asked in other words"
    )
    parser.add_argument("--confidence", type=_confidence, default=0.95, help="of intervals (default 0.95)")
    parser.add_argument(
        "--resamples", type=at_least(200), default=10_000, help="bootstrap samples (default 10000)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the bootstrap (default 0)")
    parser.add_argument("--csv", type=Path, help="where the comparison is written as CSV")
    parser.add_argument("--json", type=Path, help="where the comparison is written as JSON")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    a, b = _paths(options, parser)
    setting = Setting(
        bootstrap=Bootstrap(options.confidence, 0.8, options.resamples, options.seed),
        margins=dict(options.margin),
        metrics=options.metrics,
        other_prompts=options.other_prompts,
    )
    with offline_command("compare_logs"):
        read = {path: logs.read(path, tasks=options.tasks, cluster=options.cluster) for path in [*a, *b]}
        compared, notes = compare([read[path] for path in a], [read[path] for path in b], setting)
        rows = list(flat_rows(compared))
        if options.csv:
            write_text(options.csv, pd.DataFrame(rows).to_csv(index=False))
        if options.json:
            sources = {name: [str(path) for path in paths] for name, paths in (("a", a), ("b", b))}
            write_json(options.json, {**sources, "differences": rows, "notes": notes})
    for name, paths in (("a", a), ("b", b)):
        print(f"{name}: {', '.join(f'{path} ({read[path].model})' for path in paths)}")
    print(f"\n{table(compared, setting)}\n")
    for note in [*_closing(compared), *notes]:
        print(note)


def _closing(compared: list[ComparedMetric]) -> list[str]:
    """What the table rests on."""
    alpha = level_of(compared[0].measured.difference)
    several = f", corrected by Holm over the {len(compared)} differences" if len(compared) > 1 else ""
    lines = [
        f"A verdict needs p below {alpha:g}{several}; p is the larger of the test's and the interval's.",
    ]
    if compared[0].measured.difference.seeds is None:
        lines.append(
            "One run of each: how far another training seed would move them is not in the intervals (--a and --b take several)."
        )
    return lines


if __name__ == "__main__":
    main()
