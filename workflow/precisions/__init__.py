"""The number formats in which a base model is stored and multiplied: a precision is one file.

In: a precision's name. Out: its entry in the table, which says all that the pipeline does differently with it.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from workflow.precisions import (
    bnb_4bit,
    bnb_int8,
    emulated,
    fp8,
    fp8_products,
    hqq,
    int8_weight_only,
    sixteen_bit,
    untrainable,
)
from workflow.precisions.base import Precision, plain_facts
from workflow.runtime.errors import UserError
from workflow.runtime.registry import Registry

if TYPE_CHECKING:
    from torch import nn

REGISTRY: Registry[Precision] = Registry("precision", refusals=untrainable.REASONS)
TABLE = REGISTRY.table
register, get, names = REGISTRY.register, REGISTRY.get, REGISTRY.names
SIXTEEN_BIT = sixteen_bit.PRECISION.name


def check_installed(precision: Precision) -> None:
    """Raise a UserError if a precision needs a package that is not installed."""
    if precision.package and find_spec(precision.package) is None:
        raise UserError(
            f"precision {precision.name} needs the package {precision.package}, which is not installed; "
            f"`make {precision.package}` installs it."
        )


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
    int8_weight_only.PRECISION,
    fp8.PRECISION,
    fp8_products.PRECISION,
    *hqq.PRECISIONS,
):
    register(_precision)
