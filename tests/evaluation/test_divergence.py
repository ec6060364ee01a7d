"""The divergence of two runs is that of a script that knows neither the stage nor the harness."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_stage_in
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scored_workspace import write_scored_workspace
from transformers import AutoModelForCausalLM, AutoTokenizer

from workflow import params
from workflow.evaluation import divergence
from workflow.evaluation.language_model import batches
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import read_json, read_jsonl
from workflow.runtime.paths import MODEL, divergence_folder, split_file, weights_folder

BASELINE, NAME, SEED, ITEMS = "lora_16bit", "qlora_nf4_dq", 1, 6


@pytest.fixture(scope="module")
def workspace(tiny, tiny_model, splits, tmp_path_factory) -> Path:
    """A folder in which params, model, test split and two unlike adapters lie where the stages put them."""
    folder = tmp_path_factory.mktemp("workspace")
    runs = [(BASELINE, SEED), (NAME, SEED)]
    write_scored_workspace(folder, tiny, tiny_model, splits["test"], runs)
    file = folder / weights_folder(NAME, SEED) / "adapter_model.safetensors"
    torch.manual_seed(1)  # near enough to the baseline's that the two often agree
    save_file({name: w * (1 + 0.5 * torch.randn_like(w)) for name, w in load_file(file).items()}, file)
    (folder / "params.yaml").write_text(params.complete_text("tiny"))
    return folder


@pytest.fixture
def settings(workspace, monkeypatch) -> params.Params:
    monkeypatch.chdir(workspace)
    return with_evaluation(params.load())


def with_evaluation(settings: params.Params, **changes) -> params.Params:
    evaluation = settings.evaluation.model_copy(update=changes)
    hardware = settings.hardware.model_copy(update={"device": "cpu"})
    return settings.model_copy(update={"evaluation": evaluation, "hardware": hardware})


def measured(settings, name: str, folder: Path) -> tuple[pd.DataFrame, dict]:
    divergence.measure(settings, name, baseline=BASELINE, seed=SEED, folder=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["result.json", "tokens.parquet"]
    return pd.read_parquet(folder / "tokens.parquet"), read_json(folder / "result.json")


def plain_logits(model: torch.nn.Module, prompt: str, response: str) -> torch.Tensor:
    """The logits [tokens of the response, vocabulary] of one row, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(prompt + response, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0, start - 1 : -1].double()


def test_the_divergence_is_that_of_plain_transformers_and_pytorchs_own_loss(settings, tmp_path):
    tokens, result = measured(settings, NAME, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, weights_folder(BASELINE, SEED)).eval()
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, weights_folder(NAME, SEED)).merge_and_unload().eval()
    for parameter in merged.parameters():
        parameter.data = parameter.data.bfloat16().float()
    loss = torch.nn.KLDivLoss(reduction="none", log_target=True)
    rows = tokens[tokens["form"] == "merged_16bit"]
    written = {str(row["id"]): row for row in read_jsonl(split_file("test"))}
    assert set(rows["item"]) <= set(written) and rows["item"].nunique() == ITEMS
    for item, found in rows.groupby("item"):
        row = written[item]
        p, q = (plain_logits(model, row["chat_prompt"], row["response"]) for model in (reference, merged))
        expected = loss(q.log_softmax(-1), p.log_softmax(-1)).sum(-1).numpy()
        assert len(found) == row["response_tokens"] == len(expected)
        np.testing.assert_allclose(found.sort_values("position")["divergence"], expected, atol=2e-6)
        assert found["same_top"].tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
        assert (found["held_out"] == (row["category"] == "words")).all()
    assert rows["divergence"].mean() > 1e-3 and 0 < rows["same_top"].mean() < 1
    form = next(form for form in result["forms"] if form["form"] == "merged_16bit")
    assert form["mean"] == pytest.approx(rows["divergence"].mean()) and form["tokens"] == len(rows)
    assert [form["form"] for form in result["forms"]] == settings.forms_of(NAME)
    assert result["reference"]["base"] == "16bit" and result["baseline"] == BASELINE


def test_the_rows_are_those_of_the_held_out_loss_and_no_batch_moves_a_number(settings, tmp_path):
    from workflow.evaluation.score import evaluate

    (scored,) = evaluate(settings.run(NAME, SEED), ["as_trained"], settings.evaluation)
    loss = scored.items[scored.items["metric"] == "nats_per_token"]
    tables = [
        measured(with_evaluation(settings, **bounds), NAME, tmp_path / str(index))[0]
        for index, bounds in enumerate(
            ({}, {"batch_rows": 1}, {"batch_tokens": 400}, {"divergence_items": len(loss)})
        )
    ]
    first = tables[0]
    for table in tables[1:3]:
        np.testing.assert_allclose(table["divergence"], first["divergence"], atol=2e-6)
        assert table["item"].equals(first["item"])
    assert first["item"].unique().tolist() == loss["item"].tolist()[:ITEMS]
    trained = tables[3][tables[3]["form"] == "as_trained"]
    counts = trained.groupby("item", sort=False).size()
    assert counts.index.tolist() == loss["item"].tolist() and counts.tolist() == loss["denominator"].tolist()


def test_the_baseline_is_not_compared_with_itself_and_merging_it_moves_it_little(settings, tmp_path):
    tokens, _ = measured(settings, BASELINE, tmp_path)
    assert set(tokens["form"]) == {"merged_16bit"}
    assert 0 < tokens["divergence"].mean() < 1e-3 and tokens["same_top"].mean() > 0.9


@pytest.mark.parametrize("changes", [{"divergence_items": None}, {"forms": ["as_trained"]}])
def test_where_nothing_is_compared_the_files_say_so(settings, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(divergence, "serve", lambda *_, **__: pytest.fail("a model was loaded"))
    tokens, result = measured(with_evaluation(settings, **changes), BASELINE, tmp_path)
    assert tokens.empty and {"form", "item", "divergence", "same_top"} <= set(tokens.columns)
    assert result["forms"] == [] and result["reference"] is None


def test_equal_logits_agree_in_ties_and_in_every_chunk(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(50, 31).bfloat16()
    whole = divergence.compare_logits(logits, logits)
    assert (whole.divergence == 0).all() and whole.same_top.all()
    tied = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    assert divergence.compare_logits(tied, other).same_top.tolist() == [True, False]
    moved = logits.float() + torch.randn(50, 31)
    before = divergence.compare_logits(logits, moved)
    monkeypatch.setattr(divergence, "CHUNK", 31 * 7)
    after = divergence.compare_logits(logits, moved)
    assert (before.divergence == after.divergence).all() and (before.same_top == after.same_top).all()


def test_what_cannot_be_compared_is_refused(monkeypatch, tmp_path):
    with pytest.raises(CheckError, match="the run predicts"):
        divergence.compare_logits(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(CheckError, match="KL divergence is nan"):
        divergence.compare_logits(torch.zeros(2, 5), torch.full((2, 5), float("nan")))
    free = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(divergence.shutil, "disk_usage", lambda _: free)
    with (
        divergence.KeptLogits(tmp_path) as kept,
        pytest.raises(UserError, match="make room, or lower evaluation.divergence_items"),
    ):
        kept.keep([0], 2, [torch.zeros(2, 5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_logits_come_back_as_they_were_and_leave_nothing(tmp_path, dtype):
    rows = [torch.randn(tokens, 7).to(dtype) for tokens in (3, 1, 4)]
    with divergence.KeptLogits(tmp_path) as kept:
        kept.keep([2, 0], 8, rows[:2])
        kept.keep([1], 8, rows[2:])
        assert all(
            torch.equal(kept.row(place, torch.device("cpu")), row)
            for place, row in zip((2, 0, 1), rows, strict=True)
        )
        assert os.listdir(tmp_path) == []


def test_batches_without_a_bound_on_tokens_have_rows():
    assert list(batches([3, 9, 1], tokens=None, rows=2)) == [[1, 0], [2]]


def test_the_stage_compares_what_the_command_line_names(workspace):
    done = run_stage_in(
        workspace, "divergence", "--variant", BASELINE, "--baseline", BASELINE, "--seed", str(SEED)
    )
    assert done.returncode == 0, done.stderr
    assert "merged_16bit: KL divergence 0.0" in done.stdout
    result = read_json(workspace / divergence_folder(BASELINE, SEED) / "result.json")
    assert [form["form"] for form in result["forms"]] == ["merged_16bit"] and result["forms"][0][
        "items"
    ] == ITEMS
    shutil.rmtree(workspace / "results/divergence")


def test_the_stage_refuses_a_baseline_that_is_no_variant(workspace, monkeypatch):
    from workflow.stages import divergence as stage

    monkeypatch.chdir(workspace)
    with pytest.raises(UserError, match="nothing is not a variant of this experiment"):
        stage.divergence(NAME, "nothing", SEED)
    assert not divergence_folder(NAME, SEED).exists()
