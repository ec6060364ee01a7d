"""The number formats in which a base model is stored and multiplied: a precision is one file.

In: a precision's name. Out: its entry in the table, which says all that the pipeline does differently with it.
"""

from typing import TYPE_CHECKING

from workflow.precisions import bnb_4bit, bnb_int8, emulated, sixteen_bit, untrainable
from workflow.precisions.base import Precision, plain_facts
from workflow.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

TABLE: dict[str, Precision] = {}
SIXTEEN_BIT = sixteen_bit.PRECISION.name


def register(precision: Precision) -> None:
    """Add a precision to the table.

    Raises:
        ValueError: the table has another one of this name.
    """
    if TABLE.setdefault(precision.name, precision) is not precision:
        raise ValueError(f"there are two precisions called {precision.name}")


def get(name: str) -> Precision:
    """The precision of this name.

    Raises:
        UserError: the table has none, or one that cannot be trained on.
    """
    if name not in TABLE:
        raise UserError(f"{untrainable.unknown(name, names())}.")
    return TABLE[name]


def names() -> list[str]:
    """The names of all precisions, in the order of the table."""
    return list(TABLE)


def recognize(layer: "nn.Module") -> Precision | None:
    """The precision that a module of a loaded model is in; None if it is no linear layer of any."""
    ordered = sorted(TABLE.values(), key=lambda precision: not precision.is_quantized)
    return next((precision for precision in ordered if precision.recognizes(layer)), None)


def facts(layer: "nn.Module") -> dict[str, object]:
    """How a linear layer is held and computes, as `Precision.expected_facts` has it."""
    precision = recognize(layer)
    return plain_facts(layer) if precision is None else precision.facts(layer)


for _precision in (
    sixteen_bit.PRECISION,
    bnb_int8.PRECISION,
    bnb_4bit.NF4,
    bnb_4bit.FP4,
    emulated.MXFP4,
    emulated.NVFP4,
):
    register(_precision)
