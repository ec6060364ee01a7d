"""All problems of params.yaml stand below each other, a line each, the misspelled keys first."""

import copy

import pytest
from conftest import ROOT
from edit_params import error_of, set_variants
from ruamel.yaml import YAML

from workflow import params


@pytest.fixture(scope="module")
def default() -> dict:
    return YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())


@pytest.fixture
def problems(default, tmp_path):
    """The lines with which `load` refuses the default params after a change, without the first, which counts them."""

    def load(change) -> list[str]:
        content = copy.deepcopy(default)
        change(content)
        path = tmp_path / "params.yaml"
        head, *lines = error_of(path, content).split("\n  ")
        if not lines:
            return [head.removeprefix(f"{path}: ")]
        assert head == f"{path} has {len(lines)} problems:"
        return lines

    return load


def rename(section: dict, key: str, name: str) -> None:
    section[name] = section.pop(key)


def test_a_misspelled_key_is_said_once_and_first(problems):
    def change(content):
        content["experiment"]["seeds"] = []
        rename(content["training"]["schedule"], "learning_rate", "learning_rat")
        content["benchmark"]["steps"] = 1

    first, *others = problems(change)
    assert first == "training.schedule.learning_rat is not a key; did you mean learning_rate?"
    assert [line.split(" is ")[0] for line in others] == ["experiment.seeds", "benchmark.steps"]


def test_a_misspelled_section_is_read_as_the_one_that_it_stands_for(problems):
    def change(content):
        rename(content["sample"], "seed", "sed")
        content["sample"]["test_rows"] = 990
        rename(content, "sample", "sampel")
        rename(content["model"], "source", "sorce")

    assert problems(change) == [
        "model.sorce is not a key; did you mean source?",
        "sampel is not a key; did you mean sample?",
        "sample.sed is not a key; did you mean seed?",
        "sample.validation_rows + test_rows is 1030, which must be below rows (1000).",
    ]


def test_sections_that_are_sound_are_checked_against_each_other_beside_a_damaged_one(problems):
    def change(content):
        content["comparison"]["resamples"] = 3
        content["hardware"]["device"] = "gpu"
        content["comparison"]["primary"] = "piqa/acc"
        content["training"]["step"]["rank"] = "16"
        content["training"]["schedule"]["epochs"] = 3.0
        content["training"]["schedule"]["micro_batch_rows"] = 5
        content["variants"]["qlora_nf4"]["training"] = {"dropout": 7, "ranks": 8}

    keys = [line.split(" ")[0] for line in problems(change)]
    assert keys == [
        "hardware.device",
        "training.step.rank",
        "training.schedule.epochs",
        "training.schedule.batch_rows",
        "comparison.resamples",
        "comparison.primary",
        "variants.qlora_nf4.training.dropout",
        "variants.qlora_nf4.training.ranks",
    ]


def test_a_check_whose_keys_are_damaged_waits(problems):
    """What the experiment names cannot be held against variants that are not known."""

    def change(content):
        content["variants"] = {"lora_16bit": 1}
        content["experiment"]["baseline"] = "nothing"

    assert [line.split(" is ")[0] for line in problems(change)] == ["variants.lora_16bit"]


def test_a_key_in_the_wrong_place_is_told_where_it_stands(problems):
    def change(content):
        content["training"]["learning_rate"] = content["training"]["schedule"].pop("learning_rate")

    assert problems(change) == [
        "training.learning_rate is not a known key; known here are step, schedule (did you mean schedule.learning_rate?).",
        "training.schedule.learning_rate is missing.",
    ]


def test_a_misspelled_task_is_said_once(problems):
    def change(content):
        rename(content["evaluation"]["tasks"], "holdout_loss", "holdout_los")

    assert problems(change) == [
        "evaluation.tasks names holdout_los, and there is holdout_loss; one of the two is misspelled."
    ]


def test_keys_of_another_source_are_unknown(problems):
    def change(content):
        content["model"]["revision"] = "0" * 40

    (line,) = problems(change)
    assert (
        line.startswith("model.revision is not a known key")
        and "package, version" in line
        and ", layers," not in line
    )


def test_a_word_or_a_list_is_told_as_both(problems):
    def change(content):
        content["training"]["step"]["target_modules"] = "all-linea"

    assert problems(change) == [
        "training.step.target_modules is \"all-linea\": input should be 'all-linear' or a list."
    ]


def test_a_variant_that_does_not_run_may_not_fit_the_shared_params(default, tmp_path):
    content = copy.deepcopy(default)
    content["training"]["step"]["initialization"] = "pissa"  # which a quantized base does not allow
    set_variants(content, ["lora_16bit"])
    path = tmp_path / "params.yaml"
    with path.open("w") as file:
        YAML().dump(content, file)
    assert params.load(path).training.initialization == "pissa"
