"""Reads a page as a browser's user would, and renders one from the results in the working directory."""

import json
import re
from html.parser import HTMLParser

from workflow import params
from workflow.report.facts import gather
from workflow.report.model import Facts
from workflow.report.page import render


class Reader(HTMLParser):
    """Reads a page as a browser's user would: tags with their attributes, table rows, all text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.inside: list[str] = []
        self.table = ""
        self.feed(page)
        for row in self.rows:
            row[:] = [cell.strip() for cell in row]
        self.text = spaced("".join(self.words))
        block = re.search('<script type="application/json" id="origins">(.*?)</script>', page)
        self.origins = json.loads(block[1]) if block else {"files": [], "numbers": []}

    def handle_starttag(self, tag, attrs):
        self.apart(tag)
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)
        if dict(attrs).get("role") == "region":
            self.table = dict(attrs)["aria-label"].removeprefix("Table of ")
            self.tables[self.table] = []
        if tag == "tr":
            self.rows.append([])
            self.tables[self.table].append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass
        self.apart(tag)

    def apart(self, tag):
        """Text on both sides of a tag is apart, unless the tag is within a phrase."""
        if tag not in ("data", "strong", "mark"):
            self.handle_data(" ")

    def handle_data(self, data):
        if {"style", "script"} & set(self.inside):
            return
        self.words.append(data)
        if {"td", "th"} & set(self.inside):
            self.rows[-1][-1] = _spaced_within(self.rows[-1][-1] + data)

    def numbers(self) -> dict[str, float]:
        """The value of each number of the page, by its place as file#key."""
        files = [path for path, *_ in self.origins["files"]]
        in_tables = {f"{files[file]}#{key}": value for value, file, key in self.origins["numbers"]}
        return in_tables | {a["data-key"]: float(a["value"]) for tag, a in self.tags if tag == "data"}

    def row(self, *starts: str) -> list[str]:
        """The first table row whose first cells begin so."""
        return next(
            row for row in self.rows if all(c.startswith(s) for c, s in zip(row, starts, strict=False))
        )


def spaced(text: str) -> str:
    return " ".join(text.split())


def _spaced_within(text: str) -> str:
    """As `_spaced`, with a space kept at the end, to which more text may come."""
    return " ".join(text.split()) + (" " if text[-1:].isspace() else "")


def facts() -> Facts:
    return gather(params.load())


def read() -> Reader:
    return Reader(render(facts()))
