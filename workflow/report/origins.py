"""The origins of the numbers in tables, as data of the page instead of markup around each number.

A cell names its numbers by their places in one list, which the page's script reads.
"""

import json
import re
from dataclasses import dataclass

from markupsafe import Markup

from workflow.report.provenance import Source

CELL = re.compile(r"<td\b([^>]*)>(.*?)</td>", re.DOTALL)
NUMBER = re.compile(r'<data value="([^"]*)" data-key="([^"]*)">(.*?)</data>', re.DOTALL)
BLOCK = re.compile(r'<script type="application/json" id="origins">(.*?)</script>', re.DOTALL)
MARK = "<!-- origins -->"  # where the template wants the data


@dataclass(frozen=True)
class Numbers:
    """The numbers of the tables, each once, in the order of the page."""

    places: dict[tuple[str, str], int]  # (value, file#key) -> its place in the list

    def of_cell(self, match: re.Match) -> str:
        """A cell without markup around its numbers, and with their places as `data-n`."""
        attributes, content = match.groups()
        numbers = [(value, key) for value, key, _ in NUMBER.findall(content)]
        if not numbers:
            return match[0]
        places = " ".join(str(self.places.setdefault(number, len(self.places))) for number in numbers)
        text = NUMBER.sub(r"\3", content)
        return f'<td{attributes} data-n="{places}">{text}</td>'


def move_origins(page: str, sources: dict[str, Source]) -> str:
    """The page with the origins of its tables' numbers in one block of JSON.

    Args:
        page: HTML in which each number is `<data value="" data-key="file#key">`, and no table is within another.
        sources: those of the page; their files give each number's stage and md5.
    """
    numbers = Numbers({})
    page = CELL.sub(numbers.of_cell, page)
    files = {file.path: [file.stage, file.md5] for source in sources.values() for file in source.files}
    paths = list(
        dict.fromkeys([*files, *(Markup(key).unescape().partition("#")[0] for _, key in numbers.places)])
    )
    places = {path: index for index, path in enumerate(paths)}
    content = {
        "files": [[path, *files.get(path, ["", ""])] for path in paths],
        "numbers": [_entry(value, Markup(key).unescape(), places) for value, key in numbers.places],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace(MARK, f'<script type="application/json" id="origins">{text}</script>', 1)


def table_numbers(page: str) -> list[tuple[str, float]]:
    """The numbers of a page's tables: the place of each, as file#key, and its value. None without a block of origins.

    Raises:
        ValueError, LookupError, TypeError: the block is unsound.
    """
    block = BLOCK.search(page)
    if block is None:
        return []
    content = json.loads(block[1])
    return [(f"{content['files'][file][0]}#{key}", float(value)) for value, file, key in content["numbers"]]


def _entry(value: str, key: str, places: dict[str, int]) -> list:
    path, _, name = key.partition("#")
    return [float(value), places[path], name]
