"""YAML text as a tree of keys with the comments above them: for params files, of which every comment counts.

It knows the style of our own params files alone: block mappings indented by two, comments at the indentation of the
key below them, and blank lines between sections only. A YAML library hangs a comment on whatever stands before it, so
a replaced value would take the comment of the next key with it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

REPLACE = "!replace"
ON_ONE_LINE = re.compile(r"(.*?: ){(.*)}")


@dataclass(frozen=True)
class Entry:
    """A key with its value.

    Attributes:
        comment: the lines above the key.
        line: the key's own, with its value unless that stands below it.
        body: the lines below it that belong to its value.
    """

    key: str
    comment: tuple[str, ...]
    line: str
    body: tuple[str, ...]

    @property
    def replaces(self) -> bool:
        """Whether a preset puts this mapping in the place of the default's."""
        return self.line.endswith(f": {REPLACE}")

    def children(self) -> list[Self]:
        """The entries of a block mapping; none for any other value."""
        keys = [line.lstrip() for line in self.body if not line.lstrip().startswith("#")]
        return [] if not keys or keys[0].startswith("- ") else parse(self.body)

    def with_children(self, children: list[Self]) -> Self:
        return replace(
            self,
            line=self.line.removesuffix(f" {REPLACE}"),
            body=tuple(line for e in children for line in e.lines()),
        )

    def lines(self) -> tuple[str, ...]:
        return (*self.comment, self.line, *self.body)


def split_head(text: str) -> tuple[list[str], list[Entry]]:
    """Return the comment that a file begins with, up to its first blank line, and the file's sections."""
    head, _, sections = text.partition("\n\n")
    return head.splitlines(), parse(sections.splitlines())


def parse(lines: list[str] | tuple[str, ...]) -> list[Entry]:
    """Return the entries of a block mapping."""
    lines = [line for line in lines if line.strip()]
    indent = " " * (len(lines[0]) - len(lines[0].lstrip())) if lines else ""
    key_pattern = re.compile(rf"{indent}([^\s#:][^:]*):( |$)")
    entries: list[Entry] = []
    comment: list[str] = []
    for line in lines:
        if match := key_pattern.match(line):
            entries.append(Entry(match[1], tuple(comment), line, ()))
            comment = []
        elif line.startswith(f"{indent}#"):
            comment.append(line)
        else:
            entries[-1] = replace(entries[-1], body=(*entries[-1].body, line))
    return entries


def render(head: list[str], sections: list[Entry]) -> str:
    """Return the text of a file: the inverse of `split_head`."""
    return "\n\n".join("\n".join(lines) for lines in (head, *(entry.lines() for entry in sections))) + "\n"


def merge(default: list[Entry], changes: list[Entry]) -> list[Entry]:
    """Return a default's entries with changed and added ones put in; a comment stays unless the change has its own.

    Mappings merge key by key; one with the tag `REPLACE`, and any other value, takes the place of the default's.
    """
    changed = {entry.key: entry for entry in changes}
    known = {entry.key for entry in default}
    merged = [_merged(entry, changed[entry.key]) if entry.key in changed else entry for entry in default]
    return merged + [entry for entry in changes if entry.key not in known]


def _merged(default: Entry, change: Entry) -> Entry:
    change = replace(change, comment=change.comment or default.comment)
    before, after = default.children(), change.children()
    if not after:
        return _merged_on_one_line(default, change)
    if change.replaces:
        above = {entry.key: entry.comment for entry in before}
        return change.with_children(
            [replace(entry, comment=entry.comment or above.get(entry.key, ())) for entry in after]
        )
    return change.with_children(merge(before, after)) if before else change


def _merged_on_one_line(default: Entry, change: Entry) -> Entry:
    before, after = ON_ONE_LINE.fullmatch(default.line), ON_ONE_LINE.fullmatch(change.line)
    if not (before and after):
        return change
    children = merge(_split_line(before[2]), _split_line(after[2]))
    return replace(change, line=f"{after[1]}{{{', '.join(child.line for child in children)}}}")


def _split_line(text: str) -> list[Entry]:
    """Return the entries of a mapping on one line, whose text this is without its braces."""
    parts: list[str] = []
    depth = 0
    for part in text.split(", "):
        parts = [*parts[:-1], f"{parts[-1]}, {part}"] if depth else [*parts, part]
        depth += sum(part.count(bracket) for bracket in "[{") - sum(part.count(bracket) for bracket in "]}")
    return parse(parts)


def comments(entries: list[Entry], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each key's path and its comment as one text.

    A key without a comment shares that of the key above it; a section has its own or none.
    """
    shared: tuple[str, ...] = ()
    for entry in entries:
        shared = entry.comment or (shared if path else ())
        if shared:
            yield (*path, entry.key), " ".join(line.strip().removeprefix("#").strip() for line in shared)
        yield from comments(entry.children(), (*path, entry.key))
