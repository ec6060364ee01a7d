"""Markers and short names of the serving forms in figures, and the colors of better and worse."""

from workflow.report.drawing import PALETTE
from workflow.runtime.forms import AS_TRAINED, MERGED_16BIT, MERGED_DEQUANTIZED, REQUANTIZED

FORM_MARKERS = {AS_TRAINED: "o", MERGED_16BIT: "s", MERGED_DEQUANTIZED: "D", REQUANTIZED: "^"}
SHORT_FORMS = {
    AS_TRAINED: "as trained",
    MERGED_16BIT: "merged 16-bit",
    MERGED_DEQUANTIZED: "dequantized",
    REQUANTIZED: "requantized",
}
BETTER, WORSE = PALETTE[0], PALETTE[3]
