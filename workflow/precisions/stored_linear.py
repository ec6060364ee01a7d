"""A linear layer whose weight is stored as codes of few bits and dequantized for each product.

It is for precisions that no library loads as a layer of PyTorch's own kind, which PEFT adapts, and trains without
keeping a 16-bit copy. This module imports torch, so the table's files import it inside their functions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from workflow.precisions.base import Loading, Products, in_force
from workflow.runtime.errors import CheckError

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative; in float32, TF32


class DequantizedProduct(torch.autograd.Function):
    """x W^T with a weight that is dequantized for the forward pass, and again for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "StoredLinear"):
        """x [..., in] -> [..., out]"""
        ctx.layer = layer
        return functional.linear(x, layer.dequantized(layer, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.dequantized(ctx.layer, grad.dtype), None


class OwnProduct(torch.autograd.Function):
    """x W^T as the layer's precision multiplies, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "StoredLinear"):
        """x [..., in] -> [..., out]"""
        ctx.layer = layer
        rows = layer.products.prepared(x.reshape(-1, x.shape[-1]))
        return layer.products.product(layer, rows, x.dtype).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx, grad: Tensor):
        layer = ctx.layer
        rows = layer.products.input_gradient(layer, grad.reshape(-1, grad.shape[-1]))
        return rows.view(*grad.shape[:-1], layer.in_features), None


class StoredLinear(nn.Linear):
    """A linear layer that holds codes, and constants that turn them into numbers.

    `weight` holds the codes as integers. So PEFT casts no adapter to their type, and its merge, which knows nothing of
    the codes, fails instead of adding to them.
    """

    def __init__(
        self,
        layer: nn.Linear,
        *,
        precision: str,
        codes: Tensor,
        constants: dict[str, Tensor],
        dequantized: Callable[["StoredLinear", torch.dtype], Tensor],
        products: Products | None = None,
    ):
        """
        Args:
            layer: the ordinary layer; its bias stays.
            precision: its name in the table.
            codes: integers.
            constants: become buffers of these names.
            dequantized: gives the weight [out, in] of this layer in a type.
            products: how it multiplies; None for products with that weight.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.precision, self.compute_dtype = precision, layer.weight.dtype
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = layer.bias
        for name, constant in constants.items():
            self.register_buffer(name, constant)
        self.dequantized, self.products = dequantized, products

    @property
    def W_q(self) -> Tensor:
        """The codes. PEFT knows by this name that it must call `dequantize` to see the weight, as DoRA does."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight [out, in] in the compute type."""
        return self.dequantized(self, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        product = DequantizedProduct if in_force(self.products) is None else OwnProduct
        out = product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantize(
    model: PreTrainedModel,
    store: Callable[[nn.Linear], StoredLinear],
    loading: Loading,
    *,
    tolerance: float | None = None,
) -> PreTrainedModel:
    """The model with its linear layers stored, one after the other and in place.

    The output head stays as it is, and the layers that are kept in 16 bits.

    Args:
        tolerance: relative, of a product against that with the dequantized weight; None for the compute type's rounding.

    Raises:
        CheckError: the gradient of a stored layer is not that of its dequantized weight.
    """
    head, first = model.get_output_embeddings(), True
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is head or name in loading.layers_in_16_bits:
            continue
        stored = store(layer)
        model.set_submodule(name, stored)
        if first:
            check_gradient(stored, TOLERANCE[stored.compute_dtype] if tolerance is None else tolerance)
            first = False
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the 16-bit weights took
    return model


def dequantize(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """The model with ordinary linear layers in the compute type, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, StoredLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.dequantized(layer, compute), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    return model


def check_gradient(layer: StoredLinear, tolerance: float) -> None:
    """Raise a CheckError unless a small product and its gradient are those of the dequantized weight.

    They are compared with PyTorch's own layer in the compute type.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, layer.in_features, generator=generator).to(layer.weight.device, layer.compute_dtype)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.enable_grad():
        pairs = [(layer(ours), functional.linear(plain, layer.dequantize(), layer.bias))]
        for output in pairs[0]:
            output.sum().backward()
    for result, expected in (*pairs, (ours.grad, plain.grad)):
        difference = (result - expected).float().norm() / expected.float().norm().clamp(min=1e-30)
        if not difference < tolerance:
            raise CheckError(
                f"a layer held in {layer.precision} has another product or gradient than its dequantized weight: "
                f"they differ by {float(difference):.2g} of their size"
            )
