"""The merge diagnostic and the quick form find what plain libraries find on the same model, adapter and rows."""

import shutil
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, random_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from workflow import params
from workflow.data.choices import scored_rows
from workflow.precisions.base import Quantization
from workflow.runtime.files import read_jsonl, write_jsonl
from workflow.runtime.paths import MODEL, split_file, weights_folder
from workflow.tools import merge_diagnostic, quick, trained_ratios

NAME, SEED, ROWS = "qlora_nf4_dq", 1, 5


@pytest.fixture(scope="module")
def workspace(tiny, tiny_model, splits, tmp_path_factory) -> Path:
    """A folder in which params, model, test split, an adapter and the published study lie where they belong."""
    folder = tmp_path_factory.mktemp("workspace")
    # The task reads the split beside its own code, links resolved.
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_model, folder / MODEL)
    (folder / trained_ratios.STUDIES).parent.mkdir(exist_ok=True)
    (folder / trained_ratios.STUDIES).symlink_to(ROOT / trained_ratios.STUDIES)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_jsonl(
        folder / split_file("test"),
        scored_rows(splits["test"], tokenizer, choice_seed=55, held_out_categories=["words"]),
    )
    training = tiny.training_of(NAME)
    random_adapter(
        folder / MODEL, folder / weights_folder(NAME, SEED), rank=training.rank, alpha=training.alpha
    )
    text = params.complete_text("tiny").replace("device: auto", "device: cpu")
    (folder / "params.yaml").write_text(text)
    return folder


def run(monkeypatch, workspace: Path, module, *arguments: object) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def quantized(weight: torch.Tensor) -> torch.Tensor:
    """A weight in NF4 with double quantization and back, by bitsandbytes itself."""
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(codes, state)


def loss_of(model: torch.nn.Module, rows: list[dict]) -> float:
    """Nats per token of the responses, by transformers alone."""
    tokenizer, nats, tokens = AutoTokenizer.from_pretrained(MODEL), 0.0, 0
    for row in rows:
        # The line break before the response is scored too, and is no token of it.
        start = len(tokenizer(row["chat_prompt"].rstrip(), add_special_tokens=False)["input_ids"])
        text = row["chat_prompt"] + row["response"]
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likely = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        likely = likely.gather(-1, ids[0, 1:, None])[start - 1 :]
        nats, tokens = nats - float(likely.sum()), tokens + row["response_tokens"]
    return nats / tokens


def scored(count: int) -> list[dict]:
    """The first rows of the test split, further responses to a prompt after all prompts."""
    rows, seen, ranked = read_jsonl(split_file("test")), {}, []
    for place, row in enumerate(rows):
        rank = seen[row["chat_prompt"]] = seen.get(row["chat_prompt"], -1) + 1
        ranked.append((rank, place))
    return [rows[place] for _, place in sorted(ranked)][:count]


def test_the_changes_and_losses_are_those_of_plain_libraries(workspace, monkeypatch, tmp_path, capsys):
    run(monkeypatch, workspace, merge_diagnostic, "--variant", NAME, "--seed", SEED, "--rows", ROWS,
        "--csv", tmp_path / "layers.csv")  # fmt: skip
    table = pd.read_csv(tmp_path / "layers.csv").set_index("layer")
    assert len(table) == 28
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    adapter = load_file(weights_folder(NAME, SEED) / "adapter_model.safetensors")
    training = params.load().training_of(NAME)
    forms = {"merged_16bit": {}, "merged_dequantized": {}, "requantized": {}}
    for name, row in table.iterrows():
        weight = model.get_submodule(name).weight.detach()
        a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        learned, start = training.alpha / training.rank * (b @ a), quantized(weight)
        after = quantized(start + learned) - start
        assert row["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-4)
        assert row["quantization_error_norm"] == pytest.approx(float((start - weight).norm()), rel=1e-4)
        assert row["learned_change_norm"] == pytest.approx(float(learned.norm()), rel=1e-4)
        assert row["requantization_error_norm"] == pytest.approx(float((after - learned).norm()), rel=1e-3)
        assert row["share_left"] == pytest.approx(
            float((after * learned).sum() / learned.square().sum()), abs=1e-3
        )
        forms["merged_16bit"][name] = (weight + learned).bfloat16().float()
        forms["merged_dequantized"][name] = (start + learned).bfloat16().float()
        forms["requantized"][name] = start + after
    printed = capsys.readouterr().out
    losses = {
        cells[1].strip(): float(cells[2])
        for cells in (line.split("|") for line in printed.splitlines())
        if len(cells) == 5 and cells[1].strip() in forms
    }
    for form, weights in forms.items():
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        assert losses[form] == pytest.approx(loss_of(model, scored(ROWS)), abs=2e-3), form
    best = min(losses, key=losses.get)
    assert f"Merge into {merge_diagnostic.TARGETS[best]} ({best})" in printed.splitlines()[-1]


def test_sums_over_layers_are_those_of_one_long_vector():
    changes = [
        merge_diagnostic.LayerChange(f"model.layers.{n // 2}.x{n}", 4.0, 9.0, 1.0 + n, 2.0, 0.5)
        for n in range(4)
    ]
    *layers, whole = merge_diagnostic.by_decoder_layer(changes)
    assert [layer.name for layer in layers] == ["0", "1"]
    assert whole.error_share == pytest.approx((36 / 10) ** 0.5) and whole.survival == pytest.approx(2 / 10)


@pytest.mark.parametrize(
    ("variant", "seed", "sentence"),
    [
        ("qlora_nf4_d", 1, "did you mean qlora_nf4_dq"),
        ("lora_16bit", 1, "the base of lora_16bit is not quantized"),
        ("full_16bit", 1, "trained every weight and left no adapter"),
        (NAME, 7, "--seed is 7; experiment.seeds has 1, 2"),
        (NAME, 2, "is missing; `dvc repro train@qlora_nf4_dq-2` makes it"),
    ],
)
def test_a_run_without_a_choice_of_weights_is_refused(workspace, monkeypatch, variant, seed, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(monkeypatch, workspace, merge_diagnostic, "--variant", variant, "--seed", seed)


def test_the_quick_form_measures_the_untrained_bases(workspace, monkeypatch, tmp_path, capsys):
    run(monkeypatch, workspace, quick, "--rows", ROWS, "--precisions", "nf4", "hqq4",
        "--csv", tmp_path / "quick.csv")  # fmt: skip
    table = pd.read_csv(tmp_path / "quick.csv").set_index("base")
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    start = loss_of(plain, scored(ROWS))
    assert table.loc["16 bits", "loss"] == pytest.approx(start, abs=1e-4)
    for layer in plain.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = quantized(layer.weight.data)
    row = table.loc["NF4 + DQ"]
    assert row["gap"] == pytest.approx(loss_of(plain, scored(ROWS)) - start, abs=2e-4)
    assert row["low"] < row["gap"] < row["high"]
    printed = capsys.readouterr().out
    assert "minutes of matrix products or more" in printed and "which was not measured" in printed
    if "HQQ" not in " ".join(table.index):
        assert "needs the package hqq" in printed


@pytest.mark.parametrize(
    ("study", "of_precision"),
    [
        ("reference_study", ("qlora_nf4", "qlora_fp4", "qlora_nf4_dq", "lora_int8")),
        ("study", ("qlora_nf4_dq", "qlora_fp4", "lora_int8_wo")),
        ("curves", ("qlora_nf4_dq",)),
    ],
)
def test_the_ratios_are_those_of_a_studys_scores(study, of_precision):
    """Another computation, from the same items: sums by seed, and a bootstrap over rows with instructions together."""
    ratios = {found.variant: found for found in trained_ratios.trained_ratios() if found.study == study}
    assert set(ratios) == set(of_precision)  # the others differ in more than the precision
    said = (ROOT / "docs/tools.md").read_text(encoding="utf-8")
    for found in ratios.values():
        assert f"`{found.variant}` | {found.value:.3f} ({found.low:.3f} to {found.high:.3f}) |" in said
    items = pd.read_parquet(trained_ratios.STUDIES / study / trained_ratios.ITEMS)
    items = items[(items["task"] == "holdout_loss") & (items["metric"] == "nats_per_token")]
    means = (
        items.groupby(["variant", "form", "item", "group"])["numerator"].mean().unstack(["variant", "form"])
    )
    random = np.random.default_rng(1)
    for name in of_precision[:2]:
        trained = means[name, "as_trained"] - means["lora_16bit", "as_trained"]
        start = means[name, "base"] - means["lora_16bit", "base"]
        assert ratios[name].value == pytest.approx(trained.sum() / start.sum(), rel=1e-9)
        sums = pd.DataFrame({"trained": trained, "start": start}).groupby("group").sum().to_numpy()
        draws = random.integers(len(sums), size=(4000, len(sums)))
        drawn = sums[draws].sum(axis=1)
        low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
        # The study's interval is over seeds as well.
        assert ratios[name].low == pytest.approx(low, abs=0.02)
        assert ratios[name].high == pytest.approx(high, abs=0.02)


def test_an_estimate_has_the_outermost_ends():
    def made_up(precision: str, value: float, low: float, high: float) -> trained_ratios.TrainedRatio:
        quantization = Quantization(False, 64)
        return trained_ratios.TrainedRatio(
            "s", "m", "v", precision, quantization, value, low, high, 0.95, 9, 2
        )

    ratios = [made_up("nf4", 0.5, 0.4, 0.6), made_up("nf4", 0.3, 0.2, 0.35), made_up("fp4", 0.7, 0.5, 0.9)]
    own = trained_ratios.expected(ratios, "nf4", Quantization(False, 64), gap=(0.1, 0.05, 0.2))
    assert (own.value, own.low, own.high, own.is_own) == pytest.approx((0.04, 0.01, 0.12, True))
    other = trained_ratios.expected(ratios, "nf4", Quantization(True, 64), gap=(0.01, -0.1, 0.12))
    assert (other.value, other.low, other.high) == pytest.approx((0.005, -0.09, 0.108)) and not other.is_own


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["nf5"], "nf5 is not a known precision"),
        (["16bit"], "which quantizes no layer"),
        (["fp8"], "can load the base in none of these precisions"),
    ],
)
def test_what_the_quick_form_cannot_load_is_said(workspace, monkeypatch, names, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(monkeypatch, workspace, quick, "--precisions", *names)


def test_missing_rows_are_said_by_both(workspace, monkeypatch, tmp_path):
    shutil.copy(workspace / "params.yaml", tmp_path)
    shutil.copytree(workspace / "results", tmp_path / "results", symlinks=True)
    (tmp_path / split_file("test")).unlink()
    for module, arguments in ((quick, ()), (merge_diagnostic, ("--variant", NAME, "--seed", SEED))):
        with pytest.raises(SystemExit, match="test.jsonl is missing; `dvc repro sample` makes it"):
            run(monkeypatch, tmp_path, module, *arguments)
