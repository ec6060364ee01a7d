"""Modules of one kind compute alike: what a speed-up does to them is tried on one.

A model that is to be sharded is tried in host memory, where a pass through all layers of a large one takes minutes.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, NoneType

from torch import nn
from transformers import PreTrainedModel

SETTINGS = (bool, int, float, str, NoneType, FunctionType, BuiltinFunctionType)
NUMBER = "layer_idx"  # transformers' name for a layer's place in the model


def kind(module: nn.Module) -> Hashable:
    """What decides what a module computes, besides its weights: its class and plain settings, and those of its parts."""
    settings = {name: value for name, value in vars(module).items() if isinstance(value, SETTINGS)}
    settings.pop(NUMBER, None)
    parts = tuple((name, kind(part)) for name, part in module.named_children())
    return type(module), tuple(sorted(settings.items(), key=lambda item: item[0])), parts


@contextmanager
def first_of_each_kind(model: PreTrainedModel) -> Iterator[None]:
    """Leave out the decoder layers behind the first ones that are of every kind; a model without such layers stays whole."""
    count = model.config.get_text_config().num_hidden_layers
    stack = next(
        (
            (parent, name, part)
            for parent in model.modules()  # a layer comes before what it holds, such as as many experts
            for name, part in parent.named_children()
            if isinstance(part, nn.ModuleList) and len(part) == count
        ),
        None,
    )
    if stack is None:
        yield
        return
    parent, name, layers = stack
    kinds = [kind(layer) for layer in layers]
    setattr(parent, name, layers[: max(map(kinds.index, kinds)) + 1])
    try:
        yield
    finally:
        setattr(parent, name, layers)
