"""Draw rows as the seed recipe does, and split them so that no instruction is in two splits."""

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

    Groups of rows with the same instruction are ordered by the sha256 of seed and text (where the texts of a group
    differ in punctuation, by the smallest). Whole groups fill the test split first and the validation split next,
    until each has at least as many rows as requested; the rest is for training. Within a split, rows are ordered by
    the same hash. Finally, rows of the held-out categories are removed from the validation and training splits, so
    they appear only in the test split.

    Args:
        validation, test: rows of these splits, at least.

    Raises:
        UserError: no rows are left to train or validate on, the test split has fewer than two different
            instructions, or there is no row of a held-out category.
    """
    _check_categories(rows, held_out_categories)

    group_keys: dict[str, str] = {}
    for row in rows:
        key = shuffle_key(seed, plain(row.questions[0]))
        group_keys[row.group] = min(key, group_keys.get(row.group, key))

    def order(row: Instruction) -> tuple[str, str, str]:
        first = shuffle_key(seed, plain(row.questions[0]))
        return group_keys[row.group], first, shuffle_key(seed, *row.texts())

    splits: dict[str, list[Instruction]] = {"test": [], "validation": [], "train": []}
    sizes = {"test": test, "validation": validation, "train": len(rows)}
    names = iter(sizes)
    name, last_group = next(names), None
    for row in sorted(rows, key=order):
        if row.group != last_group:
            while len(splits[name]) >= sizes[name]:
                name = next(names)
            last_group = row.group
        splits[name].append(row)
    if not splits["train"]:
        raise UserError(
            f"sample.test_rows ({test}) and sample.validation_rows ({validation}) leave nothing to train on, "
            "since rows with the same instruction stay together."
        )
    if len({row.group for row in splits["test"]}) < 2:
        raise UserError("the test split needs at least two different instructions; raise sample.test_rows.")
    return _without_categories(splits, held_out_categories)


def _without_categories(
    splits: dict[str, list[Instruction]], categories: list[str]
) -> dict[str, list[Instruction]]:
    """Return the splits with rows of these categories in the test split alone.

    Raises:
        UserError: nothing is left to train or validate on.
    """
    remaining = dict(splits)
    for name, purpose in (("train", "train"), ("validation", "validate")):
        remaining[name] = [row for row in splits[name] if row.category not in categories]
        if not remaining[name]:
            raise UserError(
                f"sample.held_out_categories ({', '.join(categories)}) leaves nothing to {purpose} on."
            )
    return remaining


def _check_categories(rows: list[Instruction], held_out: list[str]) -> None:
    """Raise a UserError unless there are rows of every category that is to be held out."""
    categories = sorted({row.category for row in rows if row.category is not None})
    if held_out and not categories:
        raise UserError(
            "sample.held_out_categories needs rows with a category, and the drawn rows have none."
        )
    for category in held_out:
        if category not in categories:
            raise UserError(
                f"sample.held_out_categories names {category}, and no drawn row is of it; "
                f"there are {', '.join(categories)}{suggestion(category, categories)}."
            )
