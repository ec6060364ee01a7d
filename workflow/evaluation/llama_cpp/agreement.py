"""Score some rows with llama.cpp itself, and hold its numbers to those of transformers on the dequantized weights."""

from pathlib import Path

from lm_eval.models.huggingface import HFLM

from workflow.evaluation.llama_cpp import library
from workflow.evaluation.llama_cpp.record import Agreement
from workflow.runtime.errors import CheckError

TASK, METRIC = "holdout_loss", "nats_per_token"
ROWS = 4
# llama.cpp rounds activations to 8 bits before a product with quantized weights, and its cache to 16 bits. Measured over
# 72 tokens (155 in 16 bits) of SmolLM2-135M: 0.002 in 16 bits, 0.012 in Q8_0 and Q4_0, 0.048 in Q4_K_M.
TOLERANCE = 0.15  # nats per token


def compare(results: dict, language_model: HFLM, file: Path) -> Agreement | None:
    """Score the first rows of the held-out loss with llama.cpp as the harness did; None if none fits the context.

    Args:
        results: of the held-out loss, as the harness returns them.
        file: the GGUF file that `language_model` was read from.

    Raises:
        CheckError: the two differ by more than their arithmetic explains.
    """
    rows = []
    for sample in results["samples"][TASK]:
        prompt_ids, scored_ids = language_model._encode_pair(*sample["arguments"][0])
        if len(rows) < ROWS and prompt_ids and len(prompt_ids) + len(scored_ids) <= language_model.max_length:
            rows.append((prompt_ids, scored_ids, *sample[METRIC]))
    if not rows:
        return None
    scored = library.log_probabilities(file, [prompt + response for prompt, response, *_ in rows])
    losses = [
        float(-probabilities[-len(response) :].sum())
        for (_, response, *_), probabilities in zip(rows, scored, strict=True)
    ]
    counts = [tokens for *_, tokens in rows]
    agreement = Agreement(
        task=TASK,
        rows=len(rows),
        tokens=int(sum(counts)),
        transformers=sum(nats for *_, nats, _ in rows) / sum(counts),
        llama_cpp=sum(losses) / sum(counts),
        largest_difference=max(
            abs(loss - nats) / tokens for loss, (*_, nats, tokens) in zip(losses, rows, strict=True)
        ),
        tolerance=TOLERANCE,
    )
    if not abs(agreement.difference) <= TOLERANCE:
        raise CheckError(
            f"llama.cpp gives {agreement.rows} rows of {TASK} {agreement.llama_cpp:.4f} nats per token, and transformers "
            f"{agreement.transformers:.4f} with the same file, which is more apart than {TOLERANCE}"
        )
    return agreement
