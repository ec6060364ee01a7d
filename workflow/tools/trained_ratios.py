"""How much of a quantized base's extra loss was left after training, in the published studies."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workflow import params
from workflow.comparison.contrasts import bootstrap
from workflow.comparison.inference import difference
from workflow.comparison.model import Arm
from workflow.comparison.ratios import ratio
from workflow.comparison.results import table_of
from workflow.precisions.base import Quantization
from workflow.report.labels import model_name
from workflow.runtime.errors import UserError
from workflow.runtime.forms import AS_TRAINED, BASE
from workflow.runtime.paths import COMPARE, PARAMS, RESULTS

STUDIES = RESULTS / "studies"
ITEMS = Path(*COMPARE.parts[1:]) / "items.parquet"  # a published study has no folder `results`
TASK, METRIC = "holdout_loss", "nats_per_token"


@dataclass(frozen=True)
class TrainedRatio:
    """(loss of the trained variant - that of the trained baseline) / (the same of their untouched bases).

    Attributes:
        model: of the study, as its params name it.
        low, high: Fieller's interval over seeds and items.
        rows: that were scored.
    """

    study: str
    model: str
    variant: str
    precision: str
    quantization: Quantization
    value: float
    low: float
    high: float
    confidence: float
    rows: int
    seeds: int


def trained_ratios(folder: Path = STUDIES) -> list[TrainedRatio]:
    """Compute the ratio of each variant that differs from its study's baseline in the precision of its base alone.

    Raises:
        UserError: no study is published there, or none has such a variant.
    """
    ratios = [
        found
        for items in sorted(folder.glob(f"*/{ITEMS}"))
        for found in _ratios_of(
            items, params.load(items.parents[len(ITEMS.parts) - 1] / PARAMS, published=True)
        )
    ]
    if not ratios:
        raise UserError(
            f"{folder} holds no study with a quantized variant that was trained as its baseline was."
        )
    return ratios


def _ratios_of(items: Path, settings: params.Params) -> Iterator[TrainedRatio]:
    frame = pd.read_parquet(items)
    frame = frame[(frame["task"] == TASK) & (frame["metric"] == METRIC)]

    def table(variant: str, form: str):
        return table_of(frame[(frame["variant"] == variant) & (frame["form"] == form)], Arm(variant, form))

    name = settings.experiment.baseline
    baseline = settings.variants[name]
    for other in settings.experiment.variants:
        variant = settings.variants[other]
        if (
            variant.precision == baseline.precision
            or (variant.method, variant.compute_dtype) != (baseline.method, baseline.compute_dtype)
            or settings.training_of(other) != settings.training_of(name)
            or settings.rate_of(other) != settings.rate_of(name)  # chosen for another variant
        ):
            continue
        trained, start = table(name, AS_TRAINED), table(name, BASE)
        gaps = table(other, AS_TRAINED).numerators - trained.numerators
        untrained = np.broadcast_to(table(other, BASE).numerators - start.numerators, gaps.shape)
        about = (trained.denominators, trained.items["group"].to_numpy(), bootstrap(settings.comparison))
        divisor = difference(untrained, *about)
        if found := ratio(gaps, untrained, *about, divisor=divisor):
            yield TrainedRatio(
                study=items.parents[len(ITEMS.parts) - 1].name,
                model=model_name(settings.model),
                variant=other,
                precision=variant.precision,
                quantization=variant.quantization,
                value=found.value,
                low=found.low,
                high=found.high,
                confidence=settings.comparison.confidence,
                rows=divisor.items,
                seeds=len(trained.seeds),
            )


@dataclass(frozen=True)
class Expected:
    """A gap after training that was not measured, as an estimate with its ends, in nats per token."""

    value: float
    low: float
    high: float
    is_own: bool  # whether a study measured the ratio of this very precision


def expected(
    ratios: list[TrainedRatio], precision: str, quantization: Quantization, *, gap: tuple[float, float, float]
) -> Expected:
    """Estimate the gap after training of a base from its gap before.

    The ratio is the median of the same precision's, of which studies with other rows and rates have several, or of all where
    no study has that precision. Its ends are the outermost ones of these. The ends of the estimate are the outermost products
    of the gap's ends and the ratio's, so they are wider than an interval of either.

    Args:
        gap: before training, with the ends of its interval.
    """
    own = [r for r in ratios if (r.precision, r.quantization) == (precision, quantization)]
    used = own or ratios
    value = float(np.median([r.value for r in used]))
    ends = min(r.low for r in used), max(r.high for r in used)
    products = [end * factor for end in gap[1:] for factor in ends]
    return Expected(gap[0] * value, min(products), max(products), bool(own))
