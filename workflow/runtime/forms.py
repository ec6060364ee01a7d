"""The names of the serving forms, which params, results and commands share. workflow/evaluation/forms.py makes them."""

from typing import Literal, get_args

BASE = "base"  # the untouched base, which is no form of a run
Form = Literal["as_trained", "merged_16bit", "merged_dequantized", "requantized"]
AS_TRAINED, MERGED_16BIT, MERGED_DEQUANTIZED, REQUANTIZED = FORMS = get_args(Form)
