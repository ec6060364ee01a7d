"""A table of entries that have names, which a program may add to: the precisions, and the methods."""

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from workflow.runtime.errors import UserError, suggestion


class Named(Protocol):
    """What a table can hold."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


@dataclass(frozen=True)
class Registry(Generic[Entry]):
    """Entries by name, in the order in which they were registered."""

    noun: str  # for an entry, in a sentence
    table: dict[str, Entry] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)  # names that are no entries, each with the reason

    def register(self, entry: Entry) -> Entry:
        """Add an entry; its name is then known to params.yaml and to every stage.

        Raises:
            ValueError: the table has another entry of this name.
        """
        if self.table.setdefault(entry.name, entry) is not entry:
            raise ValueError(f"there are two entries for the {self.noun} {entry.name}")
        return entry

    def get(self, name: str) -> Entry:
        """The entry of this name.

        Raises:
            UserError: there is none.
        """
        if name not in self.table:
            raise UserError(f"{self.unknown(name)}.")
        return self.table[name]

    def unknown(self, name: str) -> str:
        """The sentence for a name that is no entry, without its full stop."""
        if refusal := self.refusal(name):
            return f"{name} {refusal}"
        return f"{name} is not a known {self.noun}; known are {', '.join(self.table)}{suggestion(name, self.table)}"

    def refusal(self, name: str) -> str:
        """Why a name that people ask for is no entry, to follow the name; empty for any other."""
        return f"cannot be trained on: {self.refusals[name]}" if name in self.refusals else ""

    def names(self) -> list[str]:
        """The names of all entries."""
        return list(self.table)
