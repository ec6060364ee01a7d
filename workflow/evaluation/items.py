"""From the harness' results to ours: totals, a row per item and metric, answers, and how each task was called."""

import hashlib
import json
from collections.abc import Iterator
from numbers import Real

import pandas as pd
from lm_eval.models.huggingface import HFLM

from workflow import params
from workflow.data.rows import as_row, from_scored_rows
from workflow.evaluation.harness import Call
from workflow.evaluation.results import Metric, TaskRecord

UNITS = {
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
    "acc": "share of items",
    "acc_norm": "share of items",
    "exact_match": "share of items",
    "rouge_l": "ROUGE-L F-measure",
    "chrf": "chrF, 0 to 100",
    "ended": "share of answers",
    "length": "tokens",
}
TOLERANCE = 1e-9  # between the harness' total and that of the items, as a share of the total


def scores(results: dict, task: str) -> tuple[list[Metric], pd.DataFrame]:
    """Return the totals of one task, and a row per item and metric.

    The total of a group is that over all items of its leaf tasks. If the items of a metric do not add up to the
    harness' own total (as for perplexity or corpus BLEU), only the total is kept.

    Args:
        results: as the harness returns them.

    Returns:
        The totals, and a table with task, leaf, item, category, held_out, group, metric, numerator and denominator.
        A total is the sum of numerators over the sum of denominators.
    """
    items = pd.DataFrame(
        row for leaf, samples in results["samples"].items() for row in _items(leaf, samples, task, results)
    )
    metrics = []
    keys = {(m, f): None for leaf in results["samples"] for m, f in _reported(results["results"][leaf])}
    for metric, filter_name in keys:
        name, key = _metric_name(metric, filter_name), f"{metric},{filter_name}"
        leaves = [leaf for leaf in results["samples"] if key in results["results"][leaf]]
        rows = items[items["metric"] == name] if len(items) else items
        adds_up = len(rows) > 0 and all(
            _adds_up(rows[rows["leaf"] == leaf], results["results"][leaf][key]) for leaf in leaves
        )
        if not adds_up:
            items = items[items["metric"] != name] if len(items) else items
            if len(leaves) > 1:
                continue  # several leaf tasks have no common total
        total = results["results"][leaves[0]][key]
        if len(leaves) > 1:
            total = rows["numerator"].sum() / rows["denominator"].sum()
        config = results["configs"][leaves[0]]
        metrics.append(
            Metric(
                task=task,
                metric=name,
                value=float(total),
                unit=UNITS.get(metric, f"{metric}, as the task defines it"),
                higher_is_better=results["higher_is_better"][leaves[0]].get(metric),
                split=config.get("test_split") or config.get("validation_split"),
                items=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                per_item=adds_up,
            )
        )
    return metrics, items


def _reported(values: dict) -> Iterator[tuple[str, str]]:
    """Yield metric and filter of each total that the harness reports."""
    for key in values:
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filter_name


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric}_{filter_name}"


def _adds_up(rows: pd.DataFrame, total: float) -> bool:
    """Whether the items give the harness' total."""
    if not len(rows):
        return False
    difference = abs(rows["numerator"].sum() / rows["denominator"].sum() - total)
    return difference <= TOLERANCE * max(1, abs(total))


def _items(leaf: str, samples: list[dict], task: str, results: dict) -> Iterator[dict]:
    own = task in params.OWN_TASKS
    is_group = len(results["samples"]) > 1
    for sample in samples:
        doc = sample["doc"]
        columns = {
            "task": task,
            "leaf": leaf,
            "item": str(doc["id"]) if own else str(sample["doc_id"]),
            "category": doc["category"] if own else leaf if is_group else None,
            "held_out": doc["held_out"] if own else None,
            # Items with the same instruction, or the same prompt, are not independent.
            "group": from_scored_rows([doc])[0].group if own else sample["prompt_hash"],
        }
        for metric in sample["metrics"]:
            if ratio := _ratio(sample[metric]):
                name = _metric_name(metric, sample["filter"])
                yield {**columns, "metric": name, "numerator": ratio[0], "denominator": ratio[1]}


def _ratio(value: object) -> tuple[float, float] | None:
    """Return an item's score as numerator and denominator; None if it is not a number."""
    match value:
        case Real():
            return float(value), 1.0
        case (Real(), Real()) if isinstance(value, tuple):
            return float(value[0]), float(value[1])
        case list() if value and all(isinstance(part, Real) for part in value):
            return float(sum(value)), float(len(value))
    return None


def answers_of(results: dict) -> list[dict]:
    """Return the greedy answers, each with its row and whether the model ended it by itself."""
    return [
        {
            **as_row(from_scored_rows([sample["doc"]])[0]),
            "answer": sample["filtered_resps"][0]
            .strip()
            .removeprefix(sample["doc"]["opening"].strip())
            .strip(),
            "stopped": bool(sample["ended"]),
        }
        for samples in results["samples"].values()
        for sample in samples
    ]


def task_record(call: Call, results: dict, language_model: HFLM, *, prompts_cut: int) -> TaskRecord:
    """Record how the harness was called for a task, and which version of the task it was."""
    leaves = list(results["samples"])
    first_prompt = results["samples"][leaves[0]][0]["arguments"][0][0]
    beginning = language_model.tok_encode(first_prompt)[:4]
    return TaskRecord(
        task=call.task,
        leaves=leaves,
        version=str(results["versions"][leaves[0]]),
        items=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
        few_shot=results["n-shot"][leaves[0]],
        chat_template=call.chat_template,
        items_sha256=items_sha256(results),
        bos_per_prompt=sum(token == language_model.tokenizer.bos_token_id for token in beginning),
        prompts_cut=prompts_cut,
    )


def items_sha256(results: dict) -> str:
    """Return the sha256 of everything that a task asks a model and scores it by: ids, prompts, targets."""
    items = sorted(
        json.dumps(
            [leaf, sample["doc_id"], sample["arguments"], sample["target"]], sort_keys=True, default=str
        )
        for leaf, samples in results["samples"].items()
        for sample in samples
    )
    return hashlib.sha256("\n".join(items).encode()).hexdigest()
