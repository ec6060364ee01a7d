"""Weights that are dequantized ahead: on a second stream, while the product before theirs is computed.

Dequantizing is bound by memory traffic and products are bound by arithmetic, so a GPU can do both at once. The kernels are
the same, and so are the bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

SOURCE = "weight_source"  # the attribute of a layer that holds who makes its weight


@dataclass(frozen=True)
class Weight:
    """A layer's weight as a product needs it."""

    layer: nn.Linear
    dtype: torch.dtype


Make = Callable[[nn.Linear, torch.dtype], Tensor]


@dataclass
class Asked:
    """Makes each weight when it is asked for, and keeps the order."""

    make: Make
    order: list[Weight] = field(default_factory=list)

    def weight(self, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
        self.order.append(Weight(layer, dtype))
        return self.make(layer, dtype)


class Ahead:
    """Makes the weights of a pass in a known order, each while the one before it is used.

    A weight lives until the next is asked for. Two are held at once.
    """

    def __init__(self, make: Make, order: Sequence[Weight], stream: torch.cuda.Stream):
        self.make, self.order, self.stream = make, order, stream
        self.next = 0  # the weight that is asked for next
        self.made: tuple[Tensor, torch.cuda.Event] | None = None
        self._make_next()

    def weight(self, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] of the next layer in the order.

        Raises:
            RuntimeError: another layer is asked for.
        """
        if self.made is None or self.order[self.next] != Weight(layer, dtype):
            raise RuntimeError(
                "the layers of a pass are asked for their weights in another order than before"
            )
        weight, ready = self.made
        self.next, self.made = self.next + 1, None
        self._make_next()
        torch.cuda.current_stream().wait_event(ready)
        return weight

    def _make_next(self) -> None:
        if self.next == len(self.order):
            return
        # The memory it is written to was that of the weight before the last, which products up to now have used.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            weight = self.make(self.order[self.next].layer, self.order[self.next].dtype)
            self.made = weight, self.stream.record_event()


@contextmanager
def made_by(source: Asked | Ahead, layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Let the source make the weights of these layers. Backward passes run in other threads, so each layer holds it."""
    for layer in layers:
        setattr(layer, SOURCE, source)
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, SOURCE)
