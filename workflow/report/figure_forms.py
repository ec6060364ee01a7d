"""Names of variants and serving forms that have room in figures, and the colors of better and worse."""

from workflow.report.drawing import PALETTE
from workflow.report.model import Facts
from workflow.runtime.forms import (
    AS_TRAINED,
    GGUF_Q4_0,
    GGUF_Q4_K_M,
    GGUF_Q8_0,
    MERGED_16BIT,
    MERGED_DEQUANTIZED,
    REQUANTIZED,
)

SHORT_FORMS = {
    AS_TRAINED: "as trained",
    MERGED_16BIT: "merged 16-bit",
    MERGED_DEQUANTIZED: "dequantized",
    REQUANTIZED: "requantized",
    GGUF_Q8_0: "Q8_0",
    GGUF_Q4_K_M: "Q4_K_M",
    GGUF_Q4_0: "Q4_0",
}
BETTER, WORSE = PALETTE[0], PALETTE[3]


def fitting_labels(facts: Facts, room: int) -> dict[str, str]:
    """The longest names of all variants that have room in a figure, by variant.

    Args:
        room: in characters.
    """
    full = {variant.name: variant.label for variant in facts.variants}
    compact = {
        variant.name: f"{variant.short}: {variant.compact}" if facts.lettered else variant.compact
        for variant in facts.variants
    }
    short = {variant.name: variant.short for variant in facts.variants}
    return next((labels for labels in (full, compact) if max(map(len, labels.values())) <= room), short)
