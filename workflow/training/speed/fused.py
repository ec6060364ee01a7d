"""Functions that do a training step's work with fewer passes over memory, and keep less for the backward pass.

Each computes what the layers of PEFT and transformers compute, up to the rounding of the compute type
(tests/training/test_fused.py holds each to them), in PyTorch's own operations, so it runs on a CPU as on a GPU.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from workflow import precisions
from workflow.precisions.base import Products, dequantized_products, in_force
from workflow.training.speed.ahead import SOURCE
from workflow.training.speed.chunks import LOGITS_AT_ONCE
from workflow.training.speed.kernels import gated_silu, gated_silu_backward
from workflow.training.speed.kinds import kind

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


def base_weight(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight [out, in] in `dtype`: of a quantized layer, dequantized for this call alone."""
    source = vars(base).get(SOURCE)
    return dequantized_weight(base, dtype) if source is None else source.weight(base, dtype)


def dequantized_weight(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The same, made now."""
    precision = precisions.recognize(base)
    return base.weight.to(dtype) if precision is None else precision.dequantized_weight(base, dtype)


def layers_to_dequantize(model: nn.Module) -> list[nn.Linear]:
    """The base layers that multiply by a weight which is made for each product."""
    bases = [module.base_layer for module in model.modules() if isinstance(module, LoraLayer)]
    return [base for base in bases if (precision := precisions.recognize(base)) and precision.makes_weights]


def base_product(
    base: nn.Linear,
    x: Tensor,
    *,
    bias: bool = True,
    weight: Tensor | None = None,
    prepared: dict[Products, Any] | None = None,
) -> Tensor:
    """base(x) of x [..., in] in x's type.

    Args:
        bias: whether it is added.
        weight: the layer's [out, in] in x's type, where it is at hand.
        prepared: what precisions made of x for layers before this one that read it, to which theirs is added.
    """
    added = base.bias.to(x.dtype) if bias and base.bias is not None else None
    products = _products(base)
    if products is None:
        return functional.linear(x, base_weight(base, x.dtype) if weight is None else weight, added)
    prepared = {} if prepared is None else prepared
    if products not in prepared:
        prepared[products] = products.prepared(_rows(x))
    out = products.product(base, prepared[products], x.dtype).view(*x.shape[:-1], base.out_features)
    return out if added is None else out.add_(added)


def base_input_gradient(base: nn.Linear, grad: Tensor) -> Tensor:
    """The gradient [tokens, in] of a base layer's input, of grad [tokens, out]."""
    products = _products(base)
    return grad @ base_weight(base, grad.dtype) if products is None else products.input_gradient(base, grad)


def add_base_input_gradient(total: Tensor, base: nn.Linear, grad: Tensor) -> None:
    """Add the gradient of a base layer's input to `total` [tokens, in]."""
    products = _products(base)
    if products is None:
        total.addmm_(grad, base_weight(base, grad.dtype))
    else:
        total.add_(products.input_gradient(base, grad))


def _products(base: nn.Linear) -> Products | None:
    precision = precisions.recognize(base)
    return None if precision is None else in_force(precision.products)


class AdaptedLinear(torch.autograd.Function):
    """base(x) + scaling * dropped A^T B^T in one step (Hu et al. 2021, equation 3).

    PEFT does it in seven: under autocast it casts the input to float32 and back for each adapter, which
    keeps a copy of it, and adds the scaled product in passes of their own. Here the product is added by
    the matrix product itself, and what is kept is the layer's input (which layers share) and the
    [tokens, rank] product. Gradients are summed into float32 adapters from products in x's type.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, base: nn.Linear, scaling: float
    ):
        """x [..., in] in the compute type; dropped: x after dropout, None for x itself; a [r, in], b [out, r]."""
        source = x if dropped is None else dropped
        low = functional.linear(source, a.to(x.dtype))
        out = base_product(base, x)
        _rows(out).addmm_(_rows(low), b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(source, low, a, b)
        ctx.base, ctx.scaling, ctx.has_dropped = base, scaling, dropped is not None
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        source, low, a, b = ctx.saved_tensors
        flat = _rows(grad)
        grad_low, grad_a, grad_b = _adapter_gradients(flat, source, low, a, b, ctx.scaling)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = base_input_gradient(ctx.base, flat)
            if not ctx.has_dropped:
                grad_x.addmm_(grad_low, a.to(grad.dtype), alpha=ctx.scaling)
            grad_x = grad_x.view(source.shape)
        if ctx.has_dropped and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low @ a.to(grad.dtype)).mul_(ctx.scaling).view(source.shape)
        return grad_x, grad_dropped, grad_a, grad_b, None, None


def _adapter_gradients(
    grad: Tensor, source: Tensor, low: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of grad [tokens, out]: the gradients of the [tokens, rank] product (without the scale), of a and of b."""
    grad_low = grad @ b.to(grad.dtype)
    grad_b = (grad.t() @ _rows(low)).to(b.dtype).mul_(scaling)
    grad_a = (grad_low.t() @ _rows(source)).to(a.dtype).mul_(scaling)
    return grad_low, grad_a, grad_b


class DecomposedLinear(torch.autograd.Function):
    """(base(x) + scaling * x A^T B^T) * magnitude / norm, and the bias (Liu et al. 2024, equation 5).

    `norm` is that of each row w of W + scaling * B A, and a constant for the gradient (section 4.3). PEFT adds up the
    product B A, as large as the weight, to compute it. Here it is
    sqrt(w.w + 2 scaling b.(A w) + scaling^2 b.(A A^T b)), from products that are `rank` wide, with w.w computed once.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        base: nn.Linear,
        squares: Tensor,
        scaling: float,
    ):
        """x [..., in] in the compute type; a [r, in], b [out, r]; magnitude and squares (w.w) [out], in float32."""
        weight, small = base_weight(base, x.dtype), a.to(x.dtype)
        low = functional.linear(x, small)
        plain = base_product(base, x, bias=False, weight=weight)
        _rows(plain).addmm_(_rows(low), b.to(x.dtype).t(), alpha=scaling)
        cross = (weight @ small.t()).to(b.dtype)
        norm = (squares + scaling * (b * (2 * cross + scaling * (b @ (a @ a.t())))).sum(1)).sqrt()
        scale = magnitude / norm
        # In 16 bits the scale would be rounded, and what a magnitude learns is smaller than that.
        out = torch.mul(plain, scale, out=torch.empty_like(plain))
        ctx.save_for_backward(x, low, a, b, plain, scale, norm)
        ctx.base, ctx.scaling = base, scaling
        return out if base.bias is None else out.add_(base.bias.to(out.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, low, a, b, plain, scale, norm = ctx.saved_tensors
        grad_magnitude = (_rows(grad) * _rows(plain)).sum(0, dtype=norm.dtype) / norm
        flat = torch.mul(_rows(grad), scale, out=torch.empty_like(_rows(grad)))
        grad_low, grad_a, grad_b = _adapter_gradients(flat, x, low, a, b, ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = base_input_gradient(ctx.base, flat)
            grad_x = grad_x.addmm_(grad_low, a.to(grad.dtype), alpha=ctx.scaling).view(x.shape)
        return grad_x, grad_a, grad_b, grad_magnitude, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, SwiGLU), keeping the two inputs and nothing else."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor):
        ctx.save_for_backward(gate, up)
        return gated_silu(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return gated_silu_backward(grad, gate, up)


class LinearCrossEntropy(torch.autograd.Function):
    """The summed cross entropy of hidden W^T against labels, a chunk of rows at a time.

    The logits of a chunk become their own gradient in place, so they are made once and never held
    whole: the idea of Liger's fused linear cross entropy (Hsu et al. 2024), without its kernels.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor):
        """hidden [n, size], weight [vocabulary, size], labels [n] -> (nats, right predictions), summed."""
        rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
        loss = hidden.new_zeros((), dtype=torch.float32)
        right = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        head = weight.to(hidden.dtype)
        for start in range(0, len(hidden), rows):
            chunk, targets = hidden[start : start + rows], labels[start : start + rows]
            learned = (targets != IGNORED).unsqueeze(1)
            index = targets.clamp(min=0).unsqueeze(1)
            logits = chunk @ head.t()
            right += ((logits.argmax(1, keepdim=True) == index) & learned).sum()
            logits = logits.float()  # and what it was made of is freed
            logs = functional.log_softmax(logits, dim=1)
            del logits
            loss -= (logs.gather(1, index) * learned).sum()
            if grad_hidden is not None or grad_weight is not None:
                grads = logs.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=torch.float32))
                grads = grads.mul_(learned).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grads, head, out=grad_hidden[start : start + rows])
                if grad_weight is not None:
                    grad_weight += grads.t() @ chunk
                del grads
            del logs  # or the next chunk would be made beside it
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            # In 16 bits the divisor of the loss would be rounded, and every gradient with it.
            None if grad_hidden is None else (grad_hidden.float() * grad).to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad,
            None,
        )


@contextmanager
def scoring(head: nn.Module, learned: Tensor, targets: Tensor, compute: torch.dtype) -> Iterator[None]:
    """Let the output head give the loss in place of logits: a tensor of the summed nats and the right predictions.

    The head is called as ever, so a weight that is gathered for its call is there.

    Args:
        learned: which of the positions [rows x tokens] have a target, as a mask or as their numbers.
        targets: the next token of each position [rows x tokens].
    """
    targets = targets[learned]

    def forward(hidden: Tensor) -> Tensor:
        # Without the detachment a gradient as large as the vocabulary would be made for nothing.
        weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
        hidden = hidden.flatten(0, 1)[learned].to(compute)
        return torch.stack(LinearCrossEntropy.apply(hidden, weight, targets))

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def fuse_adapters(model: nn.Module, *, compute: torch.dtype) -> int:
    """Give every adapted layer on a base that can be fused its fused form; return how many were given it.

    A layer on another base keeps PEFT's own way, with autocast around it. One whose method computes it in one step of
    its own keeps that.
    """
    fused = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        precision = precisions.recognize(module.base_layer)
        if precision is not None and precision.can_be_fused:
            if "forward" in vars(module):
                pass  # its method's own
            elif module.lora_magnitude_vector:
                squares = base_weight(module.base_layer, compute).float().square().sum(1)
                module.forward = partial(_decomposed_forward, module, squares)
            else:
                module.forward = MethodType(adapted_forward, module)
            fused += 1
        else:
            module.forward = torch.autocast(
                next(module.base_layer.parameters()).device.type, compute, enabled=compute != torch.float32
            )(module.forward)
    return fused


def adapted_forward(module: LoraLayer, x: Tensor) -> Tensor:
    (name,) = module.active_adapters
    dropout = module.lora_dropout[name]
    dropped = dropout(x) if isinstance(dropout, nn.Dropout) and module.training else None
    return AdaptedLinear.apply(
        x,
        dropped,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.base_layer,
        module.scaling[name],
    )


def _decomposed_forward(module: LoraLayer, squares: Tensor, x: Tensor) -> Tensor:
    (name,) = module.active_adapters
    return DecomposedLinear.apply(
        x,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.lora_magnitude_vector[name].weight,
        module.base_layer,
        squares,
        module.scaling[name],
    )


def fuse_layers(model: nn.Module) -> int:
    """Give root-mean-square norms and gated SiLU perceptrons their fused form; return how many were given it.

    They are known by what they hold and how they behave, so that another architecture's norm of like name
    (Gemma's adds 1 to its weight) is left alone.
    """
    agrees: dict[Hashable, bool] = {}
    fused = 0
    for module in model.modules():
        form = next((form for form in FORMS if form.may_be_of(module)), None)
        if form is None:
            continue
        alike = kind(module)
        if alike not in agrees:
            agrees[alike] = _agree(module, form.forward, form.probe(module))
        if agrees[alike]:
            module.forward = MethodType(form.forward, module)
            fused += 1
    return fused


def is_named_rms_norm(module: nn.Module) -> bool:
    """Whether a module is named and built as a root-mean-square norm; how it behaves is not tried."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _norm_probe(module: nn.Module) -> Tensor:
    """Numbers [2, size] from -2 to 3, in the type of the norm's weight."""
    size, weight = module.weight.shape[0], module.weight
    return torch.linspace(-2, 3, 2 * size, device=weight.device).view(2, size).to(weight.dtype)


def _rms_norm_forward(module: nn.Module, x: Tensor) -> Tensor:
    out = rms_norm(module, x)
    out.norm_of = NormOf(x.detach(), module)  # for a layer that rather computes it again than keeps it
    return out


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


@dataclass(frozen=True)
class NormOf:
    """What a root-mean-square norm made its output of."""

    source: Tensor
    norm: nn.Module


def _is_named_gated(module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj"))


def _gated_probe(module: nn.Module) -> Tensor:
    """Random numbers [4, in], in the type that the perceptron computes in."""
    # An adapter is in float32 on a base in 16 bits.
    types = {p.dtype for p in module.parameters() if p.is_floating_point()}
    dtype = next(iter(types - {torch.float32}), torch.float32)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, module.gate_proj.in_features, generator=generator)
    return probe.to(next(module.gate_proj.parameters()).device, dtype)


def _agree(module: nn.Module, form: Callable, probe: Tensor) -> bool:
    """Whether the fused form gives a module's own output, in training too, where a dropout would show."""
    training = module.training
    module.train()
    with torch.no_grad(), torch.random.fork_rng(), dequantized_products():
        own, fast = module(probe).float(), form(module, probe).float()
    module.train(training)
    return torch.allclose(own, fast, rtol=2e-2, atol=1e-2 * float(own.abs().mean()))


def gated_silu_forward(module: nn.Module, x: Tensor) -> Tensor:
    return module.down_proj(GatedSilu.apply(module.gate_proj(x), module.up_proj(x)))


@dataclass(frozen=True)
class Form:
    """A fused form of a module."""

    may_be_of: Callable[[nn.Module], bool]  # by what the module holds
    forward: Callable[[nn.Module, Tensor], Tensor]
    probe: Callable[[nn.Module], Tensor]  # makes an input on which both forms are tried


FORMS = (
    Form(is_named_rms_norm, _rms_norm_forward, _norm_probe),
    Form(_is_named_gated, gated_silu_forward, _gated_probe),
)
