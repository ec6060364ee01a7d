"""Make the sample: draw rows, split them, look for near-duplicates, and prepare the test split for scoring."""

from dataclasses import dataclass
from pathlib import Path

from workflow import params
from workflow.data import choices, model_files, near_duplicates
from workflow.data.draws import Draws, draw_all
from workflow.data.near_duplicates import Pair
from workflow.data.rows import Instruction
from workflow.runtime.errors import UserError


@dataclass(frozen=True)
class Sample:
    """The rows of test, validation and training, and what is reported about them.

    Attributes:
        draws: the rows that the runs see.
        per_seed: whether each seed has training rows of its own.
        scored: the rows of the test split, as `choices.scored_rows` returns them.
        shortened: test rows whose response is scored up to `longest_response` tokens only.
        held_out_categories: categories that only the test split has.
        near: pairs of a test row and an almost identical training or validation row.
        dropped: whether the training and validation rows of these pairs were removed.
        context: the tokens that the model can hold; None if it does not say.
        longer: test rows that exceed the context.
    """

    draws: Draws
    per_seed: bool
    scored: list[dict]
    shortened: int
    held_out_categories: list[str]
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

    def counts(self) -> dict[str, int | dict[int, int] | None]:
        """What counts.json holds; docs/evaluation.md says what each number counts."""
        draws = self.draws
        return {
            "test_rows": len(draws.test),
            "validation_rows": len(draws.validation),
            "train_rows": len(draws.of_first_seed),
            "train_rows_by_seed": {seed: len(rows) for seed, rows in draws.train.items()},
            "train_rows_of_all_seeds": len(draws.trained),
            "rows_to_draw_from": draws.pool,
            "held_out_rows": self.held_out_rows,
            "left_out_rows": sum(draws.left_out.values()),
            "near_duplicate_test_rows": 0 if self.dropped_rows else self.near_rows,
            "near_duplicates_dropped": self.dropped_rows,
            "shortened_responses": self.shortened,
            "choices_from_other_categories": self.mixed_rows,
            "longer_than_context": self.longer,
        }

    def summary(self) -> list[str]:
        """What the terminal shows, line by line."""
        lines = [
            f"{name}: {len(rows)} rows, {len({row.group for row in rows})} different instructions"
            for name, rows in self.draws.splits.items()
        ]
        if self.per_seed:
            by_seed = ", ".join(f"{len(rows)} of seed {seed}" for seed, rows in self.draws.train.items())
            lines.append(f"each seed trains on rows of its own: {by_seed}")
        if self.held_out_categories:
            left_out = self.draws.left_out
            lines.append(
                f"held out: {', '.join(self.held_out_categories)}: {self.held_out_rows} test rows; left out of training "
                f"are {left_out['train']} rows{' of the first seed' if self.per_seed else ''}, and of validation "
                f"{left_out['validation']}"
            )
        lines.append(
            f"{self.near_rows} test rows have a near-duplicate among the training and validation rows"
            + (f", of which {self.dropped_rows} are dropped" if self.dropped_rows else "")
        )
        lines += [f"  {line}" for line in near_duplicates.examples(self.near)]
        if self.shortened:
            lines.append(f"{self.shortened} test rows have a longer response than is scored")
        if self.longer:
            lines.append(
                f"{self.longer} test rows are longer than the model's context of {self.context} tokens: their prompts "
                "are cut"
            )
        lines.append(f"{self.mixed_rows} test rows have a response of another category to choose from")
        return lines


def make_sample(
    rows: list[Instruction], settings: params.Sample, seeds: list[int], model_folder: Path
) -> Sample:
    """Make the sample that params.yaml describes.

    Args:
        rows: the whole dataset.
        seeds: of the trainings; with `per_seed` the first of them gets the seed recipe's own rows.
        model_folder: the base model, for its tokenizer, chat template and context length.

    Raises:
        UserError: the rows do not suffice, or one of them does not fit the model.
        CheckError: two splits share an instruction.
    """
    draws = draw_all(rows, settings, seeds)
    near_duplicates.check_apart(draws.splits)
    near = near_duplicates.near_duplicates(draws.splits, threshold=settings.near_duplicate_threshold)
    dropped = settings.near_duplicates == "drop"
    if dropped:
        draws = draws.without(near)
    tokenizer = model_files.load_tokenizer(model_folder)
    check_special_tokens(draws.drawn, tokenizer)
    for row in [*draws.trained, *draws.validation]:
        choices.render(row, tokenizer)  # raises an error for a row that the chat template does not fit
    test = draws.test
    if settings.longest_response is not None:
        test = [choices.shortened(row, tokenizer, tokens=settings.longest_response) for row in test]
    scored = choices.scored_rows(
        test,
        tokenizer,
        choice_seed=settings.choice_seed,
        held_out_categories=settings.held_out_categories,
    )
    context = model_files.context_length(model_folder)
    return Sample(
        draws=draws,
        per_seed=settings.per_seed,
        scored=scored,
        shortened=sum(row != whole for row, whole in zip(test, draws.test, strict=True)),
        held_out_categories=settings.held_out_categories,
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
