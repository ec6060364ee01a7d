"""Instructions: read from the data, sampled as the seed recipe does, split without leakage."""

import hashlib
import math
import unicodedata
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path

from workflow import params
from workflow.data import chat, conversations, model_files, tables
from workflow.data.texts import check_text, says_something
from workflow.runtime.errors import UserError, suggestion
from workflow.runtime.files import read_yaml
from workflow.runtime.stage import say


@dataclass(frozen=True)
class Instruction:
    """One row of data. `id` is its position in the source, `group` what its split goes by.

    Of a conversation with several turns the last question is the instruction and its answer the response, which
    alone is learned and scored; `earlier` are the messages before them (`role`, `content`), a system message
    among them, and `not_learned` the places in it of answers that no run may learn (weight 0).
    """

    id: int
    instruction: str
    context: str
    response: str
    category: str | None
    earlier: list[dict[str, str]] = field(default_factory=list)
    not_learned: list[int] = field(default_factory=list)

    @cached_property
    def group(self) -> str:
        """What the user said first, without case, spacing and punctuation: rows that share it never meet in two splits.

        So a conversation, and a longer or shorter cut of it, are in one split, whose prompts hold each other's
        responses.
        """
        return normal(self.said[0])

    @property
    def said(self) -> list[str]:
        """What the user says, first to last, without the context."""
        return [*(turn["content"] for turn in self.earlier if turn["role"] == "user"), self.instruction]

    def user_message(self, *, use_context: bool = True) -> str:
        """What the user says: the instruction, and the context below it where there is one."""
        if use_context and self.context:
            return f"{self.instruction}\n\n{self.context}"
        return self.instruction

    def conversation(self, *, use_context: bool = True) -> dict:
        """The row in TRL's conversational prompt/completion form."""
        question = {"role": "user", "content": self.user_message(use_context=use_context)}
        return {
            "prompt": [*self.earlier, question],
            "completion": [{"role": "assistant", "content": self.response}],
        }

    def texts(self) -> tuple[str, ...]:
        """All that tells the row from others, but its category."""
        earlier = (text for turn in self.earlier for text in (turn["role"], turn["content"]))
        return (self.instruction, self.context, self.response, *earlier)


def _plain(text: str) -> str:
    """A text without what two copies of it may differ in: case and spacing."""
    return " ".join(text.casefold().split())


def normal(text: str) -> str:
    """A text without case, spacing and punctuation; where nothing else is in it, without case and spacing alone."""
    spaced = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text.casefold())
    return " ".join(spaced.split()) or _plain(text)


def read(path: Path, dataset: params.Dataset) -> list[Instruction]:
    """Read a dataset's rows in the order of its file (of its files' names, for a folder).

    Raises:
        UserError: the file does not fit its format, a column is missing, or a row has no
            instruction or no response, or a text that is none; the sentence names the file and the row.
    """
    if dataset.format == "chatterbot":
        return _number(_read_chatterbot(path), path)
    named = dataset.columns.model_dump()
    is_chat = isinstance(dataset.columns, params.ChatColumns)
    table = tables.read(path, dataset.format, named, optional=conversations.OF_THE_PROMPT if is_chat else ())
    rows = [(f"{path.name} {where}", row) for where, row in table]
    if is_chat:
        rows = [(where, _conversation(row, named, where)) for where, row in rows]
    return _number(rows, path)


def _conversation(row: dict, named: dict[str, str | None], where: str) -> dict:
    """A row of conversations as one with an instruction and a response.

    Args:
        row: its messages, which in a CSV are JSON text, its category, and what else of it could be in a prompt.
        named: the columns that `dataset.columns` names.
    """
    conversations.check_row(row, set(named.values()), where)
    messages = row["messages"]
    if isinstance(messages, str):
        messages = tables.parsed(messages, f"{where} has messages that are text and not JSON")
    return conversations.last_turn(messages, where) | {"category": row["category"]}


def _read_chatterbot(path: Path) -> list[tuple[str, dict]]:
    """Read chatterbot-corpus' YAML: the first turn is the instruction, the second the response."""
    files = sorted(path.glob("*.yml")) if path.is_dir() else [path]
    rows = []
    for file in files:
        corpus = read_yaml(file)
        conversations = corpus.get("conversations") if isinstance(corpus, dict) else None
        if not isinstance(conversations, list):
            raise UserError(f"{file.name} has no list of conversations, as chatterbot-corpus' files have.")
        for number, turns in enumerate(conversations, start=1):
            where = f"{file.name} conversation {number}"
            if isinstance(turns, str) and turns.count(" - ") == 1:
                # The corpus has one conversation without its first dash, which YAML reads as one text of both lines;
                # taken for a list of turns, it would be that text's first two letters.
                turns = [turn.strip().strip("'\"") for turn in turns.split(" - ")]
                say(f"  {where} lacks the dash before its first turn, and is read as if it had it")
            if not isinstance(turns, list) or not turns:
                raise UserError(f"{where} is not a list of turns.")
            row = {
                "instruction": turns[0],
                "context": "",
                "response": turns[1] if len(turns) > 1 else None,
                "category": file.stem,
            }
            rows.append((where, row))
    return rows


def _number(rows: list[tuple[str, dict]], path: Path) -> list[Instruction]:
    instructions = []
    for index, (where, row) in enumerate(rows):
        row = row | {"category": _category(row["category"])}
        for key in ("instruction", "context", "response", "category"):
            text = row[key]
            needed = key in ("instruction", "response")
            if text is not None and not isinstance(text, str):
                raise UserError(f"{where} has {_a(key)} that is not text but {tables.type_name(text)}.")
            if needed and (text is None or not says_something(text)):
                raise UserError(f"{where} has no {key}; every row needs one.")
            check_text(text or "", f"{where} has {_a(key)}")
        instructions.append(
            Instruction(
                id=index,
                instruction=row["instruction"].strip(),
                context=(row["context"] or "").strip(),
                response=row["response"].strip(),
                category=row["category"],
                earlier=row.get("earlier", []),
                not_learned=row.get("not_learned", []),
            )
        )
    if not instructions:
        raise UserError(f"{path.name} has no rows.")
    return instructions


def _category(label: object) -> object:
    """A class label that is a number as text, a whole one without its .0; NaN, pandas' missing number, is none."""
    match label:
        case bool():
            return str(label).lower()
        case int():
            return str(label)
        case float() | Decimal():
            if math.isnan(label):
                return None
            return str(int(label)) if label == label // 1 else str(label)
    return label


def _a(key: str) -> str:
    return f"an {key}" if key == "instruction" else f"a {key}"


def sample(rows: list[Instruction], *, size: int, seed: int) -> list[Instruction]:
    """Choose `size` rows exactly as the seed recipe: `shuffle(seed).select(range(size))`.

    Raises:
        UserError: there are fewer rows than asked for.
    """
    if len(rows) < size:
        raise UserError(f"sample.rows asks for {size} rows, and the dataset has {len(rows)}.")
    import datasets

    order = datasets.Dataset.from_dict({"row": range(len(rows))}).shuffle(seed=seed).select(range(size))
    return [rows[index] for index in order["row"]]


def split(
    rows: list[Instruction], *, validation: int, test: int, seed: int, held_out_categories: list[str]
) -> dict[str, list[Instruction]]:
    """Split rows so that no instruction is in two splits and the order of the rows has no say.

    The instructions are ordered by the sha256 of seed and text (of several that differ in punctuation, by the
    first of theirs); whole groups fill the test split, then the validation split, each until it holds at least as
    many rows as asked for, and the rest is for training. Within a split the rows are ordered by the same hash. Then
    the rows of the held-out categories leave the validation and training splits, and so appear in the test split
    alone.

    Raises:
        UserError: the groups leave nothing to train on, the test split has one instruction alone, no
            row is of a held-out category, or these leave nothing to train or to validate on.
    """
    _check_categories(rows, held_out_categories)

    places: dict[str, str] = {}
    for row in rows:
        place = _place(seed, _plain(row.said[0]))
        places[row.group] = min(place, places.get(row.group, place))

    def key(row: Instruction) -> tuple[str, str, str]:
        return places[row.group], _place(seed, _plain(row.said[0])), _place(seed, *row.texts())

    splits: dict[str, list[Instruction]] = {"test": [], "validation": [], "train": []}
    wanted = {"test": test, "validation": validation, "train": len(rows)}
    names = iter(wanted)
    name, last_group = next(names), None
    for row in sorted(rows, key=key):
        if row.group != last_group:
            while len(splits[name]) >= wanted[name]:
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
    for name, purpose in (("train", "train"), ("validation", "validate")):
        splits[name] = [row for row in splits[name] if row.category not in held_out_categories]
        if not splits[name]:
            raise UserError(
                f"sample.held_out_categories ({', '.join(held_out_categories)}) leaves nothing to {purpose} on."
            )
    return splits


def _place(seed: int, *texts: str) -> str:
    """The sha256 that orders texts: like a random draw, but the same whatever else is ordered."""
    return hashlib.sha256("\0".join([str(seed), *texts]).encode()).hexdigest()


def _check_categories(rows: list[Instruction], held_out: list[str]) -> None:
    """Raise a UserError unless there are rows of every category that is to be held out."""
    found = sorted({row.category for row in rows if row.category is not None})
    if held_out and not found:
        raise UserError(
            "sample.held_out_categories needs rows with a category, and the drawn rows have none."
        )
    for category in held_out:
        if category not in found:
            raise UserError(
                f"sample.held_out_categories names {category}, and no drawn row is of it; "
                f"there are {', '.join(found)}{suggestion(category, found)}."
            )


def scored_rows(
    rows: list[Instruction], tokenizer, *, choice_seed: int, held_out_categories: list[str]
) -> list[dict]:
    """The test rows as the evaluation tasks read them: with the prompt's text, the response's length
    and the responses to choose from.

    `prompt` is what the user says last, and `chat_prompt` all that stands before the response, as the chat template
    writes it. `opening`, where there is one, is what the chat template puts between
    prompt and response, which is learned and so scored with the response. `response_tokens` counts what
    lm-evaluation-harness scores: the tokens of chat prompt, opening and response together, less those of the
    chat prompt alone. `response_bytes` is the response's length in UTF-8. `choices`, `choice` and
    `same_category` are as `choose_from` gives them; `held_out` is whether no row of this category was trained on.

    Raises:
        UserError: a row has fewer than three other responses to choose from, or the chat template does not fit it.
    """
    scored = []
    for row in rows:
        prompt, opening = render(row, tokenizer)
        tokens = [
            len(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (prompt, prompt + opening + row.response)
        ]
        scored.append(
            {
                **as_row(row),
                "prompt": row.user_message(),
                "chat_prompt": prompt,
                **({"opening": opening} if opening else {}),
                "response_tokens": tokens[1] - tokens[0],
                "response_bytes": len(row.response.encode()),
                **choose_from(row, rows, seed=choice_seed),
                "held_out": row.category in held_out_categories,
            }
        )
    return scored


def render(row: Instruction, tokenizer) -> tuple[str, str]:
    """A row's prompt as text and what the chat template puts before its response, as `chat.render` gives them.

    Raises:
        UserError: the chat template does not fit the row, which the sentence names.
    """
    try:
        return chat.render(row.conversation()["prompt"], row.response, tokenizer)
    except UserError as error:
        raise UserError(f"row {row.id} of the dataset, counted from 0: {error}") from None


def check_special_tokens(rows: list[Instruction], tokenizer) -> None:
    """Refuse rows whose text would become one of the tokenizer's own tokens: an end, a beginning, a turn.

    Such a token in a response ends it in the middle, for training and scoring alike, and in any text it can forge
    a turn that nobody took. Chat templates put texts in as they are, and tokenizers cannot tell the two apart.

    Raises:
        UserError: there is one; the sentence names row, text and token, and counts such rows.
    """
    special = model_files.special_ids(tokenizer)
    found = []
    for row in rows:
        said = {"instruction": row.instruction, "context": row.context, "response": row.response}
        said |= {f"message {number}": turn["content"] for number, turn in enumerate(row.earlier, start=1)}
        for name, text in said.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if own := [token for token in ids if token in special]:
                found.append((row.id, name, tokenizer.convert_ids_to_tokens(own[0])))
                break
    if found:
        row_id, name, token = found[0]
        more = f" (and {len(found) - 1} more rows)" if len(found) > 1 else ""
        raise UserError(
            f"row {row_id} of the dataset, counted from 0, has the model's own token {token} in its {name}{more}, "
            "which would end or forge a turn; write it in another way in the data, or leave the row out."
        )


def check_fits(rows: list[dict], tokenizer, *, context: int) -> int:
    """Count the scored rows that are longer than a model's context, whose prompts the harness cuts at their beginning.

    Args:
        rows: as `scored_rows` gives them.
        context: tokens.

    Raises:
        UserError: a response alone is longer, which cannot be scored.
    """
    longer = 0
    for row, instruction in zip(rows, from_scored_rows(rows), strict=True):
        for choice in row["choices"]:
            tokens = len(tokenizer(row.get("opening", "") + choice, add_special_tokens=False)["input_ids"])
            if tokens >= context:
                whose = "its response" if choice == row["response"] else "a response that it is offered"
                raise UserError(
                    f"row {row['id']} of the dataset, counted from 0, cannot be scored: {whose} has {tokens} tokens, "
                    f"and the model's context holds {context}; shorten it, or leave it out."
                )
        prompt, _ = render(instruction, tokenizer)
        longer += (
            len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + row["response_tokens"] > context
        )
    return longer


def choose_from(row: Instruction, rows: list[Instruction], *, seed: int) -> dict:
    """A row's response among three others, which answer other instructions of its category.

    Seed and texts alone decide on the three and on the order of the four: another row changes a row's
    choices only where its own response is drawn for it. Where the category has too few, the rest is
    of any category, and `same_category` is false. No two of the four are the same but for case and spacing.

    Args:
        rows: whose responses are drawn from; `row` may be among them, and no category is one too.

    Returns:
        `choices`, the four texts; `choice`, the index of the right one; `same_category`.

    Raises:
        UserError: there are fewer than three.
    """
    content = row.texts()
    others = sorted(
        (other for other in rows if other.group != row.group),
        key=lambda other: (other.category != row.category, _place(seed, *content, other.response)),
    )
    distractors: list[Instruction] = []
    taken = {_plain(row.response)}
    for other in others:
        if len(distractors) < 3 and _plain(other.response) not in taken:
            taken.add(_plain(other.response))
            distractors.append(other)
    if len(distractors) < 3:
        raise UserError(
            f"the test split has {len(distractors)} other responses to set beside that of row {row.id}, "
            "and response_choice needs 3; raise sample.test_rows."
        )
    texts = [row.response, *(other.response for other in distractors)]
    choices = sorted(texts, key=lambda text: _place(seed, "order", *content, text))
    return {
        "choices": choices,
        "choice": choices.index(row.response),
        "same_category": all(other.category == row.category for other in distractors),
    }


def one_per_instruction(rows: list[Instruction]) -> list[Instruction]:
    """The first row of each instruction, in the order of the rows."""
    return list({row.group: row for row in reversed(rows)}.values())[::-1]


def as_row(row: Instruction) -> dict:
    """A row's fields; `earlier` and `not_learned` only where there are such messages."""
    optional = ("earlier", "not_learned")
    return {key: value for key, value in asdict(row).items() if key not in optional or value}


def as_rows(rows: list[Instruction]) -> list[dict]:
    return [as_row(row) for row in rows]


def from_rows(rows: list[dict]) -> list[Instruction]:
    return [Instruction(**row) for row in rows]


def from_scored_rows(rows: list[dict]) -> list[Instruction]:
    return from_rows(
        [{key: row[key] for key in Instruction.__dataclass_fields__ if key in row} for row in rows]
    )
