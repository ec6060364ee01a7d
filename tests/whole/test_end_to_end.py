"""The real pipeline, nothing stubbed, from a clean clone: by DVC, by Snakemake, on a real model."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from edit_params import set_training
from real_pipeline import NETWORK, TINY, clone, comparison, run
from ruamel.yaml import YAML

from workflow.engine import publish, study


@pytest.fixture(scope="module")
def by_dvc(warm_python, tmp_path_factory) -> Path:
    folder = clone(tmp_path_factory.mktemp("dvc"), TINY)
    warm_python.enter(folder)
    run(folder, "dvc", "repro")
    return folder


@pytest.fixture(scope="module")
def by_snakemake(warm_python, tmp_path_factory) -> Path:
    folder = clone(tmp_path_factory.mktemp("snakemake"), TINY)
    warm_python.enter(folder)
    run(folder, "snakemake", "--cores", "2", "report")
    return folder


@pytest.mark.parametrize("engine", ["by_dvc", "by_snakemake"])
def test_either_engine_makes_the_report_and_the_other_has_nothing_to_do(engine, request):
    folder = request.getfixturevalue(engine)
    assert (folder / "report/index.html").stat().st_size > 10_000
    assert "up to date" in run(folder, "dvc", "status")
    assert "Nothing to be done" in run(folder, "snakemake", "--cores", "1", "report")
    assert "Data and pipelines are up to date" in run(folder, "dvc", "repro")


def test_both_engines_give_the_same_numbers(by_dvc, by_snakemake):
    for part in ("scores", "contrasts", "decomposition"):
        assert comparison(by_dvc)[part] == comparison(by_snakemake)[part] != []
    adapters = [
        {
            path.parent.parent: path.read_bytes()
            for path in sorted((folder / "results").rglob("adapter_model.safetensors"))
        }
        for folder in (by_dvc, by_snakemake)
    ]
    assert list(adapters[0].values()) == list(adapters[1].values()) and len(adapters[0]) == 2


def test_every_number_says_what_it_is(by_dvc):
    for score in comparison(by_dvc)["scores"]:
        assert all(
            score[key] for key in ("variant", "form", "task", "metric", "unit", "split", "subset", "items")
        )
        assert set(score["per_seed"]) == (set() if score["form"] == "base" else {"1"})
    for precision in comparison(by_dvc)["precisions"].values():
        assert all(precision[key] for key in ("device", "device_name", "storage", "compute"))


def test_every_form_of_every_run_is_scored_and_compared(by_dvc):
    forms = {
        "lora_16bit": {"base", "as_trained", "merged_16bit"},
        "qlora_nf4_dq": {"base", "as_trained", "merged_16bit", "merged_dequantized", "requantized"},
    }
    for variant, expected in forms.items():
        assert {s["form"] for s in comparison(by_dvc)["scores"] if s["variant"] == variant} == expected
    verdicts = {c["verdict"] for c in comparison(by_dvc)["contrasts"]}
    assert verdicts <= {"equivalent", "worse", "better", "undecided"}
    assert {claim["claim"] for claim in comparison(by_dvc)["claims"]} == {"a", "b", "c", "d"}


def test_a_finished_run_is_packed_checked_and_published(by_dvc, tmp_path, monkeypatch):
    study.record_environment(by_dvc, study="tiny")
    study.pack(by_dvc, tmp_path / "tiny.tar.gz")
    assert (tmp_path / "tiny.tar.gz").stat().st_size < 2**20
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    publish.publish("tiny", Path("tiny.tar.gz"))
    table = pd.read_csv(tmp_path / "results/studies/tiny/summary.csv").set_index(
        ["variant", "form", "metric"]
    )
    value = table.loc[("qlora_nf4_dq", "as_trained", "nats_per_token"), "value"]
    assert re.search(rf"\| `qlora_nf4_dq` +\| +{value:.3f} \|", (tmp_path / "README.md").read_text())


# Executes the code of cards, and prints the held-out loss of what each loaded, by nothing of ours.
HELD_OUT_LOSS = """
import json
import sys

import torch


def loss(model, tokenizer):
    nats = tokens = 0
    for row in map(json.loads, open("results/sample/test.jsonl")):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        # The harness counts the newline that ends the prompt to the nats of the response, not to its tokens.
        start = len(tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"])
        ids = tokenizer(prompt + row["response"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1].double()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
        tokens += len(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
    return nats / tokens


found = []
for code in json.load(open("codes.json")):
    names = {}
    exec(code, names)
    found.append(loss(names["model"], names["tokenizer"]))
print("losses", json.dumps(found))
"""
CARD, BESIDE, SAVED = (
    "results/cards/{}/1/README.md",
    "results/train/{}/1/weights/README.md",
    "saved/{}/README.md",
)
CARDS = {
    ("lora_16bit", "as_trained", CARD): CARD.format("lora_16bit"),
    ("qlora_nf4_dq", "as_trained", CARD): CARD.format("qlora_nf4_dq"),
    ("qlora_nf4_dq", "as_trained", BESIDE): BESIDE.format("qlora_nf4_dq"),
    ("qlora_nf4_dq", "merged_16bit", SAVED): SAVED.format("merged_16bit"),
    ("qlora_nf4_dq", "requantized", SAVED): SAVED.format("requantized"),
}


@pytest.fixture(scope="module")
def losses(by_dvc) -> dict[tuple, float]:
    """What the code of each card gives, by variant, form and kind of card; the commands are those of the card."""
    card = (by_dvc / CARD.format("qlora_nf4_dq")).read_text()
    for form in ("merged_16bit", "requantized"):
        command = re.search(rf"`python (.*--form {form} .*)` +\|", card)[1]
        said = run(by_dvc, "python", *command.replace("FOLDER", f"saved/{form}").split())
        size = sum(file.stat().st_size for file in (by_dvc / "saved" / form).iterdir()) / 1e9
        assert f"saved/{form}: {size:.3g} GB, qlora_nf4_dq, seed 1, as {form}. To load it:" in said
    codes = []
    for path in CARDS.values():
        (code,) = re.findall(r"```python\n(.*?)```", (by_dvc / path).read_text(), re.DOTALL)
        codes.append(re.sub(r'^folder = "(\w+)"', r'folder = "saved/\1"', code, flags=re.MULTILINE))
    (by_dvc / "codes.json").write_text(json.dumps(codes))
    (by_dvc / "losses.py").write_text(HELD_OUT_LOSS)
    said = run(by_dvc, "python", "losses.py")
    found = json.loads(re.search(r"^losses (.*)$", said, re.MULTILINE)[1])
    return dict(zip(CARDS, found, strict=True))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: " ".join(map(str, card[:2])))
def test_the_code_of_a_card_gives_the_number_beside_it(by_dvc, losses, card):
    variant, form, kind = card
    expected = {
        s["form"]: s["value"]
        for s in comparison(by_dvc)["scores"]
        if (s["variant"], s["metric"], s["subset"]) == (variant, "nats_per_token", "all")
    }
    assert losses[card] == pytest.approx(expected[form], abs=5e-6)
    others = [value for other, value in expected.items() if other != form]
    assert all(abs(losses[card] - value) > 1e-5 for value in others)
    text, shown = (by_dvc / CARDS[card]).read_text(), f"{losses[card]:.4f}"
    assert kind == BESIDE or re.search(rf"\| +{shown} +\|", text)
    if kind == SAVED:
        assert re.search(rf"\| +{shown} +\| .*--form {form} ", (by_dvc / CARD.format(variant)).read_text())


def test_an_adapter_is_published_with_the_card_that_has_its_numbers(by_dvc):
    run(by_dvc, "python", "-m", "workflow.save_served", "--variant", "qlora_nf4_dq", "--seed", "1",
        "--form", "as_trained", "--to", "saved/adapter")  # fmt: skip
    weights, saved = by_dvc / "results/train/qlora_nf4_dq/1/weights", by_dvc / "saved/adapter"
    names = {file.name for file in weights.iterdir()}
    assert names == {file.name for file in saved.iterdir()} > {"tokenizer.json", "chat_template.jinja"}
    assert (saved / "README.md").read_text() == (
        by_dvc / "results/cards/qlora_nf4_dq/1/README.md"
    ).read_text()
    for name in names - {"README.md"}:
        assert (saved / name).read_bytes() == (weights / name).read_bytes()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("results/fetch_model/model", "results belongs to the pipeline's stages; name another folder"),
        ("workflow", "holds something else than a model; name a new folder"),
        ("params.yaml", "which is a file; name a folder"),
    ],
)
def test_a_saved_model_replaces_nothing_but_a_saved_model(by_dvc, place, sentence):
    said = run(by_dvc, "python", "-m", "workflow.save_served", "--variant", "qlora_nf4_dq", "--seed", "1",
               "--form", "merged_16bit", "--to", place, fails=True)  # fmt: skip
    assert said.startswith(f"save_served: --to is {place}, ") and sentence in said
    assert (by_dvc / place).exists() and "Traceback" not in said


def test_the_curves_are_plots_of_dvc(by_dvc):
    run(by_dvc, "dvc", "plots", "show", "--out", "plots")
    page = (by_dvc / "plots/index.html").read_text()
    assert "Training loss of lora_16bit, seed 1" in page and "Validation loss of qlora_nf4_dq, seed 1" in page


def test_another_seed_trains_only_what_is_new(by_dvc):
    before = {p: p.stat().st_mtime_ns for p in (by_dvc / "results").rglob("adapter_model.safetensors")}
    yaml = YAML()
    content = yaml.load((by_dvc / "params.yaml").read_text())
    content["experiment"]["seeds"] = [1, 2]
    with (by_dvc / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    said = run(by_dvc, "dvc", "repro")
    ran = set(re.findall(r"Running stage '([^']+)'", said))
    assert ran == {
        f"{stage}@{variant}-2"
        for stage in ("train", "evaluate")
        for variant in ("lora_16bit", "qlora_nf4_dq")
    } | {
        "divergence@lora_16bit-lora_16bit-2",
        "divergence@qlora_nf4_dq-lora_16bit-2",
        "sample",
        "compare",
        "report",
    }
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    assert comparison(by_dvc)["seeds"] == [1, 2]


def test_the_default_model_and_data(warm_python, tmp_path):
    """The embedded default at a reduced size: real weights, real rows, from the package index."""

    def smaller(content: dict) -> None:
        content["experiment"]["seeds"] = [1, 2]
        content["sample"] |= {"rows": 60, "validation_rows": 4, "test_rows": 10}
        set_training(content, steps=3, batch_rows=4, micro_batch_rows=4, max_length=96)
        content["sample"]["held_out_categories"] = []
        content["evaluation"]["answer_tokens"] = 8
        content["evaluation"]["forms"] = ["as_trained", "requantized"]
        few = {"items": 2, "few_shot": 0, "chat_template": True, "files": None}
        content["evaluation"]["tasks"] |= {"response_choice": few, "holdout_generation": dict(few)}
        content["evaluation"]["tasks"]["holdout_loss"]["items"] = None
        content["benchmark"] |= {"micro_batch_rows": 2, "warmup_steps": 0, "steps": 3}

    folder = clone(tmp_path, (ROOT / "params.yaml").read_text(), smaller)
    warm_python.enter(folder)
    run(folder, "dvc", "repro")
    found = comparison(folder)
    assert found["precisions"]["qlora_nf4_dq"]["quantized_modules"] == 7 * 30
    assert found["precisions"]["lora_16bit"]["quantized_modules"] == 0
    losses = {
        s["variant"]: s["value"]
        for s in found["scores"]
        if (s["form"], s["metric"], s["subset"]) == ("base", "nats_per_token", "all")
    }
    assert all(1 < loss < 4 for loss in losses.values())  # of random weights it is 10.8
    assert losses["qlora_nf4_dq"] > losses["lora_16bit"]
    assert "SmolLM2-135M-Instruct" in (folder / "report/index.html").read_text()


@pytest.mark.parametrize(
    ("section", "key", "value", "sentence"),
    [
        ("sample", "rows", 5000, "sample: failed: sample.rows asks for 5000 rows, and the dataset has 2026."),
        ("dataset", "sha256", "0" * 64, "nothing was used from it."),
        ("training", "ranc", 3, "params.yaml: training.ranc is not a known key"),
        ("experiment", "variants", ["lora_16bit", "qlora"], "names qlora, which variants does not define"),
    ],
)
def test_a_mistake_stops_the_run_and_leaves_nothing_half_written(tmp_path, section, key, value, sentence):
    folder = clone(tmp_path, TINY, lambda content: content[section].update({key: value}))
    said = run(folder, "dvc", "repro", "sample", fails=True)
    if "pip could not download" in said:
        pytest.skip(NETWORK)
    assert sentence in said and "Traceback" not in said
    assert not [path for path in folder.rglob("results/**/.*") if path.name != ".gitignore"]
    assert not (folder / "results/sample/test.jsonl").exists()
