"""Run a study in a folder of its own, and pack what is published of it.

    python -m workflow.study run reference_study     # a preset, or the path of a params file; again to go on

runs it to its page and packs it into studies/reference_study.tar.gz. A study has its own params, results, cache and
dvc.lock, so it leaves those of the repository alone. Its folder needs no git. It shares the repository's downloads and the
local files that its params name.
"""

import argparse
import gzip
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from workflow import params
from workflow.runtime import dvc_lock, gpus
from workflow.runtime.dvc_lock import LockedStage
from workflow.runtime.errors import UserError
from workflow.runtime.files import expanded, whole_file, write_json, write_text
from workflow.runtime.paths import (
    CACHE,
    COMPARE,
    DVC_LOCK,
    ENVIRONMENT,
    HARDWARE,
    PARAMS,
    REPORT,
    RESULTS,
    WHEELS,
)
from workflow.runtime.stage import LOGS, say

STUDIES = Path("studies")
NAME = re.compile(r"[a-z0-9_]+")
# What a study needs from the repository, besides its params.
CODE = (
    ".dvc/config",
    ".dvcignore",
    "Snakefile",
    "dvc.yaml",
    "profiles",
    "pyproject.toml",
    "requirements.lock",
    "workflow",
    HARDWARE.as_posix(),
)
PAGE_CODE = "workflow/report"  # all that is new when a page is rendered again
LOCKED_VERSIONS = Path("requirements.lock")
ITEMS = COMPARE / "items.parquet"
# Models, data, rows and adapters are not packed: their digests are in dvc.lock.
SMALL = {".csv", ".json", ".md"}
# These compute with the model and measure no time, so several can share a GPU.
SHARING = ("evaluate_base", "evaluate", "divergence")
DONE = re.compile(r"^(\w+)(?:, .*)?: done in (\d+) s$", re.MULTILINE)


def name_of(study: str) -> str:
    """Return a study's name: that of its preset or its params file.

    Raises:
        UserError: it cannot be the name of a folder.
    """
    name = Path(study).stem
    if not NAME.fullmatch(name):
        raise UserError(f"a study cannot be called {name}: small letters, digits and _ make its name.")
    return name


def lay_out(study: str, *, folder: Path, repository: Path, model: Path | None = None) -> None:
    """Put the code and the params of a study into its folder, and leave its results there alone.

    Args:
        study: a preset's name, or the path of a params file.
        folder: of the study.
        repository: the source of the code; relative paths in the params start there.
        model: another params file, whose model the study is of.

    Raises:
        UserError: there are no such params, or they are invalid.
    """
    if study.endswith(".yaml"):
        settings, text = params.load(Path(study)), Path(study).read_text(encoding="utf-8")
    else:
        settings, text = params.preset(study), params.complete_text(study)
    if model is not None:
        settings = settings.model_copy(update={"model": params.load(model).model})
        text = params.with_section(text, "model", of=model.read_text(encoding="utf-8"))
    for name in CODE:
        _copy(repository / name, folder / name)
    # DVC would take a git repository above for the study's own, and refuse files that it ignores.
    write_text(folder / ".dvc" / "config.local", "[core]\n    no_scm = true\n")
    write_text(folder / PARAMS, text)
    (repository / WHEELS).mkdir(parents=True, exist_ok=True)
    # It was once shared whole: studies side by side waited for each other's stages.
    if (folder / CACHE).is_symlink():
        (folder / CACHE).unlink()
    for path in [WHEELS, *local_files(settings)]:
        link = folder / path
        if not path.is_absolute() and not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((repository / path).resolve())


def local_files(settings: params.Params) -> list[Path]:
    """Return the local files that params name."""
    sources = [source for source in (settings.model, settings.dataset) if source.source == "file"]
    for task in settings.evaluation.tasks.values():
        sources += (task.files or {}).values()
    return [expanded(source.path, key="path") for source in sources]


def _copy(source: Path, target: Path) -> None:
    """Replace a file or a folder by a copy; do nothing if the source is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*.partial"))
    elif source.exists():
        shutil.copy(source, target)


def bring_up_to_date(folder: Path, *, engine: str, targets: list[str], cores: int, per_gpu: int) -> None:
    """Run the stale stages of a study.

    Stages that may share a GPU run first: otherwise one that measures would wait for all of them, or they for it.

    Args:
        folder: of the study.
        engine: "dvc", which runs one stage after another, or "snakemake", which runs `per_gpu` stages that compute with the
            model on each GPU.
        targets: the last stages to run; the name of a stage with a matrix stands for all of its items.
        cores: for Snakemake.
        per_gpu: number of stages that share a GPU.

    Raises:
        UserError: a stage failed; it has printed why.
    """
    _run_module(folder, "workflow.pipeline", "prune")
    if engine == "dvc":
        _run_module(folder, "workflow.pipeline", "dvc", "repro", *targets)
        return
    count = max(1, len(gpus.visible()))
    shared = per_gpu > 1 and targets == ["report"]
    for names, places in [(SHARING, per_gpu), (targets, 1)] if shared else [(targets, per_gpu)]:
        environment = {}
        if places > 1:
            threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (places * count))))
            environment = {gpus.STAGES_PER_GPU: str(places), "OMP_NUM_THREADS": threads}
        _run_module(folder, "snakemake", *_stages(folder, names), "--cores", str(cores), "--keep-going",
            "--quiet", "rules", "--resources", f"gpu={places * count}", **environment)  # fmt: skip


def _stages(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the stages of dvc.yaml with these names, item by item for a matrix; unknown names stay as they are."""
    from workflow.engine.dvc_repository import open_repo, stage_graph

    with open_repo(folder) as repo:
        stages = [stage.name for stage in stage_graph(repo)]
    return [
        stage
        for name in names
        for stage in [item for item in stages if item.startswith(f"{name}@")] or [name]
    ]


def _run_module(folder: Path, module: str, *arguments: str, **environment: str) -> None:
    """Run a module's command line in a study's folder, with additional environment variables."""
    # Without a .venv, stages find their interpreter on PATH.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    if subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, env=environment).returncode:
        raise UserError(f"the study is not finished: its logs are in {folder / LOGS}; run it again to go on.")


def finish(folder: Path) -> None:
    """Compare and render from the small results alone, for a study whose runs were made on another machine.

    Raises:
        UserError: a run is missing, or a stage failed; it has printed why.
    """
    read_lock(folder / DVC_LOCK)
    for stage in ("compare", "report"):
        _run_module(folder, "workflow.pipeline", "dvc", "repro", "--single-item", stage)


def render_again(folder: Path, *, repository: Path) -> None:
    """Render the page of a finished study with the repository's page code; all other code stays what its results are of.

    Raises:
        UserError: the study was not run, or the page failed; it has printed why.
    """
    read_lock(folder / DVC_LOCK)
    _copy(repository / PAGE_CODE, folder / PAGE_CODE)
    _run_module(folder, "workflow.pipeline", "dvc", "repro", "--single-item", "report")


def record_environment(folder: Path, **settings: str | int) -> None:
    """Record with the results what the study ran on and when it last began or ended."""
    write_json(
        folder / ENVIRONMENT,
        {
            "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            **settings,
            **_machine(),
            "packages": dict(
                sorted((package.name, package.version) for package in importlib.metadata.distributions())
            ),
        },
    )


def _machine() -> dict:
    """Return the operating system, processor, memory, and NVIDIA's driver and GPUs if there are any."""
    import psutil
    import pynvml
    import torch

    from workflow.models.load import device_name

    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": None,
        "gpus": [],
    }
    with suppress(pynvml.NVMLError):  # no driver
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        machine["driver"] = pynvml.nvmlSystemGetDriverVersion()
        machine["gpus"] = [
            {
                "name": pynvml.nvmlDeviceGetName(handle),
                "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
            }
            for handle in handles
        ]
        pynvml.nvmlShutdown()
    return machine


def stage_seconds(folder: Path) -> dict[str, list[int]]:
    """Return the seconds that each stage's runs took, including their start, by the stage's name, from the logs."""
    seconds_by_stage: dict[str, list[int]] = {}
    for log in sorted((folder / LOGS).glob("*.log")):
        for stage, seconds in DONE.findall(log.read_text(encoding="utf-8", errors="replace")):
            seconds_by_stage.setdefault(stage, []).append(int(seconds))
    return seconds_by_stage


def small_results(stages: Mapping[str, LockedStage]) -> list[Path]:
    """The results that are published, by a dvc.lock's stages: tables, records and the items' scores."""
    outs = [Path(path) for stage in stages.values() for path in stage.outs]
    small = [path for path in outs if path.suffix in SMALL and path.is_relative_to(RESULTS)]
    return sorted({*small, ITEMS})


def read_lock(path: Path) -> dict[str, LockedStage]:
    """The stages of a study's dvc.lock.

    Raises:
        UserError: the file is missing, is not sound, or names no stages.
    """
    if not path.is_file():
        raise UserError(f"{DVC_LOCK} is missing: the study was not run.")
    stages = dvc_lock.read(path)
    if not stages:
        raise UserError(f"{DVC_LOCK} names no stages.")
    return stages


def pack(folder: Path, packed: Path) -> list[Path]:
    """Pack the small results, the logs and the page of a finished study into one archive.

    Returns:
        The paths of the files, relative to the study's folder.

    Raises:
        UserError: the study is not finished.
    """
    measured = [path.relative_to(folder) for path in sorted((folder / HARDWARE).glob("*.json"))]
    files = [PARAMS, ENVIRONMENT, REPORT, *small_results(read_lock(folder / DVC_LOCK)), *measured]
    for path in files:
        if not (folder / path).is_file():
            raise UserError(f"{path} is missing: the study is not finished.")
    files += [
        DVC_LOCK,
        LOCKED_VERSIONS,
        *(path.relative_to(folder) for path in sorted((folder / LOGS).glob("*.log"))),
    ]
    with whole_file(packed) as partial:
        _write_archive(folder, files, partial)
    return files


def _write_archive(folder: Path, files: Iterable[Path], archive: Path) -> None:
    """Write an archive without dates and owners, so that the same files give the same bytes."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o644
        return member

    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for path in files:
            tar.add(folder / path, arcname=path.as_posix(), recursive=False, filter=plain)


def main() -> None:
    """Parse the command line and run it; exit with code 1 and one sentence on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m workflow.study", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run what is stale of a study, by its own stages")
    last = actions.add_parser("finish", help="compare, render and pack what was run on another machine")
    page = actions.add_parser("page", help="render a finished study's page with newer page code, and pack it")
    again = actions.add_parser("pack", help="pack a finished study again, into FOLDER.tar.gz")
    for action in (run, last, page, again):
        action.add_argument("study", help="a preset's name, or the path of a params file")
        action.add_argument("--folder", type=Path, help=f"where it is run (default {STUDIES}/NAME)")
        action.add_argument(
            "--model",
            type=Path,
            help="a params file, such as params.yaml, whose model the study is of in place of its own",
        )
    run.add_argument("--engine", choices=["snakemake", "dvc"], default="snakemake")
    run.add_argument(
        "--target", nargs="+", default=["report"], help="the stages to end with (default report)"
    )
    run.add_argument("--cores", type=int, default=os.cpu_count())
    run.add_argument("--per-gpu", type=int, default=1, help="stages that share a GPU (docs/cluster.md)")
    options = parser.parse_args()
    try:
        folder = options.folder or STUDIES / "_on_".join(
            name_of(str(part)) for part in (options.study, options.model) if part
        )
        if options.action == "run" and not _run(options, folder):
            return
        if options.action == "finish":
            lay_out(options.study, folder=folder, repository=Path.cwd(), model=options.model)
            finish(folder)
        if options.action == "page":
            render_again(folder, repository=Path.cwd())
        packed = folder.with_name(f"{folder.name}.tar.gz")
        files = pack(folder, packed)
        say(f"{packed}: {len(files)} files, {packed.stat().st_size / 2**20:.1f} MiB")
    except UserError as error:
        sys.exit(f"study: {error}")
    except KeyboardInterrupt:
        sys.exit("study: interrupted; what is done is kept, and the same command goes on")


def _run(options: argparse.Namespace, folder: Path) -> bool:
    """Run a study up to its target stages, and return whether it is finished."""
    lay_out(options.study, folder=folder, repository=Path.cwd(), model=options.model)
    settings = {"engine": options.engine, "per_gpu": options.per_gpu}
    record_environment(
        folder, study=name_of(options.study), **settings
    )  # a machine can be gone before the end
    try:
        bring_up_to_date(folder, targets=options.target, cores=options.cores, **settings)
    finally:
        record_environment(folder, study=name_of(options.study), **settings)
    for stage, seconds in stage_seconds(folder).items():
        say(
            f"{stage}: {len(seconds)} x {statistics.median(seconds):.0f} s (median), "
            f"longest {max(seconds)} s, {sum(seconds)} s in all"
        )
    if options.target != ["report"]:
        return False
    say(f"The study is finished; its page is {folder / REPORT}")
    return True


if __name__ == "__main__":
    main()
