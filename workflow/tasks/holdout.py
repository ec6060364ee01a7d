"""What the task files of this folder need from Python: the test split, and metrics per item.

lm-evaluation-harness loads this file by its path, from the stage and from its own command line alike.
"""

import json
import math
import sys
from pathlib import Path

from datasets import Dataset

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # the harness' own command does not start in the repository
    sys.path.append(str(ROOT))

from workflow.paths import split_file  # noqa: E402
from workflow.precision import use_exact_cpu_kernels  # noqa: E402

use_exact_cpu_kernels()  # so that the harness' own command computes as the stage does


def test_split(**_) -> dict[str, Dataset]:
    with (ROOT / split_file("test")).open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


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
