"""What the task files of this folder need from Python: the test split, and metrics per item.

lm-evaluation-harness loads this file by its path, from the stage and from its own command line alike.
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

from workflow.precisions.load import use_exact_cpu_kernels  # noqa: E402
from workflow.runtime.paths import MODEL, split_file  # noqa: E402

use_exact_cpu_kernels()  # so that the harness' own command computes as the stage does


class Conversation(ConfigurableTask):
    """A task whose prompt may have turns of its own before it, which get their own roles.

    A row without any is put into the chat template as the harness does it.
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
    """The test split, each row with `earlier` turns and `opening`, which most rows have none of."""
    with (ROOT / split_file("test")).open(encoding="utf-8") as lines:
        rows = [{"earlier": [], "opening": "", **json.loads(line)} for line in lines]
    # Another response to the same prompt comes after all prompts, so that the first so many items differ.
    seen: Counter[str] = Counter()
    ranked = []
    for position, row in enumerate(rows):
        ranked.append((seen[whole_prompt(row)], position))
        seen[whole_prompt(row)] += 1
    return [rows[position] for _, position in sorted(ranked)]


def whole_prompt(row: dict) -> str:
    return json.dumps([row["earlier"], row["prompt"]])


def scored_response(doc: dict) -> str:
    """What follows the prompt in training, up to the end of the response."""
    return doc["opening"] + doc["response"]


def scored_choices(doc: dict) -> list[str]:
    return [doc["opening"] + choice for choice in doc["choices"]]


def test_split(**_) -> dict[str, Dataset]:
    """Every test row, with what workflow/data/choices.py added to it."""
    return {"test": Dataset.from_list(test_rows())}


def prompts(answer_tokens: int = 0, **_) -> dict[str, Dataset]:
    """Each prompt of the test split once: a greedy answer would be the same again.

    Args:
        answer_tokens: the longest answer, in tokens: the harness' `--metadata` says it.
    """
    rows = list({whole_prompt(row): row for row in reversed(test_rows())}.values())[::-1]
    return {"test": Dataset.from_list([{**row, "answer_tokens": answer_tokens} for row in rows])}


def response_loss(doc: dict, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Numerator and denominator of each metric, for one row.

    The harness moves whitespace that ends the chat prompt into what it scores, so the numerator has
    the (almost certain) newline before the response in it; the denominator counts the response alone.
    """
    ((log_likelihood, _),) = results
    return {
        "nats_per_token": (-log_likelihood, doc["response_tokens"]),
        "bits_per_byte": (-log_likelihood / math.log(2), doc["response_bytes"]),
    }


def sum_ratio(items: list[tuple[float, int]]) -> float:
    """The sum of all rows' numerators divided by that of their denominators: each token counts alike."""
    return math.fsum(numerator for numerator, _ in items) / sum(denominator for _, denominator in items)


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / MODEL, trust_remote_code=False)


def answer_metrics(doc: dict, results: list[str]) -> dict[str, float]:
    """How near a greedy answer is to the reference, and whether the model ended it by itself.

    ROUGE-L (Lin, 2004) is the F-measure of the longest common subsequence of words, 0 to 1; chrF (Popovic,
    2015) is sacrebleu's chrF2 of the sentence, 0 to 100. The harness hands on text and not tokens, so an
    answer has ended by itself if its text has fewer tokens than an answer may have.
    """
    (answer,) = results
    tokens = len(tokenizer()(answer, add_special_tokens=False)["input_ids"])
    if doc.get("opening"):  # the model has learned to write it, and the reference has none
        answer = answer.strip().removeprefix(doc["opening"].strip())
    return {
        "rouge_l": RougeScorer(["rougeL"]).score(doc["response"], answer)["rougeL"].fmeasure,
        "chrf": sentence_chrf(answer, [doc["response"]]).score,
        "ended": float(tokens < doc["answer_tokens"]),
        "length": float(tokens),
    }
