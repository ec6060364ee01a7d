"""What `make report` shows: a line for each stage and the time left; everything else is in the logs."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import yaml
from engine_fixture import VARIANT

from workflow.engine import stage_times
from workflow.engine.progress import CLEAR, Plan, Progress, duration, label_of
from workflow.engine.stage_times import StageTimes, digest_of

REPORT = [sys.executable, "-m", "workflow.pipeline", "report"]
AFTER_ANOTHER_TRAINING = [
    "compare",
    f"divergence@{VARIANT}-{VARIANT}-1",
    f"evaluate@{VARIANT}-1",
    "report",
    f"train@{VARIANT}-1",
]


def train_otherwise(params: dict) -> None:
    params["training"]["schedule"]["weight_decay"] += 0.01


def test_each_stage_has_one_line_and_the_rest_is_in_the_logs(repository):
    repository.edit_params(train_otherwise)
    first, *lines = repository.run(*REPORT).splitlines()
    assert first == "At most 5 stages to run. What a stage prints is in logs/STAGE.log."
    assert lines[0] == f"stage 1 of at most 5: train {VARIANT}, seed 1"
    places = [line.partition(":")[0].replace("at most ", "") for line in lines]
    assert places == [f"stage {number} of 5" for number in range(1, 6)] and "at most" not in lines[-1]
    assert repository.ran() == AFTER_ANOTHER_TRAINING
    assert f"Running stage 'train@{VARIANT}-1'" in (repository.root / "logs/dvc.log").read_text()
    assert repository.run(*REPORT) == "Every stage is up to date: nothing runs.\n"
    assert repository.ran() == []
    kept = json.loads((repository.root / ".cache/stage_seconds.json").read_text())
    assert sorted(kept["seconds"]) == AFTER_ANOTHER_TRAINING


def test_a_failure_and_the_time_left_are_one_line_each(repository):
    repository.edit_params(train_otherwise)
    params = yaml.safe_load((repository.root / "params.yaml").read_text())
    published = repository.root / "results/stage_seconds.json"
    times = dict.fromkeys(AFTER_ANOTHER_TRAINING, 60.0)
    published.write_text(json.dumps({"digest": digest_of(params), "seconds": times}))
    (repository.control / f"fail train@{VARIANT}-1").touch()
    said = repository.run(*REPORT, fails=True)
    assert "At most 5 stages to run · at most 5 min left in all." in said
    *_, line, last = said.splitlines()
    assert line == f"stage 1 of at most 5: train {VARIANT}, seed 1 · at most 5 min left in all"
    # It says why, and no more: DVC's own words are in its log.
    assert last == f"train@{VARIANT}-1: failed: told to"
    assert f"failed to reproduce 'train@{VARIANT}-1'" in (repository.root / "logs/dvc.log").read_text()


def test_what_dvc_itself_refuses_reaches_the_terminal(repository):
    repository.append("dvc.yaml", "  nothing: [")
    assert "DVC: unable to read: 'dvc.yaml'" in repository.run(*REPORT, fails=True)


def test_a_terminal_has_a_live_line_that_the_time_replaces(repository):
    repository.append("workflow/report/captions/page.rst", "More.")  # which only the last stage reads
    reading, terminal = pty.openpty()
    environment = repository.environment() | {"COLUMNS": "120"}
    process = subprocess.Popen(REPORT, cwd=repository.root, env=environment, stdout=terminal, stderr=terminal)
    os.close(terminal)
    said = b""
    with suppress(OSError):  # the other end is closed
        while block := os.read(reading, 65536):
            said += block
    os.close(reading)
    assert process.wait() == 0
    first, live, *_ = said.decode().split(CLEAR)[1:]
    assert first == "1 stage to run. What a stage prints is in logs/STAGE.log.\r\n"
    assert live == "stage 1 of 1: report"
    assert re.search(r"stage 1 of 1: report · \d+ s\r\n", said.decode())  # the live line, replaced
    assert repository.ran() == ["report"]


def test_a_time_is_a_basis_only_for_the_same_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"experiment": {"seeds": [1]}, "sample": {"rows": 10}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    stage_times.load().record("sample", 3)
    assert stage_times.load().earlier == {"sample": 3}
    params["experiment"]["seeds"].append(2)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert stage_times.load().expected("sample") == 3
    params["sample"]["rows"] += 1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    assert stage_times.load().left("sample", 0, []) is None
    (tmp_path / ".cache/stage_seconds.json").write_text("[")
    assert stage_times.load().earlier == {}


def test_the_time_left_is_scaled_by_the_pace_of_this_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    times = StageTimes("digest", {"sample": 40, "train@a-1": 100, "train@a-2": 100})
    assert times.left("sample", 4, ["train@a-1", "train@a-2"]) == (236, True)
    times.record("sample", 140)  # and with a minute at the pace of before, twice as long
    assert times.left("train@a-1", 50, ["train@a-2"]) == (350, True)
    assert times.left("train@a-1", 500, ["train@a-2"]) == (200, True)
    assert times.left("train@a-1", 0, ["train@a-2", "compare"]) == (400, False)
    assert times.left("compare", 5, ["report"]) is None


def test_a_short_stage_that_had_to_wait_does_not_make_minutes_hours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    times = StageTimes("digest", {"try_model": 2, "train@a-1": 1000})
    times.record("try_model", 30)
    left, complete = times.left("train@a-1", 0, [])
    assert 1000 < left < 1500 and complete


def test_without_earlier_times_the_basis_is_what_this_run_did_of_the_same_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    times = StageTimes("digest", {})
    assert times.left("train@a-1", 0, ["train@a-2"]) is None
    times.record("train@a-1", 30)
    times.record("train@a-2", 50)
    assert times.left("train@b-1", 10, ["train@b-2", "evaluate@a-1"]) == (70, False)


def test_the_last_step_of_a_log_stands_in_the_live_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, log = Terminal(), tmp_path / "log"
    log.write_text("train: started\n  step 3 of 12, 0:09 so far, 0:27 left: loss 2\n  step 4 of 12, 0:12 so")
    progress = Progress(
        Plan({"train@a-1": "train a, seed 1"}), StageTimes("digest", {"train@a-1": 400}), stream
    )
    progress.begin("train@a-1")
    progress.tick("train@a-1", log)
    last = stream.getvalue().rpartition(CLEAR)[2]
    assert last == "stage 1 of 1: train a, seed 1 · step 4 of 12 · about 7 min left in all"


def test_stages_that_are_passed_over_are_counted_no_longer():
    names = ["sample", "train@a-1", "train@a-2", "train@a-3", "report"]
    times, stream = StageTimes("digest", dict.fromkeys(names, 60.0)), io.StringIO()
    changed = {"sample", "train@a-3"}  # a seed was added: the others' rows stay as they were
    progress = Progress(Plan({name: name for name in names}, frozenset(names) - changed), times, stream)
    progress.introduce()
    for name in ("sample", "train@a-3", "report"):
        progress.begin(name)
    first, *lines = stream.getvalue().splitlines()
    assert first.startswith("At most 5 stages to run · at most 5 min left in all.")
    assert lines == [
        "stage 1 of at most 5: sample · at most 5 min left in all",
        "stage 2 of at most 3: train@a-3 · at most 2 min left in all",
        "stage 3 of 3: report · about 60 s left in all",
    ]


def test_a_stage_and_a_time_are_said_in_words():
    command = "workflow/run divergence --variant qlora --baseline lora --seed 2"
    assert label_of(command) == "divergence qlora, baseline lora, seed 2"
    assert label_of("workflow/run sample") == "sample"
    assert [duration(seconds) for seconds in (0.4, 89, 91, 3570, 7800)] == ["0 s", "89 s", "2 min", "1 h 0 min", "2 h 10 min"]  # fmt: skip
