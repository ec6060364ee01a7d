"""A training step's forward and backward pass as CUDA graphs: the same kernels, launched all at once.

At a few hundred tokens a step a 7B model spends most of its time waiting for Python to launch some ten
thousand kernels, and at several thousand still a seventh of it. A graph is captured once for each size of pack and then
replayed; the bits are the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from workflow.training.speed.ahead import Ahead, Asked, made_by
from workflow.training.speed.fused import dequantized_weight, layers_to_dequantize
from workflow.training.speed.packing import Pack, PackSize


class GraphedSteps:
    """Captured passes, one for each size of pack. Gradients are summed into buffers that stay where they are.

    Args:
        model: its trainable parameters get a `.grad` buffer each.
        forward: a pack and the divisor of the loss (a tensor) to (loss, right predictions).
        sizes: of the packs; captured from the largest, so that all share its memory.
        slots: rows of a pack, empty ones included.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Pack, Tensor], tuple[Tensor, Tensor]],
        *,
        sizes: Sequence[PackSize],
        slots: int,
        device: torch.device,
    ):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        self.divisor = torch.ones((), device=device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Pack, tuple[Tensor, Tensor]]] = {}
        self.use_buffers()
        blanks = [_blank(size, slots, device) for size in sorted(sizes, reverse=True)]
        torch.cuda.empty_cache()  # what steps without a graph leave reserved, another stream cannot use
        # One stream for all: cuBLAS keeps a workspace for each stream that it has seen.
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        self.dequantized = layers_to_dequantize(model)
        asked = [Asked(dequantized_weight) for _ in blanks]
        with torch.cuda.stream(self.stream):  # kernels are chosen and loaded outside the captures
            for blank, weights in zip(blanks, asked, strict=True):
                with made_by(weights, self.dequantized):
                    forward(blank, self.divisor)[0].backward()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-up leaves reserved, the captures reserve again
        pool = torch.cuda.graph_pool_handle()
        second = torch.cuda.Stream()
        for blank, weights in zip(blanks, asked, strict=True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                with made_by(Ahead(dequantized_weight, weights.order, second), self.dequantized):
                    loss, right = forward(blank, self.divisor)
                    loss.backward()
                out = (loss.detach(), right.detach())
            del loss, right
            self.graphs[blank.length] = (graph, blank, out)
        self.zero()

    def use_buffers(self) -> None:
        """Put the buffers back as gradients: an optimizer's zero_grad sets them to None."""
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            parameter.grad = buffer

    def zero(self) -> None:
        torch._foreach_zero_(self.buffers)

    def __call__(self, packed: Pack, divisor: Tensor | int) -> tuple[Tensor, Tensor]:
        """Add a pack's gradients to the buffers; return (loss, right predictions).

        The first call after a `zero_grad(set_to_none=True)` begins a new sum.
        """
        if self.parameters[0].grad is None:
            self.zero()
            self.use_buffers()
        graph, static, (loss, right) = self.graphs[packed.length]
        for name in static.__dataclass_fields__:
            getattr(static, name).copy_(getattr(packed, name))
        self.divisor.copy_(torch.as_tensor(divisor))
        graph.replay()
        return loss.clone(), right.clone()


def _blank(size: PackSize, slots: int, device: torch.device) -> Pack:
    """A pack of one row that stands for any: what a graph is captured with decides no shape but the size."""
    boundaries = torch.full((slots + 1,), size.tokens, dtype=torch.int32, device=device)
    boundaries[0] = 0
    return Pack(
        torch.zeros(1, size.tokens, dtype=torch.long, device=device),
        torch.arange(size.tokens, device=device)[None],
        torch.zeros(1, size.tokens, dtype=torch.long, device=device),
        torch.zeros(size.learned, dtype=torch.long, device=device),
        boundaries,
        torch.tensor(size.tokens, device=device),
    )
