"""The order in which a training sees its rows, known before it begins."""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainingArguments

from workflow import params


class LikeLengthSampler(Sampler):
    """Orders rows so that each batch holds rows of like length, and the batches come in random order.

    Args:
        lengths: tokens of each row.
        batch_rows: rows per optimizer step.
        window: batches among which rows are sorted.
        seed: with the epoch, of the order.
    """

    def __init__(self, lengths: list[int], *, batch_rows: int, window: int, seed: int):
        self.lengths, self.batch_rows, self.seed = lengths, batch_rows, seed
        self.window_rows, self.epoch = window * batch_rows, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        random = np.random.default_rng([self.seed, self.epoch])
        rows = random.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(rows), self.window_rows):
            ordered = sorted(rows[start : start + self.window_rows], key=lambda row: self.lengths[row])
            batches += [ordered[i : i + self.batch_rows] for i in range(0, len(ordered), self.batch_rows)]
        # A batch that is not full must come last, or the loader would fill it from the next one.
        full = [batch for batch in batches if len(batch) == self.batch_rows]
        rest = [batch for batch in batches if len(batch) < self.batch_rows]
        for index in random.permutation(len(full)):
            yield from map(int, full[index])
        for batch in rest:
            yield from map(int, batch)


def planned_steps(rows: int, training: params.Training) -> int:
    """Optimizer steps of a training on so many rows (a last, smaller batch is a step too)."""
    return training.steps or math.ceil(training.epochs * math.ceil(rows / training.batch_rows))


def planned(dataset: Dataset, sampler: LikeLengthSampler, steps: int) -> tuple[str, int]:
    """The sha256 of every row in the order in which the steps learn from them, and the number of their tokens.

    A step is its number of rows and these; a row is its number of tokens, its tokens, and what each but the last of
    these is to predict (IGNORED where nothing is learned); all are 32-bit integers.
    """
    digest, tokens = hashlib.sha256(), 0
    ids, labels = list(dataset["input_ids"]), list(dataset["labels"])
    for rows in planned_rows(sampler, steps):
        digest.update(np.asarray([len(rows)], "<i4").tobytes())
        for row in rows:
            digest.update(np.asarray([len(ids[row]), *ids[row], *labels[row][1:]], "<i4").tobytes())
            tokens += len(ids[row])
    return digest.hexdigest(), tokens


def planned_rows(sampler: LikeLengthSampler, steps: int) -> Iterator[list[int]]:
    """The numbers of the rows of each optimizer step, of all processes together."""
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), sampler.batch_rows):
            if not steps:
                return
            yield order[start : start + sampler.batch_rows]
            steps -= 1
        epoch += 1


def rows_of_passes(sampler: LikeLengthSampler, arguments: TrainingArguments) -> list[list[int]]:
    """The numbers of the rows of every forward pass of a training."""
    rows = arguments.per_device_train_batch_size
    per_epoch = math.ceil(len(sampler) / rows)
    total = arguments.max_steps * arguments.gradient_accumulation_steps
    epochs = (
        math.ceil(total / per_epoch) if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs)
    )
    passes = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        passes += [order[start : start + rows] for start in range(0, len(order), rows)]
    return passes[:total] if arguments.max_steps > 0 else passes
