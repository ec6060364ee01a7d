"""Numbers as the page writes them: a true minus sign, thousands apart, as many digits as are known."""

import itertools
import math
import re
from collections.abc import Iterable

from markupsafe import Markup

NARROW = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
MOST_DECIMALS = 6
# Not allowed in HTML, even escaped: controls other than tab and line feed, and lone surrogates.
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Number(str):
    """A number as text, which in HTML also says its value and the file and key that it is from."""

    value: float
    key: str

    def __new__(cls, text: str, value: float, key: str) -> "Number":
        number = super().__new__(cls, text)
        number.value, number.key = value, key
        return number

    def __html__(self) -> Markup:
        return Markup('<data value="{}" data-key="{}">{}</data>').format(self.value, self.key, str(self))


def clean(text: str) -> str:
    """Text with the characters that HTML forbids replaced by U+FFFD."""
    return FORBIDDEN.sub("\ufffd", text.replace("\r\n", "\n"))


def number(value: float, decimals: int) -> str:
    """The value with so many decimals; what rounds to zero has no sign."""
    rounded = round(value, decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{rounded:,.{decimals}f}".replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """As `number`, with a plus sign where the rounded value is above zero."""
    return ("+" if round(value, decimals) > 0 else "") + number(value, decimals)


def significant(value: float, digits: int = 3) -> str:
    """The value with so many significant digits; whole numbers keep all of theirs."""
    return number(value, max(0, digits - _places(value)))


def quantity(value: float, unit: str, digits: int = 3) -> str:
    """A value with its unit, which a line break never parts."""
    return f"{significant(value, digits)}{NARROW}{unit.replace(' ', NARROW)}"


def ratio(value: float) -> str:
    """How many times as much, for example 0.79×."""
    return f"{number(value, 2 if value < 10 else 1)}{TIMES}"


def percent(fraction: float) -> str:
    """A fraction as a whole percentage, or with the decimals it has, for example 95 %."""
    return f"{fraction * 100:g}{NARROW}%"


def decimals_of(low: float, high: float) -> int:
    """How many decimals show an interval's half-width with two significant digits."""
    half = (high - low) / 2
    if half <= 0:
        return 3
    return min(MOST_DECIMALS, max(0, 1 - math.floor(math.log10(half))))


def separating_decimals(numbers: Iterable[float], limits: Iterable[float], *, at_least: int) -> int:
    """Decimals with which no number that is beside a limit is shown on it or beyond."""
    pairs = list(itertools.product(numbers, limits))
    for decimals in range(at_least, MOST_DECIMALS):
        rounded = [(round(value, decimals), limit) for value, limit in pairs]
        if [(a > b, a < b) for a, b in rounded] == [(a > b, a < b) for a, b in pairs]:
            return decimals
    return MOST_DECIMALS


def p_value(p: float, *, level: float) -> str:
    """A p value with its sign, for example `= 0.034`, that is never shown on the other side of the level."""
    if p < 0.001 < level:
        return f"<{NARROW}0.001"
    decimals = separating_decimals((p,), (level,), at_least=3)
    return f"={NARROW}{number(p, decimals)}"


def _places(value: float) -> int:
    """Digits before the decimal point; below one, zeros after it count as negative."""
    return math.floor(math.log10(abs(value))) + 1 if value else 1
