"""The stage's numbers are the harness' own, and those of a script that knows neither."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from workflow import evaluation, instructions, params
from workflow.files import read_jsonl, write_jsonl
from workflow.paths import MODEL, split_file, weights_folder

CPU = params.Hardware(device="cpu", compute_dtype="float32")


@pytest.fixture(scope="module")
def workspace(tiny, tiny_model, splits, tmp_path_factory) -> Path:
    """A repository in which model, adapter and test split lie where the stages put them."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_model, folder / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_jsonl(folder / split_file("test"), instructions.scored_rows(splits["test"], tokenizer))
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(folder / weights_folder("lora_16bit", 1))
    return folder


def score(workspace, tiny, name, *, adapter=True, batch_rows=4, monkeypatch) -> evaluation.Scored:
    monkeypatch.chdir(workspace)
    return evaluation.evaluate(
        model_folder=MODEL,
        weights_folder=weights_folder("lora_16bit", 1) if adapter else None,
        variant=tiny.variants[name],
        evaluation=tiny.evaluation.model_copy(update={"batch_rows": batch_rows}),
        hardware=CPU,
        test_rows=instructions.from_scored_rows(read_jsonl(split_file("test"))),
    )


def values(scored: evaluation.Scored) -> dict[str, float]:
    return {metric.metric: metric.value for metric in scored.metrics}


@pytest.mark.parametrize("adapter", [True, False])
def test_the_loss_is_that_of_a_script_without_the_harness(workspace, tiny, monkeypatch, adapter):
    scored = score(workspace, tiny, "lora_16bit", adapter=adapter, monkeypatch=monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, weights_folder("lora_16bit", 1))
    nats = tokens = size = 0
    for row in read_jsonl(split_file("test")):
        chat = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).rstrip()
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        # The newline that ends the prompt is scored too, and the denominators leave it out.
        ids = tokenizer(f"{prompt}\n{row['response']}", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double().numpy()
        scores = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        nats -= sum(scores[i - 1, ids[0, i]] for i in range(start, ids.shape[1]))
        tokens += ids.shape[1] - start - 1
        size += len(row["response"].encode())
    assert values(scored)["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    assert values(scored)["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, abs=1e-5)


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_the_printed_commands_give_the_same_number(workspace, tiny, monkeypatch, name, tmp_path):
    scored = score(workspace, tiny, name, monkeypatch=monkeypatch)
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    commands = scored.harness["commands"]
    commands[-1] += f" --output_path {shlex.quote(str(tmp_path))}"
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=workspace, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]["holdout_loss"]
    for metric, value in values(scored).items():
        assert results[f"{metric},none"] == pytest.approx(value, abs=1e-6)


def test_the_batch_size_does_not_move_the_loss(workspace, tiny, monkeypatch):
    one, many = (
        values(score(workspace, tiny, "qlora_nf4_dq", batch_rows=n, monkeypatch=monkeypatch)) for n in (1, 8)
    )
    assert one["nats_per_token"] == pytest.approx(many["nats_per_token"], abs=1e-4)


def test_items_add_up_to_the_total_and_say_what_they_are(workspace, tiny, monkeypatch, splits):
    scored = score(workspace, tiny, "qlora_nf4_dq", monkeypatch=monkeypatch)
    assert scored.precision.quantized_modules == 7 * tiny.model.layers
    for metric in scored.metrics:
        rows = scored.items[scored.items["metric"] == metric.metric]
        assert rows["numerator"].sum() / rows["denominator"].sum() == pytest.approx(metric.value, rel=1e-12)
        assert set(rows["item"]) == {row.id for row in splits["test"]} and metric.items == len(rows)
        assert (metric.split, metric.higher_is_better) == ("test", False)


def test_answers_are_greedy_and_do_not_depend_on_the_batch(workspace, tiny, monkeypatch, splits):
    monkeypatch.chdir(workspace)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    together = evaluation.answer(model, tokenizer, splits["test"][:3], tokens=8)
    alone = [evaluation.answer(model, tokenizer, [row], tokens=8)[0] for row in splits["test"][:3]]
    assert together == alone
    assert [answer["instruction"] for answer in together] == [row.instruction for row in splits["test"][:3]]
    assert evaluation.answer(model, tokenizer, [], tokens=8) == []


def test_a_full_fine_tuning_is_served_from_its_own_weights(workspace, tiny, monkeypatch, tiny_model):
    monkeypatch.chdir(workspace)
    full = tiny.variants["full_16bit"]
    own = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        own.lm_head.weight.zero_()
    own.save_pretrained("full")
    model, found = evaluation.load(MODEL, Path("full"), variant=full, hardware=CPU)
    assert not model.lm_head.weight.any() and found.quantized_modules == 0
