"""Limits: what the numbers do not show."""

from dataclasses import dataclass

from workflow import precisions
from workflow.report import formatting
from workflow.report.english import (
    RANDOM_MODEL,
    TASKS,
    cost_name,
    count,
    cut_of,
    differing_settings,
    energy_sentence,
    float32_variants,
    group_count,
    healing_of,
    listed,
    move_of,
    peak_sentence,
    quality_name,
    weights_in_16_bits,
)
from workflow.report.formatting import NARROW, quantity, ratio
from workflow.report.model import Facts
from workflow.report.names import shape_name
from workflow.runtime.forms import AS_TRAINED

FEW_SEEDS, MANY_SEEDS = 5, 20
FEW_INSTRUCTIONS = 1000
HALF, LARGE_SHARE = 0.5, 0.05  # effective rows, as a share of all; the largest row's share of the weight
LARGE_OVERLAP = 0.1  # of the training rows of two seeds
KINDS = {
    "to_baseline": "variants to the baseline",
    "to_base": "runs to their untouched base",
    "base_to_base": "untouched bases to the baseline’s",
    "form": "serving forms to the run as trained",
    "repair": "faults to their repair",
}


@dataclass(frozen=True)
class Limit:
    """A limit of this run: a heading, and a sentence or two."""

    head: str
    body: str


def limits(facts: Facts) -> list[Limit]:
    """The limits that apply to this run."""
    candidates = [
        _random_model(facts),
        _few_seeds(facts),
        _one_draw(facts),
        _overlapping_draws(facts),
        _rare_divergence(facts),
        _few_instructions(facts),
        _unequal_rows(facts),
        _narrow_intervals(facts),
        _near_duplicates(facts),
        _detectable(facts),
        _not_corrected(facts),
        _no_category_held_out(facts),
        _first_items(facts),
        _short_training(facts),
        _not_precision_alone(facts),
        _quantized_before(facts),
        _cut_and_healed(facts),
        _not_deterministic(facts),
        _emulated(facts),
        _no_real_16_bits(facts),
        _resident_set(facts),
        _random_benchmark(facts),
        _one_device(facts),
    ]
    return [limit for limit in candidates if limit]


def _random_model(facts: Facts) -> Limit | None:
    return Limit("Random weights", RANDOM_MODEL) if facts.params.model.source == "random" else None


def _few_seeds(facts: Facts) -> Limit | None:
    seeds = len(facts.params.experiment.seeds)
    if seeds >= FEW_SEEDS:
        return None
    if seeds == 1:
        return Limit(
            "One seed",
            "The variance over seeds was not measured, so every interval and verdict holds for this one "
            "training. Another seed would give other numbers, and this run cannot say how different.",
        )
    return Limit(
        f"{seeds} seeds",
        f"The intervals allow for the variance over seeds, but {seeds} trainings tell little of it: that "
        "makes the intervals wide, and their width itself uncertain.",
    )


def _one_draw(facts: Facts) -> Limit | None:
    if facts.params.sample.per_seed or len(facts.params.experiment.seeds) == 1:
        return None
    return Limit(
        "One draw of the training rows",
        "All seeds have the same training rows, so no interval says what other rows would have given. Where rows matter as "
        "much as seeds, intervals of five seeds that promise 95 % cover that in 70 to 82 % of simulations. "
        "Params can have rows drawn anew for each seed.",
    )


def _overlapping_draws(facts: Facts) -> Limit | None:
    """Draws of one data set share rows, so they differ by less than draws of all such data."""
    pool, rows = facts.rows_to_draw_from, facts.params.sample.rows
    if not pool or rows < LARGE_OVERLAP * pool:
        return None
    return Limit(
        "The seeds’ draws share rows",
        f"Each seed trains on {rows:,} of {pool:,} rows, so two seeds share {formatting.percent(round(rows / pool, 2))} of theirs "
        "on average. The intervals include the draw from these data, and less of the draw from others like them.",
    )


def _rare_divergence(facts: Facts) -> Limit | None:
    """How rarely trainings would have to diverge for half of such studies to see none."""
    seeds = len(facts.params.experiment.seeds)
    if not 1 < seeds < MANY_SEEDS:
        return None
    return Limit(
        "Trainings that diverge rarely would not be seen",
        f"Had one training in {round(1 / (1 - 0.5 ** (1 / seeds)))} diverged, half of all studies with {seeds} seeds would see "
        "none, and their intervals would leave it out.",
    )


def _few_instructions(facts: Facts) -> Limit | None:
    score = facts.score(facts.baseline.name, AS_TRAINED, facts.primary)
    if not score or not score.groups or score.groups >= FEW_INSTRUCTIONS:
        return None
    return Limit(
        "A small test set",
        f"The primary metric is over {count(score.items, 'test item')} with "
        f"{group_count(score)}. Intervals say what other items of the same kind "
        "could have given, and nothing of other data or other models.",
    )


def _unequal_rows(facts: Facts) -> Limit | None:
    """How many rows the test split is worth by its weights, and the rows that are longer than any trained on."""
    weights = facts.compared.row_weights
    if not weights:
        return None
    unequal = weights.effective_rows < HALF * weights.rows or weights.largest_share >= LARGE_SHARE
    if not unequal and not weights.longer_rows:
        return None
    body = (
        f"By {weights.metric.rpartition('_')[2]}s, the {count(weights.rows, 'test row')} weigh like "
        f"{formatting.significant(weights.effective_rows, 2)} of equal weight (Kish’s number), and the largest holds "
        f"{formatting.percent(round(weights.largest_share, 2))} of the weight."
    )
    if weights.longer_rows:
        body += (
            f" {count(weights.longer_rows, 'row')} with a response of more than {weights.max_length:,} tokens, where training "
            f"cuts a row, {'holds' if weights.longer_rows == 1 else 'hold'} {formatting.percent(round(weights.longer_share, 2))}."
        )
    return Limit(
        "Some rows weigh far more than others",
        f"{body} The differences by rows stand beside those by tokens.",
    )


def _narrow_intervals(facts: Facts) -> Limit | None:
    """The variants whose interval in the primary metric rests on few items."""
    contrasts = [
        (other, contrast)
        for other in facts.others
        if (contrast := facts.contrast("to_baseline", other.name, AS_TRAINED, facts.primary))
        and contrast.warning
    ]
    if not contrasts:
        return None
    shares = listed(
        [
            f"{other.label} {formatting.percent(round(c.difference.largest_share, 2))}"
            for other, c in contrasts
        ]
    )
    promised = formatting.percent(facts.compared.confidence)
    return Limit(
        "Some intervals may be too narrow",
        f"In the primary metric, few items make much of the variance of a difference; the largest makes: {shares}. "
        f"Intervals that promise {promised} cover 89 to 95 % in simulations of such items. Equivalence is tested there at a "
        "quarter of the level.",
    )


def _near_duplicates(facts: Facts) -> Limit | None:
    if not facts.near_duplicates:
        return None
    threshold = facts.params.sample.near_duplicate_threshold
    return Limit(
        "Some test rows resemble training rows",
        f"{facts.near_duplicates:,} of {count(facts.rows['test'], 'test row')} have a near-duplicate among the training "
        f"and validation rows: a prompt whose character 5-grams have a Jaccard similarity of {threshold:g} or more. "
        "There a run may repeat what it saw.",
    )


def _detectable(facts: Facts) -> Limit | None:
    """The smallest detectable difference, against the margin."""
    contrasts = [
        (other, contrast)
        for other in facts.others
        if (contrast := facts.contrast("to_baseline", other.name, AS_TRAINED, facts.primary))
    ]
    if not contrasts:
        return None
    unit, power = contrasts[0][1].unit, formatting.percent(facts.compared.power)
    smallest = [
        (other.label, formatting.significant(contrast.difference.detectable, 2))
        for other, contrast in contrasts
    ]
    head = (
        f"A difference to {facts.baseline.label} in the primary metric is found with a probability of {power}"
    )
    if len(smallest) == 1:
        body = f"{head} from {smallest[0][1]}{NARROW}{unit}, by a test of its own."
    else:
        each = "; ".join(f"{label} {least}" for label, least in smallest)
        body = f"{head}, by a test of its own, from so many {unit}: {each}."
    margin = facts.compared.margins.get(facts.compared.primary)
    if margin is None:
        body += " No margin is set for this metric, so nothing is called equivalent in it."
    else:
        body += f" The margin of equivalence is {margin:g}{NARROW}{unit}."
        beyond = [
            other.label
            for other, contrast in contrasts
            if contrast.difference.detectable > margin and contrast.verdict != "equivalent"
        ]
        if beyond:
            where = f" for {listed(beyond)}" if len(contrasts) > 1 else ""
            body += f" That is less, so{where} this design cannot be counted on to decide equivalence at the margin."
    return Limit("What this design can find", body)


def _not_corrected(facts: Facts) -> Limit | None:
    contrasts = facts.compared.contrasts
    family = [contrast for contrast in contrasts if contrast.in_family]
    outside = len(contrasts) - len(family)
    if not outside:
        return None
    spanned = facts.compared.family
    kinds = listed([KINDS[kind] for kind in spanned["kinds"]]) if family else ""
    names = (
        listed([quality_name(tuple(metric.split("/"))) for metric in spanned["metrics"]]) if family else ""
    )
    corrected = (
        f"Holm’s correction spans {count(len(family), 'difference')}: of {kinds}, in {names}. "
        if family
        else ""
    )
    alone = sum(contrast.corrected_over == 1 for contrast in contrasts if not contrast.in_family)
    level = formatting.percent(1 - facts.compared.confidence)
    return Limit(
        "Differences are not corrected for all of their number",
        f"{corrected}The other {outside:,} on this page are corrected over the variants (and the categories) alone, "
        f"for each metric, form and kind of difference by itself{f'; {alone:,} of them are alone in their set' if alone else ''}. "
        f"Each such set is tested at {level}, so some of them will be called decided by chance.",
    )


def _no_category_held_out(facts: Facts) -> Limit | None:
    compared = facts.compared
    if compared.held_out_categories or compared.left_out_categories or not compared.claims:
        return None
    return Limit(
        "No category was held out of training",
        "Whether a run gains on kinds of instruction that it was not trained on, claim (d), was not tested.",
    )


def _first_items(facts: Facts) -> Limit | None:
    tasks = []
    for recorded in facts.tasks:
        most, leaves = facts.params.evaluation.tasks[recorded["task"]].items, len(recorded["leaves"])
        if most is not None and recorded["items"] >= most:
            parts = f" of each of its {leaves} parts" if leaves > 1 else ""
            tasks.append(f"{TASKS.get(recorded['task'], recorded['task'])} ({most:,}{parts})")
    if not tasks:
        return None
    return Limit("Not every item was scored", f"Scored on the first items alone: {listed(tasks)}.")


def _short_training(facts: Facts) -> Limit | None:
    trained = facts.baseline.trained[0]
    batch = facts.params.training_of(facts.baseline.name).batch_rows
    seen, rows = trained.steps * batch, trained.rows.rows
    if seen >= rows:
        return None
    return Limit(
        "A short training",
        f"{count(trained.steps, 'step')} of {count(batch, 'row')} see {seen:,} of the {rows:,} training "
        "rows: less than one pass. A longer training may widen the gap or close it.",
    )


def _not_precision_alone(facts: Facts) -> Limit | None:
    """The variants that differ from the baseline in more than precision; those that differ alike stand together."""
    labels_by_settings: dict[tuple[str, ...], list[str]] = {}
    for other in facts.others:
        labels_by_settings.setdefault(tuple(differing_settings(facts, other)), []).append(other.label)
    labels_by_settings.pop((), None)
    if not labels_by_settings:
        return None
    labels = [label for group in labels_by_settings.values() for label in group]
    (first_settings, first), *rest = labels_by_settings.items()
    also = f"From {facts.baseline.label}, {listed(first)} {'differs' if len(first) == 1 else 'differ'} also in {listed(first_settings)}"
    parts = [also, *(f"{listed(group)} in {listed(settings)}" for settings, group in rest)]
    if len(labels) == 1:
        return Limit(
            f"{labels[0]} differs in more than precision",
            f"{also}, so no difference between the two is due to precision alone.",
        )
    return Limit(
        f"{len(labels):,} variants differ in more than precision",
        f"{'; '.join(parts)}. So no difference of theirs is due to precision alone.",
    )


def _quantized_before(facts: Facts) -> Limit | None:
    before = facts.model["quantized_before"]
    if not before:
        return None
    if moved := facts.model.get("moved"):
        return Limit(
            "The base was moved off its grid",
            f"Its weights come from a {before} file, and this base was moved off its grid on purpose: {move_of(moved)}. "
            "It is no published model: what 4 bits cost it is compared with what they cost the same base unmoved.",
        )
    return Limit(
        "The base had been quantized before",
        f"Its weights come from a {before} file, so its 16-bit form had lost precision before any run began. "
        "What 4 bits cost a model that was never rounded may differ. Tried apart on SmolLM2-135M (docs/mechanism.md): with its weights "
        "moved off the Q4_1 grid, what NF4 costs after training changed by +0.001 nats per token (−0.004 to +0.006).",
    )


def _cut_and_healed(facts: Facts) -> Limit | None:
    cut, healed = facts.model.get("cut"), facts.model.get("healed")
    done = [*([cut_of(cut)] if cut else []), *([healing_of(healed)] if healed else [])]
    if not done:
        return None
    return Limit(
        f"The base was {listed([*(['cut'] if cut else []), *(['healed'] if healed else [])])}",
        f"It is not a family member as released: {', and then '.join(done)}. What 4 bits cost it says little about a model "
        "that was released at this size.",
    )


def _not_deterministic(facts: Facts) -> Limit | None:
    if all(run.deterministic for variant in facts.variants for run in variant.trained):
        return None
    return Limit(
        "Runs on a GPU do not repeat to the last digit",
        "Some of its kernels add up in another order each time, so the same seed can give slightly other "
        "weights and scores. No interval has this in it apart from the variance over seeds.",
    )


def _no_real_16_bits(facts: Facts) -> Limit | None:
    real = weights_in_16_bits(facts)
    if real is None:
        return None
    variants = float32_variants(facts)
    where = "On this CPU, " if facts.on_cpu else ""
    labels, verb = listed([v.label for v in variants]), "stores" if len(variants) == 1 else "store"
    text = f"{where}{labels} {verb} weights that were rounded to 16 bits as float32"
    weights = facts.cost_of(variants[0].name, "weights")
    text += f", in {quantity(weights.value, weights.unit)}" if weights else ""
    text += f". In real 16-bit storage the {facts.model['parameters']:,} parameters would take "
    text += quantity(real, "GiB")
    smaller = [
        f"the {quantity(cost.value, cost.unit)} of {v.label} are {ratio(cost.value / real)} of that"
        + (f" and not {ratio(cost.value / weights.value)}" if weights else "")
        for v in facts.variants
        if v.precision.quantized_modules and (cost := facts.cost_of(v.name, "weights"))
    ]
    text += "".join(f"; {part}" for part in smaller)
    return Limit(
        "16-bit weights are stored as float32",
        f"{text}. The saving against real 16-bit storage is smaller than what was measured"
        + (", although the layers that stay unquantized would then shrink too." if smaller else "."),
    )


def _emulated(facts: Facts) -> Limit | None:
    precisions_of = {v.label: precisions.get(facts.params.variants[v.name].precision) for v in facts.variants}
    labels = [label for label, precision in precisions_of.items() if precision.is_emulated]
    if not labels:
        return None
    verb = "is" if len(labels) == 1 else "are"
    return Limit(
        "Emulated formats have no costs of their own",
        f"{listed(labels)} {verb} emulated: the weights were rounded to the format once, and are held and multiplied in "
        "16 bits. The scores are those of the format. Memory and speed are those of 16 bits, and say nothing of a GPU "
        "that has the format.",
    )


def _resident_set(facts: Facts) -> Limit | None:
    if not facts.on_cpu or not facts.benchmarks:
        return None
    before = facts.cost_of(facts.baseline.name, "memory_before_load")
    share = f", {quantity(before.value, before.unit)} before the model was loaded" if before else ""
    return Limit(
        "Memory is that of the whole process",
        f"On a CPU, peak memory is the resident set: Python and its libraries are in it{share}. "
        "A ratio of two peaks is therefore nearer to 1 than that of the models’ own memory.",
    )


def _random_benchmark(facts: Facts) -> Limit | None:
    shapes = list(dict.fromkeys(shape_name(block.shape) for block in facts.hardware if not block.own))
    if not shapes:
        return None
    return Limit(
        "Benchmarked shapes have random weights",
        f"The memory and speed at the {'shape' if len(shapes) == 1 else 'shapes'} of {listed(shapes)} are those of models "
        "with random weights: what they cost is real, and nothing is known of their quality.",
    )


def _one_device(facts: Facts) -> Limit | None:
    if not facts.benchmarks:
        return None
    steps = min(result.steps for result in facts.benchmarks.values())
    rows = min(result.micro_batch_rows for result in facts.benchmarks.values())
    return Limit(
        "Time and memory are of this device",
        f"They were measured on {listed(facts.devices)} over {count(steps, 'step')} of {count(rows, 'row')}, in "
        f"{'one process' if facts.processes == 1 else f'{facts.processes:,} processes'} for each variant. Steps of one process "
        f"are no independent units, so no interval, p value or verdict is made of them. {peak_sentence(facts)} Another device, batch or length of text has other ratios.",
    )


def missing(facts: Facts) -> list[str]:
    """The parts of a full report that this one lacks: a sentence for each, with the reason."""
    params, sentences = facts.params, []
    if not facts.others:
        sentences.append("No comparison: experiment.variants names one variant alone.")
    if len(params.experiment.seeds) == 1:
        sentences.append(
            "No variance over seeds, and no band in the curves: experiment.seeds names one seed."
        )
    if not any(score.subset.startswith("category/") for score in facts.compared.scores):
        sentences.append("No categories: the test split names none, or a single one.")
    elif not (facts.compared.held_out_categories or facts.compared.left_out_categories):
        sentences.append("No held-out categories: sample.held_out_categories is empty.")
    if "holdout_generation" not in params.evaluation.tasks:
        sentences.append("No written answers: holdout_generation is not among evaluation.tasks.")
    if not params.comparison.repairs:
        sentences.append("No faults before and after their repair: comparison.repairs is empty.")
    absent = [
        v.label for v in facts.others if not facts.contrast("to_baseline", v.name, AS_TRAINED, facts.primary)
    ]
    if absent:
        sentences.append(f"No difference in the primary metric for {listed(absent)}: it was not compared.")
    not_measured: dict[tuple[str, ...], list[str]] = {}  # costs by the variants without them
    for metric in ("peak_memory", "training_speed"):
        without = tuple(
            variant.label for variant in facts.variants if not facts.cost_of(variant.name, metric)
        )
        not_measured.setdefault(without, []).append(cost_name(metric).lower())
    not_measured.pop((), None)
    sentences += [
        f"No {' and no '.join(names)} for {_all_or(facts, without)}: it was not measured."
        for without, names in not_measured.items()
    ]
    own = [block for block in facts.hardware if block.own_run]
    measured = {variant.name for block in own for variant in block.variants}
    without = tuple(variant.label for variant in facts.variants if variant.name not in measured)
    if without:
        sentences.append(
            f"No memory and speed over batch and length for {_all_or(facts, without)}: the grid was not measured."
        )
    if not any(not block.on_cpu for block in facts.hardware):
        sentences.append("No GPU: results/hardware holds no measurement of one, and no grid ran on one.")
    if not facts.energy:
        sentences.append(energy_sentence(facts))
    points = [point for block in facts.hardware for point in block.points if not point.measured]
    if points:
        sentences.append(
            f"{count(len(points), 'benchmark point')} could not be measured; the tables say why of each."
        )
    return sentences


def _all_or(facts: Facts, labels: tuple[str, ...]) -> str:
    """The labels as a sentence lists them; of all of several variants, that it is all."""
    return "any variant" if len(labels) == len(facts.variants) > 1 else listed(labels)


@dataclass(frozen=True)
class Limits:
    """The limits, and the missing parts."""

    limits: list[Limit]
    missing: list[str]


def section(facts: Facts) -> Limits:
    """The content of this section's template."""
    return Limits(limits=limits(facts), missing=missing(facts))
