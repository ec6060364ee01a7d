"""The harness' Hugging Face model, with exact log-probabilities and batches that are bounded by tokens."""

from collections.abc import Iterator

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

SOFTMAX = "float32"  # the type of log-probabilities, whatever the model computes in


class LanguageModel(HFLM):
    """The harness' own class, with log-probabilities in float32 and a limit on the tokens of a forward pass.

    In a 16-bit type, the harness rounds each log-probability, and their sum over a response, to 8 or 11 significant
    bits. In bfloat16, a response of 200 nats is rounded to a whole nat, and the options of a question tie.

    Args:
        rows: per forward pass.
        tokens: per forward pass that scores, padding included, in place of `rows`. A longer row has a pass of its
            own. None to use `rows`.
    """

    def __init__(self, model, tokenizer, *, rows: int, tokens: int | None):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=rows, softmax_dtype=SOFTMAX)
        self.rows, self.tokens = rows, tokens

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        if self.tokens is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        answers = [None] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as progress:
            for batch in batches(lengths, tokens=self.tokens):
                self.batch_size_per_gpu = len(batch)
                scored = super()._loglikelihood_tokens([requests[place] for place in batch], True)
                for place, answer in zip(batch, scored, strict=True):
                    answers[place] = answer
                progress.update(len(batch))
        self.batch_size_per_gpu = self.rows
        return answers


def batches(lengths: list[int], *, tokens: int | None, rows: int = 1) -> Iterator[list[int]]:
    """Yield indices of `lengths`, longest first, in batches of at most `tokens` when padded to the longest row.

    Without `tokens`, batches have `rows`.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        count = rows if tokens is None else max(1, tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]
