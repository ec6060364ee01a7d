"""Training is alike in all but the precision, learns what it should, and gives a plain PEFT adapter."""

import csv
import hashlib
import itertools
import struct
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import RandomSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput

from workflow import methods, params
from workflow.cost import benchmark, memory
from workflow.cost.gauge import Gauge, Stopwatch
from workflow.data import chat
from workflow.methods.lora import adapter_parameters
from workflow.models import load
from workflow.runtime.errors import CheckError, UserError
from workflow.training import train
from workflow.training.checks import check_trainable, is_deterministic
from workflow.training.history import History
from workflow.training.order import LikeLengthSampler, planned, planned_steps, rows_of_passes
from workflow.training.rows import check_rendered, check_rows, with_faults
from workflow.training.speed import packing
from workflow.training.speed.choice import LAUNCHES_HIDDEN_BY, choose_speed_ups, graphs_pay
from workflow.training.speed.fused import IGNORED
from workflow.training.trainer import input_ids, model_of

CPU = params.Hardware(device="cpu", compute_dtype="float32", data_workers=0)
FAULTS = {"learn_end_token": False, "second_bos": True}
VARIANTS = ["lora_16bit", "qlora_nf4", "qlora_nf4_dq", "qlora_fp4", "lora_int8", "full_16bit"]

SPEED_UPS = ["packing", "fused_adapters", "shared_inputs", "fused_layers", "fused_loss", "cuda_graphs"]
PLAIN = dict.fromkeys(SPEED_UPS, False)  # TRL's own step
# What a switch may change on one machine in float32: a loss, a gradient's norm, a validation loss.
ROUNDING = {
    "packing": 5e-6,
    "fused_adapters": 5e-6,
    "shared_inputs": 5e-6,
    "fused_layers": 5e-6,
    "fused_loss": 5e-6,
    "cuda_graphs": 0,
}


@pytest.fixture(scope="module")
def asked(tiny) -> params.Params:
    faster = tiny.training.model_copy(update={"learning_rate": 1e-2, "steps": 4})
    return tiny.model_copy(update={"training": faster})


def run(
    asked,
    tiny_model,
    splits,
    folder,
    *,
    name="lora_16bit",
    seed=1,
    compute_dtype="float32",
    data_workers=0,
    **changes,
) -> train.Trained:
    hardware = CPU.model_copy(update={"data_workers": data_workers, "compute_dtype": compute_dtype})
    return train.train(
        one_run(asked, name, seed=seed, hardware=hardware, **changes),
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        folder=folder,
    )


def one_run(asked, name="lora_16bit", *, seed=1, hardware=CPU, **changes) -> params.Run:
    training = asked.training.model_copy(update=changes)
    return params.Run(name, asked.variants[name], seed, training, hardware)


@pytest.fixture(scope="module")
def runs(asked, tiny_model, splits, tmp_path_factory) -> dict:
    """Every variant trained once: the result and its folder."""
    trained = {}
    for name in VARIANTS:
        folder = tmp_path_factory.mktemp(name)
        trained[name] = (run(asked, tiny_model, splits, folder, name=name), folder)
    return trained


def history(folder) -> list[dict]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder) -> list[float]:
    return [float(line["loss"]) for line in history(folder)]


def bits(folder) -> dict[str, bytes]:
    """The weights of a run, in files of its method's own name."""
    files = sorted((folder / "weights").glob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_helps_and_says_what_it_did(runs, name):
    result, folder = runs[name]
    assert result.validation_loss_after < result.validation_loss_before - 0.05
    assert result.steps == 4 and result.trainable_dtype == "float32"
    assert result.adapted_modules == (0 if name == "full_16bit" else result.precision.linear_modules)
    lines = history(folder)
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4]
    assert all(
        float(line[key]) > 0 for line in lines for key in ("loss", "gradient_norm", "tokens_per_second")
    )
    with (folder / "validation.csv").open() as file:
        steps = [int(line["step"]) for line in csv.DictReader(file)]
    assert steps == [0, 2, 4]


@pytest.fixture(scope="module")
def plain_runs(asked, tiny_model, splits, tmp_path_factory) -> dict:
    """LoRA and QLoRA trained by TRL's own step, which knows none of the speed-ups."""
    trained = {}
    for name in ("lora_16bit", "qlora_nf4_dq"):
        folder = tmp_path_factory.mktemp(name)
        trained[name] = (run(asked, tiny_model, splits, folder, name=name, **PLAIN), folder)
    return trained


def assert_alike(first, second, tolerance: float) -> None:
    """Two runs, each a result and its folder, give the same numbers up to rounding."""
    for key in ("loss", "gradient_norm", "learning_rate"):
        one, other = ([float(line[key]) for line in history(folder)] for _, folder in (first, second))
        assert one == pytest.approx(other, abs=tolerance)
    assert first[0].validation_loss_before == pytest.approx(second[0].validation_loss_before, abs=tolerance)
    assert first[0].validation_loss_after == pytest.approx(second[0].validation_loss_after, abs=tolerance)


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_the_speed_ups_together_train_as_trl_does(runs, plain_runs, name):
    assert_alike(runs[name], plain_runs[name], sum(ROUNDING.values()))


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
@pytest.mark.parametrize("switch", SPEED_UPS)
def test_each_speed_up_may_be_off(asked, tiny_model, splits, runs, tmp_path, name, switch):
    result = run(asked, tiny_model, splits, tmp_path, name=name, **{switch: False})
    assert_alike((result, tmp_path), runs[name], ROUNDING[switch])
    off = {switch: False, **({"shared_inputs": False} if switch == "fused_adapters" else {})}
    assert result.speed_ups == replace(runs[name][0].speed_ups, **off)


def test_bfloat16_trains_alike_with_and_without_speed_ups(asked, tiny_model, splits, tmp_path):
    found = []
    for folder, switches in (("fast", {}), ("plain", PLAIN)):
        half = {"compute_dtype": "bfloat16", "name": "qlora_nf4_dq", **switches}
        found.append((run(asked, tiny_model, splits, tmp_path / folder, **half), tmp_path / folder))
    assert found[0][0].precision.compute == "bfloat16"
    assert_alike(*found, 2e-2)
    assert losses(found[0][1]) == pytest.approx(losses(found[1][1]), abs=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_says_which_speed_ups_were_in_force(runs, name):
    assert asdict(runs[name][0].speed_ups) == {
        "packing": True,
        "fused_adapters": name != "full_16bit",
        "shared_inputs": name not in ("full_16bit", "lora_int8"),
        "fused_layers": True,
        "fused_loss": True,
        "cuda_graphs": False,
    }


def test_a_run_without_speed_ups_says_so(plain_runs):
    assert all(not result.speed_ups.any for result, _ in plain_runs.values())


@pytest.mark.parametrize(
    ("name", "compute", "changes", "graphs"),
    [
        ("lora_16bit", "bfloat16", {}, True),
        ("qlora_nf4_dq", "float32", {"gradient_checkpointing": True}, True),
        ("qlora_nf4_dq", "bfloat16", {"dropout": 0.1}, True),
        ("qlora_nf4_dq", "bfloat16", {"gradient_checkpointing": True, "dropout": 0.1}, False),
        ("qlora_nf4_dq", "float16", {}, False),
        ("lora_int8", "bfloat16", {}, False),
        ("full_16bit", "bfloat16", {}, True),
    ],
)
def test_graphs_are_for_work_that_is_the_same_for_every_batch(
    asked, tiny_model, runs, name, compute, changes, graphs
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    on_a_gpu = replace(runs[name][0].precision, device="cuda", compute=compute)
    plan = one_run(asked, name, **changes)
    assert choose_speed_ups(model, plan, on_a_gpu).cuda_graphs == graphs
    without = plan.with_training(cuda_graphs=False)
    assert not choose_speed_ups(model, without, on_a_gpu).cuda_graphs


def test_a_base_that_is_multiplied_faster_has_graphs_for_longer_passes(tiny_model, monkeypatch):
    monkeypatch.setattr(load, "check_device", lambda precision, device: None)
    plain, fast = (
        load.load_base(tiny_model, params.preset("gpu_benchmark").variants[name], hardware=CPU)[0]
        for name in ("lora_16bit", "lora_fp8_products")
    )
    layers = load.base_linears(plain).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers) / plain.config.num_hidden_layers
    longest = LAUNCHES_HIDDEN_BY / weights
    assert [graphs_pay(plain, share * longest) for share in (0.99, 1.01)] == [True, False]
    assert [graphs_pay(fast, share * longest) for share in (1.01, 2.99, 3.01)] == [True, True, False]


def made(kind, config, **changes):
    """A tiny random model of another architecture, whose weights are large enough to tell its parts apart."""
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    model = kind._from_config(config(**shape | heads | ends | changes), attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return model


def llama(**changes):
    return made(transformers.LlamaForCausalLM, transformers.LlamaConfig, **changes)


def head_with_bias():
    model = llama()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(320))
    return model


class PastTheHead(transformers.LlamaForCausalLM):
    """Multiplies by the head's weight without calling the head."""

    def forward(self, input_ids, **others):
        hidden = self.model(input_ids=input_ids, **others).last_hidden_state
        return CausalLMOutput(logits=hidden @ self.lm_head.weight.T)


def recurrent_gemma():
    return made(transformers.RecurrentGemmaForCausalLM, transformers.RecurrentGemmaConfig, lru_width=32)


HEADS = {
    "plain": (llama, True),
    "tied": (lambda: llama(tie_word_embeddings=True), True),
    "with_bias": (head_with_bias, False),
    "divided": (
        lambda: made(transformers.GraniteForCausalLM, transformers.GraniteConfig, logits_scaling=8.0),
        False,
    ),
    "multiplied": (lambda: made(transformers.CohereForCausalLM, transformers.CohereConfig), False),
    "capped": (
        lambda: made(
            transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, final_logit_softcapping=5.0
        ),
        False,
    ),
    "capped_by_another_name": (recurrent_gemma, False),
}


@pytest.mark.parametrize(
    "head",
    [*list(HEADS)[:-1], "capped_by_another_name"],
)
def test_the_fused_loss_is_for_a_head_that_is_one_matrix(asked, runs, head):
    make, fused_loss = HEADS[head]
    model, ids = make(), torch.arange(3, 23)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = hidden @ model.get_output_embeddings().weight.T
        one_matrix = torch.allclose(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-3)
    assert one_matrix == fused_loss
    chosen = choose_speed_ups(model, one_run(asked), runs["lora_16bit"][0].precision)
    assert chosen.fused_loss == fused_loss


def test_the_fused_loss_is_for_a_head_that_is_called(asked, runs):
    model = made(PastTheHead, transformers.LlamaConfig)
    assert not choose_speed_ups(model, one_run(asked), runs["lora_16bit"][0].precision).fused_loss


ARCHITECTURES = {
    "llama": llama,
    "qwen3": lambda: made(transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
    "wide_window": lambda: made(
        transformers.MistralForCausalLM, transformers.MistralConfig, sliding_window=4096
    ),
    "narrow_window": lambda: made(
        transformers.MistralForCausalLM, transformers.MistralConfig, sliding_window=6
    ),
    "convolution": lambda: made(
        transformers.Lfm2ForCausalLM, transformers.Lfm2Config, layer_types=["conv", "full_attention"]
    ),
    "recurrence": recurrent_gemma,
}


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "qwen3", "wide_window"),
        "narrow_window",
        *(name for name in ("convolution", "recurrence")),
    ],
)
def test_only_a_model_whose_rows_stay_apart_is_packed(asked, runs, name):
    model = ARCHITECTURES[name]()
    base = runs["lora_16bit"][0].precision
    chosen = choose_speed_ups(model, one_run(asked), base)
    ids = [list(range(3, 3 + length)) for length in (12, 20, 9)]
    packed = packing.pack([{"input_ids": row, "labels": row} for row in ids])
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in ids]
        together = model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            **packing.attention_arguments(packed, attention=None),
        ).logits[0]
    assert chosen.packing == torch.allclose(torch.cat(alone), together, atol=1e-3)


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_equal_work_is_recorded_as_equal(runs, plain_runs, name):
    packed, padded = runs[name][0], plain_runs[name][0]
    assert packed.steps == padded.steps == 4 and packed.rows_per_step == padded.rows_per_step == 4
    assert packed.tokens_seen == padded.tokens_seen == packed.tokens_computed
    assert padded.tokens_computed > padded.tokens_seen
    assert packed.rows == padded.rows and packed.validation_tokens == padded.validation_tokens


def test_variants_differ_in_precision_alone(runs):
    facts = {(r.rows, r.steps, r.tokens_seen) for r, _ in runs.values()}
    assert len(facts) == 1
    adapters = {r.trainable_parameters for name, (r, _) in runs.items() if name != "full_16bit"}
    assert len(adapters) == 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in VARIANTS), ("lora_16bit", FAULTS), ("qlora_nf4_dq", {"dropout": 0.1})],
)
def test_the_same_params_give_the_same_bits_however_batches_are_prepared(
    asked, tiny_model, splits, tmp_path, name, changes
):
    results = [
        run(asked, tiny_model, splits, tmp_path / folder, name=name, data_workers=workers, **changes)
        for folder, workers in (("once", 0), ("again", 0), ("beside", 2))
    ]
    first, *others = [tmp_path / folder for folder in ("once", "again", "beside")]
    for other in others:
        assert bits(other) == bits(first)
        assert (other / "validation.csv").read_text() == (first / "validation.csv").read_text()
        for line, wanted in zip(history(other), history(first), strict=True):
            assert line | {"tokens_per_second": ""} == wanted | {"tokens_per_second": ""}
    assert all(replace(result, seconds=0) == replace(results[0], seconds=0) for result in results)
    assert all(result.deterministic for result in results)


def test_another_seed_gives_other_bits(asked, tiny_model, splits, runs, tmp_path):
    other = run(asked, tiny_model, splits, tmp_path, name="qlora_nf4_dq", seed=2)
    first, folder = runs["qlora_nf4_dq"]
    assert bits(tmp_path) != bits(folder)
    assert other.validation_loss_after != first.validation_loss_after


def test_a_gpu_is_deterministic_only_where_pytorch_is_told_to_be(runs, monkeypatch):
    on_a_gpu = replace(runs["lora_16bit"][0].precision, device="cuda")
    assert not is_deterministic(on_a_gpu)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert is_deterministic(on_a_gpu)


def response_scores(model, tokenizer, rows) -> list[list[float]]:
    """Each row's log-likelihoods in nats of its response's tokens and end token, by transformers alone."""
    scores = []
    for row in rows:
        prompt = f"<s>### Instruction:\n{row.user_message()}\n\n### Response:\n"
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = f"{prompt}{row.response}</s>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        scores.append([logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])])
    return scores


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_the_adapter_loads_in_plain_peft(runs, tiny_model, asked, splits, name):
    """The validation loss by a script that knows only PEFT and transformers."""
    result, folder = runs[name]
    base, _ = load.load_base(tiny_model, asked.variants[name], hardware=CPU)
    model = PeftModel.from_pretrained(base, folder / "weights").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    scores = np.concatenate(response_scores(model, tokenizer, splits["validation"]))
    assert len(scores) == result.validation_tokens
    assert -np.mean(scores) == pytest.approx(result.validation_loss_after, abs=1e-5)


def test_a_full_fine_tuning_is_saved_as_a_16_bit_model(runs):
    folder = runs["full_16bit"][1] / "weights"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(folder)


def build(asked, tiny_model, rows, *, name="lora_16bit", seed=1, data_workers=0, scratch=None, **changes):
    model, found = load.load_base(tiny_model, asked.variants[name], hardware=CPU)
    return train.build_trainer(
        model,
        AutoTokenizer.from_pretrained(tiny_model),
        one_run(
            asked,
            name,
            seed=seed,
            hardware=CPU.model_copy(update={"data_workers": data_workers}),
            **changes,
        ),
        train_rows=rows,
        validation_rows=rows[:2],
        precision=found,
        scratch=scratch,
    )


def test_adapters_begin_alike_in_every_precision(asked, tiny_model, rows, tmp_path):
    """TRL rounds adapters on a quantized base to bfloat16, which would change two things at once."""
    begun = []
    for name in ("lora_16bit", "qlora_nf4_dq", "lora_int8"):
        trainer = build(asked, tiny_model, rows, name=name, scratch=tmp_path)
        begun.append({n: p for n, p in model_of(trainer).named_parameters() if p.requires_grad})
    for other in begun[1:]:
        assert other.keys() == begun[0].keys()
        assert all(p.dtype == torch.float32 and torch.equal(p, begun[0][n]) for n, p in other.items())


def test_the_loss_is_on_the_response_and_its_end_token_alone(asked, tiny_model, rows, tmp_path):
    trainer = build(asked, tiny_model, rows, scratch=tmp_path, max_length=512)
    tokenizer = trainer.processing_class
    for row, made in zip(rows, trainer.train_dataset, strict=True):
        text = tokenizer.decode(made["input_ids"])
        assert text.startswith("<s>###") and text.count("<s>") == 1 and text.count("</s>") == 1
        assert row.user_message() in text
        learned = [token for token in made["labels"] if token != IGNORED]
        assert tokenizer.decode(learned) == row.response + "</s>"


def test_context_and_the_loss_on_the_prompt_are_switches(asked, tiny_model, rows, tmp_path):
    trainer = build(
        asked, tiny_model, rows, scratch=tmp_path, use_context=False, loss_on="prompt_and_response"
    )
    for made in trainer.train_dataset:
        assert "Use small letters" not in trainer.processing_class.decode(made["input_ids"])
        assert made["labels"] == made["input_ids"]


def test_rows_that_are_cut_or_dropped_are_counted(asked, tiny_model, rows, tmp_path):
    length = 75  # tokens: the shortest prompts fit with a part of the response
    trainer = build(asked, tiny_model, rows, scratch=tmp_path, max_length=length)
    cut = asked.training.model_copy(update={"max_length": length})
    counted = check_rows(trainer.train_dataset, trainer.processing_class, drawn=len(rows), training=cut)
    # A token is a byte; <s> and </s> are a token each.
    prompts = [1 + len(f"### Instruction:\n{row.user_message()}\n\n### Response:\n") for row in rows]
    whole = [prompt + len(row.response) + 1 for prompt, row in zip(prompts, rows, strict=True)]
    assert counted.rows_dropped == sum(prompt >= length for prompt in prompts) > 0
    assert counted.rows_cut == sum(total > length for total in whole) - counted.rows_dropped > 0
    with pytest.raises(UserError, match="leaves no response to learn"):
        run(asked, tiny_model, {"train": rows, "validation": rows[:2]}, tmp_path, max_length=8)


def test_every_token_is_counted_however_few_lines_the_curve_has(asked, tiny_model, splits, tmp_path):
    result = run(asked, tiny_model, splits, tmp_path, log_every_steps=3)
    assert [int(line["step"]) for line in history(tmp_path)] == [1, 3, 4]
    assert result.tokens_seen == result.tokens_computed


def reaching_the_model(trainer) -> list[tuple[list[int], list[int]]]:
    """Train, and collect every row's tokens and what each but the last is to predict, without padding."""
    reached, embedded = [], []

    def collect(model, inputs, *arguments):
        ids = input_ids(inputs)
        if isinstance(inputs, packing.Pack):
            assert ids.shape == inputs.targets.shape == (1, inputs.boundaries[-1])
            cuts = inputs.boundaries[1:-1].long()
            for row, targets in zip(
                ids[0].tensor_split(cuts), inputs.targets[0].tensor_split(cuts), strict=True
            ):
                assert targets[-1] == IGNORED
                reached.append((row.tolist(), targets[:-1].tolist()))
        else:
            for row, labels, real in zip(ids, inputs["labels"], inputs["attention_mask"] == 1, strict=True):
                assert real.tolist() == sorted(real.tolist(), reverse=True)
                assert (labels[~real] == IGNORED).all()
                reached.append((row[real].tolist(), labels[real][1:].tolist()))
        loss = step(model, inputs, *arguments)
        assert torch.equal(embedded.pop(), ids) and not embedded
        return loss

    step, trainer.training_step = trainer.training_step, collect
    embeddings = model_of(trainer).get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, arguments: embedded.append(arguments[0]))
    trainer.train()
    return reached


@pytest.mark.parametrize("switches", [{}, PLAIN], ids=["packed", "padded"])
@pytest.mark.parametrize("loss_on", ["response", "prompt_and_response"])
@pytest.mark.parametrize("faults", [{}, {"learn_end_token": False}, {"second_bos": True}, FAULTS])
def test_the_faults_asked_for_and_no_others_reach_the_model(
    asked, tiny_model, rows, tmp_path, loss_on, faults, switches
):
    changes = {"steps": None, "epochs": 1.0, "max_length": 512, "loss_on": loss_on} | faults | switches
    rows = rows[:20]
    trainer = build(asked, tiny_model, rows, scratch=tmp_path, **changes)
    tokenizer = trainer.processing_class
    reached = reaching_the_model(trainer)
    assert len(reached) == len(rows)
    for ids, targets in reached:
        text = tokenizer.decode(ids)
        assert text.startswith("<s><s>###" if "second_bos" in faults else "<s>###") and text.endswith("</s>")
        learned = ids[1:]
        if loss_on == "response":
            marker = text.index("### Response:\n") + len("### Response:\n")
            learned = ids[len(tokenizer(text[:marker], add_special_tokens=False)["input_ids"]) :]
        if "learn_end_token" in faults:
            learned = [token for token in learned if token != 1]
        assert [target for target in targets if target != IGNORED] == learned


def one_step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the adapter's gradients of the first batch, which an adapter that is not zero makes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model_of(trainer).named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    batches, learned = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    loss = sum(trainer.training_step(trainer.model, batch, learned).item() for batch in batches)
    grads = {n: p.grad for n, p in model_of(trainer).named_parameters() if p.requires_grad}
    return loss, grads


def test_each_row_of_a_pack_counts_its_positions_from_nought_in_the_model(asked, tiny_model, rows, tmp_path):
    trainer, positions = build(asked, tiny_model, rows, scratch=tmp_path), []
    decoder = model_of(trainer).get_base_model().base_model
    decoder.register_forward_pre_hook(
        lambda module, arguments, named: positions.append(named["position_ids"][0].tolist()), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.loss_of(batch, 1)
    starts = batch.boundaries.diff().tolist()
    assert len(starts) == 2 and positions == [[*range(starts[0]), *range(starts[1])]]


def test_each_switch_puts_its_own_form_into_the_model(asked, tiny_model, rows, tmp_path):
    def with_another_forward(switches) -> int:
        trainer = build(asked, tiny_model, rows, scratch=tmp_path, **switches)
        return sum("forward" in vars(module) for module in model_of(trainer).modules())

    plain = with_another_forward(PLAIN)
    layers, linears = 4, 28
    assert with_another_forward(PLAIN | {"fused_adapters": True}) - plain == linears
    assert with_another_forward(PLAIN | {"fused_layers": True}) - plain == 2 * layers + 1 + layers
    assert with_another_forward({}) - plain == linears + 2 * layers + 1 + layers


@pytest.mark.parametrize("loss_on", ["response", "prompt_and_response"])
@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_packed_padded_and_trls_own_gradients_agree(asked, tiny_model, rows, tmp_path, name, loss_on):
    steps = []
    for switches in (PLAIN, {}, {"packing": False, "cuda_graphs": False}, PLAIN | {"packing": True}):
        trainer = build(
            asked, tiny_model, rows, name=name, scratch=tmp_path, loss_on=loss_on, batch_rows=8, micro_batch_rows=4,
            **switches,
        )  # fmt: skip
        steps.append(one_step(trainer))
    (loss, grads), *others = steps
    assert len(grads) == 56 and all(grad.any() for grad in grads.values())
    for other_loss, other_grads in others:
        assert other_loss == pytest.approx(loss, abs=1e-5) and other_grads.keys() == grads.keys()
        assert all((other_grads[n] - grad).norm() < 1e-5 * grad.norm() for n, grad in grads.items())


def test_packed_and_padded_trainings_end_with_the_same_adapter(runs, plain_runs):
    for name, (_, folder) in plain_runs.items():
        adapters = [load_file(path / "weights/adapter_model.safetensors") for path in (folder, runs[name][1])]
        assert adapters[0].keys() == adapters[1].keys()
        for key, weight in adapters[0].items():
            assert (weight - adapters[1][key]).abs().max() < 2e-5  # of steps of 1e-2


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_recomputed_activations_are_the_same_ones(asked, tiny_model, splits, runs, tmp_path, name):
    result = run(asked, tiny_model, splits, tmp_path, name=name, gradient_checkpointing=True)
    assert_alike((result, tmp_path), runs[name], 1e-6)


@pytest.mark.parametrize("switches", [{}, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_runs_each_layer_twice(
    asked, tiny_model, rows, tmp_path, switches, checkpointing, passes
):
    plan = {"steps": 2, "gradient_checkpointing": checkpointing, **switches}
    trainer, calls = build(asked, tiny_model, rows, scratch=tmp_path, **plan), []
    perceptrons = [m for n, m in model_of(trainer).named_modules() if n.endswith(".mlp")]
    for module in perceptrons:
        module.register_forward_pre_hook(lambda module, arguments: calls.append(module))
    trainer.train()
    assert len(calls) == passes * len(perceptrons) * 2 * 2  # steps, and micro-batches in each


@pytest.mark.parametrize("switches", [{}, PLAIN], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("plan", "sizes"),
    [({"steps": 7, "epochs": None}, [4, 4, 4, 4, 3, 4, 4]), ({"steps": None, "epochs": 1.5}, [4, 4, 4, 4, 3, 4, 4, 4])],
)  # fmt: skip
@pytest.mark.parametrize("data_workers", [0, 2])
def test_the_recorded_order_is_that_in_which_rows_reach_the_model(
    asked, tiny_model, rows, tmp_path, switches, plan, sizes, data_workers
):
    trainer = build(
        asked,
        tiny_model,
        rows[:19],
        scratch=tmp_path,
        data_workers=data_workers,
        max_length=512,
        **plan,
        **switches,
    )
    order, tokens = planned(trainer.train_dataset, trainer.sampler(), len(sizes))
    reached, digest = iter(reaching_the_model(trainer)), hashlib.sha256()
    seen = 0
    for size in sizes:
        numbers = [size]
        for ids, targets in itertools.islice(reached, size):
            numbers += [len(ids), *ids, *targets]
            seen += len(ids)
        digest.update(struct.pack(f"<{len(numbers)}i", *numbers))
    assert not list(reached) and trainer.state.global_step == len(sizes)
    assert (order, tokens) == (digest.hexdigest(), seen)


def test_the_order_is_the_same_in_every_variant_and_another_for_each_seed(
    asked, tiny_model, splits, runs, tmp_path
):
    orders = {result.order_sha256 for result, _ in runs.values()}
    assert len(orders) == 1
    alike = run(
        asked, tiny_model, splits, tmp_path, micro_batch_rows=1, dropout=0.1, learning_rate=1e-4, **PLAIN
    )
    assert alike.order_sha256 in orders
    for change in ({"seed": 2}, {"loss_on": "prompt_and_response"}, {"length_window": 1}, {"steps": 3}):
        trainer = build(
            asked, tiny_model, splits["train"], scratch=tmp_path,
            **{"learn_end_token": True} | {k: v for k, v in change.items() if k != "steps"},
        )  # fmt: skip
        assert planned(trainer.train_dataset, trainer.sampler(), change.get("steps", 4))[0] not in orders


@pytest.mark.parametrize("plan", [{"steps": 7, "epochs": None}, {"steps": None, "epochs": 1.5}])
def test_the_packs_foreseen_are_those_that_are_trained_on(asked, tiny_model, rows, tmp_path, plan):
    """Also past an epoch's end, whose last batch is not full."""
    trainer, totals = build(asked, tiny_model, rows[:19], scratch=tmp_path, max_length=512, **plan), []
    step = trainer.training_step

    def collect(model, inputs, *arguments):
        totals.append(inputs.tokens.item())
        return step(model, inputs, *arguments)

    trainer.training_step = collect
    trainer.train()
    lengths = trainer.sampler().lengths
    foreseen = [sum(lengths[row] for row in rows) for rows in rows_of_passes(trainer.sampler(), trainer.args)]
    assert len(totals) > 10 and foreseen[: len(totals)] == totals


def test_validation_rows_have_no_fault(asked, tiny_model, splits, tmp_path):
    whole = run(asked, tiny_model, splits, tmp_path / "whole", max_length=512)
    faulty = run(asked, tiny_model, splits, tmp_path / "faulty", max_length=512, **FAULTS)
    assert faulty.validation_loss_before == whole.validation_loss_before
    assert faulty.validation_tokens == whole.validation_tokens
    assert faulty.validation_loss_after != whole.validation_loss_after
    assert whole.rows.bos_per_row == 1 and whole.rows.end_token_in_loss
    assert faulty.rows == replace(
        whole.rows,
        tokens=whole.rows.tokens + whole.rows.rows,
        tokens_in_loss=whole.rows.tokens_in_loss - whole.rows.rows,
        longest=whole.rows.longest + 1,
        bos_per_row=2,
        end_token_in_loss=False,
    )


def test_without_the_end_token_in_the_loss_a_model_learns_less_to_stop(asked, tiny_model, splits, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ends = []
    for learned in (True, False):
        folder = tmp_path / str(learned)
        run(asked, tiny_model, splits, folder, name="full_16bit", steps=10, learn_end_token=learned)
        model = AutoModelForCausalLM.from_pretrained(folder / "weights", dtype=torch.float32).eval()
        scores = response_scores(model, tokenizer, splits["validation"])
        ends.append(np.mean([row[-1] for row in scores]))
    assert ends[0] > ends[1] + 1


def test_a_second_bos_pushes_the_last_token_out_of_a_row_that_is_full(asked, tiny_model, rows, tmp_path):
    prompts = sorted(1 + len(f"### Instruction:\n{row.user_message()}\n\n### Response:\n") for row in rows)
    length = prompts[len(rows) // 2] + 1  # the middle prompt leaves room for one token of its response
    counted = []
    for twice in (False, True):
        trainer = build(asked, tiny_model, rows, scratch=tmp_path, max_length=length, second_bos=twice)
        plan = asked.training.model_copy(update={"max_length": length, "second_bos": twice})
        counted.append(check_rows(trainer.train_dataset, trainer.processing_class, drawn=40, training=plan))
    assert [c.rows_dropped for c in counted] == [
        sum(bos + prompt >= length for prompt in prompts) for bos in (0, 1)
    ]
    assert counted[0].rows_dropped < counted[1].rows_dropped
    assert counted[0].longest == counted[1].longest == length


@pytest.mark.parametrize(("bos", "first"), [(None, 0), ("<s>", 5)])
def test_a_second_bos_needs_a_first(asked, tiny_model, bos, first):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = bos
    row = {"input_ids": [first, 6, 1], "labels": [-100, 6, 1]}
    twice = asked.training.model_copy(update={"second_bos": True})
    with pytest.raises(
        UserError, match="training.step.second_bos repeats the BOS token .* they begin with none"
    ):
        with_faults(Dataset.from_list([row]), tokenizer, twice)


@pytest.mark.parametrize(
    ("ids", "labels", "faults", "sentence"),
    [
        ([0, 0, 5, 1], [-100, -100, 5, 1], {}, "begins with 2 BOS tokens, and must begin with 1"),
        ([5, 6, 1], [-100, 6, 1], {}, "begins with 0 BOS tokens, and must begin with 1"),
        ([0, 5, 1], [-100, -100, -100], {}, "has no token in the loss"),
        (
            [0, 5, 1, 6, 1],
            [-100, -100, 1, 6, 1],
            {},
            "teaches 2 end tokens, so the model would stop in its middle",
        ),
        ([0, 5, 6], [-100, 5, 6], {}, "does not teach the end token"),
        ([0, *[5] * 126, 1], [-100, *[5] * 126, -100], {}, "does not teach the end token"),
        ([0, 5, 1], [-100, 5, 1], {"second_bos": True}, "begins with 1 BOS tokens"),
        ([0, 0, 0, 5, 1], [-100, -100, -100, 5, 1], {"second_bos": True}, "begins with 3 BOS tokens"),
        ([0, 5, 1], [-100, 5, 1], {"learn_end_token": False}, "teaches the end token"),
    ],
)
def test_rows_that_would_teach_something_else_are_refused(asked, tiny_model, ids, labels, faults, sentence):
    row = {"input_ids": ids, "labels": labels}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plan = asked.training.model_copy(update=faults)
    for split in ("training", "validation"):
        with pytest.raises(CheckError, match=f"a {split} row .*{sentence}"):
            check_rows(Dataset.from_list([row]), tokenizer, drawn=1, training=plan, split=split)


@pytest.mark.parametrize(("template", "bos"), [("{{ bos_token }}", 1), ("", 0)])
def test_rows_have_the_bos_token_that_the_template_gives_them(asked, tiny_model, template, bos):
    """And not that of a text, or of a tokenizer that adds its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for begins in (0, 1, 2):
        row = {"input_ids": [*[0] * begins, 5, 1], "labels": [*[-100] * begins, 5, 1]}
        dataset = Dataset.from_list([row])
        if begins == bos:
            assert check_rows(dataset, tokenizer, drawn=1, training=asked.training).bos_per_row == bos
            continue
        with pytest.raises(CheckError, match=f"begins with {begins} BOS tokens, and must begin with {bos}"):
            check_rows(dataset, tokenizer, drawn=1, training=asked.training)


def test_rows_must_be_trained_on_as_the_template_writes_them(asked, tiny_model, rows):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plan = asked.training.model_copy(update={"max_length": 90})
    prompts = [(row.conversation()["prompt"], row.response) for row in rows]
    ids = [tokenizer(chat.whole(*pair, tokenizer))["input_ids"][:90] for pair in prompts]
    check_rendered(Dataset.from_dict({"input_ids": ids}), rows, tokenizer, plan)
    ids[3][5] += 1  # a date, say, of another day: as many tokens
    with pytest.raises(CheckError, match="row 3 of the dataset is trained on as another text than"):
        check_rendered(Dataset.from_dict({"input_ids": ids}), rows, tokenizer, plan)


def test_an_answer_of_weight_0_is_never_learned(asked, tiny_model, splits, tmp_path):
    weighted = [replace(row, earlier=[{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}],
                        not_learned=[1]) for row in splits["train"]]  # fmt: skip
    with pytest.raises(
        UserError, match=r"prompt_and_response, .* message 2 of row \d+ of the dataset, .* weight 0"
    ):
        run(asked, tiny_model, {**splits, "train": weighted}, tmp_path, loss_on="prompt_and_response")


def test_validation_rows_without_a_response_are_dropped_and_counted(
    asked, tiny_model, rows, splits, tmp_path
):
    length = 75
    short = [row for row in rows if not row.context]
    result = run(asked, tiny_model, {"train": short, "validation": rows}, tmp_path, max_length=length, steps=1,
                 warmup_fraction=0.0)  # fmt: skip
    prompts = [1 + len(f"### Instruction:\n{row.user_message()}\n\n### Response:\n") for row in rows]
    assert result.validation_rows.rows_dropped == sum(prompt >= length for prompt in prompts) > 0
    assert result.validation_rows.rows + result.validation_rows.rows_dropped == len(rows)
    assert result.validation_rows.tokens_in_loss == result.validation_tokens
    long = {"train": short, "validation": [row for row in rows if row.context][:3]}
    with pytest.raises(UserError, match="leaves no response to learn in any validation row"):
        run(asked, tiny_model, long, tmp_path, max_length=72)


def test_rows_are_counted_as_cut_whether_their_end_token_is_learned_or_not(asked, tiny_model, rows, tmp_path):
    counted = []
    for learned in (True, False):
        trainer = build(asked, tiny_model, rows, scratch=tmp_path, max_length=75, learn_end_token=learned)
        plan = asked.training.model_copy(update={"max_length": 75, "learn_end_token": learned})
        counted.append(check_rows(trainer.train_dataset, trainer.processing_class, drawn=40, training=plan))
    assert counted[0].rows_cut == counted[1].rows_cut > 0


def test_the_benchmark_counts_the_same_tokens_however_batches_are_prepared(asked, tiny_model, rows, tmp_path):
    watches = []
    for workers in (0, 2):
        trainer = build(
            asked,
            tiny_model,
            rows,
            scratch=tmp_path,
            data_workers=workers,
            batch_rows=2,
            micro_batch_rows=2,
            steps=5,
        )
        assert trainer.get_train_dataloader().num_workers == workers
        gauge = Gauge("cpu")
        watch = Stopwatch(trainer, warmup_steps=1, steps=5, device="cpu", gauge=gauge)
        trainer.add_callback(watch)
        trainer.train()
        watches.append(watch)
    longest = max(sum(trainer.sampler().lengths[row] for row in rows) for rows in watch.longest.rows)
    assert (
        max(watch.pass_tokens)
        == watch.longest.tokens
        == longest
        >= max(
            sum(trainer.sampler().lengths[row] for row in rows)
            for rows in rows_of_passes(trainer.sampler(), trainer.args)
        )
    )
    trainer.speed_ups = replace(trainer.speed_ups, cuda_graphs=True)
    long = [0] * (10**4 // trainer.sampler().lengths[0] + 1)
    trainer.expect_passes([long])
    assert trainer.data_collator.sizes[-1].tokens >= 10**4  # a graph is captured for it
    assert watches[0].useful == watches[1].useful and watches[0].padded == watches[1].padded
    shape = memory.Shape.of(trainer.causal_model.config)
    rate, share = benchmark.utilization(
        watch,
        shape=shape,
        run=one_run(asked),
        compute=torch.float32,
    )
    linear, adapters = shape.linear_parameters, adapter_parameters(shape, asked.training)
    products = (
        4 * (linear + shape.vocabulary * shape.hidden) + 6 * adapters
    )  # a token; attention comes on top
    least = products * sum(watch.useful) / sum(watch.seconds) / (rate.value * 1e12)
    assert 0 < least < share.value < 1.5 * least
    assert len(watches[0].useful) == 3 and all(
        0 < useful <= padded for useful, padded in zip(watches[0].useful, watches[0].padded, strict=True)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_validation_in_between_does_not_change_the_training(
    asked, tiny_model, splits, tmp_path, monkeypatch, dropout
):
    """On some CPUs an eval pass makes bitsandbytes cut the gradients of 4-bit layers."""
    run(asked, tiny_model, splits, tmp_path / "with", name="qlora_nf4_dq", dropout=dropout)
    monkeypatch.setattr(History, "validate", lambda self, *, step: self.validated.append((step, 0.0, 0.0)))
    run(asked, tiny_model, splits, tmp_path / "without", name="qlora_nf4_dq", dropout=dropout)
    with_it, without = (tmp_path / name / "weights/adapter_model.safetensors" for name in ("with", "without"))
    assert with_it.read_bytes() == without.read_bytes()


def test_micro_batches_give_the_gradient_of_one_batch(asked, tiny_model, splits, tmp_path):
    found = []
    for rows in (4, 2, 1):
        folder = tmp_path / str(rows)
        found.append((run(asked, tiny_model, splits, folder, micro_batch_rows=rows), folder))
    for other in found[1:]:
        assert_alike(other, found[0], 1e-5)
        assert other[0].tokens_seen == found[0][0].tokens_seen


def test_paged_optimizers_are_refused_on_a_cpu(asked, tiny_model, splits, tmp_path):
    with pytest.raises(UserError, match="training.step.optimizer is paged_adamw_32bit"):
        run(asked, tiny_model, splits, tmp_path, optimizer="paged_adamw_32bit")


def test_a_window_of_one_batch_is_a_random_order():
    lengths = list(range(100))
    order = list(LikeLengthSampler(lengths, batch_rows=5, window=1, seed=1))
    batches = [order[start : start + 5] for start in range(0, 100, 5)]
    assert all(max(batch) - min(batch) > 10 for batch in batches)


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_batches_of_like_length_cover_every_row_once_with_little_padding(rows):
    lengths = np.random.default_rng(0).integers(5, 200, rows).tolist()
    sampler = LikeLengthSampler(lengths, batch_rows=8, window=8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(rows)) and order == list(sampler)
    sampler.set_epoch(1)
    assert rows <= 8 or list(sampler) != order

    def padded(order):
        return sum(
            max(lengths[i] for i in order[s : s + 8]) * len(order[s : s + 8]) for s in range(0, rows, 8)
        )

    if rows >= 64:
        assert padded(order) < 1.25 * sum(lengths) < padded(range(rows))
        means = [np.mean([lengths[i] for i in order[s : s + 8]]) for s in range(0, rows - 7, 8)]
        assert sorted(means) != means and sorted(means, reverse=True) != means


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (3.0, 9), (0.5, 2)])
def test_planned_steps_count_a_last_smaller_batch(asked, epochs, steps):
    plan = asked.training.model_copy(update={"steps": None, "epochs": epochs, "batch_rows": 16})
    planned = planned_steps(33, plan)
    assert planned == steps and isinstance(planned, int)


def test_planned_steps_are_those_that_are_taken(asked, tiny_model, splits, tmp_path):
    result = run(asked, tiny_model, splits, tmp_path, steps=None, epochs=0.3)
    plan = asked.training.model_copy(update={"steps": None, "epochs": 0.3})
    assert result.steps == planned_steps(len(splits["train"]), plan) == len(history(tmp_path))


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq", "lora_int8", "full_16bit"])
def test_what_is_to_be_trained_must_be_float32(asked, tiny_model, rows, tmp_path, name):
    """What TRL would make of the adapter on a quantized base."""
    trainer = build(asked, tiny_model, rows, name=name, scratch=tmp_path)
    check_trainable(model_of(trainer), one_run(asked, name).method, asked.training)
    trained = next(p for p in model_of(trainer).parameters() if p.requires_grad)
    trained.data = trained.data.bfloat16()
    with pytest.raises(CheckError, match="is to be trained in torch.bfloat16, and must be in float32"):
        check_trainable(model_of(trainer), one_run(asked, name).method, asked.training)


@pytest.mark.parametrize(
    ("targets", "change", "error", "sentence"),
    [
        ("all-linear", lambda model: lora_of(model)[5].requires_grad_(False), CheckError, "is not to be trained"),
        ("all-linear", lambda model: model.get_output_embeddings().weight.requires_grad_(True), CheckError,
         "lm_head.weight is to be trained, unasked"),
        (["q_proj", "v_proj"], lambda model: lora_of(model)[0].requires_grad_(False), CheckError,
         "q_proj.lora_A.default.weight is not to be trained"),
        (["q_proj", "v_prj"], lambda model: None, UserError,
         "training.step.target_modules names v_prj, and the model has no linear layer of that name; it has down_proj, gate_proj"),
    ],
)  # fmt: skip
def test_the_layers_that_are_asked_for_and_no_others_have_an_adapter(
    asked, tiny_model, rows, tmp_path, targets, change, error, sentence
):
    trainer = build(asked, tiny_model, rows, scratch=tmp_path, target_modules=targets)
    plan = asked.training.model_copy(update={"target_modules": targets})
    if error is CheckError:
        check_trainable(model_of(trainer), methods.get("lora"), plan)
    change(model_of(trainer))
    with pytest.raises(error, match=sentence):
        check_trainable(model_of(trainer), methods.get("lora"), plan)


def lora_of(model) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def frozen_layer(trainer):
    """Nothing reaches the adapter of one layer."""
    for name, parameter in model_of(trainer).named_parameters():
        if "layers.2.self_attn.o_proj.lora_B" in name or "layers.2.self_attn.o_proj.weight" in name:
            parameter.register_hook(torch.zeros_like)


def stops_early(trainer):
    trainer.args.max_steps = 3


def without_batches_of_like_length(trainer):
    trainer._get_train_sampler = lambda dataset=None: RandomSampler(trainer.train_dataset)


@pytest.mark.parametrize(
    ("name", "fault", "sentence"),
    [
        ("qlora_nf4_dq", frozen_layer, "layers.2.self_attn.o_proj.lora_B.* is still zero after training: no gradient reached it"),
        ("full_16bit", frozen_layer, "layers.2.self_attn.o_proj.weight was not trained: no gradient reached it"),
        ("lora_16bit", stops_early, "3 steps were trained, and 4 were planned"),
        ("lora_16bit", without_batches_of_like_length, r"\d+ tokens were trained on, and \d+ were planned"),
    ],
)  # fmt: skip
def test_a_training_that_is_not_what_was_planned_leaves_no_weights(
    asked, tiny_model, splits, tmp_path, monkeypatch, name, fault, sentence
):
    class Spoiled(History):
        def __init__(self, trainer, *arguments, **named):
            fault(trainer)
            super().__init__(trainer, *arguments, **named)

    monkeypatch.setattr(train, "History", Spoiled)
    with pytest.raises(CheckError, match=sentence):
        run(asked, tiny_model, splits, tmp_path, name=name)
    assert not (tmp_path / "weights").exists()


def test_what_is_not_finite_stops_the_run(asked, tiny_model, splits, tmp_path, monkeypatch):
    with pytest.raises(CheckError, match="the training loss is not finite"):
        run(
            asked, tiny_model, splits, tmp_path, name="full_16bit", learning_rate=1e30, max_gradient_norm=1e30
        )
    validate = History.validate

    def infinite_weight(history):
        lora_of(model_of(history.trainer))[3].data[0] = float("inf")

    def infinite_loss(history):
        history.validated[-1] = (4, float("inf"), 0.0)

    for fault, sentence in (
        (infinite_weight, "lora_B.* is not finite after"),
        (infinite_loss, "validation loss is not"),
    ):

        def spoiled(self, *, step, fault=fault):
            validate(self, step=step)
            if step == 4:
                fault(self)

        monkeypatch.setattr(History, "validate", spoiled)
        with pytest.raises(CheckError, match=sentence):
            run(asked, tiny_model, splits, tmp_path)
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("name", ["qlora_nf4_dq", "full_16bit"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda weights: weights[next(iter(weights))].mul_(1.5), "was saved with other numbers than it was trained to"),
        (lambda weights: weights.pop(next(iter(weights))), "was trained and not saved|was saved with other numbers"),
    ],
)  # fmt: skip
def test_weights_that_are_not_saved_as_they_were_trained_are_refused(
    asked, tiny_model, splits, tmp_path, monkeypatch, name, change, sentence
):
    kind = PeftModel if name == "qlora_nf4_dq" else transformers.LlamaForCausalLM
    write = kind.save_pretrained

    def spoiled(self, folder, **more):
        write(self, folder, **more)
        (file,) = folder.glob("*.safetensors")
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(kind, "save_pretrained", spoiled)
    with pytest.raises(CheckError, match=sentence):
        run(asked, tiny_model, splits, tmp_path, name=name)
    assert not (tmp_path / "weights").exists()
