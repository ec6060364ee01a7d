"""Make the sample: draw rows, split them, look for near-duplicates, and prepare the test split for scoring."""

from dataclasses import dataclass
from pathlib import Path

from workflow import params
from workflow.data import choices, model_files, near_duplicates
from workflow.data.near_duplicates import Pair
from workflow.data.rows import Instruction
from workflow.data.split import draw, split
from workflow.runtime.errors import UserError


@dataclass(frozen=True)
class Sample:
    """The three splits, and what is reported about them.

    Attributes:
        splits: rows of `test`, `validation` and `train`.
        scored: the rows of the test split, as `choices.scored_rows` returns them.
        held_out_categories: categories that only the test split has.
        left_out: for `train` and `validation`, the rows that belong to these categories and were removed.
        near: pairs of a test row and an almost identical training or validation row.
        dropped: whether the training and validation rows of these pairs were removed.
        context: the tokens that the model can hold; None if it does not say.
        longer: test rows that exceed the context.
    """

    splits: dict[str, list[Instruction]]
    scored: list[dict]
    held_out_categories: list[str]
    left_out: dict[str, int]
    near: list[Pair]
    dropped: bool
    context: int | None
    longer: int

    @property
    def near_rows(self) -> int:
        """Test rows that have a near-duplicate."""
        return len({pair.test.id for pair in self.near})

    @property
    def dropped_rows(self) -> int:
        """Training and validation rows that were removed as near-duplicates."""
        return len({pair.other.id for pair in self.near}) if self.dropped else 0

    @property
    def held_out_rows(self) -> int:
        """Test rows of held-out categories."""
        return sum(row["held_out"] for row in self.scored)

    @property
    def mixed_rows(self) -> int:
        """Test rows that have a response of another category among their choices."""
        return sum(not row["same_category"] for row in self.scored)

    def counts(self) -> dict[str, int]:
        """What counts.json holds."""
        return {
            **{f"{name}_rows": len(rows) for name, rows in self.splits.items()},
            "held_out_rows": self.held_out_rows,
            "left_out_rows": sum(self.left_out.values()),
            "near_duplicate_test_rows": 0 if self.dropped_rows else self.near_rows,
            "near_duplicates_dropped": self.dropped_rows,
            "choices_from_other_categories": self.mixed_rows,
            "longer_than_context": self.longer,
        }

    def summary(self) -> list[str]:
        """What the terminal shows, line by line."""
        lines = [
            f"{name}: {len(rows)} rows, {len({row.group for row in rows})} different instructions"
            for name, rows in self.splits.items()
        ]
        if self.held_out_categories:
            lines.append(
                f"held out: {', '.join(self.held_out_categories)}: {self.held_out_rows} test rows; left out of training "
                f"are {self.left_out['train']} rows, and of validation {self.left_out['validation']}"
            )
        lines.append(
            f"{self.near_rows} test rows have a near-duplicate among the training and validation rows"
            + (f", of which {self.dropped_rows} are dropped" if self.dropped_rows else "")
        )
        lines += [f"  {line}" for line in near_duplicates.examples(self.near)]
        if self.longer:
            lines.append(
                f"{self.longer} test rows are longer than the model's context of {self.context} tokens: their prompts "
                "are cut"
            )
        lines.append(f"{self.mixed_rows} test rows have a response of another category to choose from")
        return lines


def make_sample(rows: list[Instruction], settings: params.Sample, model_folder: Path) -> Sample:
    """Make the sample that params.yaml describes.

    Args:
        rows: the whole dataset.
        model_folder: the base model, for its tokenizer, chat template and context length.

    Raises:
        UserError: the rows do not suffice, or one of them does not fit the model.
        CheckError: two splits share an instruction.
    """
    drawn = draw(rows, size=settings.rows, seed=settings.seed)
    sizes = {
        "validation": settings.validation_rows,
        "test": settings.test_rows,
        "seed": settings.split_seed,
    }
    complete = split(drawn, **sizes, held_out_categories=[])
    splits = split(drawn, **sizes, held_out_categories=settings.held_out_categories)
    left_out = {name: len(complete[name]) - len(splits[name]) for name in ("train", "validation")}
    near_duplicates.check_apart(splits)
    near = near_duplicates.near_duplicates(splits, threshold=settings.near_duplicate_threshold)
    dropped = settings.near_duplicates == "drop"
    if dropped:
        splits = near_duplicates.without(splits, near)
    tokenizer = model_files.load_tokenizer(model_folder)
    check_special_tokens(drawn, tokenizer)
    for row in [*splits["train"], *splits["validation"]]:
        choices.render(row, tokenizer)  # raises an error for a row that the chat template does not fit
    scored = choices.scored_rows(
        splits["test"],
        tokenizer,
        choice_seed=settings.choice_seed,
        held_out_categories=settings.held_out_categories,
    )
    context = model_files.context_length(model_folder)
    return Sample(
        splits=splits,
        scored=scored,
        held_out_categories=settings.held_out_categories,
        left_out=left_out,
        near=near,
        dropped=dropped,
        context=context,
        longer=choices.count_longer(scored, tokenizer, context=context) if context else 0,
    )


def check_special_tokens(rows: list[Instruction], tokenizer) -> None:
    """Refuse rows whose text contains a special token of the tokenizer, such as the end of a turn.

    In a response, such a token ends training and scoring in the middle. In any text, it can forge a turn. Chat
    templates insert texts verbatim, and tokenizers cannot tell the two apart.

    Raises:
        UserError: there is one. The message names the row, the text and the token, and counts such rows.
    """
    special = model_files.special_ids(tokenizer)
    forged = []
    for row in rows:
        texts = {"instruction": row.instruction, "context": row.context, "response": row.response}
        texts |= {f"message {number}": turn["content"] for number, turn in enumerate(row.earlier, start=1)}
        for name, text in texts.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if own := [token for token in ids if token in special]:
                forged.append((row.id, name, tokenizer.convert_ids_to_tokens(own[0])))
                break
    if forged:
        row_id, name, token = forged[0]
        more = f" (and {len(forged) - 1} more rows)" if len(forged) > 1 else ""
        raise UserError(
            f"row {row_id} of the dataset, counted from 0, has the model's own token {token} in its {name}{more}, "
            "which would end or forge a turn; write it in another way in the data, or leave the row out."
        )
