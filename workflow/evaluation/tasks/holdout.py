"""The Python code of the task files in this folder: the test split, and the metrics of an item.

lm-evaluation-harness loads this file by its path, both in the stage and from its own command line.
"""

import functools
import json
import math
import sys
from collections import Counter
from pathlib import Path

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:  # the harness' own command does not start in the repository
    sys.path.append(str(ROOT))

from workflow.precisions.bnb_4bit import use_exact_cpu_kernels  # noqa: E402
from workflow.runtime.paths import MODEL, split_file  # noqa: E402

use_exact_cpu_kernels()  # so that the harness' own command computes as the stage does


class Conversation(ConfigurableTask):
    """A task whose rows may have earlier turns, each with its own role.

    A row without earlier turns is rendered as the harness does it.
    """

    def __init__(self, config: dict):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(self, doc: dict, num_fewshot: int, **how) -> str | list[str]:
        if not doc["earlier"]:
            return super().fewshot_context(doc, num_fewshot, **how)
        if not how.get("apply_chat_template") or num_fewshot:
            raise ValueError("a conversation needs --apply_chat_template and --num_fewshot 0")
        question = {"role": "user", "content": doc["prompt"]}
        return how["chat_template"]([*doc["earlier"], question])


def test_rows() -> list[dict]:
    """Return the test split, with empty `earlier` turns and `opening` in rows that have none."""
    with (ROOT / split_file("test")).open(encoding="utf-8") as lines:
        rows = [{"earlier": [], "opening": "", **json.loads(line)} for line in lines]
    # Further responses to a prompt come after all prompts, so that the first items have different prompts.
    seen: Counter[str] = Counter()
    ranked = []
    for position, row in enumerate(rows):
        ranked.append((seen[whole_prompt(row)], position))
        seen[whole_prompt(row)] += 1
    return [rows[position] for _, position in sorted(ranked)]


def whole_prompt(row: dict) -> str:
    return json.dumps([row["earlier"], row["prompt"]])


def scored_response(doc: dict) -> str:
    """Return what follows the prompt in training, up to the end of the response."""
    return doc["opening"] + doc["response"]


def scored_choices(doc: dict) -> list[str]:
    return [doc["opening"] + choice for choice in doc["choices"]]


def test_split(**_) -> dict[str, Dataset]:
    """Return every test row, with the fields that workflow/data/choices.py added."""
    return {"test": Dataset.from_list(test_rows())}


def prompts(answer_tokens: int = 0, **_) -> dict[str, Dataset]:
    """Return each prompt of the test split once, since its greedy answer is always the same.

    Args:
        answer_tokens: the length of the longest answer in tokens, from the harness' `--metadata`.
    """
    rows = list({whole_prompt(row): row for row in reversed(test_rows())}.values())[::-1]
    return {"test": Dataset.from_list([{**row, "answer_tokens": answer_tokens} for row in rows])}


def response_loss(doc: dict, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Return numerator and denominator of each metric for one row.

    The harness moves whitespace at the end of the chat prompt into what it scores. The numerator therefore includes
    the (almost certain) newline before the response; the denominator counts the response alone.
    """
    ((log_likelihood, _),) = results
    return {
        "nats_per_token": (-log_likelihood, doc["response_tokens"]),
        "bits_per_byte": (-log_likelihood / math.log(2), doc["response_bytes"]),
    }


def sum_ratio(items: list[tuple[float, int]]) -> float:
    """Return the sum of all numerators over the sum of all denominators, so that each token has the same weight."""
    return math.fsum(numerator for numerator, _ in items) / sum(denominator for _, denominator in items)


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / MODEL, trust_remote_code=False)


def answer_metrics(doc: dict, results: list[str]) -> dict[str, float]:
    """Compare a greedy answer with the reference, and say whether the model ended it by itself.

    ROUGE-L (Lin, 2004) is the F-measure of the longest common subsequence of words, 0 to 1. chrF (Popovic, 2015) is
    sacrebleu's sentence-level chrF2, 0 to 100. The harness passes text and not tokens, so an answer counts as ended if
    its text has fewer tokens than the limit.
    """
    (answer,) = results
    tokens = len(tokenizer()(answer, add_special_tokens=False)["input_ids"])
    if doc.get("opening"):  # the model has learned to write it, but it is not in the reference
        answer = answer.strip().removeprefix(doc["opening"].strip())
    return {
        "rouge_l": RougeScorer(["rougeL"]).score(doc["response"], answer)["rougeL"].fmeasure,
        "chrf": sentence_chrf(answer, [doc["response"]]).score,
        "ended": float(tokens < doc["answer_tokens"]),
        "length": float(tokens),
    }
