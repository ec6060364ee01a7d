"""Move a GGUF file's weights at random off the grid to which quantization had rounded them (docs/mechanism.md)."""

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow import params
from workflow.data import model_files
from workflow.runtime.errors import UserError

if TYPE_CHECKING:  # it is slow to import
    from gguf import GGUFReader, ReaderTensor

# Types whose blocks hold values d q + m with evenly spaced q; a block begins with d in float16 (ggml-common.h).
GRIDS = ("Q4_0", "Q4_1")
LAYERS = "blk."  # what the tensors of decoder layers are called: not embeddings, nor the output head
# The writer states these itself, for the file that it writes.
OF_THE_FILE = ("GGUF.", "general.architecture", "general.alignment")


def write_moved(path: Path, moved: params.Moved, copy: Path) -> dict:
    """Write a copy of a GGUF file whose weights on a grid are moved, and rounded to bfloat16.

    A weight of a block with scale d moves by a draw from the uniform distribution on [-cells |d|, cells |d|]. The draws
    depend on the seed and the tensor's name alone. Whatever lies on no grid is copied as it is. The moved weights lie
    where the file had them, so a reader that reorders them, as transformers does with Llama's queries and keys,
    does so with the moves as well.

    Returns:
        What source.json says of it: `cells`, `seed`, `tensors` and `weights` that moved, and `relative_size`, the root of
        the sum of the squared moves over that of the squared weights, as rounded.

    Raises:
        UserError: the file cannot be read, or no linear layer of it is on a grid.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        chosen = {tensor.name for tensor in reader.tensors if is_on_a_grid(tensor)}
        if chosen:
            squares = _write(reader, chosen, moved, copy)
    except Exception as error:  # the reader trusts the file's offsets and sizes
        raise UserError(f"{path.name} cannot be read as GGUF: {model_files.reason(error)}.") from None
    if not chosen:
        raise UserError(
            f"no linear layer of {path.name} is stored as {' or '.join(GRIDS)}, so there is no grid to move its weights off: "
            "model.moved must be null."
        )
    return {
        "cells": moved.cells,
        "seed": moved.seed,
        "tensors": len(chosen),
        "weights": sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name in chosen),
        "relative_size": math.sqrt(squares[0] / squares[1]),
    }


def is_on_a_grid(tensor: "ReaderTensor") -> bool:
    """Whether a tensor is a linear layer's weight, stored as a grid of evenly spaced values in each block."""
    return tensor.name.startswith(LAYERS) and tensor.tensor_type.name in GRIDS


def scales(tensor: "ReaderTensor") -> np.ndarray:
    """The size |d| of a cell for each weight of a tensor on a grid, in float32 and the weights' shape."""
    import gguf

    in_a_block, bytes_of_a_block = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    blocks = np.ascontiguousarray(tensor.data).reshape(-1, bytes_of_a_block)
    of_blocks = np.abs(blocks[:, :2].copy().view("<f2").astype(np.float32))
    return np.repeat(of_blocks, in_a_block).reshape(tuple(int(size) for size in reversed(tensor.shape)))


def _write(reader: "GGUFReader", chosen: set[str], moved: params.Moved, copy: Path) -> tuple[float, float]:
    """Write the copy a tensor at a time; return the sums of the squared moves and of the squared weights."""
    import gguf

    rounded = gguf.GGMLQuantizationType.BF16
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(copy, architecture)
    for name, field in reader.fields.items():
        if not name.startswith(OF_THE_FILE):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        on_a_grid = tensor.name in chosen
        shape = tuple(int(size) for size in reversed(tensor.shape))
        size = 2 * int(tensor.n_elements) if on_a_grid else tensor.n_bytes
        kind = rounded if on_a_grid else tensor.tensor_type
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    moves = weights = 0.0
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in chosen:
            before = gguf.dequantize(tensor.data, tensor.tensor_type)
            data = gguf.quantize(before + _draw(tensor, moved), rounded)
            before = gguf.dequantize(gguf.quantize(before, rounded), rounded)
            after = gguf.dequantize(data, rounded)
            moves += float(np.square(after - before, dtype=np.float64).sum())
            weights += float(np.square(before, dtype=np.float64).sum())
        writer.write_tensor_data(data)
    writer.close()
    return moves, weights


def _draw(tensor: "ReaderTensor", moved: params.Moved) -> np.ndarray:
    """The moves of a tensor's weights."""
    name = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "big")
    cells = scales(tensor)
    draws = np.random.default_rng([moved.seed, name]).uniform(-moved.cells, moved.cells, cells.shape)
    return draws.astype(np.float32) * cells
