"""A linear layer whose weight was rounded to another format and is held in its own type."""

from typing import Self

import torch
from torch import nn

from workflow.precisions import rounding

ROUNDINGS = {"mxfp4": rounding.mxfp4, "nvfp4": rounding.nvfp4}


class RoundedLinear(nn.Linear):
    """An ordinary linear layer that knows the format of its weight.

    Attributes:
        format: a name of `ROUNDINGS`.
    """

    format: str

    @classmethod
    def of(cls, layer: nn.Linear, name: str) -> Self:
        """A layer with another's own weight and bias, which are not rounded yet."""
        new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        new.weight, new.bias, new.format = layer.weight, layer.bias, name
        return new

    @torch.no_grad()
    def round(self) -> None:
        """Round the weight to the format."""
        self.weight.data = ROUNDINGS[self.format](self.weight.data)

    @torch.no_grad()
    def is_rounded(self) -> bool:
        """Whether rounding again changes nothing.

        In NVFP4, a block that is a millionth of the weight's largest number may round to zero the second time.
        """
        change = (ROUNDINGS[self.format](self.weight.data) - self.weight.data).abs().max()
        return bool(change <= 1e-5 * self.weight.abs().max())
