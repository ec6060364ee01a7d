"""What is written has the mode that the umask asks for, is on the disk before it has its name, and is whole or absent."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from workflow import methods
from workflow.runtime.errors import UserError, first_of
from workflow.runtime.files import expanded, whole_file, whole_folder, write_json
from workflow.training import train


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def test_what_is_written_has_the_mode_that_the_umask_asks_for(umask, tmp_path):
    weights = {"a": torch.zeros(3)}
    save_file(weights, tmp_path / "bare")
    outside = tmp_path / "outside"
    outside.touch(0o600)
    with whole_folder(tmp_path / "model") as folder:
        save_file(weights, folder / "model.safetensors")
        (folder / "inner").mkdir(mode=0o700)
        write_json(folder / "inner" / "config.json", {})
        (folder / "link").symlink_to(outside)
    with whole_file(tmp_path / "alone.safetensors") as file:
        save_file(weights, file)
    file, folder = 0o666 & ~umask, 0o777 & ~umask
    found = modes(tmp_path)
    assert {found[name] for name in ("model.safetensors", "config.json", "alone.safetensors")} == {file}
    assert {found[name] for name in ("model", "inner")} == {folder}
    assert found["outside"] == 0o600  # what a link leads to is not ours


def test_a_trained_adapter_can_be_read_by_whom_the_umask_lets(tiny, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=2))
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    train.save(model, methods.get("lora"), tmp_path / "weights", weights=weights)
    umask = os.umask(0)
    os.umask(umask)
    found = modes(tmp_path / "weights") | {"model": stat.S_IMODE((tiny_model / "config.json").stat().st_mode)}
    assert "adapter_model.safetensors" in found and set(found.values()) == {0o666 & ~umask}


def test_a_file_and_a_folder_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    synced: list[int] = []  # by inode: a name may be another's by now
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        inodes = {path.stat().st_ino for path in (Path(source), *Path(source).rglob("*"))}
        assert inodes <= set(synced), target
        rename(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", replace)
    with whole_file(tmp_path / "file") as file:
        file.write_text("a")
    assert synced == [tmp_path.stat().st_ino]  # the folder, for the new name
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
    assert synced == [tmp_path.stat().st_ino]


def test_a_tilde_is_the_home_folder_or_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/rows.jsonl", key="dataset.path") == tmp_path / "rows.jsonl"
    with pytest.raises(
        UserError, match="dataset.path is ~nobody_here/x, and the system knows no such home folder"
    ):
        expanded("~nobody_here/x", key="dataset.path")


def test_the_plan_expands_a_tilde_and_says_which_variable_is_wrong(tmp_path):
    def plan(model: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "workflow.plan", "--gpu", "24", f"--model={model}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)} | environment
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    (tmp_path / "config.json").write_bytes((ROOT / "workflow/cost/shapes/llama2_7b.json").read_bytes())
    assert plan("~/config.json").returncode == 0
    wrong = plan("~/config.json", HF_HUB_DOWNLOAD_TIMEOUT="abc")
    assert wrong.returncode == 1 and wrong.stderr == (
        "plan: the environment variable HF_HUB_DOWNLOAD_TIMEOUT is 'abc'; "
        "it must be a whole number of seconds above zero.\n"
    )


def test_a_sentence_names_the_first_few_and_counts_the_others():
    assert first_of(["a", "b", "c", "d"]) == "a, b, c, d"
    assert first_of(list("abcdef")) == "a, b, c, d, and 2 more"
    assert first_of(list("abcde"), "; ") == "a; b; c; d; and 1 more"
