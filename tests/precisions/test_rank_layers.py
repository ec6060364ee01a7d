"""Layers are ranked by errors that a plain computation finds again, on training rows alone."""

import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from test_precision import CPU, variant

from workflow import precisions
from workflow.models import load, rank_layers
from workflow.precisions.base import Quantization
from workflow.runtime.paths import MODEL, train_rows_file

ROWS = [torch.arange(3, 40)[None], torch.arange(60, 70)[None]]


@pytest.fixture(scope="module")
def pair(tiny_model):
    return [load.load_base(tiny_model, variant(of), hardware=CPU)[0] for of in ("16bit", "nf4")]


def test_the_errors_are_those_of_all_rows_together(pair):
    plain, quantized = pair
    errors = rank_layers.layer_errors(plain, quantized, Quantization(block_size=64), ROWS)
    assert len(errors) == 28
    assert [e.output for e in errors] == sorted((e.output for e in errors), reverse=True)
    name = "model.layers.1.self_attn.q_proj"
    error = next(e for e in errors if e.name == name)
    layer, other = (dict(model.named_modules())[name] for model in pair)
    held = precisions.get("nf4").dequantized_weight(other, torch.float32)
    # The inputs of q_proj are the layer's own after its norm.
    with torch.no_grad():
        states = [plain(ids, output_hidden_states=True).hidden_states[1] for ids in ROWS]
        x = torch.cat([plain.model.layers[1].input_layernorm(state)[0] for state in states])
    expected = (x @ held.T - layer(x)).norm() / layer(x).norm()
    assert error.output == pytest.approx(float(expected), rel=1e-4)
    assert error.weight == pytest.approx(float((held - layer.weight).norm() / layer.weight.norm()), rel=1e-5)
    assert error.more_bytes == 64 * 64 * 2 - (64 * 64 / 2 + 4 * 64 + 64)
    assert not layer._forward_pre_hooks


def test_the_table_ends_with_a_list_to_paste(pair, tiny):
    errors = rank_layers.layer_errors(*pair, Quantization(block_size=64), ROWS)
    text = rank_layers.table(errors, keep=3)
    last = text.splitlines()[-1]
    assert last == f"layers_in_16_bits: [{', '.join(e.name for e in errors[:3])}]"
    from ruamel.yaml import YAML

    pasted = YAML(typ="safe").load(last)["layers_in_16_bits"]
    assert variant("nf4", layers_in_16_bits=pasted).layers_in_16_bits == pasted


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["rank_layers", *arguments])
    rank_layers.main()


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_model, splits):
    """A project whose model is there and whose only rows are those of the training split."""
    from workflow.data.rows import as_rows

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(tiny_model, MODEL)
    train_rows_file(1).parent.mkdir(parents=True)
    train_rows_file(1).write_text("".join(json.dumps(row) + "\n" for row in as_rows(splits["train"])))
    return tmp_path


def test_the_command_ranks_the_runs_model(project, monkeypatch, capsys):
    run(monkeypatch, "--precision", "fp4", "--rows", "2", "--keep", "2", "--block-size", "32")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "layer",
        "weight",
        "error",
        "output",
        "error",
        "MiB",
        "more",
        "in",
        "16",
        "bits",
    ]
    assert len(lines) == 1 + 28 + 4 and lines[-1].count("model.layers.") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--precision", "16bit"], "which quantizes no layer"),
        (["--precision", "nf5"], "nf5 is not a known precision"),
        (["--precision", "gptq"], "gptq cannot be trained on"),
        (["--precision", "nf4", "--block-size", "48"], "block_size is 48; precision nf4 allows"),
        (["--precision", "int8", "--double-quantization"], "double_quantization is true"),
    ],
)
def test_what_cannot_be_ranked_is_said(project, monkeypatch, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(monkeypatch, *arguments)


def test_missing_rows_are_said(project, monkeypatch):
    train_rows_file(1).unlink()
    with pytest.raises(SystemExit, match="train/1.jsonl is missing; `dvc repro sample` makes it"):
        run(monkeypatch, "--precision", "nf4")
