"""`make pin` writes a model or a data set into params.yaml, pinned, with all comments kept; or says why it cannot."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ruamel.yaml import YAML
from stub_hub import REVISION

from workflow import params
from workflow.fetch import pin
from workflow.fetch.sources import fetch_dataset, fetch_model
from workflow.runtime.errors import UserError

DEFAULT = params.complete_text("default")
ROWS = "".join(
    json.dumps({"question": f"What is {n}?", "answer": f"A number, {n}.", "topic": "ab"[n % 2], "id": n})
    + "\n"
    for n in range(12)
)


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """A folder with the default params.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(DEFAULT)
    return tmp_path


def section(name: str) -> dict:
    return YAML(typ="safe").load(Path("params.yaml"))[name]


def changed_lines() -> tuple[list[str], list[str]]:
    """The lines that params.yaml lost, and those that it gained."""
    before, after = DEFAULT.splitlines(), Path("params.yaml").read_text().splitlines()
    return [line for line in before if line not in after], [line for line in after if line not in before]


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pin", *arguments])
    pin.main()


def with_model(hub, tiny_model) -> None:
    hub.files = {file.name: file.read_bytes() for file in tiny_model.iterdir()}


def test_a_model_of_the_hub_is_pinned_by_its_commit(workspace, hub, tiny_model, monkeypatch, capsys):
    with_model(hub, tiny_model)
    command(monkeypatch, "--model", "a/b")
    said = capsys.readouterr().out
    assert f"revision {REVISION}" in said and "weights: 1 file of safetensors" in said
    assert section("model") == {
        "source": "hub",
        "repository": "a/b",
        "revision": REVISION,
        "chat_template": "model",
        "chat_date": "2024-07-26",
        "end_token": None,
        "moved": None,
        "kept_layers": None,
    }
    lost, gained = changed_lines()
    # Of the comments, only that on the line of the package went with it.
    assert [line for line in lost if line.lstrip().startswith("#")] == []
    assert gained == ["  source: hub", "  repository: a/b", f"  revision: {REVISION}"]
    assert section("dataset") == YAML(typ="safe").load(DEFAULT)["dataset"]
    assert fetch_model(params.load().model, workspace)["revision"] == REVISION


def test_a_gguf_file_and_a_folder_are_pinned_by_their_hash(workspace, tiny_model):
    shutil.copytree(tiny_model, "mine")
    for line in pin.write(pin.pin_model("mine", revision=None, before={"chat_date": "2020-01-01"})):
        assert line == "params.yaml: section model is written."
    assert section("model")["chat_date"] == "2020-01-01"
    assert fetch_model(params.load().model, workspace)["sha256"] == section("model")["sha256"]
    Path("m.Q8_0.gguf").write_bytes(b"gguf")
    assert pin.pin_model("m.Q8_0.gguf", revision=None, before={}).content["sha256"] == hashlib.sha256(b"gguf").hexdigest()  # fmt: skip


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((404, "RepoNotFound"), "there is no such repository, or HF_TOKEN may not see it"),
        ((403, "GatedRepo"), "it is gated: accept its license on its page and set HF_TOKEN"),
        ((404, "RevisionNotFound"), "it has no such revision"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_writes_nothing(workspace, hub, monkeypatch, refusal, words):
    hub.refusal = refusal
    for name in ("--model", "--dataset"):
        with pytest.raises(SystemExit, match=words) as end:
            command(monkeypatch, name, "a/b")
        assert str(end.value).startswith("pin: a/b could not be fetched") and "hf_secret" not in str(
            end.value
        )
    assert Path("params.yaml").read_text() == DEFAULT


def test_a_gated_model_whose_page_is_public_is_refused_at_its_first_file(
    workspace, hub, tiny_model, monkeypatch
):
    with_model(hub, tiny_model)
    hub.fault, hub.where = (403, {"X-Error-Code": "GatedRepo"}), "resolve"
    with pytest.raises(SystemExit, match="pin: a/b could not be fetched from the hub: it is gated"):
        command(monkeypatch, "--model", "a/b")


def test_a_hub_that_cannot_be_reached_is_one_sentence(workspace, hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(
        SystemExit, match="pin: a/b could not be fetched from the hub: the hub could not be reached"
    ):
        command(monkeypatch, "--model", "a/b")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"pytorch_model.bin": b""},
            "holds no safetensors.*pytorch_model.bin, a pickle, which is never read",
        ),
        ({"m.gguf": b""}, "holds no safetensors.*download that file and give its path"),
        ({"sub/model.safetensors": b""}, "holds no safetensors"),
        (
            {"model.safetensors": b"", "config.json": b'{"quantization_config": {"quant_method": "awq"}}'},
            "weights are quantized already .awq",
        ),
    ],
)
def test_a_model_that_could_not_be_loaded_is_refused(workspace, hub, files, words):
    hub.files = files
    with pytest.raises(UserError, match=words):
        pin.pin_model("a/b", revision=None, before={})


def test_a_data_set_of_the_hub_is_pinned_with_its_hash_and_its_columns(workspace, hub, monkeypatch, capsys):
    hub.files = {"README.md": b"", "data/train.jsonl": ROWS.encode(), "data/test.jsonl": b""}
    command(monkeypatch, "--dataset", "a/b")
    said = capsys.readouterr().out
    assert "12 rows; columns: instruction: question, context: none, response: answer, category: topic" in said
    assert "2 categories, of which the most common are b (6), a (6)" in said or "a (6), b (6)" in said
    assert "first row: 'What is 0?' -> 'A number, 0.'" in said
    assert "sample.held_out_categories is [], since the data have none of the others" in said
    loaded = params.load()
    assert loaded.dataset == params.HubDataset(
        source="hub",
        repository="a/b",
        revision=REVISION,
        file="data/train.jsonl",
        sha256=hashlib.sha256(ROWS.encode()).hexdigest(),
        format="jsonl",
        columns=params.Columns(instruction="question", context=None, response="answer", category="topic"),
    )
    assert loaded.sample.held_out_categories == []
    lost, _ = changed_lines()
    assert [line for line in lost if line.lstrip().startswith("#")] == []
    assert fetch_dataset(loaded.dataset, workspace)[0].read_text() == ROWS


def test_a_file_of_this_machine_is_pinned(workspace, monkeypatch, capsys):
    Path("q.csv").write_text('Task,Passage,Reference,Name\n"a, b",c,d,1\ne,f,g,2\n')
    command(monkeypatch, "--file", "q.csv")
    assert section("dataset") == {
        "source": "file",
        "path": "q.csv",
        "sha256": hashlib.sha256(Path("q.csv").read_bytes()).hexdigest(),
        "format": "csv",
        "columns": {"instruction": "Task", "context": "Passage", "response": "Reference", "category": None},
    }
    command(monkeypatch, "--file", "q.csv", "--columns", "instruction=Passage,response=Name")
    assert section("dataset")["columns"] == {"instruction": "Passage", "context": None, "response": "Name", "category": None}  # fmt: skip


@pytest.mark.parametrize(
    ("files", "file", "words"),
    [
        ({"a.csv": b"", "b.csv": b""}, None, r"2 files of data \(a.csv, b.csv\): choose one with FILE=NAME"),
        ({"a.bin": b""}, None, "a/b has no file in .jsonl, .csv, .parquet; it has a.bin"),
        ({"a.csv": b""}, "b.csv", "a/b has no file b.csv; it has a.csv"),
        (
            {"a.csv": b"x,y\n1,2\n"},
            None,
            "no column is called as an instruction is .*there are x, y: say which",
        ),
        ({"a.csv": b"prompt,answer\n1,\n"}, None, "a.csv row 1 has no response"),
    ],
)
def test_data_that_cannot_be_used_are_refused(workspace, hub, files, file, words):
    hub.files = files
    with pytest.raises(UserError, match=words):
        pin.pin_dataset("a/b", file, revision=None, columns=None)


def test_what_is_no_name_and_no_path_is_refused(workspace):
    with pytest.raises(
        UserError, match="MODEL is a/b/c: neither a path of this machine nor a name at the hub"
    ):
        pin.pin_model("a/b/c", revision=None, before={})
    with pytest.raises(UserError, match="FILE is nowhere.csv, and there is no such file"):
        pin.pin_dataset(None, "nowhere.csv", revision=None, columns=None)


def test_the_hub_is_the_one_that_the_environment_names(workspace, hub, tiny_model):
    with_model(hub, tiny_model)
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", "--dry-run", "pin", "MODEL=a/b", "--old-file", ".venv/.installed"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert '-m workflow.pin --model "a/b"' in done.stdout and "--dataset" not in done.stdout
    said = subprocess.run(
        [sys.executable, "-m", "workflow.pin", "--model", "a/b"],
        env=os.environ
        | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_HOME": str(workspace / "hub")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert section("model")["revision"] == REVISION and any(
        "/api/models/a/b" in path for path, _ in hub.requests
    )
