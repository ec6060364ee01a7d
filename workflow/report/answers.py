"""Written answers: which rows the page shows, the winner of each, and the words in which answers differ."""

import random
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import pandas as pd

from workflow import params, precisions
from workflow.report.formatting import clean
from workflow.runtime.files import read_jsonl
from workflow.runtime.forms import AS_TRAINED, BASE, MERGED_16BIT
from workflow.runtime.paths import COMPARE, evaluate_base_folder, evaluate_folder

TASK = "holdout_generation"
ITEMS = COMPARE / "items.parquet"
METRICS = ("rouge_l", "chrf")  # the first that was measured decides the winner
SAMPLED, DISAGREEING = 12, 8  # most rows of each kind on the page
MANY_ARMS = 8  # with more models that answered, half as many rows
MOST_MERGED = 4  # with more variants, only the first quantized one is also shown merged
TIE = "tie"
WORDS = re.compile(r"\s+|[^\s]+")


@dataclass(frozen=True)
class Arm:
    """A model that answered: a variant's untouched base, or its run with the first seed in a serving form."""

    variant: str
    form: str
    label: str

    @property
    def key(self) -> str:
        return f"{self.variant}/{self.form}"


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a row, or the dataset's response.

    Attributes:
        arm: None for the dataset's own response.
        pieces: the text in pieces, each with True if it differs from the baseline's answer.
        same: whether it equals the baseline's answer.
        score: similarity to the dataset's response; None if it was not measured.
    """

    arm: Arm | None
    label: str
    text: str
    stopped: bool | None
    pieces: list[tuple[str, bool]]
    same: bool
    score: float | None


@dataclass(frozen=True)
class Row:
    """A test row with all answers."""

    id: int
    instruction: str
    context: str
    category: str | None
    answers: list[Answer]
    winner: str  # an arm's key or `tie`; empty without scores
    sampled: bool
    disagreeing: bool  # among the rows on which the trained runs differ most


@dataclass(frozen=True)
class Answers:
    """The answers on the page.

    Attributes:
        metric: decides the winners; None if none was measured.
        answered: the number of rows that all arms answered.
    """

    arms: list[Arm]
    baseline: str
    metric: str | None
    rows: list[Row]
    answered: int
    seed: int  # of the sample


def files(settings: params.Params) -> list[Path]:
    """The files that the answers are read from."""
    experiment = settings.experiment
    folders = [evaluate_base_folder(experiment.baseline)]
    folders += [evaluate_folder(name, experiment.seeds[0]) for name in experiment.variants]
    scores = [ITEMS] if TASK in settings.evaluation.tasks else []
    return [folder / "answers.jsonl" for folder in folders] + scores


def read(settings: params.Params, labels: dict[str, str]) -> Answers:
    """Read a random sample of the rows that all arms answered, and the rows with the largest disagreement."""
    arms = _arms(settings, labels)
    answers_by_arm = [_written(settings, arm) for arm in arms]
    ids = [key for key in answers_by_arm[0] if all(key in rows for rows in answers_by_arm)]
    metric, scores = _scores(settings, arms) if ids else (None, {})
    baseline = f"{settings.experiment.baseline}/{AS_TRAINED}"
    seed = settings.comparison.seed
    most_sampled, most_disagreeing = (
        most if len(arms) <= MANY_ARMS else most // 2 for most in (SAMPLED, DISAGREEING)
    )
    sampled = set(random.Random(seed).sample(sorted(ids), min(most_sampled, len(ids))))
    trained = [place for place, arm in enumerate(arms) if arm.form == AS_TRAINED]
    distance = {
        key: _distance(key, [arms[p] for p in trained], [answers_by_arm[p] for p in trained], scores)
        for key in ids
    }
    disagreements = sorted(
        (key for key in ids if distance[key] > (0, 0)), key=lambda key: distance[key], reverse=True
    )
    disagreeing = set(disagreements[:most_disagreeing])
    return Answers(
        arms=arms,
        baseline=baseline,
        metric=metric,
        rows=[
            _row(
                key,
                arms,
                [rows[key] for rows in answers_by_arm],
                scores,
                baseline,
                key in sampled,
                key in disagreeing,
            )
            for key in ids
            if key in sampled or key in disagreeing
        ],
        answered=len(ids),
        seed=seed,
    )


def _arms(settings: params.Params, labels: dict[str, str]) -> list[Arm]:
    """The baseline's untouched base, each variant as trained, and quantized variants merged."""
    experiment = settings.experiment
    seed = experiment.seeds[0]
    arms = [Arm(experiment.baseline, BASE, "Untouched base")]
    quantized = [
        name for name in experiment.variants if precisions.get(settings.variants[name].precision).is_quantized
    ]
    merged_variants = quantized if len(experiment.variants) <= MOST_MERGED else quantized[:1]
    for name in experiment.variants:
        arms.append(Arm(name, AS_TRAINED, f"{labels[name]}, seed {seed}"))
        merged = [form for form in settings.forms_of(name) if form != AS_TRAINED]
        if name in merged_variants and merged:
            form = MERGED_16BIT if MERGED_16BIT in merged else merged[0]
            words = "merged" if form == MERGED_16BIT else form.replace("_", " ")
            arms.append(Arm(name, form, f"{labels[name]}, {words}, seed {seed}"))
    return arms


def _written(settings: params.Params, arm: Arm) -> dict[int, dict]:
    seed = settings.experiment.seeds[0]
    folder = evaluate_base_folder(arm.variant) if arm.form == BASE else evaluate_folder(arm.variant, seed)
    return {row["id"]: row for row in read_jsonl(folder / "answers.jsonl") if row["form"] == arm.form}


def _scores(settings: params.Params, arms: list[Arm]) -> tuple[str | None, dict[tuple[str, int], float]]:
    """The metric that decides the winners, and each answer's score by arm and row."""
    if TASK not in settings.evaluation.tasks:
        return None, {}
    columns = ["metric", "item", "numerator", "denominator", "variant", "seed", "form"]
    items = pd.read_parquet(ITEMS, columns=columns, filters=[("task", "==", TASK), ("metric", "in", METRICS)])
    metric = next((metric for metric in METRICS if (items["metric"] == metric).any()), None)
    seed = settings.experiment.seeds[0]
    chosen = items[(items["metric"] == metric) & (items["seed"].isna() | (items["seed"] == seed))]
    keys = {arm.key for arm in arms}
    return metric, {
        (key, int(item)): numerator / denominator
        for key, item, numerator, denominator in zip(
            chosen["variant"] + "/" + chosen["form"],
            chosen["item"],
            chosen["numerator"],
            chosen["denominator"],
            strict=True,
        )
        if key in keys
    }


def _distance(
    key: int, arms: list[Arm], answers_by_arm: list[dict[int, dict]], scores: dict[tuple[str, int], float]
) -> tuple[float, float]:
    """The disagreement of the trained runs on a row: in scores first, then in words."""
    values = [scores[arm.key, key] for arm in arms if (arm.key, key) in scores]
    texts = [WORDS.findall(rows[key]["answer"]) for rows in answers_by_arm]
    dissimilarity = max(
        (1 - SequenceMatcher(None, texts[0], text, autojunk=False).quick_ratio() for text in texts[1:]),
        default=0.0,
    )
    return (max(values) - min(values) if values else 0.0, dissimilarity)


def _row(
    key: int,
    arms: list[Arm],
    rows: list[dict],
    scores: dict[tuple[str, int], float],
    baseline: str,
    sampled: bool,
    disagreeing: bool,
) -> Row:
    first = rows[0]
    baseline_answer = clean(
        next(row["answer"] for arm, row in zip(arms, rows, strict=True) if arm.key == baseline)
    )
    response = clean(first["response"])
    answers = [Answer(None, "Reference", response, None, [(response, False)], False, None)]
    for arm, row in zip(arms, rows, strict=True):
        text = clean(row["answer"])
        is_baseline = arm.key == baseline
        answers.append(
            Answer(
                arm=arm,
                label=arm.label,
                text=text,
                stopped=row["stopped"],
                pieces=[(text, False)] if is_baseline or arm.form == BASE else marked(baseline_answer, text),
                same=text == baseline_answer and not is_baseline,
                score=scores.get((arm.key, key)),
            )
        )
    return Row(
        id=key,
        instruction=clean(first["instruction"]),
        context=clean(_context(first)),
        category=first["category"] and clean(first["category"]),
        answers=answers,
        winner=_winner(answers),
        sampled=sampled,
        disagreeing=disagreeing,
    )


def _context(row: dict) -> str:
    """A row's context, or the earlier turns of its conversation."""
    turns = (f"{turn['role']}: {turn['content']}" for turn in row.get("earlier", []))
    return "\n\n".join(turns) or row["context"]


def _winner(answers: list[Answer]) -> str:
    scored = [answer for answer in answers if answer.arm and answer.score is not None]
    if not scored:
        return ""
    best = max(answer.score for answer in scored)
    won = [answer.arm.key for answer in scored if best - answer.score < 1e-9]
    return won[0] if len(won) == 1 else TIE


def marked(before: str, after: str) -> list[tuple[str, bool]]:
    """The text `after` in pieces, each with True if `before` has other words in its place."""
    ours, theirs = WORDS.findall(after), WORDS.findall(before)
    pieces: list[tuple[str, bool]] = []
    for tag, _, _, start, end in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        text = "".join(ours[start:end])
        if text:
            pieces.append((text, tag != "equal"))
    return _bridged(pieces)


def _bridged(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """With one piece of two that differ and have nothing but a space between them."""
    bridged: list[tuple[str, bool]] = []
    for text, differs in pieces:
        between = len(bridged) > 1 and differs and bridged[-2][1] and bridged[-1][0].isspace()
        if between:
            (before, _), (space, _) = bridged[-2:]
            bridged[-2:] = [(before + space + text, True)]
        else:
            bridged.append((text, differs))
    return bridged
