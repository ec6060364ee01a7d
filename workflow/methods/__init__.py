"""The methods of fine-tuning: one file each, and one table that everything else asks.

In: a method's name in params.yaml. Out: how it wraps a model, what it trains, counts, checks, saves and allows.
"""

from workflow.methods.base import Method, Settings, Shape
from workflow.methods.dora import DORA
from workflow.methods.full import FULL
from workflow.methods.lora import LORA
from workflow.methods.lora_merge_aware import LORA_MERGE_AWARE, LORA_MERGE_AWARE_ON_LEVELS
from workflow.runtime.registry import Registry

REGISTRY: Registry[Method] = Registry("method")
TABLE = REGISTRY.table
register, get, names = REGISTRY.register, REGISTRY.get, REGISTRY.names

register(LORA)
register(DORA)
register(FULL)
register(LORA_MERGE_AWARE)
register(LORA_MERGE_AWARE_ON_LEVELS)
FROZEN = LORA.name  # of a base that is held as it is served, because nothing of it is trained

__all__ = ["FROZEN", "TABLE", "Method", "Settings", "Shape", "get", "names", "register"]
