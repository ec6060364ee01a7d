"""A base that is cut and healed learns from rows that no split of its study has, and says what was done to it."""

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
from plain_loss import plain_loss
from transformers import AutoModelForCausalLM

from workflow import params
from workflow.data.near_duplicates import jaccard
from workflow.data.rows import Instruction, as_rows, from_rows, from_scored_rows, normal
from workflow.fetch import sources
from workflow.params import editing
from workflow.runtime import gpus
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, read_jsonl, write_json, write_jsonl
from workflow.runtime.paths import (
    INSTRUCTIONS,
    MODEL,
    MODEL_SOURCE,
    PARAMS,
    TUNING_ROWS,
    split_file,
    train_rows_file,
)
from workflow.stages.sample import sample
from workflow.tools import mechanism
from workflow.tools.healing import heal, unused_rows

HEALING = {
    "method": "full", "precision": "16bit", "double_quantization": False, "block_size": None, "layers_in_16_bits": [],
    "compute_dtype": None, "processes": 1, "training": {"epochs": 3, "steps": None, "learning_rate": 0.003},
}  # fmt: skip
COLORS = ("red", "green", "blue", "black")


def dataset() -> list[Instruction]:
    """300 rows; of six, one repeats the instruction before it in capitals, and one repeats all but its last letters."""
    rows: list[Instruction] = []
    for number in range(300):
        text = f"What is the {hashlib.sha256(str(number).encode()).hexdigest()[:40]}?"
        if number % 6 == 1:
            text = rows[-1].instruction.upper()
        if number % 6 == 2:
            text = f"{rows[-2].instruction[:-3]}xy?"
        rows.append(
            Instruction(
                number, text, "", f"This is the answer {number}. " * (1 + number % 3), COLORS[number % 4]
            )
        )
    return rows


def params_text() -> str:
    text = params.complete_text("tiny")
    changes = {
        "per_seed": True,
        "rows": 25,
        "validation_rows": 8,
        "test_rows": 20,
        "held_out_categories": ["red"],
    }
    for key, value in changes.items():
        text = editing.with_value(text, "sample", key, value)
    text = editing.with_value(text, "tuning", "seeds", [101, 102])
    text = editing.with_value(text, "hardware", "device", "cpu")
    return editing.with_value(text, "variants", "healing", HEALING)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """The folder of a study of the tiny model, up to its stage `sample`."""
    folder = tmp_path_factory.mktemp("studies") / "made_up"
    with pytest.MonkeyPatch.context() as patch:
        (folder / MODEL).mkdir(parents=True)
        patch.chdir(folder)
        PARAMS.write_text(params_text())
        write_json(MODEL_SOURCE, sources.fetch_model(params.load().model, MODEL))
        write_jsonl(INSTRUCTIONS, as_rows(dataset()))
        sample()
    return folder


@pytest.fixture(scope="module")
def healed(study) -> Path:
    """The folder in which bases of all four layers and of two are healed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study.parent)
        patch.setattr(mechanism, "STUDIES", Path())
        run(
            patch,
            "heal",
            study.name,
            "--layers",
            4,
            2,
            "--variants",
            "lora_16bit",
            "qlora_nf4_dq",
            "qlora_fp4",
        )
    return study.parent


def run(patch, *arguments: object) -> None:
    patch.setattr(sys, "argv", ["mechanism", *map(str, arguments)])
    mechanism.main()


def rows_of_all_splits(study: Path) -> dict[str, list[Instruction]]:
    splits = {str(seed): from_rows(read_jsonl(study / train_rows_file(seed))) for seed in (1, 2)}
    splits |= {f"tuning {line['seed']}": from_rows(line["rows"]) for line in read_jsonl(study / TUNING_ROWS)}
    splits["validation"] = from_rows(read_jsonl(study / split_file("validation")))
    splits["test"] = from_scored_rows(read_jsonl(study / split_file("test")))
    return splits


def grams(row: Instruction) -> set[str]:
    text = normal(row.instruction)
    return {text[start : start + 5] for start in range(len(text) - 4)}


def test_no_healed_row_and_no_twin_of_one_is_in_a_split_of_any_seed(study):
    rows = unused_rows(study, params.load(study / PARAMS).sample)
    splits = rows_of_all_splits(study)
    assert splits.keys() == {"1", "2", "tuning 101", "tuning 102", "validation", "test"}
    assert any(row.category == "red" for row in splits["test"]) and all(row.category != "red" for row in rows)
    for split_rows in splits.values():
        assert len(split_rows) >= 5
        assert not {row.id for row in rows} & {row.id for row in split_rows}
        assert not {normal(row.instruction) for row in rows} & {normal(row.instruction) for row in split_rows}
        assert max(jaccard(grams(one), grams(other)) for one in rows for other in split_rows) < 0.7
    used = [row for split_rows in splits.values() for row in split_rows]

    def has_twin(row: Instruction) -> bool:
        return any(jaccard(grams(row), grams(other)) >= 0.7 for other in used)

    # What remains is all that is left over.
    left = [row for row in dataset() if row.category != "red" and not has_twin(row)]
    assert {row.id for row in rows} == {row.id for row in left} and len(left) > 40


def test_healing_lowers_the_loss_on_rows_of_no_training(study, healed, tmp_path):
    test = rows_of_all_splits(study)["test"]
    settings = params.load(study / PARAMS)
    losses = {}
    for layers in (4, 2):
        cut = tmp_path / f"cut_{layers}"
        cut.mkdir()
        kept = None if layers == 4 else layers
        sources.fetch_model(settings.model.model_copy(update={"kept_layers": kept}), cut)
        for name, folder in (("cut", cut), ("healed", healed / f"{layers}_layers")):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            assert len(model.model.layers) == layers
            losses[name] = plain_loss(model, folder, test)
        assert losses["healed"] < losses["cut"] - 1
        assert sorted(path.name for path in (healed / f"{layers}_layers" / "training").iterdir()) == [
            "history.csv", "result.json", "validation.csv",
        ]  # fmt: skip
        record = read_json(healed / f"{layers}_layers" / "config.json")["cut_and_healed"]["healed"]
        assert record["validation_loss_after"] < record["validation_loss_before"] - 1


def test_the_params_of_a_healed_base_are_those_of_the_study_and_its_model_says_what_it_is(
    study, healed, tmp_path, monkeypatch
):
    monkeypatch.chdir(healed)
    rows = unused_rows(study, params.load(study / PARAMS).sample)
    before = params.load(study / PARAMS)
    for layers, cut in ((4, None), (2, {"layers": 2, "of": 4, "dropped": [1, 2]})):
        settings = params.load(Path(f"healed_{layers}.yaml"))
        assert settings.experiment.variants == ["lora_16bit", "qlora_nf4_dq", "qlora_fp4"]
        asked = {"model": before.model, "experiment": before.experiment}
        assert settings.model_copy(update=asked) == before
        fetched = tmp_path / str(layers)
        fetched.mkdir()
        source = sources.fetch_model(settings.model, fetched)
        assert source["cut"] == cut and settings.model.path == f"{layers}_layers"
        steps = 3 * -(-len(rows) // 4)
        expected = {
            "variant": "healing",
            "rows": len(rows),
            "steps": steps,
            "seed": 1,
            "learning_rate": 0.003,
        }
        assert source["healed"].items() >= expected.items()
        assert sorted(file.name for file in fetched.glob("*.json")) == sorted(
            file.name for file in (study / MODEL).glob("*.json")
        )
        card = (Path(f"{layers}_layers") / "README.md").read_text()
        assert f"healed by full training on {len(rows)} rows" in card
        assert ("cut from 4 decoder layers to 2" in card) == (layers == 2)


def test_a_base_that_was_healed_just_so_is_left_as_it_is(study, healed, monkeypatch, capsys):
    monkeypatch.chdir(healed)
    file = healed / "2_layers" / "model.safetensors"
    before = file.stat().st_mtime_ns
    heal(Path(study.name), variant="healing", layers=[2], folder=Path())
    assert file.stat().st_mtime_ns == before
    assert "2_layers is healed already" in capsys.readouterr().out


def test_it_computes_on_one_gpu_of_two(tmp_path, monkeypatch):
    """With both visible, transformers would split every batch among them, and TRL refuses that."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["mechanism", "heal", "studies/made_up", "--layers", "2"])
    monkeypatch.setattr(gpus, "visible", lambda: [gpus.Gpu(name, name) for name in ("GPU-aa", "GPU-bb")])
    monkeypatch.setattr(gpus, "lock_folder", lambda: tmp_path)
    monkeypatch.setenv(gpus.VISIBLE, "GPU-aa,GPU-bb")
    monkeypatch.setattr(mechanism, "heal", lambda *_, **__: seen.append(os.environ[gpus.VISIBLE]) or [])
    mechanism.main()
    assert seen == ["GPU-aa"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": [2, 5]}, r"^--layers asks for 5, and the base of the study has 4\.$"),
        ({"compared": ["qlora_fp4"]}, r"experiment\.baseline is lora_16bit"),
        ({"compared": ["lora_16bit", "qlora_nf5"]}, r"experiment\.variants.* qlora_nf5"),
        ({"variant": "heal"}, r"^heal is not a variant of the study \(did you mean healing\?\)"),
        ({"variant": "lora_16bit"}, r"^lora_16bit trains .*: its method must be full\.$"),
    ],
)
def test_what_cannot_be_healed_is_refused_before_any_training(study, change, words, tmp_path):
    with pytest.raises(UserError, match=words):
        heal(study, **({"variant": "healing", "layers": [2], "folder": tmp_path} | change))
    assert not list(tmp_path.iterdir())


def test_a_study_without_a_sample_is_refused(study, tmp_path):
    (tmp_path / MODEL).mkdir(parents=True)
    (tmp_path / PARAMS).write_text((study / PARAMS).read_text())
    with pytest.raises(UserError, match="fetch_model/model is missing"):
        heal(tmp_path, variant="healing", layers=[2], folder=tmp_path)
    (tmp_path / MODEL / "config.json").write_text((study / MODEL / "config.json").read_text())
    with pytest.raises(UserError, match="sample/train is missing"):
        heal(tmp_path, variant="healing", layers=[2], folder=tmp_path)
