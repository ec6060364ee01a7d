"""Markers and short names of the serving forms in figures, and the colors of better and worse."""

from workflow.report.drawing import PALETTE
from workflow.runtime.forms import AS_TRAINED

FORM_MARKERS = {AS_TRAINED: "o", "merged_16bit": "s", "merged_dequantized": "D", "requantized": "^"}
SHORT_FORMS = {
    AS_TRAINED: "as trained",
    "merged_16bit": "merged 16-bit",
    "merged_dequantized": "dequantized",
    "requantized": "requantized",
}
BETTER, WORSE = PALETTE[0], PALETTE[3]
