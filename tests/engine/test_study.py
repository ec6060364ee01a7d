"""A study is run in a folder of its own, packed, checked, published; what does not agree is refused in one sentence."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import made_up_results
import pandas as pd
import pytest
from conftest import ROOT
from engine_fixture import EVERYTHING, assert_nothing_to_do
from report_reader import facts
from ruamel.yaml import YAML

from workflow import params
from workflow.comparison import export
from workflow.engine import publish, study
from workflow.report import drawing
from workflow.report.page import render
from workflow.report.summary import summary_markdown, summary_table
from workflow.runtime import environment
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, write_json, write_text
from workflow.runtime.forms import OWN_FORMS
from workflow.runtime.locks import try_lock
from workflow.runtime.paths import COMPARE, REPORT, SUMMARY, SUMMARY_TABLE, environment_file, weights_folder

QLORA = "qlora_nf4_dq"
LOCK = Path("dvc.lock")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a finished study with chosen numbers, one of them from a GPU's file."""
    return make(tmp_path_factory.mktemp("made"))


def make(folder: Path, **asked) -> Path:
    """Write the folder of such a study; what is asked is that of `made_up_results.write`."""
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "matplotlib_svg", lambda *_, **__: "<svg></svg>")
        compared = made_up_results.write(**asked)
        made_up_results.write_hardware()
        for name, table in export.tables(compared).items():
            write_text(COMPARE / f"{name}.csv", table.to_csv(index=False))
        write_json(COMPARE / "metrics.json", export.headline(compared))
        for kind in environment.PACKAGES:
            write_json(environment_file(kind), {"torch": "2.13.0"})
        for variant in ("lora_16bit", QLORA):
            made_up_results.write_grid(variant, "own", [made_up_results.point("grid", variant)])
        write_text(weights_folder(QLORA, 1) / "adapter_config.json", "{}")  # what stays where it was made
        made_up_results.write_lock()
        found = facts()
        write_text(SUMMARY, summary_markdown(found))
        write_text(SUMMARY_TABLE, summary_table(found).to_csv(index=False))
        write_text(REPORT, render(found))
        made_up_results.write_lock()
        write_json(
            study.ENVIRONMENT,
            {"finished": "2026-11-24 12:00 UTC", "python": "3.11.7", "driver": None, "gpus": [],
             "packages": {"torch": "2.13.0+cpu", "bitsandbytes": "0.50.2"}},
        )  # fmt: skip
        write_text(study.LOGS / "train@lora_16bit-1.log", "train, variant lora_16bit, seed 1: done in 12 s\n")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "study", symlinks=True)
    return tmp_path / "study"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty repository, which is the working directory."""
    (tmp_path / "home").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    Path("README.md").write_text(
        f"# Title\n\n{publish.BEGIN}\n{publish.NONE}\n{publish.END}\n\nThe rest.\n", encoding="utf-8"
    )
    return tmp_path / "home"


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("measured", "costs", "sentence"),
    [
        (("lora_16bit",), ["not measured"] * 2, "in one process for each variant that has them."),
        ((), [], "Memory and time were not measured."),
    ],
)
def test_a_headline_says_which_costs_were_not_measured(tmp_path, home, measured, costs, sentence):
    (tmp_path / "study").mkdir()
    study.pack(make(tmp_path / "study", measured=measured), Path("study.tar.gz"))
    publish.publish("made_up", Path("study.tar.gz"))
    (row,) = (line for line in publish.section("made_up").splitlines() if line.startswith(f"| `{QLORA}`"))
    assert [cell.strip() for cell in row.strip("|").split("|")][4:] == costs
    assert sentence in publish.section("made_up")


def test_a_study_is_packed_checked_and_published(folder, home):
    packed = folder.with_name("study.tar.gz")
    study.pack(folder, packed)
    first = packed.read_bytes()
    publish.publish("made_up", packed)
    kept = files_of(publish.PUBLISHED / "made_up")
    for path in ("params.yaml", "dvc.lock", "environment.json"):
        assert kept[Path(path)] == (folder / path).read_bytes()
    for path in ("compare/comparison.json", "compare/contrasts.csv", "compare/items.parquet", "summary.csv",
                 "evaluate/lora_16bit/1/result.json", "train/lora_16bit/2/history.csv",
                 "hardware/made_up_gpu.json"):  # fmt: skip
        assert kept[Path(path)] == (folder / "results" / path).read_bytes()
    assert not [path for path in kept if path.suffix in (".jsonl", ".log") or "weights" in path.parts]
    assert (publish.PAGES / "made_up.html").read_bytes() == (folder / REPORT).read_bytes()
    assert (publish.PAGES / "made_up.svg").read_text().lstrip().startswith("<?xml")
    publish.check(publish.published("made_up"))
    study.pack(folder, packed)
    assert packed.read_bytes() == first


def test_a_page_is_rendered_again_with_new_page_code_and_the_code_of_its_results(
    folder, tmp_path, monkeypatch
):
    shutil.rmtree(folder / "workflow", ignore_errors=True)
    (folder / "workflow").unlink(missing_ok=True)  # a link to that of the repository
    repository, ran = tmp_path / "repository", []
    for place, age in ((folder, "old"), (repository, "new")):
        for room in ("report", "comparison"):
            write_text(place / "workflow" / room / "module.py", age)
    write_text(folder / "workflow/report/gone.py", "old")
    monkeypatch.setattr(study, "_run_module", lambda *arguments: ran.append(arguments))
    study.render_again(folder, repository=repository)
    code = {path.as_posix(): text for path, text in files_of(folder).items() if path.parts[0] == "workflow"}
    assert code == {"workflow/report/module.py": b"new", "workflow/comparison/module.py": b"old"}
    assert ran == [(folder, "workflow.pipeline", "dvc", "repro", "--single-item", "report")]
    (folder / LOCK).unlink()
    with pytest.raises(UserError, match="^dvc.lock is missing: the study was not run.$"):
        study.render_again(folder, repository=repository)


def test_the_readme_shows_the_headline_from_the_published_files(folder, home):
    study.pack(folder, Path("packed.tar.gz"))
    publish.publish("made_up", Path("packed.tar.gz"))
    readme = Path("README.md").read_text()
    assert readme.startswith("# Title\n\n<!-- studies") and readme.endswith("-->\n\nThe rest.\n")
    assert publish.NONE not in readme
    assert "2026-11-24 12:00 UTC, Made-up CPU, 2 threads; torch 2.13.0+cpu, bitsandbytes 0.50.2." in readme
    assert (
        "The base had already been quantized once (GGUF Q4_1; [what that does](docs/mechanism.md))." in readme
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in readme.splitlines()
        if line.startswith("| `")
    ]
    assert [row[0] for row in rows] == ["`lora_16bit`", f"`{QLORA}`"]
    table = pd.read_csv(folder / SUMMARY_TABLE)
    own = table[(table.variant == QLORA) & (table.form == "as_trained") & (table.metric == "nats_per_token")]
    assert float(rows[1][1]) == pytest.approx(own.value.item(), abs=5e-4)
    assert rows[1][2].startswith(f"+{own.difference.item():.3f} (+{own.low.item():.3f} to ")
    assert rows[1][3] == own.verdict.item() == "worse"
    assert float(rows[1][4]) == pytest.approx(made_up_results.PEAK_GIB[QLORA], abs=5e-3)
    family = pd.read_csv(folder / COMPARE / "contrasts.csv").query("in_family")
    for word, count in family.verdict.value_counts().items():
        assert f"{count} {word}" in readme
    assert publish.with_studies(readme) == readme
    shutil.rmtree(publish.PUBLISHED)
    assert publish.NONE in publish.with_studies(readme)


def edited(path: Path, old: str, new: str) -> None:
    """Replace the first place; links to what the other tests use are not followed."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.unlink()
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def a_result(folder: Path) -> None:
    edited(folder / COMPARE / "comparison.json", '"value": 2.2034', '"value": 2.1034')


def a_measured_point(folder: Path) -> None:
    edited(folder / "results/hardware/made_up_gpu.json", '"median": 6543.0', '"median": 7543.0')


def a_curve(folder: Path) -> None:
    edited(folder / f"results/train/{QLORA}/1/history.csv", "\n1,", "\n2,")


def the_page(folder: Path) -> None:
    edited(folder / REPORT, "0.058", "0.008")


def the_page_and_its_digest(folder: Path) -> None:
    page = folder / REPORT
    before = hashlib.md5(page.read_bytes()).hexdigest()
    edited(page, '"numbers":[[', '"numbers":[[9')
    edited(folder / LOCK, before, hashlib.md5(page.read_bytes()).hexdigest())


def a_page_that_warns(folder: Path) -> None:
    page = folder / REPORT
    before = hashlib.md5(page.read_bytes()).hexdigest()
    edited(page, "<main", '<p class="banner">This page does not match.</p><main')
    edited(folder / LOCK, before, hashlib.md5(page.read_bytes()).hexdigest())


def in_lock(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        yaml = YAML(typ="safe", pure=True)
        content = yaml.load((folder / LOCK).read_text())
        change(content["stages"])
        with (folder / LOCK).open("w") as file:
            yaml.dump(content, file)

    return tamper


def the_digest_of_an_adapter(stages: dict) -> None:
    out = next(out for out in stages[f"train@{QLORA}-1"]["outs"] if out["path"].endswith("weights"))
    out["md5"] = "1" * 32 + ".dir"


def a_recorded_param(stages: dict) -> None:
    recorded = stages[f"train@{QLORA}-2"]["params"]["params.yaml"]
    recorded["training"] = recorded["training"] | {"learning_rate": 5.0}


def a_param(folder: Path) -> None:
    edited(folder / "params.yaml", "split_seed: 55", "split_seed: 56")


def a_margin(folder: Path) -> None:
    edited(folder / "params.yaml", "nats_per_token: 0.02", "nats_per_token: 0.2")


def a_param_that_is_none(folder: Path) -> None:
    edited(folder / "params.yaml", "split_seed: 55", "split_sed: 55")


def a_version(folder: Path) -> None:
    edited(folder / study.ENVIRONMENT, "2.13.0+cpu", "2.14.0+cpu")


def no_date(folder: Path) -> None:
    edited(folder / study.ENVIRONMENT, '"finished"', '"begun"')


TAMPERED = [
    (a_result, "results/compare/comparison.json is not what dvc.lock says: its md5 is not that in the entry of compare."),
    (a_measured_point, "the page has 6543.0 from results/hardware/made_up_gpu.json#points[0].useful_tokens_per_second.median"),
    (a_curve, f"results/train/{QLORA}/1/history.csv is not what dvc.lock says"),
    (the_page, "report/index.html is not what dvc.lock says"),
    (the_page_and_its_digest, "the page has 9"),
    (a_page_that_warns, "the page says that it does not match dvc.lock"),
    (in_lock(the_digest_of_an_adapter),
     f"by dvc.lock, divergence@{QLORA}-lora_16bit-1 read another results/train/{QLORA}/1/weights than was written."),
    (in_lock(a_recorded_param), f"params.yaml has another value of training than train@{QLORA}-2 was run with."),
    (in_lock(lambda stages: stages.pop(f"evaluate@{QLORA}-2")), f"dvc.lock has no evaluate@{QLORA}-2, which params.yaml"),
    (a_param, "params.yaml has another value of sample than sample was run with."),
    (a_margin, "params.yaml has another value of comparison than compare was run with."),
    (a_param_that_is_none, "params.yaml: sample.split_sed is not a key; did you mean split_seed?"),
    (a_version, "results/train/lora_16bit/1/result.json was made with torch 2.13.0+cpu, and environment.json has 2.14"),
    (no_date, "environment.json lacks finished."),
]  # fmt: skip


@pytest.mark.parametrize(("tamper", "sentence"), TAMPERED, ids=[sentence[:40] for _, sentence in TAMPERED])
def test_what_does_not_agree_is_refused_in_one_sentence(folder, home, tamper, sentence):
    tamper(folder)
    study.pack(folder, Path("packed.tar.gz"))
    before = files_of(home)
    with pytest.raises(UserError) as error:
        publish.publish("made_up", Path("packed.tar.gz"))
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert files_of(home) == before


def test_a_missing_result_is_named_when_packed_and_when_published(folder, home):
    study.pack(folder, Path("whole.tar.gz"))
    (folder / COMPARE / "contrasts.csv").unlink()
    with pytest.raises(
        UserError, match="^results/compare/contrasts.csv is missing: the study is not finished.$"
    ):
        study.pack(folder, Path("packed.tar.gz"))
    with tarfile.open("whole.tar.gz") as whole, tarfile.open("less.tar.gz", "w:gz") as less:
        for member in whole:
            if member.name != "results/compare/contrasts.csv":
                less.addfile(member, whole.extractfile(member))
    with pytest.raises(UserError, match="^results/compare/contrasts.csv is missing.$"):
        publish.publish("made_up", Path("less.tar.gz"))


def archive(name: str) -> bytes:
    """An archive with one file."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "packed.tar.gz is missing."),
        (b"no archive", "packed.tar.gz is no archive of a study: "),
        (archive("params.yaml")[:40], "packed.tar.gz is no archive of a study: "),
        (archive("../outside.json"), "packed.tar.gz is no archive of a study: "),
        (archive("params.yaml"), "dvc.lock is missing."),
    ],
    ids=["none", "text", "cut", "outside", "of something else"],
)
def test_another_archive_is_refused_in_one_sentence(home, content, sentence):
    if content is not None:
        Path("packed.tar.gz").write_bytes(content)
    command = [sys.executable, "-m", "workflow.publish", "made_up", "packed.tar.gz"]
    with pytest.raises(UserError) as error:
        publish.publish("made_up", Path("packed.tar.gz"))
    assert sentence in str(error.value) and not Path("results").exists()
    assert not list(home.parent.rglob("outside.json"))
    if content is None:
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (1, f"publish: made_up was refused: {sentence}\n")


def test_a_readme_without_the_marks_is_refused_before_anything_is_written(folder, home):
    study.pack(folder, Path("packed.tar.gz"))
    Path("README.md").write_text("# Title\n")
    with pytest.raises(UserError, match="README.md must have the lines"):
        publish.publish("made_up", Path("packed.tar.gz"))
    assert not Path("results").exists() and not Path("report").exists()


def test_many_items_are_not_for_git(folder, home, monkeypatch):
    study.pack(folder, Path("packed.tar.gz"))
    monkeypatch.setattr(publish, "MOST_ITEMS", 10)
    publish.publish("made_up", Path("packed.tar.gz"))
    found = publish.published("made_up")
    assert study.ITEMS not in found
    publish.check(found)


def test_every_published_study_holds_and_is_what_the_readme_shows():
    """The page's numbers are the results', the digests are those of the lock, the params validate."""
    names = publish.names()
    assert sorted(path.stem for path in publish.PAGES.glob("*.html")) == names
    for name in names:
        publish.check(publish.published(name))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert publish.with_studies(readme) == readme, "`python -m workflow.publish` writes it"


def test_git_has_what_is_published_and_nothing_of_what_is_run_here():
    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0

    folder = "results/studies/made_up"
    for path in (
        "dvc.lock",
        "train/lora_16bit/1/result.json",
        "compare/items.parquet",
        "fetch_model/source.json",
    ):
        assert not ignored(f"{folder}/{path}")
    for path in (
        "results/studies/.made_up.partial/params.yaml",
        "studies/made_up/dvc.lock",
        "data/rows.jsonl",
    ):
        assert ignored(path)


def test_a_published_study_makes_no_stage_of_the_repository_stale(repository, made):
    shutil.copytree(
        made, repository.root / "results/studies/made_up", ignore=shutil.ignore_patterns("workflow")
    )
    shutil.copy(made / REPORT, repository.root / "report")
    (repository.root / "report/studies").mkdir()
    shutil.move(repository.root / "report/index.html", repository.root / "report/studies/made_up.html")
    repository.run("git", "checkout", "--", "report/index.html")
    for engine in ("dvc", "snakemake"):
        assert_nothing_to_do(repository, engine)


def test_a_study_is_run_by_either_engine_beside_the_repository(repository, monkeypatch, tmp_path):
    for name, value in repository.environment().items():
        monkeypatch.setenv(name, value)
    own = {path: (repository.root / path).read_bytes() for path in ("dvc.lock", "params.yaml")}
    (repository.root / "params.yaml").write_bytes(
        own["params.yaml"].replace(b"seeds:", b"seeds: # as before\n", 1)
    )
    folder = repository.root / "studies" / "params"  # within a git repository that ignores it
    study.lay_out(str(repository.root / "params.yaml"), folder=folder, repository=repository.root)
    (repository.root / "params.yaml").write_bytes(own["params.yaml"])
    (repository.control / "fail compare").touch()
    with pytest.raises(UserError, match="the study is not finished: its logs are in .*logs; run it again"):
        study.bring_up_to_date(folder, engine="snakemake", targets=["report"], cores=4, per_gpu=2)
    in_order = (repository.control / "ran").read_text().split()
    ran = repository.ran()
    (repository.control / "fail compare").unlink()
    # Those that share the GPU come first, and share the cores as they do the GPU.
    evaluated = [stage for stage in EVERYTHING if stage.startswith("evaluate")]
    assert {(repository.control / f"threads {stage}").read_text() for stage in evaluated} == {"2"}
    measured = [stage for stage in EVERYTHING if stage.startswith("benchmark")]
    assert max(map(in_order.index, evaluated)) < min(map(in_order.index, measured))
    study.bring_up_to_date(folder, engine="dvc", targets=["report"], cores=4, per_gpu=1)
    assert sorted({*ran, *repository.ran()}) == EVERYTHING and "report" not in ran
    study.bring_up_to_date(folder, engine="snakemake", targets=["report"], cores=4, per_gpu=2)
    names = ["train", "evaluate_base", "evaluate", "benchmark", "benchmark_grid", "sample"]
    study.bring_up_to_date(folder, engine="snakemake", targets=names, cores=4, per_gpu=1)
    assert repository.ran() == []
    for path, content in own.items():
        assert (repository.root / path).read_bytes() == content
    assert_nothing_to_do(repository, "dvc")


def test_a_study_run_on_another_machine_is_finished_from_its_small_results(repository, monkeypatch):
    for name, value in repository.environment().items():
        monkeypatch.setenv(name, value)
    there, here = repository.root / "studies/there", repository.root / "studies/here"
    for folder in (there, here):
        study.lay_out(str(repository.root / "params.yaml"), folder=folder, repository=repository.root)
    targets = ["evaluate_base", "evaluate", "divergence", "benchmark", "benchmark_grid"]
    study.bring_up_to_date(there, engine="snakemake", targets=targets, cores=4, per_gpu=1)
    small = shutil.ignore_patterns("weights", "model")
    shutil.copytree(there / "results", here / "results", ignore=small, dirs_exist_ok=True)
    shutil.copy(there / "dvc.lock", here)
    repository.ran()
    study.finish(here)
    assert repository.ran() == ["compare", "report"] and (here / REPORT).is_file()
    (here / "dvc.lock").unlink()
    with pytest.raises(UserError, match="dvc.lock is missing: the study was not run"):
        study.finish(here)


def test_a_study_has_the_code_the_params_and_links_to_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/piqa").mkdir(parents=True)
    (tmp_path / "data/dolly-15k.jsonl").write_text("{}")
    shutil.copytree(ROOT / "workflow", "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    folder = Path("studies/reference_study")
    study.lay_out("reference_study", folder=folder, repository=tmp_path)
    write_text(folder / "results/kept.json", "{}")
    write_text(folder / "workflow/gone.py", "")
    study.lay_out("reference_study", folder=folder, repository=tmp_path)
    assert (folder / "params.yaml").read_text() == params.complete_text("reference_study")
    assert (folder / "data/dolly-15k.jsonl").read_text() == "{}"
    assert (folder / "workflow/engine/study.py").is_file() and not (folder / "workflow/gone.py").exists()
    assert (folder / "results/kept.json").is_file()
    assert "no_scm = true" in (folder / ".dvc/config.local").read_text()


def test_studies_share_downloads_alone(repository, monkeypatch):
    """What a stage locks and what it says it read are by its name, which is the same in every study."""
    for name, value in repository.environment().items():
        monkeypatch.setenv(name, value)
    folders = [repository.root / "studies" / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / ".cache").symlink_to(repository.root / ".cache")  # as it once was laid out
        study.lay_out(str(repository.root / "params.yaml"), folder=folder, repository=repository.root)
        assert (folder / ".cache/wheels").samefile(repository.root / ".cache/wheels")
    running = [folder / ".cache/running" for folder in folders]
    for folder in running:
        folder.mkdir(exist_ok=True)
    assert not running[0].samefile(running[1])
    held = try_lock(running[0] / "pipeline")
    study.bring_up_to_date(folders[1], engine="dvc", targets=["fetch_dataset"], cores=1, per_gpu=1)
    held.release()
    assert held and repository.ran() == ["fetch_dataset"]


def test_a_study_is_laid_out_on_the_model_of_other_params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(params.complete_text("tiny"))
    study.lay_out("reference_study", folder=tmp_path / "study", repository=tmp_path, model=Path("mine.yaml"))
    expected = params.preset("reference_study").model_copy(update={"model": params.preset("tiny").model})
    assert params.load(tmp_path / "study" / "params.yaml") == expected
    with pytest.raises(UserError, match="none.yaml is missing"):
        study.lay_out(
            "reference_study", folder=tmp_path / "study", repository=tmp_path, model=Path("none.yaml")
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "no_such_preset"], "no_such_preset is not a preset; known are default, curves, gpu_benchmark, "),
        (["run", "My-Study.yaml"], "a study cannot be called My-Study: small letters, digits and _ make its name."),
        (["pack", "tiny"], "dvc.lock is missing: the study was not run."),
        (["finish", "no_such_preset"], "no_such_preset is not a preset; known are default, curves, gpu_benchmark, "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path, arguments, sentence):
    done = subprocess.run(
        [sys.executable, "-m", "workflow.study", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("study: ")
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("params.yaml"))


def test_the_time_of_each_stage_is_read_from_the_logs(tmp_path):
    write_text(
        tmp_path / "logs/train@a-1.log",
        "train, variant a, seed 1: started\ntrain, variant a, seed 1: done in 20 s\n",
    )
    write_text(tmp_path / "logs/train@a-2.log", "train, variant a, seed 2: done in 30 s\n")
    write_text(tmp_path / "logs/sample.log", "sample: done in 4 s\n")
    write_text(tmp_path / "logs/compare.log", "compare: failed: it did.\n")
    assert study.stage_seconds(tmp_path) == {"sample": [4], "train": [20, 30]}


def test_the_machine_is_recorded(tmp_path):
    study.record_environment(tmp_path, study="tiny", engine="dvc")
    found = read_json(tmp_path / study.ENVIRONMENT)
    assert set(publish.RECORDED) <= found.keys() and found["engine"] == "dvc"
    assert found["packages"]["peft"] and found["memory_gib"] > 0 and found["processor"]
    assert str(Path.home()) not in json.dumps(found)


def test_the_reference_study_asks_what_it_is_for():
    asked = params.preset("reference_study")
    assert asked.experiment.variants == [
        "lora_16bit", "qlora_nf4", QLORA, "qlora_fp4", "lora_int8", "full_16bit", "seed_recipe"]  # fmt: skip
    assert len(asked.experiment.seeds) == 5 and asked.evaluation.forms == list(OWN_FORMS)
    assert (asked.sample.rows, asked.sample.seed, asked.training.epochs) == (1000, 55, 3)
    assert set(asked.evaluation.tasks) == {"holdout_loss", "response_choice", "holdout_generation", "piqa"}
    decided = {"holdout_loss/nats_per_token", "holdout_loss/bits_per_byte", "response_choice/acc",
               "response_choice/acc_norm", "holdout_generation/rouge_l", "holdout_generation/chrf",
               "holdout_generation/ended", "piqa/acc", "piqa/acc_norm"}  # fmt: skip
    assert set(asked.comparison.margins) == decided
    assert set(asked.comparison.repairs) == {"all_faults", "merge_into_4_bits", "no_double_quantization"}


@pytest.mark.parametrize("name", ["dataset", "piqa"])
def test_the_data_of_the_reference_study_are_those_that_it_names(name):
    asked = params.preset("reference_study")
    source = asked.dataset if name == "dataset" else asked.evaluation.tasks["piqa"].files["validation"]
    found = ROOT.parent / "shared" / source.path
    if not found.is_file():
        pytest.skip(f"{source.path} is not on this machine")
    assert hashlib.sha256(found.read_bytes()).hexdigest() == source.sha256
