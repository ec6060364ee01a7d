"""Which rows each seed trains on, and which all seeds are validated and tested on."""

from dataclasses import dataclass, replace

import numpy as np

from workflow import params
from workflow.data import near_duplicates
from workflow.data.near_duplicates import Pair
from workflow.data.rows import Instruction
from workflow.data.split import draw, in_order, split, split_off, without_categories
from workflow.runtime.errors import UserError


@dataclass(frozen=True)
class Draws:
    """The rows of all seeds. No instruction is in two of test, validation and training, whatever the seed.

    Attributes:
        test, validation: rows that all seeds share.
        train: by training seed, the rows that its runs are trained on.
        left_out: for `train` (of the first seed) and `validation`, the rows that belong to held-out categories and were
            removed.
        drawn: all rows that were drawn, each once, with those that were then left out.
        pool: how many rows each seed but the first draws its own from; None where all seeds share a draw.
    """

    test: list[Instruction]
    validation: list[Instruction]
    train: dict[int, list[Instruction]]
    left_out: dict[str, int]
    drawn: list[Instruction]
    pool: int | None

    @property
    def of_first_seed(self) -> list[Instruction]:
        """The training rows of the first seed."""
        return next(iter(self.train.values()))

    @property
    def trained(self) -> list[Instruction]:
        """The rows that any seed trains on, each once."""
        return list({row.id: row for rows in self.train.values() for row in rows}.values())

    @property
    def splits(self) -> dict[str, list[Instruction]]:
        """The rows by split, those that any seed trains on as one."""
        return {"test": self.test, "validation": self.validation, "train": self.trained}

    def without(self, near: list[Pair]) -> "Draws":
        """Return the draws without the training and validation rows of these pairs.

        Raises:
            UserError: nothing is left to validate on, or for a seed to train on.
        """
        remaining = {
            seed: near_duplicates.without(self.splits | {"train": rows}, near)
            for seed, rows in self.train.items()
        }
        return replace(
            self,
            validation=next(iter(remaining.values()))["validation"],
            train={seed: splits["train"] for seed, splits in remaining.items()},
        )


def draw_all(rows: list[Instruction], settings: params.Sample, seeds: list[int]) -> Draws:
    """Draw the rows that the sample's params describe.

    Args:
        rows: the whole dataset.
        seeds: training seeds; with `per_seed` the first of them gets the seed recipe's own rows.

    Raises:
        UserError: the rows do not suffice.
    """
    return (_draw_for_each if settings.per_seed else _draw_once)(rows, settings, seeds)


def seed_of_draw(sample_seed: int, training_seed: int) -> int:
    """Return the seed of the shuffle that draws a training seed's rows, where it is not the first of the seeds.

    It is the first 64-bit word of numpy's `SeedSequence(sample_seed, spawn_key=(training_seed,))`, so the draws of two
    seeds are independent, and another seed in the list changes none of them.
    """
    sequence = np.random.SeedSequence(sample_seed, spawn_key=(training_seed,))
    return int(sequence.generate_state(1, np.uint64)[0])


def _draw_once(rows: list[Instruction], settings: params.Sample, seeds: list[int]) -> Draws:
    """Draw rows as the seed recipe does, and split them; every seed trains on the same."""
    drawn = draw(rows, size=settings.rows, seed=settings.seed)
    complete = split(drawn, **_sizes(settings), held_out_categories=[])
    splits = split(drawn, **_sizes(settings), held_out_categories=settings.held_out_categories)
    return Draws(
        splits["test"],
        splits["validation"],
        train=dict.fromkeys(seeds, splits["train"]),
        left_out={name: len(complete[name]) - len(splits[name]) for name in ("train", "validation")},
        drawn=drawn,
        pool=None,
    )


def _draw_for_each(rows: list[Instruction], settings: params.Sample, seeds: list[int]) -> Draws:
    """Draw the training rows of each seed anew, apart from validation and test splits that all of them share.

    The first seed draws as the seed recipe does, from the whole dataset, and then loses the held-out categories. The two
    splits have no instruction of its rows. Every other seed draws from all rows whose instruction is in neither split and
    that are of no held-out category.
    """
    held_out = settings.held_out_categories
    own = draw(rows, size=settings.rows, seed=settings.seed)
    whole = split_off(rows, apart_from=own, **_sizes(settings), held_out_categories=[])
    splits = split_off(rows, apart_from=own, **_sizes(settings), held_out_categories=held_out)
    first, *others = seeds
    train = {first: without_categories(own, held_out, purpose="train")}
    scored = {row.group for split_rows in whole.values() for row in split_rows}
    pool = [row for row in rows if row.group not in scored and row.category not in held_out]
    if others and len(pool) < settings.rows:
        raise UserError(
            f"sample.rows asks for {settings.rows} rows for each seed, and {len(pool)} rows of the dataset are neither tested "
            "nor validated on, nor of a held-out category."
        )
    for seed in others:
        train[seed] = draw(pool, size=settings.rows, seed=seed_of_draw(settings.seed, seed))
    drawn = {row.id: row for part in (own, *whole.values(), *train.values()) for row in part}
    return Draws(
        splits["test"],
        splits["validation"],
        train={seed: in_order(seed_rows, seed=settings.split_seed) for seed, seed_rows in train.items()},
        left_out={
            "train": len(own) - len(train[first]),
            "validation": len(whole["validation"]) - len(splits["validation"]),
        },
        drawn=list(drawn.values()),
        pool=len(pool),
    )


def _sizes(settings: params.Sample) -> dict[str, int]:
    return {
        "validation": settings.validation_rows,
        "test": settings.test_rows,
        "seed": settings.split_seed,
    }
