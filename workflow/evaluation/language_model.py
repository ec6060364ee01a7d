"""The harness' Hugging Face model, with exact log-probabilities, at the scored tokens alone, in bounded batches."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

SOFTMAX = "float32"  # the type of log-probabilities, whatever the model computes in


class LanguageModel(HFLM):
    """The harness' own class, with other sums: float32, at the scored tokens alone, in batches of bounded size.

    In a 16-bit type, the harness rounds each log-probability, and their sum over a response, to 8 or 11 significant
    bits. In bfloat16, a response of 200 nats is rounded to a whole nat, and the options of a question tie. The harness
    also computes the logits of every token, padding included, which is a fifth of a small model's work and most of
    its memory, and then uses those of the responses.

    Args:
        rows: per forward pass.
        tokens: per forward pass that scores, padding included, in place of `rows`. A longer row has a pass of its
            own. None to use `rows`.
        receive: called after each forward pass that scores, with the places of its rows in the order of the requests,
            the number of all scored tokens, and for each row its logits [scored tokens, vocabulary]. None for nobody.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        rows: int,
        tokens: int | None,
        receive: Callable[[list[int], int, list[torch.Tensor]], None] | None = None,
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=rows, softmax_dtype=SOFTMAX)
        self.rows, self.tokens, self.receive = rows, tokens, receive

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        counts = [len(scored) for _, _, scored in requests]
        answers: list = [None] * len(requests)
        read = defaultdict(list)  # one-token options of a question have one input, which is read once
        for place, (_, context, scored) in enumerate(requests):
            read[tuple((context + scored)[-(self.max_length + 1) : -1])].append(place)
        read = list(read.items())
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as progress:
            for batch in batches([len(row) + 1 for row, _ in read], tokens=self.tokens, rows=self.rows):
                ends = self._logits_at_the_end(
                    [read[index][0] for index in batch],
                    [max(counts[place] for place in read[index][1]) for index in batch],
                )
                scored = {
                    place: logits[-counts[place] :]
                    for index, logits in zip(batch, ends, strict=True)
                    for place in read[index][1]
                }
                if self.receive:
                    self.receive(list(scored), sum(counts), list(scored.values()))
                for place, logits in scored.items():
                    answers[place] = _likelihood(logits, requests[place][2])
                progress.update(len(scored))
        return answers

    def _logits_at_the_end(self, rows: list[tuple[int, ...]], counts: list[int]) -> tuple[torch.Tensor, ...]:
        """The logits [count, vocabulary] at the last `counts` tokens of each row.

        Raises:
            ValueError: a response is longer than what the model reads.
        """
        if too_long := [count for row, count in zip(rows, counts, strict=True) if count > len(row)]:
            raise ValueError(
                f"a response of {max(too_long)} tokens is scored, and the model reads {self.max_length}"
            )
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            ids[index, : len(row)] = torch.tensor(row)
            scored[index, len(row) - count : len(row)] = True
        scored = scored.to(self.device)

        def select(_head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            return inputs[0][scored][None]

        hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            return self._model_call(ids.to(self.device))[0].split(counts)
        finally:
            hook.remove()


def _likelihood(logits: torch.Tensor, tokens: list[int]) -> tuple[float, bool]:
    """The log-likelihood of tokens in nats, and whether each is the most likely one."""
    targets = torch.tensor(tokens, device=logits.device)
    likely = logits.float().log_softmax(-1).gather(-1, targets[:, None]).sum()
    return float(likely), bool((logits.argmax(-1) == targets).all())


def batches(lengths: list[int], *, tokens: int | None, rows: int = 1) -> Iterator[list[int]]:
    """Yield indices of `lengths`, longest first, in batches of at most `tokens` when padded to the longest row.

    Without `tokens`, batches have `rows`.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        count = rows if tokens is None else max(1, tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]
