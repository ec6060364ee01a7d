"""Each variant is tried on a few layers of the model before anything is trained."""

import pytest
from conftest import ROOT, run_stage_in
from transformers import AutoConfig

from workflow import params
from workflow.cost import trial
from workflow.runtime.errors import UserError

VARIANTS = ["lora_16bit", "qlora_nf4", "lora_int8", "full_16bit"]
NO_TOKENS = {"vocab_size": 600, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA = NO_TOKENS | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
OTHER = NO_TOKENS | {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
DEEPSEEK = LLAMA | {
    "num_hidden_layers": 6, "first_k_dense_replace": 3, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
}  # fmt: skip


@pytest.fixture
def experiment() -> params.Params:
    experiment = params.load(ROOT / "params.yaml")
    matrix = experiment.experiment.model_copy(update={"variants": VARIANTS})
    return experiment.model_copy(update={"experiment": matrix})


def model(folder, kind, sizes):
    AutoConfig.for_model(kind, **sizes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_models_that_go_are_let_through(tmp_path, experiment, kind):
    trial.try_variants(model(tmp_path, kind, LLAMA), experiment)


@pytest.mark.parametrize(
    ("kind", "sizes", "sentence"),
    [
        ("falcon", OTHER, r": qlora_nf4: nf4 was asked for, and quantization of \S+query_key_value is None instead of "
                          r"nf4; lora_int8: int8 was asked for"),
        ("mixtral", LLAMA | {"num_local_experts": 4},
         r": lora_16bit, qlora_nf4, lora_int8: 7\d% of the weights lie outside of linear layers.*experts.* one tensor"),
        ("deepseek_v3", DEEPSEEK, r"% of the weights lie outside of linear layers.*layers\.3\.mlp\.experts"),
        ("gpt2", NO_TOKENS | {"n_embd": 64, "n_layer": 3, "n_head": 4}, r"c_(fc|attn)|no linear layer besides its head"),
        ("bloom", OTHER, r"the model \(bloom\) has an attention that PyTorch's scaled_dot_product_attention does not"),
        ("gemma2", LLAMA, r"the model \(gemma2\) has an attention that"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)  # fmt: skip
def test_what_does_not_go_is_said_by_variant(tmp_path, experiment, kind, sizes, sentence):
    with pytest.raises(UserError, match=sentence) as end:
        trial.try_variants(model(tmp_path, kind, sizes), experiment)
    assert "\n" not in str(end.value)


def test_a_target_that_no_layer_has_is_said(tmp_path, experiment):
    training = experiment.training.model_copy(update={"target_modules": ["q_proj", "wq"]})
    matrix = experiment.experiment.model_copy(update={"variants": ["lora_16bit"]})
    with pytest.raises(
        UserError, match="lora_16bit: training.step.target_modules names wq, and no linear layer"
    ):
        trial.try_variants(
            model(tmp_path, "llama", LLAMA),
            experiment.model_copy(update={"training": training, "experiment": matrix}),
        )


def test_the_copy_has_the_widths_and_every_kind_of_layer():
    full = AutoConfig.for_model("deepseek_v3", **DEEPSEEK)
    assert trial.small_config(full).num_hidden_layers == 4  # three dense ones, and the first with experts
    full = AutoConfig.for_model("llama", **LLAMA | {"num_hidden_layers": 40})
    small = trial.small_config(full)
    assert (small.num_hidden_layers, small.hidden_size, small.intermediate_size) == (2, 64, 128)
    assert full.num_hidden_layers == 40


def test_the_stage_stops_the_run_and_leaves_no_mark(tmp_path):
    (tmp_path / "params.yaml").write_text(params.complete_text("tiny"))
    folder = tmp_path / "results/fetch_model/model"
    folder.mkdir(parents=True)
    model(folder, "bloom", OTHER)
    done = run_stage_in(tmp_path, "try_model")
    assert done.returncode == 1 and "try_model: failed: the model (bloom)" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "results/try_model/ready").exists()
