"""Rows laid end to end in one sequence, each attending to itself alone, so that nothing is padded."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from workflow.precisions.base import dequantized_products
from workflow.runtime.errors import CheckError
from workflow.training.speed.fused import IGNORED

VARLEN, BY_ROW = "packed_varlen", "packed_by_row"
# Before torch 2.12 grouped queries needed no permission.
NAMES_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class Pack:
    """Rows end to end. Tensors are [1, tokens], but `boundaries` [rows + 1], int32: where each row begins.

    A row may be empty: a pack of a fixed shape (for a CUDA graph) ends in empty rows. Its `learned` is filled up with the
    last position, whose target is always IGNORED.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor  # the next token, IGNORED where it is not learned
    learned: Tensor  # [n]: the positions that have a target
    boundaries: Tensor
    tokens: Tensor  # of the rows, without what fills the pack up; a number

    def to(self, device: torch.device) -> "Pack":
        return Pack(
            *(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__)
        )

    def pin_memory(self) -> "Pack":
        """What a data loader calls where batches go on to a GPU."""
        return Pack(*(getattr(self, name).pin_memory() for name in self.__dataclass_fields__))

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]


@dataclass(frozen=True, order=True)
class PackSize:
    """How much a pack holds, or can hold."""

    tokens: int
    learned: int  # tokens that have a target

    @classmethod
    def of(cls, rows: list[dict]) -> "PackSize":
        """The size of a pack of tokenized rows (input_ids, labels)."""
        learned = (sum(label != IGNORED for label in row["labels"][1:]) for row in rows)
        return cls(sum(len(row["input_ids"]) for row in rows), sum(learned))

    def holds(self, other: "PackSize") -> bool:
        return self.tokens >= other.tokens and self.learned >= other.learned


def pack(rows: list[dict], *, size: PackSize | None = None, slots: int | None = None, pad: int = 0) -> Pack:
    """Lay tokenized rows (input_ids, labels) end to end.

    Args:
        size: of the pack; the tokens that the rows leave free become a row of padding that nothing is learned from.
        slots: entries of `boundaries` less one, at least one more than the rows.
        pad: the token that fills up.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    ids = [token for row in rows for token in row["input_ids"]]
    # The last token of a row predicts nothing: the first of the next is another row's.
    targets = [label for row in rows for label in (*row["labels"][1:], IGNORED)]
    learned = [position for position, target in enumerate(targets) if target != IGNORED]
    positions = [position for count in lengths for position in range(count)]
    tokens = sum(lengths)
    if size is not None and not size.holds(PackSize(tokens, len(learned))):
        raise ValueError(f"{tokens} tokens, {len(learned)} of them learned, do not fit into a pack of {size}")
    free = 0 if size is None else size.tokens - tokens
    ids += [pad] * free
    targets += [IGNORED] * free
    positions += range(free)
    if size is not None:
        learned += [len(ids) - 1] * (size.learned - len(learned))
    starts = [0]
    for count in [*lengths, *([free] if free else [])]:
        starts.append(starts[-1] + count)
    if slots is not None and len(starts) > slots + 1:
        raise ValueError(f"{len(starts) - 1} rows do not fit into {slots} slots")
    if slots is not None:
        starts += [starts[-1]] * (slots + 1 - len(starts))
    return Pack(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor([targets]),
        torch.tensor(learned, dtype=torch.long),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(tokens),
    )


class PackingCollator:
    """Makes a pack of the rows of a forward pass."""

    def __init__(self, *, sizes: Sequence[PackSize] = (), slots: int | None = None):
        """sizes: ascending; a pack has the first that holds its rows, and their own size where none does."""
        self.sizes, self.slots = sizes, slots

    def __call__(self, rows: list[dict]) -> Pack:
        own = PackSize.of(rows)
        return pack(rows, size=next((size for size in self.sizes if size.holds(own)), None), slots=self.slots)


def sizes_needed(passes: Sequence[PackSize], *, free: float = 1 / 20, multiple: int = 64) -> list[PackSize]:
    """The fewest sizes of packs, ascending, that hold these passes and leave little free.

    A pass has the first size that holds its tokens, and that size holds the learned tokens of every such pass. The least
    sum of free tokens for each number of sizes is found by dynamic programming over the different lengths.

    Args:
        free: share of all tokens that may be left free, beside the rounding.
        multiple: of which the tokens of a size are.
    """
    lengths, index = np.unique(
        [-(-size.tokens // multiple) * multiple for size in passes], return_inverse=True
    )
    counts = np.bincount(index)
    number, tokens = (
        np.concatenate([[0], counts.cumsum()]),
        np.concatenate([[0], (counts * lengths).cumsum()]),
    )
    # left[i, j]: tokens left free if the lengths from i to j all become lengths[j].
    left = (number[None, 1:] - number[:-1, None]) * lengths - (tokens[None, 1:] - tokens[:-1, None])
    left = np.where(np.arange(len(lengths))[:, None] <= np.arange(len(lengths)), left, np.inf)
    least, starts = left[0], [np.zeros(len(lengths), dtype=int)]
    while least[-1] > free * tokens[-1]:
        # With one size more: the lengths before the start of its last size have the sizes found so far.
        totals = np.concatenate([[np.inf], least[:-1]])[:, None] + left
        starts.append(totals.argmin(0))
        least = totals.min(0)
    ends = [len(lengths) - 1]
    for start in reversed(starts[1:]):
        ends.append(int(start[ends[-1]]) - 1)
    sizes, below = [], -1
    for end in reversed(ends):
        members = (size for size, place in zip(passes, index, strict=True) if below < place <= end)
        learned = max(1, *(size.learned for size in [*members, *sizes[-1:]]))
        sizes.append(PackSize(int(lengths[end]), learned))
        below = end
    return sizes


def packed_attention(model: PreTrainedModel, compute: torch.dtype, device: torch.device) -> str | None:
    """The attention that packs of this model run fastest with on a device; None for a mask over the whole pack.

    VARLEN, PyTorch's variable-length flash attention, needs 16 bits and an Ampere GPU or newer. BY_ROW is for a CPU,
    where a few more calls cost less than the products between rows that a mask throws away.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return None
    if device.type == "cpu":
        return BY_ROW
    is_16_bits = compute in (torch.bfloat16, torch.float16)
    fast = device.type == "cuda" and is_16_bits and torch.cuda.get_device_capability(device) >= (8, 0)
    return VARLEN if fast else None


def can_be_packed(model: PreTrainedModel, *, longest: int) -> bool:
    """Whether rows laid end to end give this model what each alone does: tried with two short rows.

    A window of attention shorter than the longest row would be lost, and two short rows do not show it. A row alone has
    the other's tokens behind it, which it does not see: bitsandbytes chooses its kernels by the number of tokens, and
    the rounding of two of them, through 32 layers of 16 bits, could be taken for a leak.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and getattr(config, "use_sliding_window", True):
        return False
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (12,), generator=random).tolist()
    rows = [{"input_ids": part, "labels": part} for part in (ids[:5], ids[5:])]
    packed = pack(rows).to(model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), dequantized_products():
            together = model.base_model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                use_cache=False,
                **attention_arguments(packed, attention=None),
            ).last_hidden_state[0]
            alone = torch.cat(
                [
                    model.base_model(
                        input_ids=torch.tensor([row + other], device=model.device), use_cache=False
                    ).last_hidden_state[0, : len(row)]
                    for row, other in ((ids[:5], ids[5:]), (ids[5:], ids[:5]))
                ]
            )
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes no positions, or no mask of this form
    finally:
        model.train(training)
    difference = (together - alone).float().norm() / alone.float().norm()
    return bool(difference < (1e-4 if alone.dtype == torch.float32 else 5e-2))


def attention_arguments(packed: Pack, *, attention: str | None, longest_row: int | None = None) -> dict:
    """What a transformers model needs so that each row attends to itself alone.

    Args:
        longest_row: tokens that no row of the pack exceeds, padding included; None for the whole pack. The kernel
            starts a block for every 128 of them in every row, and most find nothing to do.
    """
    if attention == VARLEN:
        longest = min(packed.length, longest_row or packed.length)
        return {"attention_mask": None, "boundaries": packed.boundaries, "longest": longest}
    if attention == BY_ROW:
        lengths = [length for length in packed.boundaries.diff().tolist() if length]
        return {"attention_mask": None, "row_lengths": lengths}
    row = torch.bucketize(
        torch.arange(packed.length, device=packed.boundaries.device), packed.boundaries[1:], right=True
    )
    return {"attention_mask": (row[:, None] == row[None, :]).tril()[None, None]}


def _varlen_attention(
    module, query, key, value, attention_mask, *, scaling, dropout=0.0, boundaries, longest, **others
):
    """transformers' attention interface over PyTorch's varlen_attn: query [1, heads, tokens, size]."""
    _check_plain(others, dropout)
    grouped = query.shape[1] != key.shape[1]
    # Rotations by float32 angles leave float32 where the weights are: autocast casts it for other attentions, not here.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = varlen_attn(
        query.transpose(1, 2)[0],
        key.transpose(1, 2)[0],
        value.transpose(1, 2)[0],
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        **({"enable_gqa": grouped} if NAMES_GROUPED else {}),
    )
    return out[None], None


def _row_attention(module, query, key, value, attention_mask, *, scaling, dropout=0.0, row_lengths, **others):
    """transformers' attention interface, a row at a time: query [1, heads, tokens, size]."""
    _check_plain(others, dropout)
    rows = zip(*(part.split(row_lengths, dim=2) for part in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outs = [
        scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=grouped) for row in rows
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _check_plain(others: dict, dropout: float) -> None:
    """Raise a CheckError if a model's attention needs a soft cap, sinks or dropout, which packed attention lacks."""
    unknown = [name for name in ("softcap", "s_aux") if others.get(name) is not None]
    if unknown or dropout:
        raise CheckError(
            f"attention of this model asks for {', '.join(unknown) or 'dropout'}, which packed attention does not "
            "have; set training.step.packing and training.step.cuda_graphs to false"
        )


AttentionInterface.register(VARLEN, _varlen_attention)
AttentionInterface.register(BY_ROW, _row_attention)
