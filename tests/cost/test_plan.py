"""The plan counts a model as its publisher does, or refuses it by name."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import CPU, ROOT
from peft import get_peft_model
from plan_command import run_plan
from transformers import AutoConfig

from workflow import params
from workflow.cost import architecture, cards, memory, plan
from workflow.methods.lora import LORA
from workflow.models import load
from workflow.training.speed import fused
from workflow.training.speed.shared_inputs import share_inputs

LLAMA = json.loads((params.SHAPES / "llama2_7b.json").read_text())
# Sizes of published models (hidden, intermediate, layers, heads, key-value heads, vocabulary), and the number of
# parameters in their safetensors files.
PUBLISHED = [
    ("llama", (4096, 11008, 32, 32, 32, 32000), {}, 6_738_415_616),
    ("llama", (576, 1536, 30, 9, 3, 49152), {"tie_word_embeddings": True}, 134_515_008),
    ("mistral", (4096, 14336, 32, 32, 8, 32000), {}, 7_241_732_096),
    ("qwen2", (3584, 18944, 28, 28, 4, 152064), {"tie_word_embeddings": False}, 7_615_616_512),
    ("qwen2", (896, 4864, 24, 14, 2, 151936), {"tie_word_embeddings": True}, 494_032_768),
    ("qwen3", (4096, 12288, 36, 32, 8, 151936), {"head_dim": 128, "tie_word_embeddings": False}, 8_190_735_360),
    ("gemma", (3072, 24576, 28, 16, 16, 256000), {"head_dim": 256}, 8_537_680_896),
    ("stablelm", (2560, 6912, 32, 32, 32, 50304), {"tie_word_embeddings": False}, 2_795_443_200),
    ("olmo2", (4096, 11008, 32, 32, 32, 100352), {"tie_word_embeddings": False}, 7_298_617_344),
    ("smollm3", (2048, 11008, 36, 16, 4, 128256), {"tie_word_embeddings": True}, 3_075_098_624),
]  # fmt: skip
EXPERTS = {
    "gpt_oss": "116.8", "deepseek_v3": "671", "mixtral": "46.7", "llama4_text": "107.8", "granitemoe": "37.04",
    "qwen2_moe": "14.32", "qwen3_moe": "15.35", "jamba": "51.57",
}  # fmt: skip
OF_ANOTHER_KIND = (
    "phi", "phi3", "starcoder2", "gpt_neox", "bloom", "falcon", "gpt2", "opt", "mpt", "gpt_neo", "gptj", "codegen",
    "glm", "arcee", "apertus", "mamba", "rwkv", "gemma3",
)  # fmt: skip


def config_file(folder, kind, sizes, **more):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size")  # fmt: skip
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": kind, **dict(zip(names, sizes, strict=True)), **more}))
    return file


def refusal(monkeypatch, file, *options) -> str:
    monkeypatch.setattr("sys.argv", ["plan", "--model", str(file), "--gpu", "24", "--length", "64", *options])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert "\n" not in end.value.code and end.value.code.startswith("plan: ")
    return end.value.code


@pytest.mark.parametrize(("kind", "sizes", "more", "published"), PUBLISHED)
def test_parameters_are_those_that_were_published(tmp_path, kind, sizes, more, published):
    _, shape = architecture.read(config_file(tmp_path, kind, sizes, **more))
    assert shape.parameters == published


@pytest.mark.parametrize("kind", [*EXPERTS, *OF_ANOTHER_KIND])
def test_what_is_no_llama_is_refused_by_name_with_its_true_size(tmp_path, monkeypatch, kind):
    config = AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path)
    said = refusal(monkeypatch, tmp_path / "config.json")
    assert f"the model ({kind}) has {EXPERTS.get(kind, '')}" in said and "billion parameters" in said
    if kind in EXPERTS:
        assert "experts" in said and "where nothing is quantized or adapted" in said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": -4096}, "config.json has hidden_size -4096: input should be greater than 0"),
        ({"hidden_size": 4096.5}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"intermediate_size": 0}, "intermediate_size 0: input should be greater than 0"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers 10000000: input should be less than or equal to 1000"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size 1000000000000: input should be less than"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_key_value_heads": -8}, "num_key_value_heads -8: input should be greater than 0"),
        ({"head_dim": 0}, "head_dim 0: input should be greater than 0"),
        ({"num_attention_heads": 10**9}, "number of attention heads"),
        ({"rms_norm_eps": float("nan")}, "config.json (has rms_norm_eps nan|is refused)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantized already \(mxfp4"),
        ({"max_position_embeddings": 32}, r"--length .* is 64 tokens, and the model's context .* holds 32"),
    ],
)  # fmt: skip
def test_an_impossible_config_is_one_sentence(tmp_path, monkeypatch, change, sentence):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    said = refusal(monkeypatch, tmp_path / "config.json")
    assert re.search(sentence, said), said


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_config_without_a_size_is_not_taken_for_the_class_default(tmp_path, monkeypatch, key):
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != key}))
    assert f"config.json has no {key}" in refusal(monkeypatch, tmp_path / "config.json")


def test_rows_are_not_longer_on_average_than_at_most(monkeypatch):
    said = refusal(monkeypatch, "llama2_7b", "--mean-length", "65")
    assert "--mean-length is 65, and no row is longer than --length, 64" in said


def test_adapters_on_layers_that_are_not_counted_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    assert "  target_modules: all-linear" in text
    file.write_text(text.replace("  target_modules: all-linear", "  target_modules: [q_proj, lm_head]", 1))
    assert "names lm_head; the plan counts adapters on q_proj" in refusal(
        monkeypatch, "llama2_7b", "--params", str(file)
    )


def test_what_is_not_predicted_is_said(tmp_path, capsys, monkeypatch):
    file = config_file(tmp_path, "gemma", (256, 640, 2, 8, 2, 512), head_dim=32)
    options = ("--gpu", "24", "--length", "64")
    assert "An estimate: the weights of a gemma are counted" in run_plan(
        capsys, monkeypatch, "--model", str(file), *options
    )
    assert "An estimate" not in run_plan(capsys, monkeypatch, "--model", "llama2_7b", *options)
    slow = tmp_path / "params.yaml"
    slow.write_text((ROOT / "params.yaml").read_text().replace("fused_loss: true", "fused_loss: false", 1))
    assert "a speed-up under training is off" in run_plan(
        capsys, monkeypatch, "--model", "llama2_7b", *options, "--params", str(slow)
    )


@pytest.mark.parametrize("kind", architecture.MEASURED)
def test_layers_that_are_promised_keep_what_the_formula_counts(tiny, kind):
    """What autograd saves in a model of each kind, with the run's own fused layers, without its frozen weights."""
    tokens = 96
    config = AutoConfig.for_model(
        kind, hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=8, vocab_size=512,
        num_key_value_heads=2, head_dim=32, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    plain = tiny.training.model_copy(update={"dropout": 0.0, "target_modules": "all-linear"})
    model, _ = load.random_base(config, tiny.variants["lora_16bit"], hardware=CPU, seed=0)
    model = get_peft_model(model, LORA.peft_config(plain)).train()
    model.enable_input_require_grads()
    fused.fuse_layers(model)
    fused.fuse_adapters(model, compute=torch.float32)
    share_inputs(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = model.get_base_model().model(input_ids=torch.arange(tokens)[None], use_cache=False)
    shape = architecture.counted_shape(architecture.build(config))
    expected = shape.layers * memory.kept_of_a_layer(shape, plain, tokens) + 2 * tokens * shape.hidden
    assert output.last_hidden_state.requires_grad
    assert sum(storage.nbytes() for storage in saved.values()) / 2 == pytest.approx(expected, rel=0.05)


# In billions, as the models' cards and papers have them.
BILLIONS = {
    "llama2_7b": 6.74, "llama2_13b": 13.02, "llama2_70b": 69.0, "llama3_8b": 8.03, "llama3_1_8b": 8.03, "llama3_70b": 70.6,
    "llama3_1_70b": 70.6,
    "tinyllama_1b": 1.10, "mistral_7b": 7.25, "smollm2_135m": 0.135, "smollm2_360m": 0.362, "smollm2_1_7b": 1.71,
    "qwen2_5_0_5b": 0.494, "qwen2_5_1_5b": 1.54, "qwen2_5_3b": 3.09, "qwen2_5_7b": 7.62, "qwen2_5_14b": 14.8,
    "qwen2_5_32b": 32.8, "qwen2_5_72b": 72.7, "qwen3_0_6b": 0.596, "qwen3_1_7b": 1.72, "qwen3_4b": 4.02,
    "qwen3_8b": 8.19, "qwen3_14b": 14.8, "qwen3_32b": 32.8,
}  # fmt: skip


def test_each_named_shape_has_the_parameters_that_its_model_card_names():
    assert {file.stem for file in params.SHAPES.glob("*.json")} == BILLIONS.keys()
    for name, billions in BILLIONS.items():
        _, shape = architecture.read(params.SHAPES / f"{name}.json")
        assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.005), name


def minutes(text: str, variant: str) -> float:
    """Of a variant without checkpointing."""
    (line,) = [
        line for line in text.splitlines() if line.startswith(f"{variant} ") and line.split()[1] == "no"
    ]
    return float(line.split()[6])


def test_a_named_card_has_its_memory_and_times_of_its_own(capsys, monkeypatch):
    options = ("--model", "tinyllama_1b", "--length", "512")
    by_size = run_plan(capsys, monkeypatch, *options, "--gpu", "80")
    measured = run_plan(capsys, monkeypatch, *options, "--gpu", "h100")
    slower = run_plan(capsys, monkeypatch, *options, "--gpu", "a100_80", "--price", "2")
    assert "a GPU of 80 GB" in measured and "a GPU of 80 GB" in slower
    assert minutes(by_size, "lora_16bit") == minutes(measured, "lora_16bit") < minutes(slower, "lora_16bit")
    assert "measured; name the card" in by_size and "fitted to what was measured on this card" in measured
    assert "Times are estimated: A100 80 GB" in slower
    (line,) = [
        line for line in slower.splitlines() if line.startswith("lora_16bit") and line.split()[1] == "no"
    ]
    assert float(line.split()[7]) == pytest.approx(minutes(slower, "lora_16bit") / 60 * 2, abs=0.01)
    assert "no bfloat16" in run_plan(capsys, monkeypatch, *options, "--gpu", "t4")


def test_a_card_with_half_the_rates_takes_twice_the_time_but_for_what_the_processor_does(tiny):
    shape = memory.Shape.of(AutoConfig.from_pretrained(params.SHAPES / "llama2_7b.json"))
    whole = cards.CARDS["h100"]
    half = replace(whole, tflops=whole.tflops / 2, gb_per_second=whole.gb_per_second / 2)
    variant, training = tiny.variants["qlora_nf4"], tiny.training
    times = [
        plan.step_seconds(shape, variant, training, tokens=2048, rates=plan.Rates.of(card))
        for card in (whole, half)
    ]
    assert times[1] - plan.SECONDS_PER_PASS == pytest.approx(2 * (times[0] - plan.SECONDS_PER_PASS))
    assert times[0] == plan.step_seconds(shape, variant, training, tokens=2048)


def test_an_unknown_card_is_refused_by_name(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["plan", "--model", "llama2_7b", "--gpu", "rtx409"])
    with pytest.raises(SystemExit) as end:
        plan.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "invalid value rtx409" in said and "did you mean rtx4090?" in said
