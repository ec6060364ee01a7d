"""The card of a GGUF file: how llama.cpp, Ollama, transformers and vLLM serve the run, and how its tensors are stored."""

from pathlib import Path

from workflow import methods, params
from workflow.data import cards
from workflow.data.lineage import Lineage
from workflow.runtime.forms import MERGED_16BIT
from workflow.runtime.paths import MODEL


def fallback_words(fallbacks: list[dict]) -> str:
    """Return which tensors have another type than the file type gives them; empty if none has.

    Args:
        fallbacks: as a result has them: `tensors`, `count`, `width`, `intended` and `stored`.
    """
    if not fallbacks:
        return ""
    widths = sorted({fallback["width"] for fallback in fallbacks})
    by_types: dict[tuple[str, str], list[str]] = {}
    for fallback in fallbacks:
        names = by_types.setdefault((fallback["stored"], fallback["intended"]), [])
        names.append(f"{fallback['tensors']} ({fallback['count']})")
    parts = [
        f"{stored} in place of {intended}: {', '.join(names)}"
        for (stored, intended), names in by_types.items()
    ]
    rows = " or ".join(f"{width:,}" for width in widths)
    return f"Rows of {rows} weights hold no whole number of blocks, so other types take their place. {'; '.join(parts)}."


def commands(
    variant: params.Variant, origin: Lineage, *, file_name: str, run: str, rank: int, has_modelfile: bool
) -> str:
    """Return the commands that serve a GGUF file, and the run by vLLM.

    Args:
        run: its variant and, for a run, its seed, joined by a slash.
        rank: of the adapter.
        has_modelfile: whether a Modelfile lies beside the file.
    """
    name = run.replace("/", "-").replace("_", "-")
    lines = [
        "# llama.cpp, which reads the chat template in the file",
        f"llama-cli -m {file_name} --jinja",
        f"llama-server -m {file_name} --jinja",
    ]
    if has_modelfile:
        lines += [
            "# Ollama, by the Modelfile, whose template is the model's own",
            f"ollama create {name} -f Modelfile",
            f"ollama run {name}",
        ]
    variant_name, _, seed = run.partition("/")
    if seed:
        lines += [
            "# vLLM, the run's model merged into 16 bits",
            f"python -m workflow.save_served --variant {variant_name} --seed {seed} --form {MERGED_16BIT} --to merged",
            "vllm serve merged",
        ]
        if methods.get(variant.method).leaves_adapter:
            base = origin.base_model if origin.base_model and origin.revision else MODEL.as_posix()
            lines += [
                "# or its adapter on the 16-bit base, which is the same but for the rounding of the merge",
                f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=results/train/{run}/weights",
            ]
    return "\n".join(lines)


def gguf_card(
    variant: params.Variant,
    origin: Lineage,
    *,
    form: str,
    run: str,
    texts: dict[str, str],
    scores: list[dict],
) -> str:
    """Return the card of a GGUF file.

    Args:
        texts: `commands` in the shell, `code` in Python, and `stored`, which says how the tensors are stored.
        The others are those of `cards.served_card`.
    """
    card = cards.served_card(variant, origin, form=form, run=run, code=texts["code"], scores=scores)
    head, _, numbers = card.partition("\n## Numbers\n")
    return f"{head}\n## How to serve it\n\n```sh\n{texts['commands']}\n```\n\n## How it is stored\n\n{texts['stored']}\n\n## Numbers\n{numbers}"


def loading_gguf(*, compute: str, device: str, folder: Path, file_name: str) -> str:
    """Return Python that reads a GGUF file as it was scored: by transformers, which dequantizes it."""
    code = cards.loading_model(compute=compute, device=device, folder=folder)
    arguments = f'gguf_file="{file_name}"'
    return code.replace("    folder, dtype", f"    folder, {arguments}, dtype").replace(
        "(folder)", f"(folder, {arguments})"
    )
