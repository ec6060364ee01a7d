"""The model card of each run, in the format of the model hub: metadata, loading code, scores, costs and limits."""

from huggingface_hub import EvalResult

from workflow import methods
from workflow.comparison.model import ALL, Score
from workflow.comparison.records import TrainingRecord
from workflow.comparison.shares import GAIN
from workflow.data import cards, lineage
from workflow.data.lineage import Lineage
from workflow.methods import initializations
from workflow.report import english, formatting
from workflow.report.formatting import NARROW
from workflow.report.labels import dataset_name, model_name
from workflow.report.model import Facts, Variant
from workflow.report.names import OPTIMIZERS
from workflow.report.sections.kept import percentage
from workflow.report.sections.limits import limits
from workflow.report.summary import COSTS, cost_text
from workflow.runtime import markdown
from workflow.runtime.forms import AS_TRAINED
from workflow.runtime.markdown import Code, escaped
from workflow.runtime.paths import weights_folder


def model_card(facts: Facts, variant: Variant, seed: int) -> str:
    """The card of one run's adapter, or of its full model.

    Args:
        variant: the run's variant.
        seed: the run's seed.
    """
    origin = lineage.of_record(facts.params.model, facts.model)
    scores = [
        score
        for score in facts.compared.scores
        if (score.variant, score.form, score.subset) == (variant.name, AS_TRAINED, ALL)
        and str(seed) in score.per_seed
    ]
    run = next(run for run in variant.trained if run.seed == seed)
    parts = [
        _metadata(facts, variant, seed, scores, origin),
        f"# {escaped(variant.label)} on {escaped(model_name(facts.params.model))}, seed {seed}",
        _introduction(facts, variant, run),
        f"Base: {escaped(_source_words(facts))}" + _base_words(origin),
        *_loading(facts, variant, seed, origin),
        *_numbers(facts, variant, seed, scores),
        *_other_forms(facts, variant, seed),
        *_costs(facts, variant),
        "## Training",
        _training(facts, variant, run),
        "## Limits",
        "\n".join(f"- **{escaped(limit.head)}.** {escaped(limit.body)}" for limit in limits(facts)),
        "## Made by",
        _made_by(facts, variant, run),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: Facts, variant: Variant, seed: int, scores: list[Score], origin: Lineage) -> str:
    """The YAML block at the head of the card, with the scores as its model index."""
    dataset = dataset_name(facts.params.dataset)
    data = cards.metadata(
        origin,
        facts.params.variants[variant.name],
        dataset=dataset,
        name=f"{model_name(facts.params.model)} {variant.name}, seed {seed}",
        results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=f"{dataset}, test split",
                dataset_split=score.split,
                metric_type=score.metric,
                metric_name=english.quality_name((score.task, score.metric)),
                metric_value=score.per_seed[str(seed)],
            )
            for score in scores
        ],
    )
    return f"---\n{data.to_yaml()}\n---"


def _introduction(facts: Facts, variant: Variant, run: TrainingRecord) -> str:
    """A paragraph on what was trained: the data, the precision and the device."""
    method = methods.get(facts.params.variants[variant.name].method)
    return (
        f"{method.product if method.leaves_adapter else method.trains.capitalize()}, trained on {run.rows.rows:,} rows of "
        f"{escaped(dataset_name(facts.params.dataset))} with the base held in {variant.precision.storage}, computing in "
        f"{variant.precision.compute}, on {escaped(variant.precision.device_name)}. It is one run of a "
        f"comparison of precisions, made to be compared and not to be used."
    )


def _base_words(origin: Lineage) -> str:
    """The end of a sentence that relates the base of the metadata to the base of the training."""
    if origin.base_model and origin.revision:
        return "."
    if origin.base_model:
        return (
            f". It descends from {origin.base_model}, whose own weights are others: the numbers are of the base that "
            "`dvc repro fetch_model` stores."
        )
    return ". It has no name on the hub, so the metadata name none."


def _loading(facts: Facts, variant: Variant, seed: int, origin: Lineage) -> list[str]:
    code = cards.loading(
        facts.params.variants[variant.name].keeping(getattr(variant.precision, "layers_in_16_bits", [])),
        origin,
        compute=variant.precision.compute,
        device=variant.precision.device,
        folder=weights_folder(variant.name, seed),
    )
    return ["## How to load it", f"```python\n{code}\n```"]


def _numbers(facts: Facts, variant: Variant, seed: int, scores: list[Score]) -> list[str]:
    """The run's scores as trained, and the difference to the baseline."""
    rows = [
        [
            english.quality_name((score.task, score.metric)),
            f"{score.per_seed[str(seed)]:.4f}",
            f"{score.value:.4f}",
            f"{score.items:,}",
        ]
        for score in scores
    ]
    head = ("Metric", "This run", "Mean over the seeds", "Items")
    parts = [
        "## Numbers",
        f"On {escaped(dataset_name(facts.params.dataset))}’s test split, as trained: loaded by the code above.",
        markdown.table(head, rows, right=[1, 2, 3]) if rows else "It was not scored.",
    ]
    contrast = facts.to_baseline(variant.name, AS_TRAINED, facts.primary)
    if contrast:
        sentences = [contrast.sentence, english.what_seeds_vary(facts.params)]
        parts.append(
            escaped(
                f"Over the seeds {english.listed(facts.compared.seeds)}: {' '.join(filter(None, sentences))}"
            )
        )
        parts += _gain_kept(facts, variant)
    elif variant.is_baseline:
        parts.append("It is the baseline that the other variants are compared with.")
    return parts


def _gain_kept(facts: Facts, variant: Variant) -> list[str]:
    """A sentence with the share of the baseline's gain that a variant keeps as trained. Empty if none is stated."""
    shares = {(s.variant, s.form): s for s in facts.compared.shares if s.measure == GAIN}
    share = shares.get((variant.name, AS_TRAINED))
    interval = share and percentage(facts, share)
    if interval is None:
        return []
    confidence = formatting.percent(share.confidence)
    text = (
        f"Of what {facts.baseline.label} gained over its untouched base, it keeps {interval.value} "
        f"({confidence} interval {interval.low} to {interval.high})."
    )
    return [escaped(text.replace(NARROW, " "))]


def _other_forms(facts: Facts, variant: Variant, seed: int) -> list[str]:
    """The run's scores in its other serving forms, with the command that writes each."""
    rows = []
    for form in facts.forms_of(variant.name):
        score = facts.score(variant.name, form, facts.primary)
        if form != AS_TRAINED and score and str(seed) in score.per_seed:
            command = f"save_served --variant {variant.name} --seed {seed} --form {form} --to FOLDER"
            rows.append(
                [
                    english.form_name(form),
                    f"{score.per_seed[str(seed)]:.4f}",
                    f"{score.value:.4f}",
                    Code(f"python -m workflow.{command}"),
                ]
            )
    if not rows:
        return []
    name = english.quality_name(facts.primary)
    head = ("Served", f"{name}: this run", "Mean over the seeds", "Written as a model of its own by")
    return [
        "## Loaded otherwise",
        "The same run in another form is another model, with numbers of its own. An adapter put on a base in another "
        "precision than it was trained on is none of these forms, and was not scored.",
        markdown.table(head, rows, right=[1, 2]),
    ]


def _costs(facts: Facts, variant: Variant) -> list[str]:
    costs = [cost for name in COSTS if (cost := facts.cost_of(variant.name, name))]
    lines = (
        f"- {english.cost_name(cost.metric)}: {escaped(cost_text(cost, variant))} ({escaped(cost.definition)})"
        for cost in costs
    )
    return ["## What it cost", "\n".join(lines)] if costs else []


def _training(facts: Facts, variant: Variant, run: TrainingRecord) -> str:
    training = facts.training_of(variant.name)
    method = methods.get(facts.params.variants[variant.name].method)
    adapter = f"rank {training.rank}, alpha {training.alpha}, dropout {training.dropout:g}; "
    if not method.leaves_adapter:
        adapter = ""
    if traits := method.traits(training):
        adapter += f"{english.listed(traits)}; "
    if initializations.get(training.initialization).changes_base:
        adapter += f"saved at rank {2 * training.rank}, as the difference from its beginning, for the published base; "
    kept = ""
    if training.keep == "best":
        kept = f"the weights of step {run.kept_step:,}, whose validation loss was the lowest; "
    text = (
        f"{adapter}{english.count(run.steps, 'step')} of {english.count(training.batch_rows, 'row')}, "
        f"{run.tokens_seen:,} tokens, {OPTIMIZERS[training.optimizer]}, learning rate {training.learning_rate:g} "
        f"({training.schedule}), loss on the {training.loss_on.replace('_', ' ')}, seed {run.seed}; {kept}"
        f"{english.duration(run.seconds)}."
    )
    return text.replace(NARROW, " ")


def _made_by(facts: Facts, variant: Variant, run: TrainingRecord) -> str:
    """The command that reproduces the run, the digest of its weights, and the libraries' versions."""
    origin = facts.lock.origins.get(weights_folder(variant.name, run.seed).as_posix())
    method = methods.get(facts.params.variants[variant.name].method)
    kind = "adapter" if method.leaves_adapter else "model"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    digest = f"; the {kind}’s md5 in dvc.lock is `{origin.md5}`" if origin and origin.md5 else ""
    return f"`dvc repro train@{variant.name}-{run.seed}`{digest}. Versions: {versions}."


def _source_words(facts: Facts) -> str:
    """The base model's name and source."""
    source = facts.model
    keys = ("repository", "revision", "package", "version", "member", "path", "sha256")
    details = ", ".join(f"{key} {source[key]}" for key in keys if source.get(key))
    return f"{model_name(facts.params.model)} ({source['source']}{': ' if details else ''}{details})"
