"""Tokenized rows: made by TRL, held against the chat template, given the faults that params ask for, and counted."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
)

from workflow import params
from workflow.data import chat
from workflow.data.rows import Instruction
from workflow.runtime.errors import CheckError, UserError, suggestion
from workflow.training.speed.fused import IGNORED


@dataclass(frozen=True)
class Rows:
    """What the tokenized training rows hold, counted as they are trained on."""

    rows: int
    rows_dropped: int  # no response token is left within max_length
    rows_cut: int  # end at max_length, so their end token is not learned
    tokens: int
    tokens_in_loss: int
    longest: int  # tokens
    bos_per_row: int
    end_token_in_loss: bool


def chosen(
    train_rows: list[Instruction], validation_rows: list[Instruction], training: params.Training
) -> tuple[list[Instruction], list[Instruction]]:
    """The rows of the sample that a run trains and validates on: without the categories that it leaves out.

    Of the training rows that remain, the first `training.schedule.rows` are used.

    Raises:
        UserError: no row is of a left-out category, nothing is left to train or to validate on, or there are fewer rows.
    """
    left_out = training.left_out_categories
    known = sorted({row.category for row in (*train_rows, *validation_rows) if row.category is not None})
    for category in left_out:
        if category not in known:
            there_are = f"they are of {', '.join(known)}" if known else "they have no category"
            raise UserError(
                f"training.schedule.left_out_categories names {category}, and no training or validation row is of it; "
                f"{there_are}{suggestion(category, known)}."
            )
    train_rows, validation_rows = (
        [row for row in rows if row.category not in left_out] for rows in (train_rows, validation_rows)
    )
    for rows, purpose in ((train_rows, "train"), (validation_rows, "validate")):
        if left_out and not rows:
            raise UserError(
                f"training.schedule.left_out_categories ({', '.join(left_out)}) leaves nothing to {purpose} on."
            )
    if training.rows is not None and training.rows > len(train_rows):
        beside = f" besides those of {', '.join(left_out)}" if left_out else ""
        raise UserError(
            f"training.schedule.rows is {training.rows}, and the sample has {len(train_rows)} training rows{beside}."
        )
    return train_rows[: training.rows], validation_rows


def tokenizable(rows: list[Instruction] | list[dict], training: params.Training) -> Dataset:
    if not rows:
        raise UserError(
            "there are no rows to train or to validate on; `dvc repro --force sample` draws them again."
        )
    if isinstance(rows[0], dict):
        return Dataset.from_list(rows)
    if training.loss_on == "prompt_and_response" and (row := next((r for r in rows if r.not_learned), None)):
        raise UserError(
            f"training.step.loss_on is prompt_and_response, which learns every message, and message {row.not_learned[0] + 1} "
            f"of row {row.id} of the dataset, counted from 0, has the weight 0; use response."
        )
    return Dataset.from_list([row.conversation(use_context=training.use_context) for row in rows])


def check_rendered(
    dataset: Dataset,
    rows: list[Instruction] | list[dict],
    tokenizer: PreTrainedTokenizerBase,
    training: params.Training,
) -> None:
    """Raise a CheckError unless TRL's tokens are those of the text that the chat template makes of each row.

    TRL leaves out rows whose prompt alone is as long as a row may be. Rows that came as tokens already have no text.
    """
    if isinstance(rows[0], dict):
        return
    made = iter(dataset["input_ids"])
    ids = next(made, None)
    for row in rows:
        prompt = row.conversation(use_context=training.use_context)["prompt"]
        text = chat.whole(prompt, row.response, tokenizer)
        if ids == tokenizer(text, add_special_tokens=False)["input_ids"][: training.max_length]:
            ids = next(made, None)
            continue
        before, _ = chat.render(prompt, row.response, tokenizer)
        if len(tokenizer(before, add_special_tokens=False)["input_ids"]) < training.max_length:
            raise CheckError(
                f"row {row.id} of the dataset is trained on as another text than the chat template makes of it: "
                + chat.parting(tokenizer.decode(ids or []), text)
            )
    if ids is not None:
        raise CheckError("more rows are trained on than stage sample drew")


def with_faults(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, training: params.Training) -> Dataset:
    """Put the faults that params ask for into tokenized rows: a second BOS token, no end token in the loss.

    A second BOS token is learned where the first one is. A row with no label left is dropped.

    Raises:
        UserError: a row begins with no BOS token that could be repeated.
    """
    if training.second_bos:
        bos = tokenizer.bos_token_id
        if bos is None or any(ids[0] != bos for ids in dataset["input_ids"]):
            raise UserError(
                "training.step.second_bos repeats the BOS token that rows begin with, and with this model's tokenizer "
                "and chat template they begin with none."
            )
        dataset = dataset.map(_begin_twice, fn_kwargs={"max_length": training.max_length})
    if not training.learn_end_token:
        dataset = dataset.map(_ignore, fn_kwargs={"token": tokenizer.eos_token_id})
    return dataset.filter(teaches)


def teaches(row: dict) -> bool:
    return any(label != IGNORED for label in row["labels"])


def _begin_twice(row: dict, max_length: int) -> dict:
    return {key: [row[key][0], *row[key]][:max_length] for key in ("input_ids", "labels")}


def _ignore(row: dict, token: int) -> dict:
    return {"labels": [IGNORED if label == token else label for label in row["labels"]]}


def check_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    drawn: int,
    training: params.Training,
    split: str = "training",
) -> Rows:
    """Count what the trainer holds of the rows, and refuse what a run must not be trained or validated on.

    Args:
        drawn: rows that the sample has, before those without a response token in max_length were dropped.

    Raises:
        UserError: no row has a response token left within max_length.
        CheckError: a row has no token in the loss, does not begin with as many BOS tokens as the chat template
            gives it, or a whole row does not have its end token in the loss once; where params ask for one of
            these faults, a row does not have it.
    """
    if not len(dataset):
        raise UserError(
            f"training.step.max_length is {training.max_length} tokens, which leaves no response to learn in any {split} row."
        )
    bos_tokens = int(chat.begins_with_bos(tokenizer)) + training.second_bos
    cut = tokens = in_loss = longest = ends_taught = 0
    for row in dataset:
        ids, labels = row["input_ids"], row["labels"]
        which = f"a {split} row ({tokenizer.decode(ids[:16])!r} ...)"
        if not teaches(row):
            raise CheckError(f"{which} has no token in the loss")
        if (bos := chat.leading(ids, tokenizer.bos_token_id)) != bos_tokens:
            raise CheckError(f"{which} begins with {bos} BOS tokens, and must begin with {bos_tokens}")
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        ends = tokenizer.eos_token_id in ids[start:]
        taught = labels.count(tokenizer.eos_token_id)
        is_cut = not ends and len(ids) == training.max_length
        if taught and not training.learn_end_token:
            raise CheckError(f"{which} teaches the end token, which training.learn_end_token leaves out")
        if training.learn_end_token and not taught and not is_cut:
            raise CheckError(f"{which} does not teach the end token, so the model would not stop")
        if taught > 1 and training.loss_on == "response":
            raise CheckError(f"{which} teaches {taught} end tokens, so the model would stop in its middle")
        cut += is_cut
        ends_taught += taught > 0
        tokens += len(ids)
        longest = max(longest, len(ids))
        in_loss += sum(label != IGNORED for label in labels)
    return Rows(
        rows=len(dataset),
        rows_dropped=drawn - len(dataset),
        rows_cut=cut,
        tokens=tokens,
        tokens_in_loss=in_loss,
        longest=longest,
        bos_per_row=bos_tokens,
        end_token_in_loss=ends_taught > 0,
    )
