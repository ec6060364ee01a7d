"""The names of the serving forms, which params, results and commands share. workflow/evaluation/forms.py makes them."""

from typing import Literal, get_args

BASE = "base"  # the untouched base, which is no form of a run
GgufForm = Literal["gguf_q8_0", "gguf_q4_k_m", "gguf_q4_0"]
Form = Literal["as_trained", "merged_16bit", "merged_dequantized", "requantized", GgufForm]
FORMS = get_args(Form)
GGUF_Q8_0, GGUF_Q4_K_M, GGUF_Q4_0 = GGUF_FORMS = get_args(GgufForm)  # files of llama.cpp, of the merged model
AS_TRAINED, MERGED_16BIT, MERGED_DEQUANTIZED, REQUANTIZED = OWN_FORMS = FORMS[:4]  # which need no extra


def variant_and_form(served: str) -> tuple[str, str]:
    """The two parts of `variant/form`; a variant alone is served as trained."""
    variant, _, form = served.partition("/")
    return variant, form or AS_TRAINED
