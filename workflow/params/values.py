"""The types of single values in params: numbers within bounds, names, days, hashes."""

import unicodedata
from collections.abc import Callable
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from workflow import methods, precisions
from workflow.methods import initializations


def _one_line(text: str) -> str:
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise PydanticCustomError("one_line", "must be one line of text, without control characters")
    return text


def _quoted_day(day: Any) -> Any:
    if isinstance(day, date):
        raise PydanticCustomError("quoted", f'must stand in quotes, as "{day:%Y-%m-%d}"')
    return day


def _day(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise PydanticCustomError("day", 'must be a day of the calendar, as "2024-07-26"') from None
    return text


def _name_in(table: dict[str, Any], refusal: Callable[[str], str] = lambda name: "") -> Any:
    """The type of a name in a table, which a program may add to before it loads params.

    Args:
        refusal: why a name that people ask for is not in the table, to follow `it`; empty for any other.
    """

    def check(name: str) -> str:
        if name not in table:
            if refused := refusal(name):
                raise PydanticCustomError("refused", "{reason}", {"reason": f"it {refused}"})
            *others, last = map(repr, table)
            raise PydanticCustomError("literal_error", f"input should be {', '.join(others)} or {last}")
        return name

    return Annotated[str, AfterValidator(check), WithJsonSchema({"enum": list(table), "type": "string"})]


MethodName = _name_in(methods.TABLE)
PrecisionName = _name_in(precisions.TABLE, precisions.REGISTRY.refusal)
InitializationName = _name_in(initializations.TABLE)
# Bounds that no one comes near: beyond them a typing error would run out of memory or overflow hours later.
Count = Annotated[int, Field(gt=0, le=10**9)]
Size = Annotated[int, Field(gt=0, le=2**20)]  # of a weight, in one direction
Layers = Annotated[int, Field(gt=0, le=1000)]
Vocabulary = Annotated[int, Field(gt=0, le=2**24)]
Length = Annotated[int, Field(ge=8, le=10**9)]  # tokens
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy's generators take
Line = Annotated[str, StringConstraints(min_length=1), AfterValidator(_one_line)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Rate = Annotated[float, Field(gt=0, le=10)]
# A number, or a variant's name for what tuning chose for that variant; of the two, an error is told of what was meant.
RATE_KINDS = ("rate[number]", "rate[variant]")
LearningRate = Annotated[
    Annotated[Rate, Tag(RATE_KINDS[0])] | Annotated[Line, Tag(RATE_KINDS[1])],
    Discriminator(lambda value: RATE_KINDS[isinstance(value, str)]),
]
# Names become part of DVC stage names and folder names, where `-`, `/` and `@` have a meaning.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$", max_length=64)]
Day = Annotated[  # YYYY-MM-DD
    str,
    StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"),
    AfterValidator(_day),
    BeforeValidator(_quoted_day),
]
# A linear layer's name, or its end, with * for any text.
LayerPattern = Annotated[str, StringConstraints(pattern=r"^[\w.*-]+$", max_length=200)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
ColumnName = Annotated[str, StringConstraints(min_length=1)]
TaskName = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]  # task/metric
# How a run is served; workflow/evaluation/forms.py says what each is.
Served = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)?$")]  # variant or variant/form
# What a difference is taken between; workflow/comparison/compare.py says what each is.
Kind = Literal["to_baseline", "to_base", "base_to_base", "recovery", "form", "repair"]
# The metrics of our own tasks; a test holds workflow/evaluation/tasks/ to them.
OWN_METRICS = {
    "holdout_loss": ("nats_per_token", "bits_per_byte"),
    "response_choice": ("acc", "acc_norm"),
    "holdout_generation": ("rouge_l", "chrf", "ended", "length"),
}
OWN_TASKS = tuple(OWN_METRICS)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
