"""Learning rates are tried and chosen on validation rows alone, and a training takes the rate that was chosen."""

import csv
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import CPU, ROOT, run_stage_in, write_rows_to_train_on
from edit_params import put, set_training
from ruamel.yaml import YAML

from workflow import params
from workflow.data.rows import as_rows
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, write_json, write_jsonl
from workflow.training import train
from workflow.tuning import choose, tune
from workflow.tuning.records import CandidateResult, Choice

SEEDS = [11, 12]
RATES = {"low": 1e-4, "middle": 1e-2, "high": 2.0}
CANDIDATES = {name: {"variant": "lora_16bit", "learning_rate": rate} for name, rate in RATES.items()}


def asked(**changes) -> dict:
    """Params of the tiny preset: three rates of the baseline, which both variants take."""
    content = YAML(typ="safe", pure=True).load(params.complete_text("tiny"))
    set_training(content, learning_rate="lora_16bit", steps=3, validations=3)
    content["hardware"] |= {"device": "cpu", "compute_dtype": "float32"}
    content["tuning"] = {"candidates": CANDIDATES, "seeds": SEEDS}
    for key, value in changes.items():
        put(key.replace("__", "."), value)(content)
    return content


def write_params(folder: Path, content: dict) -> params.Params:
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    return params.load(folder / "params.yaml")


def run(folder: Path, *arguments: str, fails: bool = False) -> subprocess.CompletedProcess:
    done = run_stage_in(folder, *arguments)
    assert (done.returncode != 0) == fails, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tiny_model, splits, tmp_path_factory) -> Path:
    """A folder without any test row, in which every candidate was tried and the rates were chosen."""
    folder = tmp_path_factory.mktemp("tuned")
    write_params(folder, asked())
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copytree(tiny_model, folder / "results/fetch_model/model")
    write_rows_to_train_on(folder, splits)
    drawn = [{"seed": seed, "rows": as_rows(splits["train"])} for seed in SEEDS]
    write_jsonl(folder / "results/sample/tuning.jsonl", drawn)
    run(folder, "candidates")
    for name in CANDIDATES:
        run(folder, "tune", "--candidate", name)
    run(folder, "rates")
    return folder


def curves(folder: Path, name: str) -> dict[int, list[float]]:
    """A candidate's validation losses by seed, as its curve has them."""
    losses: dict[int, list[float]] = {}
    with (folder / f"results/tune/{name}/validation.csv").open() as file:
        for line in csv.DictReader(file):
            losses.setdefault(int(line["seed"]), []).append(float(line["validation_loss"]))
    return losses


def test_a_result_says_what_it_is_and_agrees_with_its_curve(folder):
    for name, rate in RATES.items():
        result = read_json(folder / f"results/tune/{name}/result.json")
        assert (result["candidate"], result["variant"], result["learning_rate"]) == (name, "lora_16bit", rate)
        assert (result["metric"], result["unit"], result["split"], result["higher_is_better"]) == (
            "validation_loss", "nats per token", "validation", False)  # fmt: skip
        assert [one["seed"] for one in result["runs"]] == SEEDS
        assert result["precision"]["device"] == "cpu" and "torch" in result["versions"]
        by_seed = curves(folder, name)
        for one in result["runs"]:
            losses = by_seed[one["seed"]]
            assert len(losses) == 4 and one["steps"] == 3 and one["tokens_seen"] > 0
            assert (one["validation_loss_before"], one["validation_loss_after"]) == (losses[0], losses[-1])
            assert one["best_validation_loss"] == min(losses)
            assert losses[one["best_step"]] == min(losses)


def test_a_candidate_is_the_training_that_a_run_at_its_rate_would_be(folder, tiny_model, splits, tmp_path):
    settings = params.load(folder / "params.yaml")
    trained = train.train(
        settings.run("lora_16bit", SEEDS[1], learning_rate=RATES["middle"]),
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        folder=tmp_path,
    )
    one = read_json(folder / "results/tune/middle/result.json")["runs"][1]
    assert one["validation_loss_after"] == pytest.approx(trained.validation_loss_after, rel=1e-6)
    assert (one["validation_loss_kept"], one["kept_step"]) == (
        one["validation_loss_after"],
        trained.kept_step,
    )
    assert (one["order_sha256"], one["tokens_seen"]) == (trained.order_sha256, trained.tokens_seen)


def test_no_weights_are_kept_and_no_test_row_is_read(folder):
    assert not (folder / "results/sample/test.jsonl").exists()
    for name in CANDIDATES:
        files = sorted(path.name for path in (folder / f"results/tune/{name}").iterdir())
        assert files == ["result.json", "validation.csv"]
        read = read_json(folder / f"results/tune/{name}/result.json")["inputs"]
        assert "results/sample/validation.jsonl" in read["deps"]
        assert not any("test" in Path(path).name for path in read["deps"])
        assert read["params"][f"tuning.candidates.{name}"] == CANDIDATES[name]


def test_the_lowest_mean_loss_is_chosen(folder):
    means = {name: sum(c[-1] for c in curves(folder, name).values()) / len(SEEDS) for name in RATES}
    first, second, _ = sorted(means, key=means.get)
    record = read_json(folder / "results/rates/choices.json")
    choice = record["choices"]["lora_16bit"]
    assert (choice["chosen"], choice["learning_rate"], choice["runner_up"]) == (first, RATES[first], second)
    assert choice["margin"] == pytest.approx(means[second] - means[first])
    assert [one["learning_rate"] for one in choice["candidates"]] == sorted(RATES.values())
    assert record["seeds"] == SEEDS and record["unit"] == "nats per token"
    for variant in ("lora_16bit", "qlora_nf4_dq"):
        assert record["variants"][variant]["tuned_for"] == "lora_16bit"
        file = read_json(folder / f"results/rates/variants/{variant}.json")
        assert file == {"variant": variant, "learning_rate": RATES[first]}


def test_a_training_takes_the_chosen_rate_and_records_it(folder):
    chosen = read_json(folder / "results/rates/variants/lora_16bit.json")["learning_rate"]
    run(folder, "train", "--variant", "qlora_nf4_dq", "--seed", "1")
    trained = folder / "results/train/qlora_nf4_dq/1"
    assert read_json(trained / "result.json")["learning_rate"] == chosen
    with (trained / "history.csv").open() as file:
        assert max(float(line["learning_rate"]) for line in csv.DictReader(file)) == pytest.approx(chosen)


def test_a_benchmark_runs_before_a_rate_is_chosen(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("rates", "tune"))
    run(copy, "benchmark", "--variant", "lora_16bit")
    assert (copy / "results/benchmark/lora_16bit/result.json").is_file()
    said = run(copy, "train", "--variant", "lora_16bit", "--seed", "1", fails=True).stderr
    assert "results/rates/variants/lora_16bit.json is missing" in said


def test_a_name_that_is_no_candidate_is_one_sentence(folder):
    said = run(folder, "tune", "--candidate", "lower", fails=True).stderr
    assert "lower is not a candidate; tuning.candidates has low, middle, high." in said
    assert "Traceback" not in said


def made_up(name: str, rate: float, *losses: float | None) -> CandidateResult:
    return CandidateResult.model_validate(
        {"candidate": name, "variant": "lora_16bit", "learning_rate": rate,
         "runs": [{"seed": seed, "diverged": None if loss else "the training loss is not finite",
                   "validation_loss_before": 3.0, "validation_loss_after": loss, "validation_loss_kept": loss,
                   "kept_step": 3, "best_validation_loss": loss,
                   "best_step": 3, "steps": 3, "tokens_seen": 9, "order_sha256": "", "seconds": 1.0}
                  for seed, loss in enumerate(losses, start=11)]}
    )  # fmt: skip


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """Writes made-up candidates of the baseline; returns how the choice among them came out."""
    monkeypatch.chdir(tmp_path)

    def choice_among(*candidates: CandidateResult) -> Choice:
        for each in candidates:
            write_json(Path("results/tune") / each.candidate / "result.json", each.model_dump())
        listed = {
            each.candidate: {"variant": each.variant, "learning_rate": each.learning_rate}
            for each in candidates
        }
        settings = write_params(tmp_path, asked(tuning__candidates=listed))
        return choose.choose(settings).choices["lora_16bit"]

    return choice_among


def test_the_mean_over_the_seeds_decides_and_not_the_best_seed(tried):
    choice = tried(made_up("a", 1e-4, 2.0, 2.6), made_up("b", 1e-3, 2.2, 2.2), made_up("c", 1e-2, 2.4, 2.4))
    assert (choice.chosen, choice.runner_up, choice.end, choice.warning) == ("b", "a", None, None)
    assert choice.margin == pytest.approx(0.1)


def test_a_choice_at_an_end_of_the_tried_rates_says_so(tried):
    low = tried(made_up("a", 1e-4, 2.0, 2.0), made_up("b", 1e-3, 2.2, 2.2))
    assert low.warning == "0.0001 is the lowest rate that was tried for lora_16bit: a lower one may be better"
    high = tried(made_up("a", 1e-4, 2.4, 2.4), made_up("b", 1e-3, 2.2, 2.2))
    assert (
        high.warning == "0.001 is the highest rate that was tried for lora_16bit: a higher one may be better"
    )


def test_a_rate_that_diverges_with_one_seed_is_not_chosen(tried):
    choice = tried(made_up("a", 1e-4, 2.4, 2.4), made_up("b", 1e-3, 2.2, 2.2), made_up("c", 1e-2, 1.9, None))
    assert (choice.chosen, choice.runner_up, choice.end) == ("b", "a", None)
    with pytest.raises(UserError, match=r"every candidate of lora_16bit diverged \(0.001, 0.01\): add lower"):
        tried(made_up("b", 1e-3, None, 2.0), made_up("c", 1e-2, None, None))


def test_a_candidate_that_was_not_tried_is_missed_by_name(tried, tmp_path):
    with pytest.raises(UserError, match=r"results/tune/low/result.json is missing"):
        choose.choose(write_params(tmp_path, asked()))


def test_without_candidates_the_rates_are_those_of_params(tried, tmp_path):
    content = asked(tuning__candidates={})
    set_training(content, learning_rate=0.003)
    content["experiment"]["variants"].append("full_16bit")
    rates = choose.choose(write_params(tmp_path, content))
    assert rates.choices == {}
    assert {name: rate.learning_rate for name, rate in rates.variants.items()} == {
        "lora_16bit": 0.003, "qlora_nf4_dq": 0.003, "full_16bit": 1e-4}  # fmt: skip
    assert {rate.tuned_for for rate in rates.variants.values()} == {None}


def test_an_arm_at_its_own_best_is_a_variant_that_names_another(tried, tmp_path):
    content = asked()
    own = {f"nf4_{name}": {"variant": "qlora_nf4_dq", "learning_rate": rate} for name, rate in RATES.items()}
    content["tuning"]["candidates"] |= own
    content["variants"]["own_rate"] = content["variants"]["qlora_nf4_dq"] | {
        "training": {"learning_rate": "qlora_nf4_dq"}
    }
    content["experiment"]["variants"].append("own_rate")
    for name, losses in {"low": (2, 3), "middle": (1, 4), "high": (3, 2)}.items():
        for prefix, loss in zip(("", "nf4_"), losses, strict=True):
            each = made_up(f"{prefix}{name}", RATES[name], loss, loss)
            write_json(Path(f"results/tune/{prefix}{name}/result.json"), each.model_dump())
    rates = choose.choose(write_params(tmp_path, content)).variants
    assert [rates[name].learning_rate for name in ("lora_16bit", "qlora_nf4_dq", "own_rate")] == [
        1e-2,
        1e-2,
        2.0,
    ]
    assert rates["own_rate"].tuned_for == "qlora_nf4_dq"


def test_a_training_that_is_not_finite_counts_as_diverged(tiny, tiny_model, splits):
    candidate = params.Candidate.model_construct(variant="full_16bit", learning_rate=1e30)
    tuning = params.Tuning.model_construct(candidates={"wild": candidate}, seeds=[11])
    training = tiny.training.model_copy(update={"max_gradient_norm": 1e30, "steps": 3})
    settings = tiny.model_copy(update={"tuning": tuning, "training": training, "hardware": CPU})
    runs, curve, _ = tune.try_candidate(
        settings, "wild", model_folder=tiny_model, train_rows={11: splits["train"]},
        validation_rows=splits["validation"],
    )  # fmt: skip
    assert "not finite" in runs[0].diverged and runs[0].validation_loss_after is None
    assert runs[0].validation_loss_before == curve["validation_loss"].iloc[0] > 0
