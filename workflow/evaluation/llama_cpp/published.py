"""A folder that holds a run as a GGUF file, with all that is needed to serve it."""

from dataclasses import asdict
from pathlib import Path

import gguf
from transformers import AutoTokenizer

from workflow import params
from workflow.data import gguf_cards, lineage, ollama
from workflow.evaluation.llama_cpp import serve
from workflow.evaluation.llama_cpp.record import GgufRecord
from workflow.evaluation.llama_cpp.write import FILE
from workflow.runtime.files import write_text

MODELFILE = "Modelfile"
NO_MODELFILE = (
    "The chat template cannot be written in Ollama's language, so there is no Modelfile: without one, Ollama would send "
    "prompts without their turns."
)


def write(
    folder: Path,
    form: str,
    run: params.Run,
    *,
    model_folder: Path,
    scores: list[dict],
) -> str:
    """Write a GGUF file, its tokenizer, Modelfile and card; return the commands that serve it.

    Args:
        scores: of the form, as `cards.served_card` takes them.

    Raises:
        UserError, CheckError: as `serve.serve` does.
    """
    _, served = serve.serve(run, form, folder=folder, model_folder=model_folder, weights_folder=run.weights)
    name = run.name if run.seed is None else f"{run.name}/{run.seed}"
    (folder / serve.IN_16_BITS).unlink()
    lineage.copy_tokenizer(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    parts = (
        ollama.template_parts(tokenizer, adds_bos=_adds_bos(folder / FILE))
        if tokenizer.chat_template
        else None
    )
    if parts:
        write_text(folder / MODELFILE, ollama.modelfile(FILE, parts))
    origin = lineage.read(model_folder)
    commands = gguf_cards.commands(
        run.variant, origin, file_name=FILE, run=name, rank=run.training.rank, has_modelfile=parts is not None
    )
    texts = {
        "commands": commands,
        "code": gguf_cards.loading_gguf(
            compute=served.precision.compute, device=served.precision.device, folder=Path("."), file_name=FILE
        ),
        "stored": _stored(served.gguf, has_modelfile=parts is not None),
    }
    write_text(
        folder / lineage.CARD,
        gguf_cards.gguf_card(run.variant, origin, form=form, run=name, texts=texts, scores=scores),
    )
    return commands


def _adds_bos(file: Path) -> bool:
    """Whether llama.cpp puts a BOS token before a text by itself."""
    fields = gguf.GGUFReader(file).fields
    if gguf.Keys.Tokenizer.ADD_BOS in fields:
        return bool(fields[gguf.Keys.Tokenizer.ADD_BOS].contents())
    return fields[gguf.Keys.Tokenizer.MODEL].contents() == "llama"  # llama.cpp's default


def _stored(record: GgufRecord, *, has_modelfile: bool) -> str:
    """Return how the tensors are stored, in sentences."""
    types = ", ".join(f"{count} in {name}" for name, count in record.types.items())
    fallbacks = gguf_cards.fallback_words([asdict(fallback) for fallback in record.fallbacks])
    sentences = [
        f"{record.file_type}, {record.size:,} bytes, written by {record.converter} and {record.llama_cpp}, without an "
        f"importance matrix. Tensors: {types}.",
        fallbacks,
        "" if has_modelfile else NO_MODELFILE,
    ]
    return "\n\n".join(filter(None, sentences))
