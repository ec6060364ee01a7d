"""Draw rows as the seed recipe does, and split them so that no instruction is in two splits."""

from collections.abc import Iterator
from itertools import groupby

from workflow.data.rows import Instruction, plain, shuffle_key
from workflow.runtime.errors import UserError, suggestion


def draw(rows: list[Instruction], *, size: int, seed: int) -> list[Instruction]:
    """Draw `size` rows exactly as the seed recipe does: `shuffle(seed).select(range(size))`.

    Raises:
        UserError: the dataset has fewer rows.
    """
    if len(rows) < size:
        raise UserError(f"sample.rows asks for {size} rows, and the dataset has {len(rows)}.")
    import datasets

    order = datasets.Dataset.from_dict({"row": range(len(rows))}).shuffle(seed=seed).select(range(size))
    return [rows[index] for index in order["row"]]


def split(
    rows: list[Instruction], *, validation: int, test: int, seed: int, held_out_categories: list[str]
) -> dict[str, list[Instruction]]:
    """Split rows so that no instruction is in two splits. The order of the rows does not matter.

    Groups of rows with the same instruction come in the order of `in_order`. Whole groups fill the test split first and
    the validation split next, until each has at least as many rows as requested; the rest is for training. Finally, rows
    of the held-out categories are removed from the validation and training splits, so they appear only in the test split.

    Args:
        validation, test: rows of these splits, at least.

    Raises:
        UserError: no rows are left to train or validate on, the test split has fewer than two different
            instructions, or there is no row of a held-out category.
    """
    _check_categories(rows, held_out_categories, which="drawn")
    splits = _filled(rows, validation=validation, test=test, seed=seed)
    if not splits["train"]:
        raise UserError(
            f"sample.test_rows ({test}) and sample.validation_rows ({validation}) leave nothing to train on, "
            "since rows with the same instruction stay together."
        )
    _check_test_split(splits["test"])
    for name, purpose in (("train", "train"), ("validation", "validate")):
        splits[name] = without_categories(splits[name], held_out_categories, purpose=purpose)
    return splits


def split_off(
    rows: list[Instruction],
    *,
    apart_from: list[Instruction],
    validation: int,
    test: int,
    seed: int,
    held_out_categories: list[str],
) -> dict[str, list[Instruction]]:
    """Take test and validation splits from the rows that share no instruction with `apart_from`.

    They are filled as `split` fills them, test first, and the validation split then loses the held-out categories.

    Raises:
        UserError: these rows do not fill the two splits, none is left to validate on, the test split has fewer than two
            different instructions, or there is no row of a held-out category.
    """
    trained = {row.group for row in apart_from}
    others = [row for row in rows if row.group not in trained]
    _check_categories(others, held_out_categories, which="remaining")
    splits = _filled(others, validation=validation, test=test, seed=seed)
    if len(splits["validation"]) < validation:
        raise UserError(
            f"sample.test_rows ({test}) and sample.validation_rows ({validation}) are more than the {len(others)} rows of "
            "the dataset that share no instruction with the rows that the first seed draws (sample.rows)."
        )
    _check_test_split(splits["test"])
    validated = without_categories(splits["validation"], held_out_categories, purpose="validate")
    return {"test": splits["test"], "validation": validated}


def in_order(rows: list[Instruction], *, seed: int) -> list[Instruction]:
    """Return rows in the order in which they fill the splits, those with the same instruction together.

    Groups are ordered by the sha256 of seed and text (where the texts of a group differ in punctuation, by the smallest),
    and the rows of a group by theirs.
    """
    group_keys: dict[str, str] = {}
    for row in rows:
        key = shuffle_key(seed, plain(row.questions[0]))
        group_keys[row.group] = min(key, group_keys.get(row.group, key))

    def key_of(row: Instruction) -> tuple[str, str, str]:
        first = shuffle_key(seed, plain(row.questions[0]))
        return group_keys[row.group], first, shuffle_key(seed, *row.texts())

    return sorted(rows, key=key_of)


def without_categories(rows: list[Instruction], categories: list[str], *, purpose: str) -> list[Instruction]:
    """Return the rows that are of none of these categories.

    Args:
        purpose: what the rows are for, `train` or `validate`; for the error.

    Raises:
        UserError: none is left.
    """
    remaining = [row for row in rows if row.category not in categories]
    if not remaining:
        raise UserError(
            f"sample.held_out_categories ({', '.join(categories)}) leaves nothing to {purpose} on."
        )
    return remaining


def _filled(
    rows: list[Instruction], *, validation: int, test: int, seed: int
) -> dict[str, list[Instruction]]:
    """Return the rows of the splits `test`, `validation` and `train`, each filled with whole groups before the next."""
    splits: dict[str, list[Instruction]] = {"test": [], "validation": [], "train": []}
    sizes = {"test": test, "validation": validation, "train": len(rows) + 1}
    for group in _groups(in_order(rows, seed=seed)):
        name = next(name for name in splits if len(splits[name]) < sizes[name])
        splits[name].extend(group)
    return splits


def _groups(rows: list[Instruction]) -> Iterator[list[Instruction]]:
    return (list(group) for _, group in groupby(rows, key=lambda row: row.group))


def _check_test_split(rows: list[Instruction]) -> None:
    """Raise a UserError if the test split has a single instruction."""
    if len({row.group for row in rows}) < 2:
        raise UserError("the test split needs at least two different instructions; raise sample.test_rows.")


def _check_categories(rows: list[Instruction], held_out: list[str], *, which: str) -> None:
    """Raise a UserError unless there are rows of every category that is to be held out."""
    categories = sorted({row.category for row in rows if row.category is not None})
    if held_out and not categories:
        raise UserError(
            f"sample.held_out_categories needs rows with a category, and the {which} rows have none."
        )
    for category in held_out:
        if category not in categories:
            raise UserError(
                f"sample.held_out_categories names {category}, and no {which} row is of it; "
                f"there are {', '.join(categories)}{suggestion(category, categories)}."
            )
