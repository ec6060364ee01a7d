"""The comparison of unmoved and moved bases as Markdown and as a page with one figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from workflow import report
from workflow.comparison.ratios import Ratio
from workflow.report.drawing import (
    INK,
    MARKERS,
    MUTED,
    PALETTE,
    PAPER,
    ROW,
    Panel,
    draw_svg,
    put_worse_left,
    rows_axis,
    write_over_row,
)
from workflow.report.formatting import decimals_of, number, percent, signed
from workflow.report.labels import dataset_name, model_name, variant_labels
from workflow.runtime import markdown
from workflow.runtime.files import md5
from workflow.tools.gaps import PART, Interval, Loss, VariantGaps
from workflow.tools.moved_studies import ITEMS, UNIT, Study

HERE, STYLE = Path(__file__).parent, Path(report.__file__).parent / "style.css"
TEMPLATE = "mechanism.html.jinja"
HEAD = (
    "variant",
    "training",
    "gap, base as it is",
    "gap, moved bases",
    "moved less as it is",
    "after / before, as it is",
    "after / before, moved",
    "answer",
)
LOSS_HEAD = ("variant", "base", "loss before training", "loss after training")
OFFSET = 0.1  # of the two marks of a row, as a share of the row
LEGEND_COLUMNS = 3
IN_UNIT = f"{UNIT}; less is better"


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        note: on its numbers, such as their unit and direction.
    """

    caption: str
    note: str
    head: tuple[str, ...]
    rows: list[list[str]]


def interval(part: Interval) -> str:
    decimals = decimals_of(part.low, part.high)
    return f"{signed(part.value, decimals)} ({signed(part.low, decimals)} to {signed(part.high, decimals)})"


def ratio_words(ratio: Ratio | None) -> str:
    if ratio is None:
        return "the gap before may be zero"
    return f"{number(ratio.value, 2)} ({number(ratio.low, 2)} to {number(ratio.high, 2)})"


def _rows(gaps: list[VariantGaps], unmoved: Study) -> list[list[str]]:
    """A row for each variant and moment, as text."""
    labels, rows = variant_labels(unmoved.settings), []
    for variant in gaps:
        for moment, gap in (("before", variant.before), ("after", variant.after)):
            row = [labels[variant.variant], moment, *map(interval, (gap.unmoved, gap.moved, gap.change))]
            if moment == "after":
                row += [ratio_words(variant.ratio_unmoved), ratio_words(variant.ratio_moved), variant.answer]
            rows.append(row + [""] * (len(HEAD) - len(row)))
    return rows


def _loss_rows(scored: list[Loss], unmoved: Study) -> list[list[str]]:
    labels = variant_labels(unmoved.settings)
    return [
        [
            labels[loss.variant],
            "as it is" if loss.draw is None else f"moved, seed {loss.draw}",
            number(loss.before, 4),
            number(loss.after, 4),
        ]
        for loss in scored
    ]


def _answers(gaps: list[VariantGaps], unmoved: Study) -> list[str]:
    labels = variant_labels(unmoved.settings)
    return [f"{labels[gap.variant]}: {gap.answer}. {gap.reason.capitalize()}." for gap in gaps]


def _method(gaps: list[VariantGaps], unmoved: Study, moved: list[Study]) -> list[str]:
    """What was compared, and by which rule, as paragraphs."""
    settings, change = unmoved.settings, gaps[0].after.change
    draws, cells = len(moved), moved[0].moved.cells
    sizes = ", ".join(f"{100 * study.source['moved']['relative_size']:.2f}" for study in moved)
    device = next(iter(unmoved.trained.values()))[0].precision.device_name
    return [
        f"{model_name(settings.model)} on {dataset_name(settings.dataset)}: the base as it is ({unmoved.source['quantized_before']}), "
        f"and {draws} draws of it whose linear weights were moved at random by up to {cells:g} of their own block’s cell "
        f"({sizes} % of the weights’ size). {len(settings.experiment.seeds)} seeds; {change.items:,} test items with "
        f"{change.groups:,} different instructions; {device}.",
        f"A gap is the held-out loss of a variant, as trained, less that of {settings.experiment.baseline} on the same base, in "
        f"{UNIT}; less is better. Intervals are at {percent(change.confidence)}. The moved gap is the mean over the draws. Items are paired "
        "across bases. After training, draws and seeds are crossed units; before it, draws alone.",
        f"The rule, set before any run. Not the grid: the interval of the change lies above −{gaps[0].margin:g}. The grid, which makes at least "
        f"{'a third' if PART == 1 / 3 else PART} of the gap: the interval of the moved gap less two thirds of the other lies below 0. "
        "Undecided: anything else.",
    ]


def as_markdown(gaps: list[VariantGaps], scored: list[Loss], unmoved: Study, moved: list[Study]) -> str:
    """Answers, tables, and how they were made."""
    parts = [
        f"# {markdown.escaped(unmoved.settings.report.title)}",
        "\n".join(f"- {markdown.escaped(answer)}" for answer in _answers(gaps, unmoved)),
        *(markdown.escaped(text) for text in _method(gaps, unmoved, moved)),
        markdown.table(HEAD, _rows(gaps, unmoved)),
        f"The losses, in {UNIT}; less is better:",
        markdown.table(LOSS_HEAD, _loss_rows(scored, unmoved), right=[2, 3]),
    ]
    return "\n\n".join(parts) + "\n"


def render(gaps: list[VariantGaps], scored: list[Loss], unmoved: Study, moved: list[Study]) -> str:
    """The page as HTML. The same studies give the same bytes."""
    return render_page(
        unmoved.settings.report.title,
        answers=_answers(gaps, unmoved),
        method=_method(gaps, unmoved, moved),
        panel=figure(gaps, variant_labels(unmoved.settings)),
        tables=[
            Table("gaps to 16 bits", IN_UNIT, HEAD, _rows(gaps, unmoved)),
            Table("losses on each base", IN_UNIT, LOSS_HEAD, _loss_rows(scored, unmoved)),
        ],
        command="compare",
        studies=[unmoved, *moved],
    )


def render_page(
    title: str,
    *,
    answers: list[str],
    method: list[str],
    panel: Panel,
    tables: list[Table],
    command: str,
    studies: list[Study],
) -> str:
    """The page of a comparison of studies as HTML.

    Args:
        command: of `python -m workflow.mechanism`, which made it.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        style=Markup(STYLE.read_text(encoding="utf-8")),
        title=title,
        answers=answers,
        method=method,
        panel=panel,
        tables=tables,
        command=command,
        files=[(f"{study.folder.name}/{ITEMS}", md5(study.file(ITEMS))) for study in studies],
    )


def figure(gaps: list[VariantGaps], labels: dict[str, str]) -> Panel:
    """Each variant's gap before and after training, on the base as it is and on the moved ones."""
    rows = [
        (f"{labels[variant.variant]}, {moment} training", [gap.unmoved, gap.moved])
        for variant in gaps
        for moment, gap in (("before", variant.before), ("after", variant.after))
    ]
    return gap_panel(rows, ["base as it is", "moved bases"])


def gap_panel(rows: list[tuple[str, Sequence[Interval]]], bases: list[str]) -> Panel:
    """Gaps with their intervals, a row for each variant and moment.

    Args:
        rows: the text of a row, and its gap on each base.
        bases: what each is called.
    """
    apart = min(2 * OFFSET, 4 * OFFSET / (len(bases) - 1))
    marks = [
        (
            label,
            place * apart - OFFSET,  # the first is as far below the text of the row, however many there are
            PALETTE[place % len(PALETTE)],
            MARKERS[place % len(MARKERS)],
        )
        for place, label in enumerate(bases)
    ]

    def draw(axes: Axes) -> None:
        rows_axis(axes, len(rows))
        for row, (text, parts) in enumerate(rows):
            write_over_row(axes, row, text)
            axes.plot([0, 0], [row - 0.2, row + 0.25], color=MUTED, linewidth=1.2)
            for part, (_, shift, color, marker) in zip(parts, marks, strict=True):
                axes.plot([part.low, part.high], [row + shift] * 2, color=color, linewidth=1.6)
                axes.plot(
                    part.value, row + shift, color=color, marker=marker, markersize=6, markeredgecolor=PAPER
                )
        for label, _, color, marker in marks:
            axes.plot([], [], color=color, marker=marker, label=label)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13 * 8 / len(rows)),
            ncols=min(len(bases), LEGEND_COLUMNS),
            frameon=False,
            labelcolor=INK,
        )
        put_worse_left(axes, higher_is_better=False)
        axes.set_xlabel(f"gap to 16 bits, {UNIT} (left is worse)")

    alt = f"Gap to 16 bits in {UNIT}. " + " ".join(
        f"{text}: "
        + ", ".join(f"{base} {interval(part)}" for part, base in zip(parts, bases, strict=True))
        + "."
        for text, parts in rows
    )
    return Panel(
        "Gap to 16 bits, before and after training", draw_svg("gaps", draw, alt, height=len(rows) * ROW + 110)
    )
