"""What is saved here means the same to the versions before: transformers 4.57 and PEFT 0.17 give the same loss."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, file_model, random_adapter
from gguf_models import write_gguf
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
)

from workflow import params
from workflow.data import cards, compatibility
from workflow.evaluation import export
from workflow.fetch import convert, sources
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, write_json
from workflow.runtime.paths import MODEL, weights_folder

OLDER = ROOT / ".venv-older"  # made by `make test` from requirements-older.lock
THETA, DEFAULT_THETA = 100_000.0, 10_000.0
TEXT = "What grows on trees, and what is the color of it in the autumn? " * 4
BY_LAYER = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": THETA},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0}}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": THETA}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": THETA}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": THETA}
PARTIAL = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.75}
# What transformers 4 must read of each: the rotary embedding of other architectures is in other keys.
CONFIGS = {
    "llama3": (LlamaConfig(rope_parameters=LLAMA3), {"rope_theta": THETA, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    "yarn": (Qwen2Config(rope_parameters=YARN), {"rope_theta": THETA, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
    "partial": (PhiConfig(rope_parameters=dict(PARTIAL)), {"rope_theta": THETA, "partial_rotary_factor": 0.75, "rope_scaling": None}),
    "gpt_neox": (GPTNeoXConfig(rope_parameters=dict(PARTIAL)), {"rotary_emb_base": THETA, "rotary_pct": 0.75}),
    "by layer": (Gemma3TextConfig(rope_parameters=BY_LAYER), {"rope_theta": THETA, "rope_local_base_freq": 20_000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi3": (Phi3Config(rope_parameters=LONG, original_max_position_embeddings=4096, max_position_embeddings=131072), {"rope_theta": THETA, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}}),
}  # fmt: skip


def sharp_model(folder: Path, **changes) -> Path:
    """A tiny Llama whose attention depends on positions so much that another rotary embedding shows in the loss."""
    torch.manual_seed(5)
    tokenizer = convert.byte_tokenizer(vocabulary=319, max_positions=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(25)
            elif weight.dim() == 2:
                weight.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> dict[str, tuple[Path, Path | None]]:
    """Every kind of model that is saved, by name: base and adapter. The working directory is a repository of them."""
    folder, before = tmp_path_factory.mktemp("saved"), Path.cwd()
    os.chdir(folder)
    (folder / "params.yaml").write_text(params.complete_text("tiny"))
    MODEL.mkdir(parents=True)
    sources.fetch_model(file_model(sharp_model(folder / "source")), MODEL)
    write_gguf(sharp_model(folder / "tied", tie_word_embeddings=True), folder / "model.F32.gguf")
    (folder / "from gguf").mkdir()
    sources.fetch_model(file_model(folder / "model.F32.gguf"), folder / "from gguf")

    def finish(weights: Path, name: str) -> None:
        cards.complete(
            weights, weights, tiny.variants[name], model_folder=MODEL, compute="float32", device="cpu"
        )

    adapter = random_adapter(MODEL, weights_folder("qlora_nf4_dq", 1))
    settings = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"r": 4, "base_model_name_or_path": str(MODEL)})
    finish(adapter, "qlora_nf4_dq")
    own = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    with torch.no_grad():
        own.lm_head.weight.mul_(1.5)
    own.save_pretrained("full")
    finish(Path("full"), "full_16bit")
    training = tiny.training.model_copy(update={"rank": 4, "alpha": settings["lora_alpha"]})
    patch = pytest.MonkeyPatch()
    patch.setattr(params.Params, "training_of", lambda *_, **__: training)
    for form in ("merged_16bit", "merged_dequantized"):
        export.save_served("qlora_nf4_dq", 1, form, folder / form)
    export.save_served("qlora_nf4_dq", 1, "as_trained", folder / "published")
    yield {
        "fetched": (MODEL.absolute(), None),
        "from GGUF": (folder / "from gguf", None),
        "adapter": (MODEL.absolute(), adapter.absolute()),
        "published adapter": (MODEL.absolute(), folder / "published"),
        "full": (folder / "full", None),
        "merged_16bit": (folder / "merged_16bit", None),
        "merged_dequantized": (folder / "merged_dequantized", None),
    }
    patch.undo()
    os.chdir(before)


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("configs")
    for name, (config, _) in CONFIGS.items():
        config.save_pretrained(folder / name)
        compatibility.make_compatible(folder / name)
    return [folder / name for name in CONFIGS]


def read(saved: dict, configs: list[Path], path: str) -> dict:
    asked = {"text": TEXT, "models": [[str(base), adapter and str(adapter)] for base, adapter in saved.values()],
             "configs": list(map(str, configs))}  # fmt: skip
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "read_older.py"], input=json.dumps(asked), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def newer(saved, configs) -> dict:
    return read(saved, configs, "")


@pytest.fixture(scope="module")
def older(saved, configs) -> dict:
    assert OLDER.is_dir(), "`make test` makes .venv-older from requirements-older.lock; it is missing."
    return read(saved, configs, str(OLDER))


def test_what_is_saved_has_the_same_tokens_and_loss_in_both(saved, newer, older):
    assert older["versions"][0].startswith("4.57.") and newer["versions"][0].startswith("5.")
    assert older["versions"][1].startswith("0.17.")
    for name, one, other in zip(saved, newer["models"], older["models"], strict=True):
        for key in ("prompt", "ids", "special", "ends", "tied", "length"):
            assert one[key] == other[key], (name, key)
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5), name
        assert (other["theta"], other["length"]) == (THETA, 2048), name
    losses = [round(model["loss"], 4) for model in older["models"]]
    assert len(set(losses)) == len(losses) - 1  # the adapter and its published copy alone are the same


def test_another_rotary_embedding_would_show(saved, newer, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    base.config.rope_parameters = {"rope_type": "default", "rope_theta": DEFAULT_THETA}
    other = LlamaForCausalLM(base.config).eval()
    other.load_state_dict(base.state_dict())
    ids = torch.tensor([newer["models"][0]["ids"]])
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for model in (base.eval(), other)]
    assert (
        losses[0] == pytest.approx(newer["models"][0]["loss"], abs=1e-5) and abs(losses[0] - losses[1]) > 1e-3
    )


def test_the_older_ones_warn_of_no_key(older):
    assert [said for said in older["said"] if "gemm_4bit" not in said] == []


def test_every_rotary_embedding_is_read_by_both(configs, newer, older):
    for (name, (config, expected)), one, other in zip(
        CONFIGS.items(), newer["configs"], older["configs"], strict=True
    ):
        assert {key: other[key] for key in expected} == expected, name
        mine = {key: value for key, value in one["rope_parameters"].items() if key != "type"}
        assert mine == config.to_dict()["rope_parameters"], name


def test_saved_settings_say_nothing_of_this_machine(saved, tmp_path):
    for base, adapter in saved.values():
        for file in (*(adapter or base).glob("*.json"), *(adapter or base).glob("*.md")):
            assert str(tmp_path.parent.parent) not in file.read_text(), file
        settings = read_json((adapter or base) / "tokenizer_config.json")
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert not settings.keys() & {"is_local", "local_files_only", "name_or_path"}
        if not adapter:
            config = read_json(base / "config.json")
            assert config["torch_dtype"] == config["dtype"] == "bfloat16" and config["rope_theta"] == THETA
            assert not config.keys() & {"_name_or_path", "_model_name_or_path"}


def test_a_disk_without_room_is_named_before_anything_is_written(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    for form in ("as_trained", "merged_16bit"):
        with pytest.raises(UserError, match=r"which needs .* GB, and its disk has 0 GB free: make room"):
            export.save_served("qlora_nf4_dq", 1, form, tmp_path / "new" / form)
    assert not (tmp_path / "new").exists()
