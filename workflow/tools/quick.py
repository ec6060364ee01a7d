"""Measure in minutes what quantizing a base costs before any training, and estimate what would be left after it.

    .venv/bin/dvc repro fetch_model sample
    python -m workflow.quick

Scores the untouched base of params.yaml on rows of its test split, in 16 bits and in each quantized precision that this machine
can load. What is left after training is estimated by the ratio of the two gaps in the published studies. A study measures it.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from workflow import params, precisions
from workflow.cost.memory import GIB, Shape
from workflow.cost.plan import read_shape
from workflow.precisions.base import Precision
from workflow.runtime import markdown, outputs
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_jsonl, write_text
from workflow.runtime.forms import BASE
from workflow.runtime.paths import MODEL, split_file
from workflow.runtime.stage import offline_command, say
from workflow.tools.arguments import at_least
from workflow.tools.trained_ratios import Expected, TrainedRatio, expected, trained_ratios

if TYPE_CHECKING:  # they take seconds to import
    from workflow.comparison.inference import Difference
    from workflow.tools.losses import Loss

MATRIX_ROWS, MATRIX_SECONDS = 512, 0.5  # of the products that are timed


@dataclass(frozen=True)
class UntrainedBase:
    """An untouched base in one precision: its loss, its gap to 16 bits, and what would be left of the gap after training."""

    label: str
    loss: "Loss"
    gap: "Difference"
    expected: Expected


def runs_of(settings: params.Params, names: list[str]) -> Iterator[params.Run]:
    """Yield the untouched base in each quantized precision, and again with double quantization where it exists.

    Args:
        names: of precisions; all if there are none.

    Raises:
        UserError: there is no such precision, or it quantizes nothing.
    """
    from workflow.models.rank_layers import variant_of

    for precision in map(precisions.get, names) if names else precisions.TABLE.values():
        if not precision.is_quantized and not names:
            continue
        for double in (False, True)[: 1 + precision.can_be_double_quantized]:
            variant = variant_of(precision, None, double_quantization=double)
            yield params.Run(
                precision.short(variant.quantization), variant, None, settings.training, settings.hardware
            )


def problem(precision: Precision, settings: params.Params) -> str:
    """Why this machine cannot load a base in a precision; empty if it can."""
    from workflow.models.load import check_device, choose_device

    try:
        precisions.check_installed(precision)
        check_device(precision, choose_device(settings.hardware))
    except UserError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Estimate:
    """What the measurement takes: seconds without loading, and GiB of the largest base in memory."""

    seconds: float
    gib: float


def estimate(shape: Shape, settings: params.Params, *, tokens: int, bases: int) -> Estimate:
    """Estimate the forward passes from a product of this model's size that is timed here.

    A pass takes 2 operations per weight and token, the output head's weights included. Other work and padding come on top.

    Args:
        tokens: that are read with each base.
        bases: how many are loaded, that in 16 bits included.
    """
    import torch

    from workflow.models.load import choose_compute, choose_device

    device = choose_device(settings.hardware)
    baseline = settings.variants[settings.experiment.baseline]
    dtype = choose_compute(settings.hardware, baseline, device)
    wide = max(size for sizes in shape.linears.values() for size in sizes)
    left = torch.randn(MATRIX_ROWS, shape.hidden, device=device, dtype=dtype)
    right = torch.randn(shape.hidden, wide, device=device, dtype=dtype)

    def seconds_for(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            product = left @ right
        product.sum().item()  # waits for the device
        return time.perf_counter() - started

    seconds_for(1)
    count = 1
    while (seconds := seconds_for(count)) < MATRIX_SECONDS:
        count *= 2
    rate = count * 2 * MATRIX_ROWS * shape.hidden * wide / seconds
    work = 2 * tokens * (shape.linear_parameters + shape.vocabulary * shape.hidden)
    return Estimate(bases * work / rate, shape.parameters * dtype.itemsize / GIB)


def measure(
    settings: params.Params, runs: list[params.Run], ratios: list[TrainedRatio], *, rows: int
) -> tuple["Loss", list[UntrainedBase]]:
    """Score the base in 16 bits and in each precision.

    Raises:
        CheckError, UserError: as for a serving form.
    """
    from workflow.evaluation.forms import SIXTEEN_BIT
    from workflow.tools import losses

    plain = params.Run(
        "16 bits", runs[0].variant.model_copy(update=SIXTEEN_BIT), None, settings.training, settings.hardware
    )
    started = time.monotonic()
    reference = losses.measure(settings, plain, BASE, rows=rows)
    seconds = time.monotonic() - started
    say(
        f"  16 bits: {reference.value:.4f} nats per token, {seconds:.0f} s; the others take about {len(runs) * seconds:.0f} s"
    )
    bases = []
    for run in runs:
        loss = losses.measure(settings, run, BASE, rows=rows)
        gap = losses.minus(loss, reference, settings, trained=False)
        say(f"  {run.name}: {loss.value:.4f} nats per token")
        left = expected(
            ratios, run.variant.precision, run.variant.quantization, gap=(gap.value, gap.low, gap.high)
        )
        bases.append(UntrainedBase(run.name, loss, gap, left))
    return reference, bases


def table(reference: "Loss", bases: list[UntrainedBase]) -> str:
    """A row for each precision, as Markdown."""
    confidence = f"{100 * bases[0].gap.confidence:.4g} %"
    head = [
        "base",
        "GiB of weights",
        "untrained loss, nats per token, less is better",
        f"minus 16 bits ({confidence} interval)",
        "estimate after training (its ends)",
    ]
    rows = [["16 bits", f"{reference.precision.weights_gib:.3f}", f"{reference.value:.4f}", "", ""]]
    rows += [
        [
            base.label,
            f"{base.loss.precision.weights_gib:.3f}",
            f"{base.loss.value:.4f}",
            f"{base.gap.value:+.4f} ({base.gap.low:+.4f} to {base.gap.high:+.4f})",
            f"{base.expected.value:+.4f} ({base.expected.low:+.4f} to {base.expected.high:+.4f})"
            + ("" if base.expected.is_own else " *"),
        ]
        for base in bases
    ]
    return markdown.table(head, rows, right=[1, 2])


def basis(ratios: list[TrainedRatio], bases: list[UntrainedBase]) -> str:
    """Say what the estimates rest on."""
    studies = "; ".join(_of_a_study(list(found)) for _, found in groupby(ratios, key=lambda r: r.study))
    text = (
        f"The estimate is the gap before training times the share of it that training left in the published studies: {studies}. "
        "It takes the median of the same precision's shares. Its ends are the outermost products of the intervals of both. "
        "They hold for another model only as far as it behaves like that one, which was not measured."
    )
    if any(not base.expected.is_own for base in bases):
        text += " * No study trained on this precision: all shares count."
    return text


def _of_a_study(ratios: list[TrainedRatio]) -> str:
    first = ratios[0]
    shares = ", ".join(f"{r.variant} {r.value:.3f} ({r.low:.3f} to {r.high:.3f})" for r in ratios)
    return f"{first.study} ({first.model}; {first.rows:,} rows, {first.seeds} seeds) {shares}"


def flat_table(reference: "Loss", bases: list[UntrainedBase]) -> pd.DataFrame:
    """A row for each precision, in nats per token."""
    first = {"base": "16 bits", "loss": reference.value, "rows": len(reference.tokens)}
    rows = [
        {
            "base": base.label,
            "loss": base.loss.value,
            "rows": base.gap.items,
            "gap": base.gap.value,
            "low": base.gap.low,
            "high": base.gap.high,
            "confidence": base.gap.confidence,
            "p_value": base.gap.p_value,
            "expected": base.expected.value,
            "expected_low": base.expected.low,
            "expected_high": base.expected.high,
            "ratio_of_this_precision": base.expected.is_own,
        }
        for base in bases
    ]
    return pd.DataFrame([first, *rows])


def tokens_of(rows: list[dict]) -> int:
    """Tokens of the prompts and responses of rows of the test split."""
    from workflow.data.model_files import load_tokenizer

    texts = [row["chat_prompt"] + row["response"] for row in rows]
    encoded = load_tokenizer(MODEL)(texts, add_special_tokens=False)["input_ids"]
    return sum(map(len, encoded))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.quick",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=at_least(2), default=200, help="of the test split (default 200)")
    parser.add_argument(
        "--precisions", nargs="+", default=[], help="quantized ones (default: all that can be loaded)"
    )
    parser.add_argument("--csv", type=Path, help="where the table is written as CSV")
    options = parser.parse_args()
    with offline_command("quick"):
        settings = params.load()
        candidates = list(runs_of(settings, options.precisions))
        ratios = trained_ratios()
        from workflow.tools.losses import check_ready

        check_ready()
        outputs.check_outputs(MODEL, split_file("test"))
        problems = {run.name: problem(precisions.get(run.variant.precision), settings) for run in candidates}
        runs = [run for run in candidates if not problems[run.name]]
        for name, reason in problems.items():
            if reason:
                say(f"{name} is left out: {reason}")
        if not runs:
            raise UserError("this machine can load the base in none of these precisions.")
        rows = read_jsonl(split_file("test"))[: options.rows]
        tokens, (_, _, shape) = tokens_of(rows), read_shape("own")
        cost = estimate(shape, settings, tokens=tokens, bases=1 + len(runs))
        say(
            f"{len(rows)} rows, {tokens:,} tokens, {1 + len(runs)} bases: about {cost.seconds / 60:.1f} minutes of matrix "
            f"products or more, besides loading; {cost.gib:.2f} GiB for the weights of the largest base"
        )
        reference, bases = measure(settings, runs, ratios, rows=options.rows)
        if options.csv:
            write_text(options.csv, flat_table(reference, bases).to_csv(index=False))
    say(f"\n{table(reference, bases)}\n")
    say(basis(ratios, bases))


if __name__ == "__main__":
    main()
