"""Serve a run, or the untouched base, as a GGUF file, read back by transformers, which dequantizes it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from workflow import methods, params
from workflow.data import compatibility, lineage, model_files
from workflow.evaluation import forms
from workflow.evaluation.forms import SIXTEEN_BIT, Served
from workflow.evaluation.llama_cpp import write
from workflow.models.load import base_linears, choose_compute, choose_device, describe
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.forms import AS_TRAINED, BASE, MERGED_16BIT

IN_16_BITS = "16bit.gguf"
# Letters of several scripts, digits, spaces in a row, a line break, and what a template puts between turns.
SAMPLE = "Hello  world: naïve café, 12345.67\n\n\tif x == 1:  # 中文 и кириллица 🙂"


def serve(
    run: params.Run, form: str, *, folder: Path, model_folder: Path, weights_folder: Path | None
) -> tuple[torch.nn.Module, Served]:
    """Write a run, or without `weights_folder` the base, as `model.gguf` in a folder, and load that.

    Args:
        form: a GGUF form.
        folder: where files are written. The 16-bit file stays there, so that another form begins with it.
        The others are those of `forms.serve`.

    Returns:
        The model in eval mode, its weights dequantized, and what it was found to be.

    Raises:
        UserError: as `forms.serve` does, or llama.cpp's packages are not installed or do not know the model.
        CheckError: the file's weights, tokenizer or chat template are not those of the model.
    """
    in_16_bits, file = folder / IN_16_BITS, folder / write.FILE
    if not in_16_bits.is_file():
        merged = folder / "merged"
        save_merged(run, merged, model_folder=model_folder, weights_folder=weights_folder)
        write.convert(merged, in_16_bits)
        shutil.rmtree(merged)
    record = write.quantize(in_16_bits, file, form)
    check_tokenizer(file, model_folder)
    compute = choose_compute(run.hardware, run.variant, choose_device(run.hardware))
    model = load(file, compute=compute, hardware=run.hardware)
    frozen = run.variant.model_copy(update=SIXTEEN_BIT | {"method": methods.FROZEN})
    precision = replace(
        describe(model, frozen, compute=compute),
        storage=f"GGUF {record.file_type}",
        quantized_modules=len(base_linears(model)),
        weights_gib=round(record.weights_size / 2**30, 6),
    )
    return model.eval(), Served(form, precision, adapters=0, adapter_dtype=None, gguf=record)


def save_merged(run: params.Run, folder: Path, *, model_folder: Path, weights_folder: Path | None) -> None:
    """Write the run's 16-bit model, or the base, with its tokenizer, as a folder that any program can load."""
    if weights_folder is None:
        form, run = BASE, replace(run, variant=run.variant.model_copy(update=SIXTEEN_BIT))
    else:
        form = MERGED_16BIT if run.method.leaves_adapter else AS_TRAINED
    model, _ = forms.serve(run, form, model_folder=model_folder, weights_folder=weights_folder)
    stored = AutoConfig.from_pretrained(model_folder, trust_remote_code=False).dtype or torch.bfloat16
    model.to(stored).save_pretrained(folder)
    lineage.copy_tokenizer(model_folder, folder)
    compatibility.make_compatible(folder)


def load(file: Path, *, compute: torch.dtype, hardware: params.Hardware) -> torch.nn.Module:
    """Read a GGUF file by transformers, its weights dequantized to the type that is computed in.

    Raises:
        UserError: transformers does not know the architecture in this format.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=compute,
            device_map={"": choose_device(hardware)},
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"transformers cannot read {file.name}: {model_files.reason(error)}.") from None


def check_tokenizer(file: Path, model_folder: Path) -> None:
    """Raise a CheckError unless a GGUF file has the tokenizer and the chat template of the model."""
    own = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    stored = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    if stored.chat_template != own.chat_template:
        raise CheckError(f"{file.name} has another chat template than the model")
    text = SAMPLE + "".join(map(str, own.all_special_tokens)) + json.dumps(own.chat_template)
    ids, expected = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (stored, own))
    if ids != expected:
        raise CheckError(
            f"{file.name} has another tokenizer than the model: a text of {len(text)} characters differs"
        )
