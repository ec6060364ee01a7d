"""What the system or the network refuses is one sentence, leaves nothing half done, and the next run continues."""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, hub_model, run_stage_in, write_rows_to_train_on
from engine_fixture import assert_clean, create_repository
from stub_hub import REVISION, start_index, use_hub

from workflow import params
from workflow.engine.snakemake_rules import job_command
from workflow.evaluation import harness
from workflow.fetch import convert, sources
from workflow.runtime import faults
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, whole_folder, write_jsonl, write_text
from workflow.runtime.paths import MODEL, TASKS_READY, train_folder, weights_folder

ROW = {"instruction": "Say a number.", "response": "Four. " * 40}
COLUMNS = params.Columns(instruction="instruction", context=None, response="response", category=None)
TINY = params.complete_text("tiny")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Disks.


@contextlib.contextmanager
def disk(folder: Path, *, size: str):
    """A file system of its own, as small as `size`, at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", folder], capture_output=True
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte on the file system of a folder; return the file that takes them all."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def dataset_of(folder: Path, *, rows: int) -> None:
    """A params.yaml in `folder` whose dataset is a file of so many rows."""
    write_jsonl(folder / "rows.jsonl", [ROW | {"instruction": f"Say {n}."} for n in range(rows)])
    sha = digest((folder / "rows.jsonl").read_bytes())
    start, end = TINY.index("dataset:\n"), TINY.index("sample:\n")
    section = (
        f"dataset:\n  source: file\n  path: rows.jsonl\n  sha256: {sha}\n  format: jsonl\n"
        "  columns: {instruction: instruction, context: null, response: response, category: null}\n\n"
    )
    write_text(folder / "params.yaml", TINY[:start] + section + TINY[end:])


def failed(done: subprocess.CompletedProcess, stage: str) -> str:
    """The one sentence with which a stage ended, and nothing else but its progress."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = [line for line in done.stderr.splitlines() if ": failed: " in line]
    assert line.startswith(f"{stage}: failed: ")
    return line


def test_a_stage_on_a_full_disk_says_so_leaves_nothing_and_then_goes_on(tmp_path):
    dataset_of(tmp_path, rows=4000)
    with disk(tmp_path / "results", size="800k") as results:
        line = failed(run_stage_in(tmp_path, "fetch_dataset"), "fetch_dataset")
        assert (
            "the disk is full: results/fetch_dataset/instructions.jsonl could not be written, and the "
            in line
        )
        assert "KiB that are free are too little; free some. Log: logs/fetch_dataset.log. Mend it" in line
        assert (tmp_path / "logs/fetch_dataset.log").read_text().splitlines()[-1] == line
        assert not [path for path in results.rglob("*") if path.is_file()]
        remount(results, "size=8m")
        assert run_stage_in(tmp_path, "fetch_dataset").returncode == 0
        assert len((results / "fetch_dataset/instructions.jsonl").read_text().splitlines()) == 4000


def _torch_save(folder: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(2**19)}, folder / "state.pt")


def _safetensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2**19)}, folder / "model.safetensors")


def _numpy(folder: Path) -> None:
    import numpy

    numpy.save(folder / "a.npy", numpy.zeros(2**19))


def _parquet(folder: Path) -> None:
    import numpy
    import pandas

    pandas.DataFrame({"a": numpy.random.default_rng(0).random(2**17)}).to_parquet(folder / "a.parquet")


def _tokenizer(folder: Path) -> None:
    convert.byte_tokenizer(vocabulary=30000, max_positions=100).save_pretrained(folder)


def _datasets(folder: Path) -> None:
    import datasets

    write_jsonl(folder.parent.parent / "rows.jsonl", [ROW] * 4000)
    datasets.load_dataset("json", data_files=str(folder.parent.parent / "rows.jsonl"), cache_dir=str(folder))


def _many_small(folder: Path) -> None:
    for number in range(300):
        (folder / f"{number}.txt").write_text("x" * 4000)


WRITERS = [_torch_save, _safetensors, _numpy, _parquet, _tokenizer, _datasets, _many_small]


@pytest.mark.parametrize("write", WRITERS)
def test_every_librarys_word_for_a_full_disk_is_understood(tmp_path, write):
    """They raise an OSError without a file's name, a RuntimeError, an Exception, or an error that does not say why."""
    with disk(tmp_path / "disk", size="600k") as small:
        target = small / "made"
        filler = small / "filler"
        # Full to the last page when the error is understood: PyTorch's does not say that it is this.
        filler.write_bytes(bytes(300 * 1024))
        full = pytest.raises(
            UserError, match=r"^the disk is full: .*/disk/made could not be written, and the"
        )
        with full, faults.as_user_errors(), whole_folder(target) as folder:
            write(folder)
        assert [path.name for path in small.iterdir()] == ["filler"]


def test_a_full_disk_for_temporary_files_names_the_variable_that_moves_them(tmp_path, monkeypatch):
    with disk(tmp_path / "scratch", size="64k") as scratch:
        monkeypatch.setenv("TMPDIR", str(scratch))
        monkeypatch.setattr("tempfile.tempdir", None)
        with (
            pytest.raises(UserError, match=r"the disk is full: .*scratch.* set TMPDIR to a folder with more"),
            faults.as_user_errors(),
            tempfile.TemporaryDirectory() as folder,
        ):
            Path(folder, "unpacked").write_bytes(bytes(2**20))


def test_a_full_disk_for_downloads_names_the_variable_that_moves_them(hub, tmp_path, monkeypatch):
    with disk(tmp_path / "home", size="64k") as home:
        monkeypatch.setenv("HF_HOME", str(home))
        use_hub(hub, home / "hub", monkeypatch)
        hub.files["rows.jsonl"] = bytes(2**20)
        full = pytest.raises(
            UserError, match=r"the disk is full: .*/home.* set HF_HOME to a folder with more"
        )
        with full, faults.as_user_errors():
            sources.hub_file(hub_dataset(hub.files["rows.jsonl"]))
        remount(home, "size=8m")
        assert sources.hub_file(hub_dataset(hub.files["rows.jsonl"])).stat().st_size == 2**20


def test_a_wheel_that_does_not_fit_the_disk_is_not_kept(index, tmp_path):
    with disk(tmp_path / ".cache", size="16k") as cache:
        full = pytest.raises(UserError, match=r"the disk is full: .cache/wheels/\w+ could not be written")
        with full, faults.as_user_errors():
            fetch(index)
        remount(cache, "size=8m")
        assert fetch(index).name == WHEEL


@pytest.mark.parametrize(
    "into_log", [False, True], ids=["beside its log", "into its log, as Snakemake runs it"]
)
def test_a_log_on_a_full_disk_does_not_hide_why_a_stage_ended(tmp_path, into_log):
    dataset_of(tmp_path, rows=4000)
    with disk(tmp_path / "results", size="800k"), disk(tmp_path / "logs", size="64k") as logs:
        (logs / "fetch_dataset.log").touch()
        fill(logs)
        if not into_log:
            line = failed(run_stage_in(tmp_path, "fetch_dataset"), "fetch_dataset")
            assert "the disk is full: results/fetch_dataset/instructions.jsonl" in line
            return
        with (logs / "fetch_dataset.log").open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", "workflow.stages.fetch_dataset"],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )
        assert done.returncode == 1 and (logs / "fetch_dataset.log").read_bytes() == b""


def test_a_log_that_cannot_be_begun_ends_a_stage_in_one_sentence(tmp_path):
    dataset_of(tmp_path, rows=100)
    with disk(tmp_path / "logs", size="64k") as logs:
        remount(logs, "ro")
        line = failed(run_stage_in(tmp_path, "fetch_dataset"), "fetch_dataset")
        assert (
            "logs/fetch_dataset.log cannot be written, as its file system is read-only: mount it writable"
            in line
        )
        assert not (tmp_path / "results").exists()
        remount(logs, "rw")
        assert run_stage_in(tmp_path, "fetch_dataset").returncode == 0


def test_a_read_only_folder_is_named_and_then_the_stage_goes_on(tmp_path):
    dataset_of(tmp_path, rows=100)
    with disk(tmp_path / "results", size="1m") as results:
        remount(results, "ro")
        line = failed(run_stage_in(tmp_path, "fetch_dataset"), "fetch_dataset")
        assert "results/fetch_dataset cannot be written, as its file system is read-only" in line
        remount(results, "rw")
        assert run_stage_in(tmp_path, "fetch_dataset").returncode == 0


def test_a_folder_of_somebody_else_is_named_with_the_user_that_may_not_write_it(tmp_path):
    dataset_of(tmp_path, rows=100)
    (tmp_path / "logs").mkdir()
    (tmp_path / "results").mkdir(mode=0o555)
    bare = []
    if os.geteuid() == 0:  # whom no mode keeps out, until it gives that right away
        if not shutil.which("setpriv"):
            pytest.skip(
                "root writes to read-only folders, and setpriv, which can take that right away, is missing"
            )
        bare = ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]
    command = [*bare, sys.executable, "-m", "workflow.stages.fetch_dataset"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    line = failed(done, "fetch_dataset")
    assert (
        "there is no permission to read or write results/fetch_dataset: give it to the user that runs this ("
        in line
    )
    (tmp_path / "results").chmod(0o755)
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (
            errno.EDQUOT,
            "this user's disk quota is used up, so results/x could not be written: free some of it",
        ),
        (errno.EFBIG, "results/x would be larger than the system lets a file be: raise `ulimit -f`"),
        (errno.EMFILE, "too many files are open at once: raise the limit, as in `ulimit -n 4096`"),
        (
            errno.EIO,
            "the disk or network file system of results/x fails (Input/output error): see that it is",
        ),
        (errno.ESTALE, "the disk or network file system of results/x fails (Stale file handle)"),
        (errno.ENOMEM, "the machine is out of memory: end what else uses it"),
    ],
)
def test_other_refusals_of_the_system_have_a_sentence(number, words):
    said = faults.sentence(OSError(number, os.strerror(number), "results/x"))
    assert said.startswith(words) and said.endswith(".")


def door(folder: Path, name: str, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a line of code as a stage, at a stage's door."""
    program = (
        "import os, resource, sys\nfrom pathlib import Path\nfrom workflow.runtime import files, stage as console\n"
        f"def stage():\n    {code}\nsys.argv[1:] = []\nconsole.run_stage({name!r}, stage)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("limit", "code", "words"),
    [
        ("NOFILE, (20, 20)", "kept = [open('/dev/null') for _ in range(99)]", "too many files are open"),
        (
            "FSIZE, (5000, 5000)",
            "files.write_text(Path('results/a'), 'x' * 9999)",
            "results/a would be larger than",
        ),
    ],
)
def test_a_limit_of_the_system_is_met_as_foreseen(tmp_path, limit, code, words):
    done = door(tmp_path, "sample", f"resource.setrlimit(resource.RLIMIT_{limit}); {code}")
    assert words in failed(done, "sample")
    assert not any(path.is_file() for path in tmp_path.glob("results/**/*"))


def test_an_error_that_is_no_fault_of_the_system_is_not_explained_away():
    for error in (
        KeyError("x"),
        ValueError("disk"),
        FileNotFoundError(errno.ENOENT, "none", "x"),
        OSError("odd"),
    ):
        assert faults.sentence(error) is None
        with pytest.raises(type(error)), faults.as_user_errors():
            raise error
    for error in (OSError(errno.ENOSPC, "x"), MemoryError()):
        hidden = ValueError("something else")
        hidden.__cause__ = error
        assert faults.sentence(hidden)


def test_a_disk_with_room_is_not_blamed_for_an_unclear_error_of_a_write():
    assert faults.sentence(RuntimeError("basic_ios::clear: iostream error")) is None


# Engines.


@pytest.fixture(scope="module")
def small_repository(tmp_path_factory):
    """A repository of stubbed stages on a disk of its own, in which fetch_dataset runs through a stage's real door."""
    folder = tmp_path_factory.mktemp("small")
    with disk(folder / "disk", size="16m") as small:
        yield create_repository(small, variants=["lora_16bit"], seeds=[1])


def let_fetch_dataset(repository, code: str) -> None:
    """Let stage fetch_dataset do this at a stage's door, and then what its stub does."""
    runner = repository.root / "workflow/run"
    if not (stub := runner.with_name("stub")).exists():
        shutil.copy(runner, stub)
        shutil.copy(ROOT / "workflow/runtime/gpus.py", runner.parent / "runtime")
    door = f"import os, sys\nfrom workflow.runtime import files, stage as console\nsys.argv[1:] = []\ndef stage():\n    {code}\n"
    door += "console.run_stage('fetch_dataset', stage)\n"
    (repository.root / "workflow/door.py").write_text(door)
    runner.write_text(
        f'#!/bin/sh\nset -e\nif [ "$1" = fetch_dataset ]; then PYTHONPATH=. "{sys.executable}" workflow/door.py; fi\n'
        'exec workflow/stub "$@"\n'
    )


KILLED = (
    "fetch_dataset: failed: the process was killed: if nobody did it, the machine ran out of memory, so "
    "end what else uses it, or take a machine with more of it. Log: logs/fetch_dataset.log. Run the same command"
)
TOO_LARGE = (
    "fetch_dataset: failed: the disk is full: results/fetch_dataset/big could not be written, and the "
)


@pytest.mark.parametrize("engine", ["dvc", "snakemake"])
def test_both_engines_show_why_a_stage_was_ended_and_go_on_when_it_is_mended(small_repository, engine):
    repository = small_repository
    (repository.root / "dvc.lock").unlink(missing_ok=True)
    for folder in ("results/fetch_dataset", ".snakemake", ".dvc/cache"):
        shutil.rmtree(repository.root / folder, ignore_errors=True)

    def run(*, fails: bool, job: bool = False) -> str:
        if job:  # what Snakemake runs, without its start of seconds
            return repository.run("bash", "-c", job_command("fetch_dataset", pull=False), fails=fails)
        if engine == "dvc":
            return repository.dvc("repro", "fetch_dataset", fails=fails)
        return repository.snakemake("--cores", "1", "fetch_dataset", fails=fails)

    large = "files.write_text(files.Path('results/fetch_dataset/big'), 'x' * 30_000_000)"
    for code, words in (("os.kill(os.getpid(), 9)", KILLED), (large, TOO_LARGE)):
        let_fetch_dataset(repository, code)
        said = run(fails=True, job=engine == "snakemake" and code == large)
        assert words in said and "Traceback" not in said
        assert words in (repository.root / "logs/fetch_dataset.log").read_text()
        assert not list((repository.root / "results").glob("fetch_dataset/*"))
    let_fetch_dataset(repository, "pass")
    run(fails=False, job=engine == "snakemake")
    assert repository.ran()[-1] == "fetch_dataset"
    assert_clean(repository, "fetch_dataset")


def test_a_disk_that_is_full_before_anything_runs_is_one_sentence_at_our_doors(small_repository):
    repository = small_repository
    filler = fill(repository.root)
    try:
        said = repository.run(sys.executable, "-m", "workflow.pipeline", "prune", fails=True)
    finally:
        filler.unlink()
    assert said.startswith("the disk is full: ") and len(said.splitlines()) == 1
    repository.run(sys.executable, "-m", "workflow.pipeline", "prune")


def test_a_job_whose_log_cannot_be_written_says_so(small_repository):
    """Of a job's log nothing can be shown then, and the terminal would say only that a job failed."""
    log = small_repository.root / "logs/nowhere.log"
    log.parent.mkdir(exist_ok=True)
    log.touch()
    command = job_command("nowhere", pull=False).replace(" -m workflow.pipeline ", " -c 1/0 2>/dev/null ")
    done = subprocess.run(["sh", "-c", command], cwd=small_repository.root, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr
        == "nowhere: failed, and its log logs/nowhere.log could not be written: is the disk full?\n"
    )


# Memory.


@pytest.fixture(scope="module")
def ready_to_train(tiny_model, rows, splits, tmp_path_factory) -> Path:
    """A folder in which stage train can run."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "params.yaml").write_text(TINY)
    shutil.copytree(tiny_model, folder / MODEL)
    write_rows_to_train_on(folder, splits)
    write_text(folder / TASKS_READY, "Every task can be loaded.\n")
    return folder


def test_a_gpu_without_memory_for_a_training_step_says_what_to_lower_and_then_trains(ready_to_train):
    """There is no GPU here: the first of two runs raises in its step what PyTorch raises on one."""
    code = (
        "import os, sys, torch\n"
        "from workflow.training import train as training\n"
        "from workflow.runtime.stage import run_stage\n"
        "from workflow.stages.train import gpus_needed, processes_of, train\n"
        "def step(*_, **__):\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of '\n"
        "        '23.64 GiB of which 1.02 GiB is free. Process 1 has 22.6 GiB memory in use.')\n"
        "if first := os.fork():\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])\n"
        "    sys.exit('it trained') if code != 1 or os.path.exists('results/train/lora_16bit/1/weights') else None\n"
        "else:\n"
        "    torch.Tensor.backward = step\n"
        "run_stage('train', train, arguments={'variant': str, 'seed': int}, gpus_needed=gpus_needed, processes_of=processes_of)\n"
    )
    label, run = "train, variant lora_16bit, seed 1", ("lora_16bit", 1)
    done = subprocess.run(
        [sys.executable, "-c", code, "--variant", run[0], "--seed", str(run[1])],
        cwd=ready_to_train,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if ": failed: " in line]
    assert line.startswith(
        f"{label}: failed: the GPU is out of memory (2.50 GiB more were asked for, and it has 23.64 GiB in all): "
        "lower training.schedule.micro_batch_rows, set training.step.gradient_checkpointing: true, or train a 4-bit variant "
        "such as qlora_nf4_dq; `python -m workflow.plan` says what fits. Log: "
    )
    assert (ready_to_train / weights_folder(*run) / "adapter_model.safetensors").is_file()
    assert read_json(ready_to_train / train_folder(*run) / "result.json")["steps"] == 3


def _error_of(block) -> BaseException:
    with pytest.raises(Exception) as raised:
        block()
    return raised.value


def test_memory_that_the_machine_does_not_have_is_told_from_other_errors():
    import torch

    error = _error_of(lambda: torch.empty(2**50, dtype=torch.uint8))
    said = faults.sentence(error, stage="evaluate")
    assert said == (
        "the machine is out of memory (1048576.0 GiB more were asked for): lower evaluation.batch_rows "
        "and evaluation.batch_tokens."
    )
    said = faults.sentence(_error_of(lambda: bytearray(2**60)), stage="fetch_model")
    assert said == "the machine is out of memory: end what else uses it, or take a machine with more of it."
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert faults.sentence(killed, stage="train").startswith("the machine is out of memory: lower training.")
    full = RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
        "out of shared memory. Please try to raise your shared memory limit."
    )
    assert "set hardware.data_workers: 0" in faults.sentence(full)
    assert faults.sentence(RuntimeError("can't start new thread")).startswith(
        "the system lets this user start no"
    )


def test_a_stage_that_reaches_a_limit_on_its_memory_ends_in_one_sentence(tmp_path):
    """The limit is the system's own, and the error the interpreter's."""
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (500 * 2**20, 500 * 2**20))"
    done = door(tmp_path, "sample", f"{limit}; bytes(2**30)")
    assert "the machine is out of memory: end what else uses it" in failed(done, "sample")


def test_one_of_several_processes_that_has_no_memory_tells_its_launcher(tmp_path):
    launcher = {"WORKFLOW_LAUNCHER": str(os.getpid()), "RANK": "1", "WORLD_SIZE": "2"}
    done = door(tmp_path, "train", "raise MemoryError", **launcher)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "train: the machine is out of memory: lower training.schedule.micro_batch_rows"
    )
    assert len(done.stderr.splitlines()) == 1


# Downloads.

CONTENT = b'{"instruction": "a", "response": "b"}\n' * 200
WHEEL = "some_rows-1.0-py3-none-any.whl"


def hub_dataset(content: bytes = CONTENT) -> params.HubDataset:
    return params.HubDataset(
        source="hub", repository="a/b", revision=REVISION, file="rows.jsonl", sha256=digest(content),
        format="jsonl", columns=COLUMNS,
    )  # fmt: skip


def _dataset() -> None:
    assert sources.hub_file(hub_dataset()).read_bytes() == CONTENT


def _model() -> None:
    model = hub_model()
    folder = sources.hub_snapshot(model)
    assert (folder / "model.safetensors").read_bytes() == CONTENT and (folder / "config.json").is_file()


def _task() -> None:
    import datasets

    with harness.named("piqa", ""), contextlib.chdir("/"):
        assert len(datasets.load_dataset("a/b", cache_dir=os.environ["TASK_CACHE"])["train"]) == 200


DOWNLOADS = {"dataset": _dataset, "model": _model, "task": _task}
NO_HUB = (
    "what answered is a web page and no hub: see whether the network wants a log-in, and whether HF_ENDPOINT"
)
CUT = "the connection ended before the whole file had come; run again"
REFUSES = "it refuses this user; check the token or password, and what it may see"
BROKEN = {
    "401": ((401, {}), "", f"the hub answered 401: {REFUSES}"),
    "403": ((403, {}), "", f"the hub answered 403: {REFUSES}"),
    "404": ((404, {}), "", "the hub answered 404: it has no such file; check the names in params.yaml"),
    "429": ((429, {"Retry-After": "120"}), "", "answered 429: too many requests came from here; run again after 120 s"),
    "429 without a time": ((429, {}), "", "answered 429: too many requests came from here; run again in some minutes"),
    "500": ((500, {}), "", "the hub answered 500: it fails at the moment; try again later"),
    "a page instead of an answer": ("page", "", NO_HUB),
    "a page instead of the file": ("page", "resolve", NO_HUB),
    "half a file": ("half", "resolve", CUT),
    "redirects without end": ("loop", "", "point at each other without end: check the network's proxy"),
}  # fmt: skip


@pytest.mark.parametrize("what", DOWNLOADS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_download_that_a_hub_or_a_network_breaks_is_one_sentence_and_then_goes_on(
    hub, tmp_path, monkeypatch, what, case
):
    monkeypatch.setenv("TASK_CACHE", str(tmp_path / "task"))
    hub.files = {"rows.jsonl": CONTENT}
    if what == "model":
        hub.files = {"model.safetensors": CONTENT, "config.json": b"{}"}
    hub.fault, hub.where, words = BROKEN[case]
    with pytest.raises(UserError) as raised:
        DOWNLOADS[what]()
    said = str(raised.value)
    assert words in said and said.endswith(".") and "\n" not in said and "hf_secret" not in said
    hub.fault = None
    DOWNLOADS[what]()


@pytest.mark.parametrize("what", DOWNLOADS)
def test_a_gated_repository_is_told_from_one_that_is_not_there(hub, tmp_path, monkeypatch, what):
    monkeypatch.setenv("TASK_CACHE", str(tmp_path / "task"))
    for refusal, words in {
        (403, "GatedRepo"): "it is gated: accept its license",
        (404, "RepoNotFound"): "no such repo",
    }.items():
        hub.refusal = refusal
        with pytest.raises(UserError, match=words):
            DOWNLOADS[what]()


@pytest.mark.parametrize("what", DOWNLOADS)
def test_a_hub_that_nobody_answers_for_is_one_sentence(hub, tmp_path, monkeypatch, what):
    monkeypatch.setenv("TASK_CACHE", str(tmp_path / "task"))
    hub.shutdown()
    hub.server_close()
    why = "" if what == "task" else r" \(\[Errno 111\] Connection refused\)"
    reached = rf"the hub could not be reached{why}, and the local cache does not hold it; check the network\."
    with pytest.raises(UserError, match=reached):
        DOWNLOADS[what]()


def test_a_hub_whose_name_nobody_knows_is_one_sentence(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(UserError, match=r"the hub could not be reached \(.*[Nn]ame.*\), and the local cache"):
        _dataset()


def test_a_file_that_is_not_the_one_asked_for_leaves_the_cache_so_that_the_next_run_gets_it(hub):
    hub.files = {"rows.jsonl": b"<!DOCTYPE html><html>log in</html>"}
    with pytest.raises(
        UserError, match=r"it is a web page: see whether the network wants a log-in.*nothing was used"
    ):
        _dataset()
    hub.files = {"rows.jsonl": CONTENT}
    _dataset()


def test_the_stages_door_ends_a_refused_download_in_one_sentence_and_goes_on_the_next_time(hub, tmp_path):
    hub.files = {"rows.jsonl": CONTENT}
    hub.fault = (404, {})
    start, end = TINY.index("dataset:\n"), TINY.index("sample:\n")
    section = (
        f"dataset:\n  source: hub\n  repository: a/b\n  revision: {REVISION}\n  file: rows.jsonl\n"
        f"  sha256: {digest(CONTENT)}\n  format: jsonl\n"
        "  columns: {instruction: instruction, context: null, response: response, category: null}\n\n"
    )
    (tmp_path / "params.yaml").write_text(TINY[:start] + section + TINY[end:])
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        **{f"HF_{name}_OFFLINE": "0" for name in ("HUB", "DATASETS")},
    }
    line = failed(run_stage_in(tmp_path, "fetch_dataset", **environment), "fetch_dataset")
    assert "a/b could not be fetched from the hub: the hub answered 404" in line
    assert not (tmp_path / "results").exists()
    hub.fault = None
    assert run_stage_in(tmp_path, "fetch_dataset", **environment).returncode == 0
    assert read_json(tmp_path / "results/fetch_dataset/source.json")["rows"] == 200


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on loopback with one wheel; pip sees nothing else, tries once, and has a password for it."""
    server = start_index()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr("some_rows/rows.jsonl", CONTENT * 4)
        wheel.writestr(
            "some_rows-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-rows\nVersion: 1.0\n"
        )
        wheel.writestr(
            "some_rows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("some_rows-1.0.dist-info/RECORD", "")
    server.files[WHEEL] = made.getvalue()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://someone:pip_secret@127.0.0.1:{server.server_port}/simple")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()


def fetch(index, **changes) -> Path:
    fields = {"source": "wheel", "package": "some-rows", "version": "1.0", "sha256": digest(index.files[WHEEL]),
              "member": "some_rows/rows.jsonl", "format": "jsonl", "columns": COLUMNS}  # fmt: skip
    return sources.fetch_wheel(params.WheelDataset(**(fields | changes)), key="dataset")


LIST = r"simple/some-rows/$"
FILE = r"\.whl$"
BROKEN_INDEX = {
    "401 for the list": ((401, {}), LIST, f"the index answered 401: {REFUSES}"),
    "403 for the file": ((403, {}), FILE, f"the index answered 403: {REFUSES}"),
    "404": ((404, {}), LIST, "the index answered 404: it has no such file; check the names in params.yaml"),
    "429": ((429, {"Retry-After": "1"}), FILE, "the index answered 429: too many requests came from here"),
    "500": ((500, {}), LIST, "the index answered 500: it fails at the moment; try again later"),
    "a page instead of the list": ("page", LIST, "lists no file, as a web page does; see whether the network wants"),
    "a page instead of the file": ("page", FILE, "nothing was used from it"),
    "half a file": ("half", FILE, CUT),
    "redirects without end": ("loop", LIST, "point at each other without end; check the network's proxy"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_a_wheel_that_an_index_or_a_network_breaks_is_one_sentence_and_leaves_nothing(index, case):
    index.fault, index.where, words = BROKEN_INDEX[case]
    with pytest.raises(UserError) as raised:
        fetch(index)
    said = str(raised.value)
    assert words in said and said.endswith(".") and "\n" not in said and "pip_secret" not in said
    assert [path.suffix for path in sources.WHEELS.iterdir()] == [".lock"]
    if case in ("half a file", "a page instead of the file"):
        index.fault = None
        assert fetch(index).read_bytes() == index.files[WHEEL]


def test_an_index_that_nobody_answers_for_is_one_sentence(index):
    index.shutdown()
    index.server_close()
    with pytest.raises(
        UserError, match=r"the index could not be reached \(\[Errno 111\] Connection refused\); check"
    ):
        fetch(index)


def test_an_index_whose_name_nobody_knows_is_one_sentence(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://someone:pip_secret@index.invalid/simple")
    with pytest.raises(
        UserError, match=r"the index could not be reached \(.*\); check the network"
    ) as raised:
        fetch(index)
    assert "pip_secret" not in str(raised.value)


def test_a_version_that_an_index_does_not_have_is_not_taken_for_a_broken_network(index):
    with pytest.raises(UserError, match=r"No matching distribution found for some-rows==2.0; check the name"):
        fetch(index, version="2.0")
