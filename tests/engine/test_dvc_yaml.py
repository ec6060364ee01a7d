"""dvc.yaml names what its stages really read and write."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from workflow import params
from workflow.params.training import TrainingSchedule
from workflow.runtime import environment, paths
from workflow.stages.train import DECIDING_ROOMS

STAGES = {
    name: stage.get("do", stage)  # of a stage for each entry of a mapping, what each does
    for name, stage in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"].items()
}

# What every stage uses and no number depends on: how files are written, what the terminal shows and says, how long a
# process lives, where things lie, which versions are recorded, whether what is read is what was written, and the check of
# params.yaml, whose values DVC tracks key by key.
PLUMBING = (ROOT / "workflow", ROOT / "workflow/runtime", ROOT / "workflow/params")
NO_PLUMBING = {ROOT / "workflow/runtime/environment.py", ROOT / "workflow/runtime/git.py"}


def names(stage: str, kind: str) -> list[str]:
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in STAGES[stage].get(kind, [])]


def outputs(stage: str) -> list[str]:
    return [name for kind in ("outs", "metrics", "plots") for name in names(stage, kind)]


def decides(path: Path) -> bool:
    """Whether a number may depend on this file of code: not if a room says there what it is for, and no more."""
    if not path.is_file() or (path not in NO_PLUMBING and path.parent in PLUMBING):
        return False
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


def imported(module: Path) -> set[Path]:
    """The project's modules that this one imports, directly and through others, plumbing left out."""
    found, pending = set(), [module]
    while pending:
        new = directly_imported(pending.pop()) - found
        found |= new
        pending += new
    return found


def directly_imported(module: Path) -> set[Path]:
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "workflow":
            parts = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            parts = [alias.name for alias in node.names if alias.name.startswith("workflow.")]
        else:
            continue
        for part in parts:
            place = ROOT / part.replace(".", "/")
            found.update(path for path in (place.with_suffix(".py"), place / "__init__.py") if decides(path))
    return found


def test_a_checkpoint_belongs_to_the_code_of_every_room_that_decides_a_training():
    code = ROOT / "workflow"
    rooms = {path.relative_to(code).parts[0] for path in imported(code / "stages/train.py")}
    assert rooms == set(DECIDING_ROOMS)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_code_that_makes_its_numbers(stage):
    door = ROOT / "workflow" / "stages" / f"{stage}.py"
    needed = {str(path.relative_to(ROOT)) for path in {door, *imported(door)}}
    tracked = names(stage, "deps")
    missing = {
        path for path in needed if not any(path == dep or path.startswith(f"{dep}/") for dep in tracked)
    }
    assert not missing


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_says_what_it_is_and_what_it_needs(stage):
    asked = STAGES[stage]
    assert asked["desc"] and asked["cmd"].split()[:2] == ["workflow/run", stage]
    assert set(asked["meta"]["resources"]) <= {"gpu", "mem_mb", "runtime"}
    for dep in names(stage, "deps"):
        if dep.startswith("workflow/"):
            assert (ROOT / dep).exists(), dep


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_a_gpu_at_its_door_if_its_job_asks_for_one(stage):
    door = (ROOT / "workflow" / "stages" / f"{stage}.py").read_text()
    assert ("gpus_needed=" in door) == ("gpu" in STAGES[stage]["meta"]["resources"])


def test_a_candidate_depends_on_every_setting_of_a_training_but_the_rate_of_the_runs():
    reads = set(names("tune", "params"))
    schedule = {f"training.schedule.{key}" for key in TrainingSchedule.model_fields}
    assert {key for key in reads if key.startswith("training.")} == schedule - {
        "training.schedule.learning_rate"
    } | {"training.step"}


def test_no_test_row_reaches_the_choice_of_a_rate():
    read = [path for stage in ("tune", "candidates", "rates") for path in names(stage, "deps")]
    assert not any("test" in Path(path).parts[-1] for path in read) and "results/sample" not in read
    assert {path for path in read if path.startswith("results/sample/")} == {
        "results/sample/tuning.jsonl",
        "results/sample/validation.jsonl",
    }


@pytest.mark.parametrize("stage", STAGES)
def test_params_of_a_stage_exist(stage):
    sections = set(params.Params.model_fields)
    assert {name.split(".")[0] for name in names(stage, "params")} <= sections


def test_paths_in_code_are_those_of_the_pipeline():
    run = ("${item.variant}", "${item.seed}")
    assert [str(paths.environment_file(kind)) for kind in environment.PACKAGES] == outputs("environment")
    assert str(paths.MODEL) in outputs("fetch_model") and str(paths.MODEL_SOURCE) in outputs("fetch_model")
    assert str(paths.INSTRUCTIONS) in outputs("fetch_dataset")
    assert str(paths.DATASET_SOURCE) in outputs("fetch_dataset")
    assert {str(paths.split_file(split)) for split in ("validation", "test")} < set(outputs("sample"))
    assert str(paths.TRAIN_ROWS) in outputs("sample") and str(paths.TUNING_ROWS) in outputs("sample")
    assert str(paths.train_rows_file(run[1])) in names("train", "deps")
    assert str(paths.train_rows_file("${experiment.seeds[0]}")) in names("benchmark", "deps")
    assert str(paths.tune_folder("${key}") / "result.json") in outputs("tune")
    assert str(paths.CANDIDATES) in outputs("candidates") and str(paths.RATE_CHOICES) in outputs("rates")
    assert str(paths.rate_file(run[0])) in names("train", "deps")
    assert str(paths.rate_file("").parent) in outputs("rates")
    assert str(paths.weights_folder(*run)) in outputs("train")
    assert str(paths.evaluate_folder(*run) / "items.parquet") in outputs("evaluate")
    assert str(paths.evaluate_base_folder(run[0]) / "items.parquet") in outputs("evaluate_base")
    assert str(paths.divergence_folder(*run) / "tokens.parquet") in outputs("divergence")
    assert str(paths.benchmark_file(run[0])) in outputs("benchmark")
    assert [str(path) for path in paths.MEASURED] == outputs("measured")
    assert {str(paths.FETCHED_TASKS), str(paths.TASKS_READY)} == set(outputs("fetch_tasks"))
    assert any(paths.TASKS.is_relative_to(name) for name in names("evaluate", "deps"))
    assert str(paths.TASKS_READY) in names("train", "deps")
    assert str(paths.COMPARE / "comparison.json") in outputs("compare")
    made = (paths.REPORT, paths.SUMMARY, paths.SUMMARY_TABLE, paths.CARDS)
    assert outputs("report") == [str(path) for path in made]


def test_metrics_and_curves_are_for_git_and_results_for_dvc():
    """`cache: false` under `outs` would switch off the run cache of a stage that is not cheap."""
    for stage, asked in STAGES.items():
        for kind in ("outs", "metrics", "plots"):
            for entry in asked.get(kind, []):
                name, options = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
                for_git = kind != "outs" or (stage in ("compare", "report") and not name.endswith(".parquet"))
                assert options.get("cache", True) != for_git, f"{stage}: {name}"
