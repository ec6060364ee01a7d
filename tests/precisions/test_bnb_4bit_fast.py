"""The quicker way to dequantize 4-bit weights is taken only where it gives the same bits in less time."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import ROOT

from workflow.precisions import bnb_4bit_fast

STORED = (torch.zeros(4, dtype=torch.uint8), None)


def way(numbers: list[float]):
    return lambda packed, state: torch.tensor(numbers)


def refuses(packed, state):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("ours", "costs", "taken"),
    [
        (way([1.0, 2.0]), (1.0, 2.0), "ours"),
        (way([1.0, 2.0]), (2.0, 1.0), "own"),
        (way([1.0, 2.0000002]), (1.0, 2.0), "own"),
        (refuses, (1.0, 2.0), "own"),
    ],
)
def test_ours_is_taken_if_it_works_gives_the_same_bits_and_is_quicker(ours, costs, taken):
    own, asked = way([1.0, 2.0]), iter(costs)
    found = bnb_4bit_fast.quicker(ours, own, STORED, lambda work: next(asked))
    assert found is {"ours": ours, "own": own}[taken]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])  # fmt: skip
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_has_the_librarys_bits(kind, nested, device):
    weight = torch.randn(96, 640, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    for blocksize in (32, 64, 128):
        stored = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
        assert bnb_4bit_fast.dequantized(*stored).equal(dequantize_4bit(*stored))


INTERPRETED = """
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from workflow.precisions import bnb_4bit_kernels
for dtype in (torch.float32, torch.float16):
    for kind in ("nf4", "fp4"):
        for nested in (True, False):
            for blocksize in (32, 64, 128, 256):
                weight = torch.randn(96, 648, dtype=dtype) * 0.02
                stored = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
                assert bnb_4bit_kernels.dequantized(*stored).equal(dequantize_4bit(*stored)), (dtype, kind, nested, blocksize)
"""


@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: it comes with a CUDA build of torch"
)
def test_the_kernel_gives_the_librarys_bits_in_tritons_interpreter():
    subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True
    )
