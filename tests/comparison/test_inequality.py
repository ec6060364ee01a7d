"""Groups that weigh or differ unequally: each end's own tail, the warning, and the guard of equivalence.

Each bound holds for these fixed draws. docs/statistics.md has the table of a larger simulation.
"""

import dataclasses
import math

import made_up_scores
import numpy as np
import pytest
from made_up_scores import LOSS, ask, items_of, write_results
from scipy import optimize, stats

from workflow import params
from workflow.comparison import compare
from workflow.comparison.inference import (
    GUARD,
    Bootstrap,
    Difference,
    difference,
    equivalence,
    may_cover_too_little,
)
from workflow.comparison.results import Results
from workflow.comparison.sentences import inequality_sentence
from workflow.comparison.weights import weigh_rows
from workflow.runtime.forms import AS_TRAINED

BOOTSTRAP = Bootstrap(confidence=0.95, power=0.8, resamples=300, seed=1)
STUDIES, MARGIN = 600, 20.0
NOISE = 2 * math.sqrt(0.05 * 0.95 / STUDIES)


def lognormal(random: np.random.Generator, groups: int) -> np.ndarray:
    """Skewed differences with mean 0 and variance 1."""
    values = np.exp(random.normal(size=groups))
    return (values - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def studies(groups: int, *, tokens: float) -> list[Difference]:
    """Studies of one seed whose true difference is 0; `tokens` is the standard deviation of the log of a row's tokens."""
    random, estimates = np.random.default_rng(3), []
    for number in range(STUDIES):
        denominators = np.maximum(1, np.round(np.exp(random.normal(4, tokens, groups))))
        numerators = denominators * lognormal(random, groups)
        bootstrap = dataclasses.replace(BOOTSTRAP, seed=number)
        estimates.append(difference(numerators[np.newaxis], denominators, np.arange(groups), bootstrap))
    return estimates


@pytest.mark.parametrize(
    ("groups", "tokens", "fewest"), [(30, 0.0, 0.92), (60, 0.0, 0.92), (60, 1.0, 0.91)], ids=str
)
def test_lognormal_differences_are_covered_less_and_are_not_called_equivalent_more(groups, tokens, fewest):
    """The sample that lacks the tail looks precise: without its guard, equivalence would be claimed twice as often."""
    estimates = studies(groups, tokens=tokens)
    covered = np.mean([estimate.low <= 0 <= estimate.high for estimate in estimates])
    symmetric = np.mean([_symmetric(estimate) for estimate in estimates])
    at_margin = [
        equivalence(dataclasses.replace(estimate, value=estimate.value + MARGIN), margin=MARGIN).p_value
        for estimate in estimates
    ]
    warned = np.array([may_cover_too_little(estimate) for estimate in estimates])
    unguarded = np.mean(np.where(warned, np.array(at_margin) / GUARD, at_margin) < 0.05)
    wrong = np.mean(np.array(at_margin) < 0.05)
    print(
        f"covered {covered:.3f} (symmetric {symmetric:.3f}), warned {warned.mean():.2f}, wrong {wrong:.3f} ({unguarded:.3f})"
    )
    assert fewest <= covered and covered > symmetric
    assert wrong <= 0.05 + NOISE < unguarded
    assert warned.mean() > 0.9


def _symmetric(estimate: Difference) -> bool:
    """Whether an interval of equal halves, with the degrees of freedom of the narrower one, covers zero."""
    half = min(estimate.high - estimate.value, estimate.value - estimate.low)
    return abs(estimate.value) <= half


def test_each_end_has_the_freedom_of_its_own_tail():
    """Against a bootstrap-t written out, with each resample's own linearized standard error."""
    random = np.random.default_rng(5)
    groups, resamples = 40, 4000
    sizes = np.round(np.exp(random.normal(3, 0.5, groups))) + 1
    sums = sizes * random.exponential(size=groups)
    estimate = difference(
        sums[np.newaxis], sizes, np.arange(groups), dataclasses.replace(BOOTSTRAP, resamples=20_000)
    )
    statistics = []
    for _ in range(resamples):
        chosen = random.integers(groups, size=groups)
        ratio = sums[chosen].sum() / sizes[chosen].sum()
        rest = sums[chosen] - ratio * sizes[chosen]
        error = math.sqrt((rest**2).sum() * groups / (groups - 1)) / sizes[chosen].sum()
        statistics.append((ratio - estimate.value) / error)
    low, high = (-np.quantile(statistics, 0.05), np.quantile(statistics, 0.95))
    freedom = optimize.brentq(lambda f: stats.t.ppf(0.95, f) - low, 1.5, 200)
    assert low > high  # the sample's long tail is on the side of the truth above the estimate
    assert estimate.high_freedom == pytest.approx(freedom, rel=0.35)
    assert stats.t.ppf(0.95, estimate.high_freedom) == pytest.approx(low, rel=0.04)
    assert estimate.high - estimate.value > estimate.value - estimate.low
    assert estimate.low_freedom > estimate.high_freedom


def test_how_unequal_the_groups_are():
    random = np.random.default_rng(6)
    labels = np.repeat(np.arange(25), 2)
    denominators, numerators = random.integers(1, 50, 50).astype(float), random.exponential(size=(2, 50))
    estimate = difference(numerators, denominators, labels, BOOTSTRAP)
    sizes = denominators.reshape(25, 2).sum(axis=1)
    sums = numerators.mean(axis=0).reshape(25, 2).sum(axis=1)
    parts = sums - sums.sum() / sizes.sum() * sizes
    assert estimate.effective_groups == pytest.approx(1 / np.sum((sizes / sizes.sum()) ** 2))
    assert estimate.largest_weight == pytest.approx(max(sizes) / sum(sizes))
    assert estimate.largest_share == pytest.approx(max(parts**2) / sum(parts**2))
    assert estimate.skewness == pytest.approx(stats.skew(parts))
    same = difference(np.zeros((1, 50)), denominators, labels, BOOTSTRAP)
    assert (same.largest_share, same.skewness) == (0, 0)


def test_where_an_interval_may_be_too_narrow_it_is_said_and_equivalence_asks_for_more():
    values = np.random.default_rng(8).normal(size=200)
    even = difference(values[np.newaxis], np.ones(200), np.arange(200), BOOTSTRAP)
    skewed = difference(np.exp(values)[np.newaxis], np.ones(200), np.arange(200), BOOTSTRAP)
    few = difference(values[np.newaxis, :20], np.ones(20), np.arange(20), BOOTSTRAP)
    answers = difference(
        (np.arange(200) < 4)[np.newaxis].astype(float), np.ones(200), np.arange(200), BOOTSTRAP, span=1.0
    )
    older = dataclasses.replace(skewed, skewness=None)
    assert [may_cover_too_little(d) for d in (even, skewed, few, answers, older)] == [
        False, True, True, False, False,
    ]  # fmt: skip
    assert inequality_sentence(even) is None
    assert (
        f"weigh like 200, one of them makes {100 * skewed.largest_share:.0f} % of the variance, and the skewness is "
        f"{skewed.skewness:.1f}." in inequality_sentence(skewed)
    )
    guarded, plain = (equivalence(d, margin=3.0) for d in (skewed, older))
    assert guarded.p_value == pytest.approx(GUARD * plain.p_value)
    assert (guarded.confidence, plain.confidence) == (pytest.approx(0.975), pytest.approx(0.9))
    assert guarded.low < plain.low < plain.high < guarded.high
    reached = max(abs(guarded.low), abs(guarded.high))
    assert equivalence(skewed, margin=reached).p_value == pytest.approx(0.05)


def test_the_weights_of_the_rows_and_those_longer_than_any_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path)
    settings = ask(tmp_path, training__step__max_length=30)
    frame = items_of("lora_16bit", AS_TRAINED, 1)
    tokens = frame[frame["task"] == "holdout_loss"]["denominator"].to_numpy()
    weights = weigh_rows(Results(settings), settings)
    assert weights.rows == len(tokens)
    assert weights.effective_rows == pytest.approx(1 / np.sum((tokens / tokens.sum()) ** 2))
    assert weights.largest_share == pytest.approx(tokens.max() / tokens.sum())
    assert (weights.longer_rows, weights.max_length) == (np.sum(tokens > 30), 30)
    assert weights.longer_share == pytest.approx(tokens[tokens > 30].sum() / tokens.sum())


def test_the_baseline_is_compared_with_itself_where_there_are_seeds_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(made_up_scores, "SEEDS", [1, 2, 3, 4])
    write_results(tmp_path)
    compared, _ = compare.compare(params.load())
    controls = [c for c in compared.contrasts if c.kind == "control"]
    (loss,) = (c for c in controls if f"{c.task}/{c.metric}" == LOSS)
    means = []
    for seed in (1, 2, 3, 4):
        frame = items_of("lora_16bit", AS_TRAINED, seed)
        frame = frame[frame["task"] == "holdout_loss"]
        means.append(frame["numerator"].sum() / frame["denominator"].sum())
    assert loss.difference.value == pytest.approx(np.mean(means[:2]) - np.mean(means[2:]), abs=1e-12)
    assert loss.difference.seeds == 2 and loss.corrected_over == 1
    assert {c.verdict for c in controls} <= {"equivalent", "undecided"}
    assert loss.name == "seeds 1 and 2 less seeds 3 and 4"
    assert "lora_16bit/as_trained with seeds 1 and 2" in loss.sentence
    assert "itself with seeds 3 and 4" in loss.sentence
    few, _ = compare.compare(ask(tmp_path, experiment__seeds=[1, 2, 3]))
    assert not [c for c in few.contrasts if c.kind == "control"]


def test_every_loss_weighted_by_tokens_has_a_twin_by_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path)
    compared, _ = compare.compare(params.load())
    for contrast in compared.contrasts:
        assert bool(contrast.by_rows) == (contrast.metric == "nats_per_token")
    (held_out,) = (
        c
        for c in compared.contrasts
        if (c.kind, c.variant, c.form, c.subset, c.metric)
        == ("to_base", "qlora_nf4_dq", AS_TRAINED, "held_out", "nats_per_token")
    )
    frames = [items_of("qlora_nf4_dq", AS_TRAINED, seed) for seed in made_up_scores.SEEDS]
    frames = [*frames, items_of("qlora_nf4_dq", "base", None)]
    frames = [f[(f["task"] == "holdout_loss") & f["held_out"]] for f in frames]
    *ours, base = [(f["numerator"] / f["denominator"]).mean() for f in frames]
    assert held_out.by_rows.value == pytest.approx(np.mean(ours) - base, abs=1e-12)
