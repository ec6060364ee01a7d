"""The stage's numbers are the harness' own, and those of a script that knows neither."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU, ROOT, random_adapter, warm
from gguf_models import write_gguf
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from scored_workspace import write_scored_workspace
from transformers import AutoModelForCausalLM, AutoTokenizer

from workflow import params
from workflow.data.choices import scored_rows
from workflow.data.rows import Instruction
from workflow.evaluation import harness, score, task_data
from workflow.evaluation.items import items_sha256, scores
from workflow.evaluation.language_model import batches
from workflow.evaluation.llama_cpp import extra, serve, write
from workflow.evaluation.prompt_checks import check_scored
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import read_jsonl, sha256, write_jsonl
from workflow.runtime.paths import MODEL, gguf_folder, split_file, weights_folder

NAME, SEED = "qlora_nf4_dq", 1
PIQA = ROOT.parent / "shared" / "data" / "piqa" / "validation.jsonl"
GOALS = [
    {
        "goal": f"Reach number {index}.",
        "sol1": "Count up to it.",
        "sol2": "Paint it blue.",
        "label": index % 2,
    }
    for index in range(9)
]


@pytest.fixture(scope="module")
def workspace(tiny, tiny_model, splits, tmp_path_factory) -> Path:
    """A repository in which params, model, adapters and test split lie where the stages put them."""
    folder = tmp_path_factory.mktemp("workspace")
    runs = [("lora_16bit", SEED), (NAME, SEED)]
    write_scored_workspace(folder, tiny, tiny_model, splits["test"], runs)
    write_jsonl(folder / "goals.jsonl", GOALS)
    text = params.complete_text("tiny")
    own = "    holdout_generation: {items: 4,"
    mapped = f"{{validation: {{path: goals.jsonl, sha256: {sha256(folder / 'goals.jsonl')}}}}}"
    piqa = f"    piqa: {{items: 7, few_shot: 2, chat_template: false, files: {mapped}}}\n"
    (folder / "params.yaml").write_text(text.replace(own, piqa + own))
    before = Path.cwd()
    os.chdir(folder)
    task_data.fetch(params.load().evaluation)
    os.chdir(before)
    return folder


@pytest.fixture
def asked(workspace, monkeypatch) -> params.Params:
    monkeypatch.chdir(workspace)
    return params.load()


def score_form(
    asked, name=NAME, form="as_trained", *, tasks=None, batch_rows=4, batch_tokens=None, hardware=CPU
) -> score.Scored:
    wanted = asked.evaluation.model_copy(
        update={
            "batch_rows": batch_rows,
            "batch_tokens": batch_tokens,
            "tasks": {t: v for t, v in asked.evaluation.tasks.items() if tasks is None or t in tasks},
        }
    )
    run = replace(asked.run(name, None if form == "base" else SEED), hardware=hardware)
    (scored,) = score.evaluate(run, [form], wanted)
    return scored


def values(scored: score.Scored) -> dict[str, float]:
    return {f"{metric.task}/{metric.metric}": metric.value for metric in scored.result.metrics}


def plain_model(adapter: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, weights_folder("lora_16bit", 1)) if adapter else model).eval()


def log_likelihood(model, tokenizer, context: str, continuation: str) -> tuple[float, int]:
    """Nats of a continuation by numpy alone, and its tokens; a context's last whitespace belongs to it."""
    start = len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
    ids = tokenizer(context + continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    scores = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return sum(scores[i - 1, ids[0, i]] for i in range(start, ids.shape[1])), ids.shape[1] - start


def chat_prompt(tokenizer, text: str) -> str:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("adapter", [True, False])
def test_the_loss_is_that_of_a_script_without_the_harness(asked, adapter):
    scored = score_form(asked, "lora_16bit", "as_trained" if adapter else "base", tasks=["holdout_loss"])
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), plain_model(adapter)
    nats = tokens = size = 0
    for row in read_jsonl(split_file("test")):
        found, length = log_likelihood(
            model, tokenizer, chat_prompt(tokenizer, row["prompt"]), row["response"]
        )
        nats -= found
        tokens += length - 1  # without the newline that ends the prompt
        size += len(row["response"].encode())
    assert values(scored)["holdout_loss/nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    assert values(scored)["holdout_loss/bits_per_byte"] == pytest.approx(nats / np.log(2) / size, abs=1e-5)


def test_the_choice_is_that_of_a_script_without_the_harness(asked):
    scored = score_form(asked, "lora_16bit", tasks=["response_choice"])
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), plain_model(adapter=True)
    right, right_by_length = {}, {}
    for row in read_jsonl(split_file("test")):
        prompt = chat_prompt(tokenizer, row["prompt"])
        nats = [log_likelihood(model, tokenizer, prompt, choice)[0] for choice in row["choices"]]
        assert row["choices"][row["choice"]] == row["response"]
        right[str(row["id"])] = float(np.argmax(nats) == row["choice"])
        by_length = np.array(nats) / [len(choice) for choice in row["choices"]]
        right_by_length[str(row["id"])] = float(np.argmax(by_length) == row["choice"])
    for metric, expected in (("acc", right), ("acc_norm", right_by_length)):
        rows = scored.items[scored.items["metric"] == metric].set_index("item")["numerator"]
        assert len(rows) == 6 and rows.to_dict() == {item: expected[item] for item in rows.index}


def test_answers_are_those_of_a_script_without_the_harness(asked):
    scored = score_form(asked, "lora_16bit", tasks=["holdout_generation"])
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), plain_model(adapter=True)
    assert len(scored.answers) == 4 and len({(a["instruction"], a["context"]) for a in scored.answers}) == 4
    for answer in scored.answers:
        ids = tokenizer(chat_prompt(tokenizer, answer["instruction"] + ("\n\n" + answer["context"]) * bool(answer["context"])),
                        add_special_tokens=False, return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["answer"] == text.strip()


def test_answer_metrics_agree_with_hand_worked_cases(asked):
    import importlib.util

    spec = importlib.util.spec_from_file_location("holdout", "workflow/evaluation/tasks/holdout.py")
    holdout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(holdout)
    doc = {"response": "the cat sat on the mat", "answer_tokens": 30}
    found = holdout.answer_metrics(doc, ["the cat lay on a mat"])
    assert found["rouge_l"] == pytest.approx(4 / 6)  # the cat on mat, of six words on either side
    assert found["length"] == 20 and found["ended"] == 1  # a token is a byte
    assert holdout.answer_metrics({**doc, "answer_tokens": 20}, ["the cat lay on a mat"])["ended"] == 0
    assert holdout.answer_metrics(doc, [doc["response"]])["chrf"] == pytest.approx(100)
    thinks = {**doc, "opening": "<think>\n\n</think>\n\n"}
    opened = holdout.answer_metrics(thinks, ["<think>\n\n</think>\n\nthe cat sat on the mat"])
    assert opened["chrf"] == pytest.approx(100) and opened["length"] == 19 + 22
    assert holdout.answer_metrics(doc, [""]) == {"rouge_l": 0, "chrf": 0, "ended": 1, "length": 0}


CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def chats(tiny, tiny_model, tmp_path_factory) -> tuple[Path, list[Instruction]]:
    """A repository whose test split has conversations and single questions, and whose template opens the response."""
    folder = tmp_path_factory.mktemp("chats")
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_model, folder / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / MODEL)
    earlier = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "Fig"},
    ]
    rows = [
        Instruction(index, "Another?", "", f"Answer {index}", None, earlier[: (0, 1, 3)[index % 3]])
        for index in range(3)
    ] + [Instruction(3 + n, f"Say {n}", "", f"It is {n}", None) for n in range(4)]
    scored = scored_rows(rows, tokenizer, choice_seed=55, held_out_categories=[])
    write_jsonl(folder / split_file("test"), scored)
    training = params.preset("tiny").training
    adapter = folder / weights_folder("lora_16bit", SEED)
    random_adapter(folder / MODEL, adapter, rank=training.rank, alpha=training.alpha)
    (folder / "params.yaml").write_text(params.complete_text("tiny"))
    return folder, rows


def chat_text(row: Instruction) -> str:
    text = "<s>"
    for turn in [*row.earlier, {"role": "user", "content": row.instruction}]:
        text += (
            f"A: {turn['content']}</s>"
            if turn["role"] == "assistant"
            else f"{turn['role']}: {turn['content']}\n"
        )
    return text


def test_a_conversation_is_scored_on_the_prompt_and_the_response_that_are_learned(
    chats, monkeypatch, tmp_path
):
    from workflow.models.load import load_base
    from workflow.training.train import build_trainer

    folder, rows = chats
    monkeypatch.chdir(folder)
    asked = params.load()
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), plain_model(adapter=True)
    scored = score_form(asked, "lora_16bit")
    nats = tokens = 0
    right = {}
    written = {row["id"]: row for row in read_jsonl(split_file("test"))}
    for row in rows:
        found, length = log_likelihood(model, tokenizer, chat_text(row), f"A: {row.response}")
        nats -= found
        tokens += length - 1  # without the newline that ends the prompt
        choices = [
            log_likelihood(model, tokenizer, chat_text(row), f"A: {choice}")[0]
            for choice in written[row.id]["choices"]
        ]
        right[str(row.id)] = float(np.argmax(choices) == written[row.id]["choice"])
    assert values(scored)["holdout_loss/nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    chosen = scored.items[scored.items["metric"] == "acc"].set_index("item")["numerator"]
    assert len(chosen) == 6 and chosen.to_dict() == {item: right[item] for item in chosen.index}
    groups = scored.items[scored.items["task"] == "holdout_loss"].set_index("item")["group"].to_dict()
    assert (groups["0"], groups["1"], groups["2"]) == ("another", "another", "name a fruit")
    assert [answer.get("earlier", []) for answer in scored.answers] == [row.earlier for row in rows[:4]]
    for answer, row in zip(scored.answers, rows[:4], strict=True):
        ids = tokenizer(chat_text(row), add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["answer"] == text.strip()

    base, precision = load_base(MODEL, asked.variants["lora_16bit"], hardware=CPU)
    trainer = build_trainer(
        base, tokenizer, params.Run("lora_16bit", asked.variants["lora_16bit"], 1, asked.training, asked.hardware),
        train_rows=rows, validation_rows=rows, precision=precision, scratch=tmp_path,
    )  # fmt: skip
    for row, learned in zip(rows, trainer.train_dataset, strict=True):
        assert tokenizer.decode(learned["input_ids"]) == f"{chat_text(row)}A: {row.response}</s>"
        masked = [
            token for token, label in zip(learned["input_ids"], learned["labels"], strict=True) if label < 0
        ]
        assert tokenizer.decode(masked) == chat_text(row)


def test_the_printed_commands_score_conversations_alike(chats, monkeypatch, tmp_path):
    monkeypatch.chdir(chats[0])
    asked = params.load()
    for task in ("holdout_loss", "response_choice", "holdout_generation"):
        scored = score_form(asked, "lora_16bit", tasks=[task])
        found = by_hand(scored, task, tmp_path / task)
        mine = {key.split("/")[1]: value for key, value in values(scored).items()}
        assert mine and all(found[metric] == pytest.approx(value, abs=1e-6) for metric, value in mine.items())


def by_hand(scored: score.Scored, task: str, folder: Path) -> dict[str, float]:
    """Run the printed commands that one task needs, and read what the harness wrote."""
    environment = os.environ | {"PATH": f"{warm().lm_eval.parent}:{os.environ['PATH']}"}
    commands = scored.result.harness.commands
    chosen = [command for command in commands if not command.startswith("lm_eval")]
    chosen += [command for command in commands if f"--tasks {task}" in command]
    chosen[-1] += f" --output_path {shlex.quote(str(folder))}"
    for command in chosen:
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(folder.rglob("results_*.json")).read_text())["results"][task.split("_from_")[0]]
    return {key.split(",")[0]: value for key, value in results.items() if key.endswith(",none")}


@pytest.mark.parametrize(
    ("name", "form", "task"),
    [
        ("lora_16bit", "as_trained", "holdout_loss"),
        (NAME, "base", "holdout_loss"),
        (NAME, "as_trained", "holdout_loss"),
        (NAME, "merged_16bit", "holdout_loss"),
        (NAME, "merged_dequantized", "holdout_loss"),
        (NAME, "requantized", "holdout_loss"),
        (NAME, "as_trained", "response_choice"),
        (NAME, "as_trained", "holdout_generation"),
        (NAME, "requantized", "piqa_from_files"),
    ],
)
def test_the_printed_commands_give_the_same_numbers(asked, name, form, task, tmp_path):
    asked_task = task.removesuffix("_from_files")
    scored = score_form(asked, name, form, tasks=[asked_task])
    found = by_hand(scored, task, tmp_path)
    mine = {key.split("/")[1]: value for key, value in values(scored).items()}
    assert mine and all(found[metric] == pytest.approx(value, abs=1e-6) for metric, value in mine.items())


def test_the_batch_size_does_not_move_the_loss(asked):
    one, many = (
        values(score_form(asked, tasks=["holdout_loss"], batch_rows=n))["holdout_loss/nats_per_token"]
        for n in (1, 8)
    )
    assert one == pytest.approx(many, abs=1e-4)


def test_a_bound_on_tokens_moves_no_score_and_holds(asked, monkeypatch):
    passes = []
    call = score.LanguageModel._model_call
    monkeypatch.setattr(
        score.LanguageModel,
        "_model_call",
        lambda self, inps, *rest, **more: passes.append(inps.shape) or call(self, inps, *rest, **more),
    )
    free = values(score_form(asked, batch_rows=64))
    passes.clear()
    bounded = score_form(asked, batch_rows=2, batch_tokens=400)
    assert values(bounded) == pytest.approx(free, abs=1e-4)
    assert bounded.result.harness.batch_tokens == 400
    assert all(rows * tokens <= 400 or rows == 1 for rows, tokens in passes)
    assert any(rows > 2 for rows, _ in passes)


@pytest.mark.parametrize(("tokens", "wanted"), [
    (100, [[1], [3], [0, 4, 2]]),  # 120 alone, though it is longer; 60; three of 30
    (60, [[1], [3], [0, 4], [2]]),
    (1, [[1], [3], [0], [4], [2]]),
])  # fmt: skip
def test_a_batch_is_of_like_lengths_and_within_its_tokens(tokens, wanted):
    assert list(batches([30, 120, 5, 60, 30], tokens=tokens)) == wanted


def test_a_log_probability_is_not_rounded_to_the_type_that_the_model_computes_in(asked):
    items = score_form(
        asked, tasks=["holdout_loss"], hardware=CPU.model_copy(update={"compute_dtype": "bfloat16"})
    ).items
    nats = torch.tensor(items.loc[items["metric"] == "nats_per_token", "numerator"].to_numpy())
    assert (nats.bfloat16().double() != nats).all() and len(nats) > 5


def test_items_add_up_to_the_totals_and_say_what_they_are(asked, splits):
    scored = score_form(asked, form="requantized")
    assert {m.task for m in scored.result.metrics} == {
        "holdout_loss",
        "response_choice",
        "piqa",
        "holdout_generation",
    }
    for metric in scored.result.metrics:
        rows = scored.items[(scored.items["metric"] == metric.metric) & (scored.items["task"] == metric.task)]
        assert rows["numerator"].sum() / rows["denominator"].sum() == pytest.approx(metric.value, rel=1e-12)
        assert metric.per_item and metric.items == len(rows) and rows["item"].is_unique
        assert metric.higher_is_better is (
            None if metric.metric == "length" else metric.task != "holdout_loss"
        )
    about = scored.items[["variant", "seed", "form"]].drop_duplicates()
    assert about.values.tolist() == [[NAME, SEED, "requantized"]]
    loss = scored.items[scored.items["metric"] == "nats_per_token"]
    assert set(loss["item"]) == {str(row.id) for row in splits["test"]}
    assert (loss["held_out"] == (loss["category"] == "words")).all() and loss["held_out"].any()
    piqa = next(asdict(task) for task in scored.result.harness.tasks if task.task == "piqa")
    assert re.fullmatch("[0-9a-f]{64}", piqa.pop("items_sha256")) and piqa.pop("prompts_cut") == 0
    assert piqa == {"task": "piqa", "leaves": ["piqa"], "version": "1.0", "items": 7, "few_shot": 2,
                    "chat_template": False, "bos_per_prompt": 0}  # fmt: skip
    own = next(task for task in scored.result.harness.tasks if task.task == "holdout_loss")
    assert own.chat_template and own.bos_per_prompt == 1
    assert scored.result.harness.batch_rows == 4 and scored.result.harness.version


@pytest.fixture
def harness_results(asked) -> tuple[dict[str, dict], HFLM]:
    """What the harness returned for our own tasks, and the model that it scored."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = HFLM(pretrained=plain_model(adapter=False), tokenizer=tokenizer, batch_size=4)
    return {
        task: harness.run(harness.call_of(task, asked.evaluation), model)
        for task in asked.evaluation.tasks
        if task in params.OWN_TASKS
    }, model


def test_what_is_scored_must_be_what_is_trained(harness_results, monkeypatch):
    results, model = harness_results
    assert [check_scored(found, model) for found in results.values()] == [0, 0, 0]
    doc = results["holdout_loss"]["samples"]["holdout_loss"][3]["doc"]
    with monkeypatch.context() as patch:
        patch.setitem(doc, "response_tokens", doc["response_tokens"] + 1)
        with pytest.raises(
            CheckError, match=f"of row {doc['id']} of the test split are scored, and the sample stage"
        ):
            check_scored(results["holdout_loss"], model)
    with monkeypatch.context() as patch:
        # As of a template that prints the date, on another day: as many tokens, and other ones.
        patch.setitem(doc, "chat_prompt", doc["chat_prompt"].replace("Instruction", "Instructiom"))
        with pytest.raises(
            CheckError,
            match=f"prompt of row {doc['id']} .* another text than stage sample .*tion:.* and '.*tiom:",
        ):
            check_scored(results["holdout_loss"], model)
    template = model.tokenizer.chat_template
    model.tokenizer.chat_template = template.replace("{{ bos_token }}", "").replace("{{- bos_token }}", "")
    assert model.tokenizer.chat_template != template
    for found in results.values():
        with pytest.raises(
            CheckError, match="is scored with 1 BOS tokens, and rows are trained with 0, as the chat"
        ):
            check_scored(found, model)
    model.tokenizer.chat_template = template
    encode = model.tok_encode
    with monkeypatch.context() as patch:
        patch.setattr(model, "tok_encode", lambda text, **more: [0, *encode(text, **more)])
        for found in results.values():
            with pytest.raises(CheckError, match="is scored with 2 BOS tokens, and rows are trained with 1"):
                check_scored(found, model)


def test_prompts_that_the_context_cuts_are_counted_and_responses_refused(harness_results, monkeypatch):
    results, model = harness_results
    samples = results["holdout_loss"]["samples"]["holdout_loss"]
    whole = sorted(len(model.tok_encode("".join(sample["arguments"][0]))) for sample in samples)
    monkeypatch.setattr(type(model), "max_length", whole[-3])
    assert check_scored(results["holdout_loss"], model) == sum(n > whole[-3] + 1 for n in whole)
    monkeypatch.setattr(type(model), "max_length", 5)
    with pytest.raises(
        CheckError, match=r"of the response of row \d+ of the test split \d+ tokens are scored, and .* 5$"
    ):
        check_scored(results["holdout_loss"], model)


def test_items_have_a_digest_of_all_that_is_asked(harness_results):
    results, _ = harness_results
    found = {task: items_sha256(one) for task, one in results.items()}
    assert len(set(found.values())) == 3
    for task, one in results.items():
        (samples,) = one["samples"].values()
        assert items_sha256({"samples": {task: samples[::-1]}}) == found[task]
        assert items_sha256({"samples": {task: samples[1:]}}) != found[task]
        for key, value in (("doc_id", -1), ("target", "x"), ("arguments", [("x", "y")])):
            changed = [samples[0] | {key: value}, *samples[1:]]
            assert items_sha256({"samples": {task: changed}}) != found[task]


def test_a_score_that_is_not_finite_is_refused(asked, monkeypatch):
    serve = score.serve

    def broken(run, form, **folders):
        model, served = serve(run, form, **folders)
        model.lm_head.weight.data[0] = float("nan")
        return model, served

    monkeypatch.setattr(score, "serve", broken)
    with pytest.raises(CheckError, match="holdout_loss gives base a score that is not finite"):
        score_form(asked, "lora_16bit", form="base", tasks=["holdout_loss"])


def test_a_gguf_form_is_scored_from_its_file_by_both_programs(asked, monkeypatch):
    """The byte tokenizer is none that the converter knows, so the test writes the 16-bit file itself."""
    try:
        extra.check_installed()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(write, "convert", write_gguf)
    monkeypatch.setattr(serve, "check_tokenizer", lambda *_: None)
    scored = score_form(asked, NAME, form="gguf_q4_k_m", tasks=["holdout_loss"])
    record, precision = scored.result.gguf, scored.result.precision
    assert (record.file_type, precision.storage) == ("Q4_K_M", "GGUF Q4_K_M")
    assert precision.quantized_modules == precision.linear_modules == 7 * asked.model.layers
    assert record.agreement.rows == 4 and abs(record.agreement.difference) < 0.01
    rows = scored.items[scored.items["metric"] == "nats_per_token"][:4]
    assert record.agreement.transformers == pytest.approx(rows["numerator"].sum() / rows["denominator"].sum())
    merged = score_form(asked, NAME, form="merged_16bit", tasks=["holdout_loss"])
    assert (
        0
        < abs(values(scored)["holdout_loss/nats_per_token"] - values(merged)["holdout_loss/nats_per_token"])
        < 0.2
    )
    assert any("gguf_file=model.gguf" in command for command in scored.result.harness.commands)
    assert not gguf_folder(NAME, SEED).exists()


def test_a_form_is_loaded_once_for_all_tasks(asked, monkeypatch):
    loads = []
    serve = score.serve
    monkeypatch.setattr(
        score, "serve", lambda run, form, **folders: loads.append(form) or serve(run, form, **folders)
    )
    forms = asked.forms_of(NAME)
    run = replace(asked.run(NAME, SEED), hardware=CPU)
    list(score.evaluate(run, forms, asked.evaluation))
    assert loads == forms == ["as_trained", "merged_16bit", "merged_dequantized", "requantized"]


def results_of(leaves: dict[str, list], totals: dict[str, float], metric: str = "acc") -> dict:
    """What the harness returns for these leaf tasks, as far as scores are taken from it."""
    return {
        "samples": {
            leaf: [
                {"doc": {}, "doc_id": i, "prompt_hash": f"{leaf}{i}", "filter": "none", "metrics": [metric], metric: v}
                for i, v in enumerate(items)
            ]
            for leaf, items in leaves.items()
        },
        "results": {leaf: {f"{metric},none": totals[leaf], "alias": leaf} for leaf in leaves},
        "configs": {leaf: {"validation_split": "validation"} for leaf in leaves},
        "higher_is_better": {leaf: {metric: True} for leaf in leaves},
        "n-samples": {leaf: {"effective": len(items)} for leaf, items in leaves.items()},
    }  # fmt: skip


def test_a_group_is_the_mean_over_all_its_items_and_its_leaves_are_categories():
    results = results_of({"a": [1, 0], "b": [1, 1, 1, 1]}, {"a": 0.5, "b": 1.0})
    (metric,), items = scores(results, "group")
    assert (metric.value, metric.items, metric.per_item) == (pytest.approx(5 / 6), 6, True)
    assert items["category"].tolist() == ["a"] * 2 + ["b"] * 4


def test_a_metric_that_is_not_a_ratio_of_its_items_is_kept_as_a_total_alone():
    (metric,), items = scores(results_of({"a": [0.2, 0.4]}, {"a": 0.9}), "a")
    assert (metric.value, metric.per_item, len(items)) == (0.9, False, 0)
    (metric,), items = scores(results_of({"a": ["x", "y"]}, {"a": 0.7}, "bleu"), "a")
    assert (metric.value, metric.per_item, len(items)) == (0.7, False, 0)
    (metric,), items = scores(results_of({"a": [[True, False], [True]]}, {"a": 2 / 3}, "inst"), "a")
    assert metric.per_item and items["denominator"].tolist() == [2, 1]


@pytest.mark.skipif(not PIQA.is_file(), reason="the piqa file is not part of the repository")
def test_piqa_itself_from_its_file(asked, monkeypatch, tmp_path, tiny_model):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / MODEL)
    file = params.LocalFile(path=str(PIQA), sha256=sha256(PIQA))
    task = params.Task(items=50, few_shot=0, chat_template=False, files={"validation": file})
    wanted = asked.evaluation.model_copy(update={"tasks": {"piqa": task}})
    (found,) = task_data.fetch(wanted)
    assert found["items"] == 1838
    run = replace(asked.run("lora_16bit", None), hardware=CPU)
    (scored,) = score.evaluate(run, ["base"], wanted)
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), plain_model(adapter=False)
    right = []
    for row in read_jsonl(PIQA)[:50]:
        context = f"Question: {row['goal']}\nAnswer:"
        nats = [log_likelihood(model, tokenizer, context, f" {row[key]}")[0] for key in ("sol1", "sol2")]
        right.append(float(np.argmax(nats) == row["label"]))
    items = scored.items[scored.items["metric"] == "acc"]["numerator"].tolist()
    assert items == right and isinstance(scored.items, pd.DataFrame)
