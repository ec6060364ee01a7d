"""Write a 16-bit model as a GGUF file: llama.cpp's converter, its types by tensor, and its rounding."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderTensor

from workflow.evaluation.llama_cpp import extra, library, types
from workflow.evaluation.llama_cpp.record import GgufRecord
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import whole_file

FILE = "model.gguf"
PLAIN = ("F32", "F16", "BF16")  # the types of a tensor that is not quantized
# What a quantized tensor may differ from its own, as a share of its norm: Q4_0 of normal weights differs by 0.09.
LARGEST_ERROR = 0.25
CHECKED_ROWS = 512  # of each tensor: dequantizing takes longer than quantizing
# What the converter says of a model or tokenizer that it does not know: the end of its last line.
UNKNOWN_TOKENIZER = "BPE pre-tokenizer was not recognized"
# A reader of these files takes them from the tensors.
VIRTUAL = ("GGUF.", "general.architecture")


def convert(model_folder: Path, file: Path, *, vocabulary_alone: bool = False) -> None:
    """Write a model folder, of 16-bit weights and a tokenizer, as a 16-bit GGUF file, with llama.cpp's converter.

    Args:
        vocabulary_alone: leave the weights out, to see whether the converter knows architecture and tokenizer.

    Raises:
        UserError: the converter is not installed, or does not know the architecture or the tokenizer.
    """
    site = extra.site_of(extra.CONVERTER)
    with whole_file(file) as unfinished:
        command = [
            sys.executable,
            "-m",
            extra.MODULES[extra.CONVERTER],
            str(model_folder),
            "--outfile",
            str(unfinished),
        ]
        finished = subprocess.run(
            [*command, "--outtype", "auto", *(["--vocab-only"] if vocabulary_alone else [])],
            env=os.environ | {"PYTHONPATH": str(site), "NO_LOCAL_GGUF": "1"},
            capture_output=True,
            text=True,
        )
        if finished.returncode:
            raise UserError(
                f"llama.cpp's converter cannot write {model_folder} as GGUF: {_reason(finished.stderr)}."
            )


def check_convertible(model_folder: Path, folder: Path) -> None:
    """Raise a UserError unless the packages are there and the converter knows the model and its tokenizer.

    Args:
        folder: for what the check writes.
    """
    extra.check_installed()
    convert(model_folder, folder / "vocabulary.gguf", vocabulary_alone=True)


def _reason(said: str) -> str:
    """Return what went wrong, of all that the converter said."""
    if UNKNOWN_TOKENIZER in said:
        return "it does not know the tokenizer"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR:hf-to-gguf:").rstrip(".") if lines else "it does not say why"


def quantize(source: Path, target: Path, form: str) -> GgufRecord:
    """Write a 16-bit GGUF file again in the types of a GGUF form, tensor by tensor.

    Raises:
        UserError: llama.cpp is not installed, or the model is one for which it has other rules.
        CheckError: a tensor is no longer the one it was.
    """
    reader = GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()

    def setting(key: str) -> int:
        return reader.fields[key.format(arch=architecture)].contents()

    heads = setting(gguf.Keys.Attention.HEAD_COUNT)
    shared = gguf.Keys.Attention.HEAD_COUNT_KV.format(arch=architecture)
    shapes = {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in reader.tensors}
    choices = types.choose(
        shapes,
        form,
        architecture=architecture,
        layers=setting(gguf.Keys.LLM.BLOCK_COUNT),
        grouped=shared in reader.fields and reader.fields[shared].contents() != heads,
    )
    counts: dict[str, int] = {}
    errors = [0.0]
    with whole_file(target) as unfinished:
        writer = GGUFWriter(unfinished, architecture)
        _copy_fields(reader, writer, file_type=types.FILE_TYPES[form].number)
        stored = {tensor.name: _type(tensor, choices[tensor.name]) for tensor in reader.tensors}
        for tensor in reader.tensors:
            kind, shape = stored[tensor.name], shapes[tensor.name]
            size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
            counts[kind.name] = counts.get(kind.name, 0) + 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            blocks, error = _rounded(tensor, stored[tensor.name])
            writer.write_tensor_data(blocks)
            errors.append(error)
        writer.close()
    return GgufRecord(
        file_type=types.FILE_TYPES[form].name,
        size=target.stat().st_size,
        weights_size=sum(int(tensor.n_bytes) for tensor in GGUFReader(target).tensors),
        types=counts,
        fallbacks=types.fallbacks(choices, shapes, form),
        largest_error=max(errors),
        converter=extra.version_of(extra.CONVERTER),
        llama_cpp=extra.version_of(extra.LLAMA_CPP),
    )


def _copy_fields(reader: GGUFReader, writer: GGUFWriter, *, file_type: int) -> None:
    """Copy what a file says of its model and tokenizer, with another file type."""
    for name, field in reader.fields.items():
        if not name.startswith(VIRTUAL) and name != gguf.Keys.General.FILE_TYPE:
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(file_type)


def _type(tensor: ReaderTensor, choice: types.Choice) -> GGMLQuantizationType:
    return tensor.tensor_type if choice.stored is None else GGMLQuantizationType[choice.stored]


def _rounded(tensor: ReaderTensor, kind: GGMLQuantizationType) -> tuple[np.ndarray, float]:
    """Return a tensor's data in another type, and by how much its first rows differ, as a share of their norm.

    Raises:
        CheckError: it differs by more than rounding does.
    """
    if kind == tensor.tensor_type:
        return np.ascontiguousarray(tensor.data), 0.0
    weights = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.data.shape[0], -1)
    blocks = gguf.quantize(weights, kind) if kind.name in PLAIN else library.quantized(weights, int(kind))
    before, after = weights[:CHECKED_ROWS], gguf.dequantize(blocks[:CHECKED_ROWS], kind)
    norm = float(np.linalg.norm(before))
    error = float(np.linalg.norm(after - before)) / norm if norm else 0.0
    if not error <= LARGEST_ERROR:
        raise CheckError(
            f"{tensor.name} in {kind.name} differs from its weights by {error:.3g} of their norm"
        )
    return blocks, error
