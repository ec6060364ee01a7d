"""Training: the adapter, its rows, and the loss curves."""

from dataclasses import dataclass

import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, StrMethodFormatter

from workflow import methods
from workflow.comparison.records import RowsRecord
from workflow.methods import initializations
from workflow.report import english
from workflow.report.drawing import PAPER, Panel, color_of, draw_svg, marker_of, spread
from workflow.report.formatting import significant
from workflow.report.model import Facts
from workflow.report.names import OPTIMIZERS

CURVE_HEIGHT = 260
NAME_ROOM = 1.36  # right end of the axis over the last step, to leave room for the names


def training_words(facts: Facts) -> str:
    """Sentences on the training of the baseline."""
    training = facts.training_of(facts.baseline.name)
    trained = facts.baseline.trained[0]
    modules = (
        "all linear layers"
        if training.target_modules == "all-linear"
        else english.listed(training.target_modules)
    )
    method = methods.get(facts.params.variants[facts.baseline.name].method)
    adapter = (
        f"{method.product} of rank {training.rank} "
        f"({', '.join([f'alpha {training.alpha}', f'dropout {training.dropout:g}', *method.traits(training)])}) on {modules} "
        f"({trained.adapted_modules:,} of them)"
        if method.leaves_adapter
        else method.trains.capitalize()
    )
    part = "the response alone" if training.loss_on == "response" else "prompt and response"
    return (
        f"{adapter} was trained for {english.count(trained.steps, 'step')} of "
        f"{english.count(training.batch_rows, 'row')} with {OPTIMIZERS[training.optimizer]}, learning rate "
        f"{training.learning_rate:g} ({training.schedule} schedule), with the loss on {part}. "
        f"{_rows(trained.rows, training.max_length)}{_shared(facts)}"
        f"{_beginnings(facts)}{_kept(facts)}"
    )


def _rows(rows: RowsRecord, max_length: int) -> str:
    text = f"Of {english.count(rows.rows, 'training row')}, {rows.rows_cut:,} end at {max_length:,} tokens"
    if rows.rows_dropped:
        text += f"; {rows.rows_dropped:,} more had no response within that length and were left out"
    return f"{text}."


def _shared(facts: Facts) -> str:
    """A sentence on what the variants share. Empty if they differ in more than the precision of the base."""
    methods = {facts.params.variants[variant.name].method for variant in facts.variants}
    if (
        not facts.others
        or len(methods) > 1
        or _begun_with_the_base(facts)
        or any(english.differing_settings(facts, other) for other in facts.others)
    ):
        return ""
    return " With one seed, all variants begin with the same adapter and see the same rows in the same order."


def _begun_with_the_base(facts: Facts) -> list[tuple[str, str]]:
    """The name of each variant whose adapter begins with its base's own weights, and of the initialization."""
    begun = []
    for variant in facts.variants:
        method = methods.get(facts.params.variants[variant.name].method)
        initialization = initializations.get(facts.params.training_of(variant.name).initialization)
        if method.leaves_adapter and initialization.of_the_base:
            begun.append((variant.label, initialization.label))
    return begun


def _beginnings(facts: Facts) -> str:
    """Sentences on the variants that do not begin with the adapter of their seed. Empty if there are none."""
    begun = _begun_with_the_base(facts)
    if not begun:
        return ""
    kinds = english.listed(list(dict.fromkeys(kind for _, kind in begun)))
    names = english.listed([name for name, _ in begun])
    return (
        f" With {kinds}, an adapter begins with its base’s own weights ({names}). It is not the adapter that other variants "
        "of a seed begin with, and it is the same for every seed, which sets "
        f"{'the rows, their order' if facts.params.sample.per_seed else 'the order of the rows'} and dropout alone."
    )


def _kept(facts: Facts) -> str:
    """Sentences on the variants whose best weights were saved, with the step and loss of each run. Empty if none were."""
    parts = []
    for variant in facts.variants:
        if facts.params.training_of(variant.name).keep == "best":
            runs = [
                f"with seed {run.seed} step {run.kept_step:,} of {run.steps:,} ({significant(run.validation_loss_kept, 4)} nats "
                f"per token; the last step {significant(run.validation_loss_after, 4)})"
                for run in variant.trained
            ]
            parts.append(
                f" The saved weights of {variant.label} are those of the lowest validation loss: {english.listed(runs)}."
            )
    return "".join(parts)


def curve_panels(facts: Facts) -> list[Panel]:
    """Loss and token accuracy over the tokens seen: lines for training rows, points for validation rows."""
    return [
        _curves(facts, "loss", "validation_loss", "Loss, in nats per token (lower is better)", 1),
        _curves(facts, "token_accuracy", "validation_token_accuracy",
                "Token accuracy, as a percentage (higher is better)", 100),
    ]  # fmt: skip


def _curves(facts: Facts, column: str, validation_column: str, title: str, scale: int) -> Panel:
    palette = {variant.name: color_of(variant) for variant in facts.variants}
    history = facts.history.assign(value=facts.history[column] * scale)
    validation = facts.validation.assign(value=facts.validation[validation_column] * scale)
    several = len(facts.params.experiment.seeds) > 1
    for curve in (history, validation):
        curve["tokens"] = curve["step"] * curve["variant"].map(_tokens_per_step(facts))

    def draw(axes: Axes) -> None:
        seaborn.lineplot(
            history,
            x="tokens",
            y="value",
            hue="variant",
            palette=palette,
            legend=False,
            estimator="mean",
            errorbar=("pi", 100) if several else None,  # from the lowest to the highest seed
            err_kws={"alpha": 0.18, "linewidth": 0},
            linewidth=1.3,
            ax=axes,
        )
        for variant in facts.variants:
            points = validation[validation["variant"] == variant.name].groupby("tokens")["value"]
            color, middle = color_of(variant), points.mean()
            for tokens, low, high in zip(middle.index, points.min(), points.max(), strict=True):
                axes.plot([tokens] * 2, [low, high], color=color, linewidth=1.6)
            axes.plot(
                middle.index,
                middle,
                color=color,
                marker=marker_of(variant),
                markersize=6,
                markeredgecolor=PAPER,
                linestyle="none",
                zorder=3,
            )
        _name_lines(axes, facts, history)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(history["tokens"])))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("%" if scale == 100 else "nats per token")
        axes.set_xlabel("tokens seen")

    last = history["tokens"].max()
    parts = []
    for variant in facts.variants:
        for seed, run in validation[validation["variant"] == variant.name].groupby("seed"):
            ends = significant(run["value"].iloc[0]), significant(run["value"].iloc[-1])
            parts.append(f"{variant.label}, seed {seed}: validation rows from {ends[0]} to {ends[1]}.")
    alt = f"{title}, over the first {last:,.0f} tokens. " + " ".join(parts)
    return Panel(title, draw_svg(f"curve-{column.replace('_', '-')}", draw, alt, height=CURVE_HEIGHT))


def _name_lines(axes: Axes, facts: Facts, history: pd.DataFrame) -> None:
    """Write each variant's name at the end of its line, in its color."""
    last = history["tokens"].max()
    ends = [
        float(run[run["step"] == run["step"].max()]["value"].mean())
        for variant in facts.variants
        for run in [history[history["variant"] == variant.name]]
    ]
    low, high = axes.get_ylim()
    places = spread(ends, 14 * (high - low) / CURVE_HEIGHT)
    for variant, y in zip(facts.variants, places, strict=True):
        axes.annotate(
            variant.short,
            (last, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            weight="bold",
            color=color_of(variant),
        ).set_in_layout(False)
    axes.set_xlim(None, last * NAME_ROOM)


def _tokens_per_step(facts: Facts) -> dict[str, float]:
    """By variant, the tokens that its runs saw in an optimizer step, on average."""
    return {
        variant.name: sum(run.tokens_seen for run in variant.trained)
        / sum(run.steps for run in variant.trained)
        for variant in facts.variants
    }


def _ticks(tokens: pd.Series) -> list[float]:
    """Ticks at whole numbers, up to the last one."""
    return [
        tick for tick in MaxNLocator(4, integer=True).tick_values(0, tokens.max()) if tick <= tokens.max()
    ]


def _other_validation_rows(facts: Facts) -> str:
    """The variants that leave out other categories than the baseline, as the end of a sentence. Empty if none do."""
    left_out = facts.compared.left_out_categories
    others = [v.label for v in facts.others if left_out.get(v.name) != left_out.get(facts.baseline.name)]
    if not others:
        return ""
    return f", save to {english.listed(others)}, whose validation rows leave out other categories"


@dataclass(frozen=True)
class TrainingSection:
    """The description of the training, and its curves."""

    words: str
    panels: list[Panel]
    other_rows: str  # the variants whose validation rows are not the baseline's, as the end of a sentence; empty if none


def section(facts: Facts) -> TrainingSection:
    """The content of this section's template."""
    return TrainingSection(
        words=training_words(facts), panels=curve_panels(facts), other_rows=_other_validation_rows(facts)
    )
