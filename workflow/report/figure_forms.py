"""Short names of the serving forms in figures, and the colors of better and worse."""

from workflow.report.drawing import PALETTE
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
