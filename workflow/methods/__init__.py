"""The methods of fine-tuning: one file each, and one table that everything else asks.

In: a method's name in params.yaml. Out: how it wraps a model, what it trains, counts, checks, saves and allows.
"""

from workflow.methods.base import Method, Settings, Shape
from workflow.methods.full import FULL
from workflow.methods.lora import LORA
from workflow.methods.lora_merge_aware import LORA_MERGE_AWARE, LORA_MERGE_AWARE_ON_LEVELS
from workflow.runtime.errors import UserError

TABLE: dict[str, Method] = {}


def register(entry: Method) -> Method:
    """Put a method into the table; its name is then known to params.yaml and to every stage."""
    TABLE[entry.name] = entry
    return entry


def get(name: str) -> Method:
    """The method of this name.

    Raises:
        UserError: there is none.
    """
    if name not in TABLE:
        raise UserError(f"there is no method {name}; known are {', '.join(names())}.")
    return TABLE[name]


def names() -> list[str]:
    return list(TABLE)


register(LORA)
register(FULL)
register(LORA_MERGE_AWARE)
register(LORA_MERGE_AWARE_ON_LEVELS)
FROZEN = LORA.name  # of a base that is held as it is served, because nothing of it is trained

__all__ = ["FROZEN", "TABLE", "Method", "Settings", "Shape", "get", "names", "register"]
