"""A base whose decoder layers were dropped computes what a model built by hand from the same layers does."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import file_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from workflow.data import lineage, model_files
from workflow.fetch import sources
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, write_json

LAYERS = 4  # of the preset tiny
IDS = torch.arange(3, 60)[None]


def fetch(source: Path, folder: Path, kept: int | None) -> dict:
    """What source.json says of a model of which so many layers are kept."""
    folder.mkdir()
    return sources.fetch_model(file_model(source).model_copy(update={"kept_layers": kept}), folder)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def by_hand(folder: Path, layers: list[int]) -> torch.Tensor:
    """The logits of a model whose list of layers was replaced in memory."""
    model = load(folder)
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in layers)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(layers)
    return logits(model)


@pytest.fixture(scope="module")
def in_parts(tiny_model, tmp_path_factory) -> Path:
    """The tiny model in one file for each layer, and one for the rest, as large models are stored."""
    folder = tmp_path_factory.mktemp("parts")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    weights = load_file(folder / model_files.SINGLE)
    (folder / model_files.SINGLE).unlink()
    parts: dict[str, dict] = {}
    for name, weight in weights.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        parts.setdefault(f"model-{part}.safetensors", {})[name] = weight
    for file, content in parts.items():
        save_file(content, folder / file, metadata={"format": "pt"})
    places = {name: file for file, content in parts.items() for name in content}
    write_json(folder / model_files.INDEX, {"metadata": {"total_size": 1}, "weight_map": places})
    return folder


@pytest.mark.parametrize(("kept", "layers"), [(3, [0, 1, 3]), (2, [0, 3]), (1, [0])])
@pytest.mark.parametrize("stored", ["tiny_model", "in_parts"])
def test_the_cut_model_computes_what_one_built_by_hand_does(stored, kept, layers, request, tmp_path):
    whole = request.getfixturevalue(stored)
    before = fetch(whole, tmp_path / "whole", None)
    record = fetch(whole, tmp_path / "cut", kept)
    cut = load(tmp_path / "cut")
    assert torch.equal(logits(cut), by_hand(whole, layers))
    assert not torch.allclose(logits(cut), logits(load(whole)), atol=1e-3)
    config = read_json(tmp_path / "cut" / "config.json")
    assert config["num_hidden_layers"] == kept == len(cut.model.layers)
    dropped = [index for index in range(LAYERS) if index not in layers]
    assert record["cut"] == {"layers": kept, "of": LAYERS, "dropped": dropped} and record["healed"] is None
    assert before["cut"] is None
    of_a_layer = sum(weight.numel() for weight in cut.model.layers[0].parameters())
    assert record["parameters"] == before["parameters"] - (LAYERS - kept) * of_a_layer
    if stored == "in_parts":
        index = read_json(tmp_path / "cut" / model_files.INDEX)
        size = sum(
            tensor.nbytes
            for file in model_files.weights_files(tmp_path / "cut")
            for tensor in load_file(file).values()
        )
        assert index["metadata"]["total_size"] == size


@pytest.mark.parametrize(
    ("kept", "layers"), [(4, [0, 1, 6, 7]), (5, [0, 1, 2, 6, 7]), (7, [0, 1, 2, 3, 5, 6, 7])]
)
def test_a_block_in_the_middle_goes(tiny, kept, layers, tmp_path):
    eight = tiny.model.model_copy(update={"layers": 8})
    for name, number in (("whole", None), ("cut", kept)):
        (tmp_path / name).mkdir()
        sources.fetch_model(eight.model_copy(update={"kept_layers": number}), tmp_path / name)
    assert torch.equal(logits(load(tmp_path / "cut")), by_hand(tmp_path / "whole", layers))


def test_that_it_was_cut_stays_with_the_weights_and_stands_in_the_card(tiny_model, tmp_path):
    first = fetch(tiny_model, tmp_path / "cut", 2)
    assert "cut from 4 decoder layers to 2" in (tmp_path / "cut" / lineage.CARD).read_text()
    load(tmp_path / "cut").save_pretrained(tmp_path / "saved")  # what a training does
    for name in lineage.TOKENIZER_FILES:
        if (tmp_path / "cut" / name).is_file():
            shutil.copy(tmp_path / "cut" / name, tmp_path / "saved")
    assert fetch(tmp_path / "saved", tmp_path / "again", None)["cut"] == first["cut"]
    with pytest.raises(UserError, match=r"cut before, .* so model\.kept_layers must be null\.$"):
        fetch(tmp_path / "saved", tmp_path / "twice", 1)


@pytest.mark.parametrize("kept", [4, 40])
def test_a_model_keeps_fewer_layers_than_it_has(tiny_model, kept, tmp_path):
    words = (
        rf"^model\.kept_layers is {kept}, and the model has 4 layers: fewer must be kept, or null for all\.$"
    )
    with pytest.raises(UserError, match=words):
        fetch(tiny_model, tmp_path / "cut", kept)


@pytest.mark.parametrize(
    "stored", ["yes", {"cut": None}, {"cut": {"layers": 2, "of": 4, "dropped": "1"}, "healed": None}]
)
def test_another_meaning_of_the_key_is_refused(tiny_model, stored, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other")
    config = read_json(tmp_path / "other" / "config.json")
    write_json(tmp_path / "other" / "config.json", config | {"cut_and_healed": stored})
    with pytest.raises(
        UserError, match=r"^the model's config\.json has cut_and_healed, .* remove that key\.$"
    ):
        fetch(tmp_path / "other", tmp_path / "fetched", None)


def test_lists_with_an_entry_for_each_layer_are_cut_as_well(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "mixed")
    config = read_json(tmp_path / "mixed" / "config.json")
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    write_json(tmp_path / "mixed" / "config.json", config | {"layer_types": kinds})
    fetch(tmp_path / "mixed", tmp_path / "cut", 2)
    assert read_json(tmp_path / "cut" / "config.json")["layer_types"] == [kinds[0], kinds[3]]


def test_a_model_with_other_names_for_its_layers_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=2)).save_pretrained(folder)
    config = read_json(folder / "config.json")
    with pytest.raises(UserError, match=r"^model\.kept_layers must be null: .* has no num_hidden_layers\.$"):
        fetch(folder, tmp_path / "cut", 2)
    write_json(folder / "config.json", config | {"num_hidden_layers": 3})
    words = (
        r"^model\.kept_layers must be null: the model's weights are not stored as layers\.0 to layers\.2\.$"
    )
    with pytest.raises(UserError, match=words):
        fetch(folder, tmp_path / "again", 2)
