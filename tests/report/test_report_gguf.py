"""The page says how a GGUF file is stored, and how llama.cpp itself scores it."""

from workflow.report.sections.evidence import file_words

FALLBACK = {
    "tensors": "blk.*.attn_q.weight",
    "count": 30,
    "width": 576,
    "intended": "Q4_K",
    "stored": "Q5_0",
}
AGREEMENT = {
    "task": "holdout_loss",
    "rows": 4,
    "tokens": 72,
    "transformers": 3.5730197,
    "llama_cpp": 3.6209075,
    "largest_difference": 0.1377,
    "tolerance": 0.15,
}


def test_tensors_of_another_type_and_llama_cpps_own_score_are_said():
    assert file_words({"fallbacks": [FALLBACK], "agreement": AGREEMENT}) == (
        ". Rows of 576 weights hold no whole number of blocks, so other types take their place. "
        "Q5_0 in place of Q4_K: blk.*.attn_q.weight (30). llama.cpp itself gives 4 rows of held-out loss "
        "3.6209 nats per token, and transformers 3.5730 (at most 0.15 apart)."
    )


def test_a_file_without_either_and_another_form_say_nothing_of_it():
    assert file_words({"fallbacks": [], "agreement": None}) == ""
    assert file_words(None) == ""
