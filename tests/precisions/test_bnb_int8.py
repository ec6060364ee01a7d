"""A weight in int8 is what rounding each of its rows by itself gives."""

import numpy as np
import pytest
import torch
from conftest import CPU
from safetensors.torch import load_file

from workflow import precisions
from workflow.models.load import load_base

LAYER = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dequantized_weight_is_its_row_rounded_to_127_steps_of_the_largest_entry(tiny, tiny_model, dtype):
    """The paper's equation 2 (Dettmers et al. 2022), by numpy; bitsandbytes rounds the weight to float16 before."""
    model, _ = load_base(tiny_model, tiny.variants["lora_int8"], hardware=CPU)
    layer = model.get_submodule(LAYER)
    weight = precisions.get("int8").dequantized_weight(layer, dtype)
    (file,) = tiny_model.glob("*.safetensors")
    original = load_file(file)[f"{LAYER}.weight"].to(torch.float16).double().numpy()
    largest = np.abs(original).max(axis=1, keepdims=True)
    scaled = original / largest * 127
    expected = torch.from_numpy(np.rint(scaled) * largest / 127)
    decided = torch.from_numpy(
        np.abs(scaled % 1 - 0.5) > 1e-4
    )  # halfway, the last digit of a float32 decides
    assert weight.dtype == dtype and weight.shape == original.shape
    rounding = 2**-22 if dtype == torch.float32 else 2**-8
    assert decided.double().mean() > 0.99
    torch.testing.assert_close(weight.double()[decided], expected[decided], rtol=rounding, atol=0.0)
