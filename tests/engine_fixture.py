"""A small repository with the project's own dvc.yaml and Snakefile, whose stages are stubs that log runs.

The repository's `workflow/run` calls this file, which then plays the stage.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
# What the engines read or import; every other file of the project is a stub that tests may edit.
REAL_FILES = (
    ".dvcignore",
    ".gitignore",
    "Snakefile",
    "dvc.yaml",
    "params.yaml",
    "profiles/default/config.yaml",
    "workflow/__init__.py",
    "workflow/pipeline.py",
    "workflow/engine/__init__.py",
    "workflow/engine/dvc_patch_recording.py",
    "workflow/engine/dvc_patch_state.py",
    "workflow/engine/dvc_repair.py",
    "workflow/engine/dvc_repository.py",
    "workflow/engine/engine_locks.py",
    "workflow/engine/machine.py",
    "workflow/engine/pipeline.py",
    "workflow/engine/progress.py",
    "workflow/engine/prune.py",
    "workflow/engine/quiet_dvc.py",
    "workflow/engine/snakemake_options.py",
    "workflow/engine/snakemake_rules.py",
    "workflow/engine/stage_times.py",
    "workflow/engine/warm_stages.py",
    "workflow/report/captions/curves.rst",
    "workflow/report/captions/page.rst",
    "workflow/report/captions/tables.rst",
)
REAL_ROOMS = ("methods", "params", "precisions", "runtime")
CONTROL = "STUB_CONTROL"
ENGINES = ("dvc", "snakemake")
VARIANT, OTHER = "lora_16bit", "qlora_nf4_dq"
# They decide which files of a folder there are, and nothing that is in any file.
FOLDER_BY_SEED, SEEDS = "results/sample/train", "experiment.seeds"
TUNING_ROWS, TUNING_SEEDS = "results/sample/tuning.jsonl", "tuning.seeds"
Edit = Callable[[dict[str, Any]], None]
NOTHING = "Nothing to be done"
PROFILE = "Using workflow specific profile profiles/default for setting default command line arguments.\n"
EVERYTHING = [
    f"benchmark@{VARIANT}",
    f"benchmark_grid@{VARIANT}-own",
    "candidates",
    "compare",
    f"divergence@{VARIANT}-{VARIANT}-1",
    "environment",
    f"evaluate@{VARIANT}-1",
    f"evaluate_base@{VARIANT}",
    "fetch_dataset",
    "fetch_model",
    "fetch_tasks",
    "measured",
    "rates",
    "report",
    "sample",
    f"train@{VARIANT}-1",
    "try_model",
]
# These two are cheap and their outputs are for git, so they run again and do not come from the cache.
COLLECTING = ["compare", "report"]
AFTER_ADDING_A_SEED = [
    "compare",
    f"divergence@{VARIANT}-{VARIANT}-2",
    f"evaluate@{VARIANT}-2",
    "report",
    "sample",
    f"train@{VARIANT}-2",
]
AFTER_ADDING_A_VARIANT = [
    f"benchmark@{OTHER}",
    f"benchmark_grid@{OTHER}-own",
    "compare",
    f"divergence@{OTHER}-{VARIANT}-1",
    f"evaluate@{OTHER}-1",
    f"evaluate_base@{OTHER}",
    "measured",
    "rates",
    "report",
    f"train@{OTHER}-1",
    "try_model",
]
AFTER_CHANGING_THE_EVALUATION = ["compare", f"evaluate@{VARIANT}-1", f"evaluate_base@{VARIANT}", "report"]


@dataclass(frozen=True)
class Repository:
    """A repository with stubbed stages; `control` holds their log and what they are told to do."""

    root: Path
    control: Path

    def run(self, *command: str, fails: bool = False) -> str:
        """Run a command in the repository, check whether it fails, and return what it printed."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def environment(self) -> dict[str, str]:
        """Return the variables of a shell without an active virtual environment or a user's settings."""
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.control),
            "XDG_CACHE_HOME": str(self.control / "cache"),
            "DVC_NO_ANALYTICS": "1",
            "DVC_GLOBAL_CONFIG_DIR": str(self.control / "dvc_global"),
            "DVC_SYSTEM_CONFIG_DIR": str(self.control / "dvc_system"),
            "DVC_SITE_CACHE_DIR": str(self.control / "dvc_site"),
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "user.name",
            "GIT_CONFIG_VALUE_0": "test",
            "GIT_CONFIG_KEY_1": "user.email",
            "GIT_CONFIG_VALUE_1": "test@example.org",
            CONTROL: str(self.control),
            "WORKFLOW_WARM": "",  # stubs need no libraries
        }

    def dvc(self, *arguments: str, fails: bool = False) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, fails=fails)

    def prune(self) -> str:
        """Forget the stages that dvc.yaml no longer has."""
        return self.run(sys.executable, "-m", "workflow.pipeline", "prune")

    def snakemake(self, *arguments: str, fails: bool = False) -> str:
        said = self.run(str(snakemake_command()), *arguments, fails=fails)
        return said.replace(PROFILE, "")

    def bring_up_to_date(self, engine: str) -> list[str]:
        """Run the whole pipeline with `dvc` or `snakemake`; return the stages that really ran, sorted."""
        if engine == "dvc":
            self.dvc("repro")
        else:
            self.snakemake("--cores", "2", "report")
        return self.ran()

    def ran(self) -> list[str]:
        """Return the stages that ran since the last call, sorted."""
        log = self.control / "ran"
        names = sorted(log.read_text().split()) if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def edit_params(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Let `edit` change the content of params.yaml."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        edit(params)
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def append(self, path: str, line: str) -> None:
        with (self.root / path).open("a") as file:
            file.write(line + "\n")

    def commit(self) -> None:
        """Commit everything that git does not ignore."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "change")

    def copy(self, folder: Path) -> "Repository":
        """Return a copy of its own below `folder`, files' times and DVC's cache included."""
        shutil.copytree(self.root, folder / "repository", symlinks=True)
        (folder / "control").mkdir()
        return Repository(folder / "repository", folder / "control")

    def clone(self, folder: Path) -> "Repository":
        """Return a git clone below `folder`, which has nothing of DVC's cache."""
        self.run("git", "clone", "--quiet", str(self.root), str(folder / "repository"))
        (folder / "control").mkdir(exist_ok=True)
        return Repository(folder / "repository", folder / "control")


def snakemake_command() -> Path:
    return Path(sys.executable).parent / "snakemake"


def create_repository(folder: Path, variants: list[str], seeds: list[int]) -> Repository:
    """Make a committed repository below `folder` in which no stage has run yet."""
    repository = Repository(folder / "repository", folder / "control")
    repository.control.mkdir()
    for name in REAL_FILES:
        path = repository.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, path)
    for room in REAL_ROOMS:
        shutil.copytree(
            PROJECT / "workflow" / room,
            repository.root / "workflow" / room,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    runner = repository.root / "workflow" / "run"
    # A test may put a script there that runs when the stage has ended and DVC has not yet taken down what it read.
    after = f'. "${CONTROL}/after $1"'
    runner.write_text(
        f'#!/bin/sh\n"{sys.executable}" "{Path(__file__).resolve()}" "$@" || exit 1\n'
        f'if [ -e "${CONTROL}/after $1" ]; then {after}; fi\n'
    )
    runner.chmod(0o755)

    def set_matrix(params: dict[str, Any]) -> None:
        params["experiment"] |= {"variants": variants, "baseline": variants[0], "seeds": seeds}
        params["benchmark"]["variants"] = list(variants)

    repository.edit_params(set_matrix)
    for path in code_dependencies(repository.root / "dvc.yaml"):
        file = repository.root / path
        if not file.suffix:
            file = file / "file.txt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("stub\n")
    repository.run("git", "init", "--quiet", "--initial-branch", "main")
    repository.dvc("init", "--quiet")
    repository.commit()
    return repository


@contextmanager
def hanging(repository: Repository, stage: str, engine: list[str]) -> Iterator[subprocess.Popen]:
    """Yield an engine's run of a stage, in a process group of its own; the stage has started and hangs."""
    hang = repository.control / f"hang {stage}"
    hang.touch()
    run = subprocess.Popen(
        [*engine, stage],
        cwd=repository.root,
        env=repository.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = repository.control / "ran"
    try:
        wait_until(lambda: log.exists() and stage in log.read_text().split())
        yield run
    finally:
        hang.unlink()


def damage(path: Path) -> None:
    """Flip a bit of a file, and leave its size, time and mode as they were."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    with path.open("r+b") as file:  # in place: a link to it has the same content
        file.write(content)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def assert_clean(repository: Repository, *stages: str) -> None:
    """Fail unless `dvc status` has nothing to say (of these stages)."""
    assert json.loads(repository.dvc("status", "--json", *stages)) == {}


def assert_nothing_to_do(repository: Repository, engine: str) -> None:
    if engine == "snakemake":
        assert NOTHING in repository.snakemake("--cores", "1", "report")
    else:
        repository.dvc("repro")
    assert repository.ran() == []


def add_seed(params: dict[str, Any]) -> None:
    params["experiment"]["seeds"].append(2)


def add_variant(params: dict[str, Any]) -> None:
    add_unmeasured_variant(params)
    params["benchmark"]["variants"].append(OTHER)


def add_unmeasured_variant(params: dict[str, Any]) -> None:
    params["experiment"]["variants"].append(OTHER)


def change_evaluation(params: dict[str, Any]) -> None:
    params["evaluation"]["answer_tokens"] += 1


def push_and_clone(repository: Repository, folder: Path) -> Repository:
    repository.dvc("remote", "add", "--default", "store", str(folder / "store"))
    repository.commit()
    repository.dvc("push", "--quiet")
    return repository.clone(folder / "clone")


def code_dependencies(dvc_yaml: Path) -> set[str]:
    """Return the dependencies that no stage writes: code, and files of the repository."""
    stages = [stage.get("do", stage) for stage in yaml.safe_load(dvc_yaml.read_text())["stages"].values()]
    written = {path for stage in stages for path in outputs(stage, {})}
    # The baseline is a variant: what is read of it is what stages wrote of a variant.
    read = {path.replace("${item.baseline}", "${item.variant}") for stage in stages for path in stage["deps"]}
    return {
        path
        for path in read
        if not any(path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in written)
    }


def outputs(stage: dict[str, Any], item: dict[str, str]) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        for entry in stage.get(kind, []):
            yield resolve(next(iter(entry)) if isinstance(entry, dict) else entry, item)


def resolve(text: str, item: dict[str, str]) -> str:
    """Put a matrix item's values, or those of an entry of a mapping and its key, into a path or key of dvc.yaml."""
    for name, value in item.items():
        text = text.replace(f"${{item.{name}}}", value).replace(f"${{{name}}}", value)
    return text


def play_stage(name: str, *options: str) -> None:
    """Do what every stage does at its door, and then the stub's work."""
    from workflow.runtime import dvc_lock_text, inputs, lifetime
    from workflow.runtime.errors import UserError

    lifetime.end_with_engines()
    dvc_lock_text.keep_copy_of_lock()
    item = {flag.removeprefix("--"): value for flag, value in zip(options[::2], options[1::2], strict=True)}
    label = name + ("@" + "-".join(item.values()) if item else "")
    try:
        with inputs.recording(name, item):
            write_outputs(name, item, label)
            inputs.check()
    except UserError as error:
        sys.exit(f"{label}: failed: {error}")


def write_outputs(name: str, item: dict[str, str], label: str) -> None:
    """Write every output of a stage from its dependencies and params, once a test lets it."""
    from workflow.runtime import inputs

    control = Path(os.environ[CONTROL])
    with (control / "ran").open("a") as log:
        log.write(f"{label}\n")
    (control / f"threads {label}").write_text(os.environ.get("OMP_NUM_THREADS", "as many as there are"))
    if (control / f"fail {label}").exists():
        sys.exit(f"{label}: failed: told to")
    while (control / f"hang {label}").exists():
        time.sleep(0.05)
    stage = yaml.load(Path("dvc.yaml").read_text(), yaml.CSafeLoader)["stages"][name]
    params = yaml.load(inputs.params_file(Path("params.yaml")).read_text(), yaml.CSafeLoader)
    if "foreach" in stage:
        stage, key = stage["do"], item["candidate"]
        item = {"key": key, "variant": params["tuning"]["candidates"][key]["variant"]}
    digest = hashlib.sha256(label.encode())
    seeds = params["experiment"]["seeds"]
    for dependency in stage["deps"]:
        path = resolve(dependency, item).replace(f"${{{SEEDS}[0]}}", str(seeds[0]))
        digest.update(meaning(Path(path)))
    for key in stage.get("params", []):
        if key in (SEEDS, TUNING_SEEDS):  # no other seed changes a seed's rows, or the rows that all share
            continue
        value = params
        for part in resolve(key, item).split("."):
            value = value[part]
        digest.update(json.dumps(value).encode())
    for path in map(Path, outputs(stage, item)):
        if path.name == "ready":  # always the same, so that what waits for it runs no second time
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("ready\n")
            continue
        if path.parts[-2:] == ("rates", "variants"):  # what a training waits for, which a test may choose
            path.mkdir(parents=True, exist_ok=True)
            for variant in params["experiment"]["variants"]:
                chosen = control / f"rate {variant}"
                (path / f"{variant}.json").write_text(chosen.read_text() if chosen.exists() else "of params")
            continue
        names = [Path("first"), Path("folder/second")]
        if path == Path(FOLDER_BY_SEED):
            names = [Path(f"{seed}.jsonl") for seed in seeds]
        for file in [path] if path.suffix else [path / name for name in names]:
            file.parent.mkdir(parents=True, exist_ok=True)
            drawn_for = params["tuning"]["seeds"] if file == Path(TUNING_ROWS) else None
            file.write_text(json.dumps({"file": str(file), "digest": digest.hexdigest(), "seeds": drawn_for}))


def meaning(path: Path) -> bytes:
    """Return the content of a file, or of all files of a folder, without the comment lines of code."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    files = [file for file in files if "__pycache__" not in file.parts]
    texts = [(file, file.read_text().splitlines()) for file in files]
    return "\n".join(
        line for file, lines in texts for line in lines if not (file.suffix == ".py" and line.startswith("#"))
    ).encode()


if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))
    play_stage(*sys.argv[1:])
