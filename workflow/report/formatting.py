"""Numbers as text: with a true minus sign, thousands separators, and as many digits as are known."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from workflow.comparison.sentences import p_text

NARROW = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
MOST_DECIMALS = 6
SHORT_TEXT = 240  # characters, and
SHORT_LINES = 6  # lines: longer texts are folded
# Not allowed in HTML, even escaped: controls other than tab and line feed, and lone surrogates.
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Number(str):
    """A number as text that carries its value and its place, as file#key. HTML shows both."""

    value: float
    key: str

    def __new__(cls, text: str, value: float, key: str) -> "Number":
        number = super().__new__(cls, text)
        number.value, number.key = value, key
        return number

    def __html__(self) -> Markup:
        return Markup('<data value="{}" data-key="{}">{}</data>').format(self.value, self.key, str(self))


@dataclass(frozen=True)
class Text:
    """A text that may be long. `short` is its beginning if it is to be folded, otherwise None."""

    full: str
    short: str | None


def clean(text: str) -> str:
    """Text with the characters that HTML forbids replaced by U+FFFD."""
    return FORBIDDEN.sub("\ufffd", text.replace("\r\n", "\n"))


def fold(text: str) -> Text:
    """A text, with its beginning if it is long enough to be folded."""
    lines = text.splitlines()
    if len(text) <= SHORT_TEXT and len(lines) <= SHORT_LINES:
        return Text(text, None)
    return Text(text, "\n".join(lines[: SHORT_LINES - 2])[: SHORT_TEXT - 60].rstrip() + " …")


def number(value: float, decimals: int) -> str:
    """The value with a number of decimals. Zero has no sign."""
    rounded = round(value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:,.{decimals}f}".replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """As `number`, with a plus sign if the rounded value is above zero."""
    return ("+" if round(value, decimals) > 0 else "") + number(value, decimals)


def significant(value: float, digits: int = 3) -> str:
    """The value with a number of significant digits. The digits before the point are all kept."""
    return number(value, max(0, digits - _places(value)))


def quantity(value: float, unit: str, digits: int = 3) -> str:
    """A value with its unit, joined by a space that does not break."""
    return f"{significant(value, digits)}{NARROW}{unit.replace(' ', NARROW)}"


def ratio(value: float) -> str:
    """A ratio, for example 0.79×."""
    return f"{number(value, 2 if value < 10 else 1)}{TIMES}"


def span(low: float, high: float) -> str:
    """The two ends of an interval: three significant digits, or up to five if three do not tell them apart."""
    ends = [(significant(low, digits), significant(high, digits)) for digits in (3, 4, 5)]
    return " to ".join(next((pair for pair in ends if pair[0] != pair[1]), ends[0]))


def percent(fraction: float) -> str:
    """A fraction as a percentage, for example 95 %."""
    return f"{fraction * 100:g}{NARROW}%"


def decimals_of(low: float, high: float) -> int:
    """The number of decimals that shows an interval's half-width with two significant digits."""
    half = (high - low) / 2
    if half <= 0:
        return 3
    return min(MOST_DECIMALS, max(0, 1 - math.floor(math.log10(half))))


def separating_decimals(numbers: Iterable[float], limits: Iterable[float], *, at_least: int) -> int:
    """The fewest decimals with which each rounded number stays on its side of each limit."""
    pairs = list(itertools.product(numbers, limits))
    for decimals in range(at_least, MOST_DECIMALS):
        rounded = [(round(value, decimals), limit) for value, limit in pairs]
        if [(a > b, a < b) for a, b in rounded] == [(a > b, a < b) for a, b in pairs]:
            return decimals
    return MOST_DECIMALS


def p_value(p: float, *, level: float) -> str:
    """A p value with its sign, for example `= 0.034`. Rounding never moves it across the level."""
    return p_text(p, level).replace(" ", NARROW)


def _places(value: float) -> int:
    """The number of digits before the decimal point. Zeros after it count as negative."""
    return math.floor(math.log10(abs(value))) + 1 if value else 1
