"""What the YAML parser says, in words and with the place to look at."""

import re

from ruamel.yaml.error import YAMLError
from ruamel.yaml.reader import ReaderError

# What the parser's problem begins with, what it means, and whether to look where the parser began (its context) instead
# of where it stopped.
WORDS = (
    (r"found character '\\t'", "a tab stands where spaces must be", False),
    (
        r"found character '(.)' that cannot start",
        "a text cannot begin with {0} unless it stands in quotes",
        False,
    ),
    (
        "mapping values are not allowed",
        "a colon where no key can be: the line above lacks a space after its colon, the indentation is too deep, or a text "
        "with a colon needs quotes",
        False,
    ),
    ("could not find expected ':'", "a key without a colon and a space after it", True),
    ("expected ',' or ']'", "a list that is not closed by ]", True),
    ("expected ',' or '}'", "a mapping that is not closed by }}", True),
    (
        "expected <block end>",
        "an indentation that fits none of the lines above, or a text after a value",
        False,
    ),
    ("found unexpected end of stream", "a quote that is not closed", True),
    (
        r"found unknown escape character '(.)'",
        "\\{0} in double quotes means nothing; single quotes take a backslash as it is",
        False,
    ),
    (r"found undefined alias '?([^']*)'?", "*{0} refers to an anchor &{0} that there is not above it", False),
    (r'found duplicate key "([^"]*)"', "{0} is a duplicate key: it stands above too", False),
    ("but found another document", "--- begins a second document, and a file holds one", False),
    (r"expected the node content, but found '(.*)'", "{0} stands where a value must be", False),
    (
        r"could not determine a constructor for the tag '?([^']*)'?",
        "{0} is a tag, which may not be here; a text with ! stands in quotes",
        False,
    ),
)


def explain(error: YAMLError, text: str) -> str:
    """Return the line and column in parentheses, and what is wrong there, as the end of "is not valid YAML".

    Args:
        error: what ruamel.yaml raised.
        text: what was parsed.
    """
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position)
        column = error.position - (text.rfind("\n", 0, error.position) + 1)
        return f"{_place(line, column)}: unacceptable character #x{error.character:04x}: a control character"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    for pattern, words, at_beginning in WORDS:
        if match := re.match(pattern, problem):
            problem = words.format(*match.groups())
            mark = (error.context_mark if at_beginning else None) or mark
            break
    return f"{_place(mark.line, mark.column) if mark else ''}: {problem}"


def _place(line: int, column: int) -> str:
    """A place, which the parser counts from 0 and editors from 1."""
    return f" (line {line + 1}, column {column + 1})"
