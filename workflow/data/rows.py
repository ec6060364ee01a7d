"""Rows of data: what an instruction with its response is, and how it is stored as JSON."""

import hashlib
import unicodedata
from dataclasses import asdict, dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Instruction:
    """One row of data: an instruction and the response to learn.

    The last question of a conversation is the instruction, and its answer is the response. Only that answer is
    learned and scored.

    Attributes:
        id: position in the source, counted from 0.
        instruction: what the user asks last.
        context: a text that the instruction refers to; empty where there is none.
        response: the answer.
        category: the label of the row; None where it has none.
        earlier: the messages before the instruction (`role`, `content`), a system message included.
        not_learned: positions in `earlier` of answers that no run may learn (their weight is 0).
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
        """The user's first message without case, spacing and punctuation. A group is never divided between splits.

        A conversation and a longer or shorter cut of it are therefore in the same split. In different splits, the
        prompts of one would contain the responses of the other.
        """
        return normal(self.questions[0])

    @property
    def questions(self) -> list[str]:
        """The user's messages, first to last, without the context."""
        return [*(turn["content"] for turn in self.earlier if turn["role"] == "user"), self.instruction]

    def user_message(self, *, use_context: bool = True) -> str:
        """The user's last message: the instruction, followed by the context if there is one."""
        if use_context and self.context:
            return f"{self.instruction}\n\n{self.context}"
        return self.instruction

    def conversation(self, *, use_context: bool = True) -> dict:
        """The row in TRL's conversational prompt-completion format."""
        question = {"role": "user", "content": self.user_message(use_context=use_context)}
        return {
            "prompt": [*self.earlier, question],
            "completion": [{"role": "assistant", "content": self.response}],
        }

    def texts(self) -> tuple[str, ...]:
        """All texts that distinguish the row from others, except its category."""
        earlier = (text for turn in self.earlier for text in (turn["role"], turn["content"]))
        return (self.instruction, self.context, self.response, *earlier)


def plain(text: str) -> str:
    """Return a text without case and extra spacing."""
    return " ".join(text.casefold().split())


def normal(text: str) -> str:
    """Return a text without case, extra spacing and punctuation; a text of punctuation alone keeps it."""
    spaced = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text.casefold())
    return " ".join(spaced.split()) or plain(text)


def shuffle_key(seed: int, *texts: str) -> str:
    """Return the sha256 that orders texts at random. The order of two texts does not depend on any others."""
    return hashlib.sha256("\0".join([str(seed), *texts]).encode()).hexdigest()


def as_row(row: Instruction) -> dict:
    """Return the fields of a row; `earlier` and `not_learned` are omitted where they are empty."""
    optional = ("earlier", "not_learned")
    return {key: value for key, value in asdict(row).items() if key not in optional or value}


def as_rows(rows: list[Instruction]) -> list[dict]:
    """Return the fields of each row."""
    return [as_row(row) for row in rows]


def from_rows(rows: list[dict]) -> list[Instruction]:
    """Return the rows that `as_rows` stored."""
    return [Instruction(**row) for row in rows]


def from_scored_rows(rows: list[dict]) -> list[Instruction]:
    """Return the rows inside those of the test split, which hold more than a row's own fields."""
    return from_rows(
        [{key: row[key] for key in Instruction.__dataclass_fields__ if key in row} for row in rows]
    )
