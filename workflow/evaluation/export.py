"""Write a run of params.yaml, or its untouched base, in a serving form as a folder of its own.

    python -m workflow.save_served --variant qlora_nf4_dq --seed 1 --form merged_16bit --to .cache/served/mine

The folder can be published. Libraries that cannot quantize while they load, such as the command line of
lm-evaluation-harness, can load from it exactly what the stages scored.
"""

import argparse
import shutil
from pathlib import Path

from workflow import params, precisions
from workflow.runtime import outputs
from workflow.runtime.errors import UserError, missing
from workflow.runtime.files import whole_folder, write_text
from workflow.runtime.forms import AS_TRAINED, BASE, FORMS, GGUF_FORMS, REQUANTIZED
from workflow.runtime.paths import (
    CARDS,
    MODEL,
    RESULTS,
    evaluate_base_folder,
    evaluate_folder,
)
from workflow.runtime.stage import offline_command, say

GB = 10**9  # as disks are sold
SETTINGS = ("config.json", "adapter_config.json", "model.gguf")  # of a folder that holds a model
MARGIN = 2**24  # bytes for the files beside the weights


def save_served(variant: str, seed: int | None, form: str, to: Path) -> None:
    """Save a run in a serving form, with its tokenizer and card, in the folder `to`.

    Args:
        seed: of the run; None for the untouched base.

    Raises:
        UserError: params.yaml has no such variant, or the variant no such form; the model or the run is damaged;
            `to` holds something other than a model, or its disk has too little space.
    """
    settings = params.load()
    params.check_variant(settings, variant)
    if form != BASE and not params.can_be_served(settings.variants[variant], form):
        raise UserError(f"{variant} cannot be served as {form}.")
    if (seed is None) != (form == BASE) and not (seed is None and form in GGUF_FORMS):
        raise UserError(
            "--seed names a run, and form base has none: give one or the other. A GGUF form without --seed is of the base."
        )
    check_target(to)
    run = settings.run(variant, seed)
    if form == AS_TRAINED and run.method.leaves_adapter:
        code = save_adapter(run, to)
    elif form in GGUF_FORMS:
        code = save_gguf(run, form, to)
    else:
        code = save_model(run, form, to)
    size = sum(file.stat().st_size for file in to.iterdir()) / GB
    source = "the untouched base of " + variant if seed is None else f"{variant}, seed {seed},"
    say(f"{to}: {size:.3g} GB, {source} as {form}. To load it:\n\n{code}\n")


def check_target(to: Path) -> None:
    """Raise a UserError unless a folder may be written there. It may replace a model that was saved before."""
    if to.resolve().is_relative_to(RESULTS.resolve()):
        raise UserError(f"--to is {to}, and {RESULTS} belongs to the pipeline's stages; name another folder.")
    if to.is_file():
        raise UserError(f"--to is {to}, which is a file; name a folder.")
    if to.is_dir() and any(to.iterdir()) and not any((to / name).is_file() for name in SETTINGS):
        raise UserError(f"--to is {to}, which holds something else than a model; name a new folder.")


def check_space(to: Path, size: int) -> None:
    """Raise a UserError unless the disk has room for `size` bytes beside the folder that is there now."""
    existing = next(folder for folder in (to.absolute(), *to.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < size + MARGIN:
        raise UserError(
            f"--to is {to}, which needs {size / GB:.3g} GB, and its disk has {free / GB:.3g} GB free: "
            "make room, or name a folder on another disk."
        )


def save_adapter(run: params.Run, to: Path) -> str:
    """Copy a run's adapter with its tokenizer and the card that has its numbers; return the code that loads it."""
    from workflow.data import cards, lineage
    from workflow.evaluation import forms
    from workflow.models.load import with_whole_names

    weights = run.weights
    if not weights.is_dir():
        raise missing(weights)
    outputs.check_outputs(MODEL, weights)
    forms.check_adapter(weights, MODEL, run.method, run.training)
    check_space(to, sum(file.stat().st_size for file in weights.iterdir()))
    card = CARDS / run.name / str(run.seed) / lineage.CARD
    compute, device = _compute_and_device(run)
    with whole_folder(to) as folder:
        for file in weights.iterdir():
            shutil.copyfile(file, folder / file.name)
        if card.is_file():
            shutil.copyfile(card, folder / lineage.CARD)
    whole = with_whole_names(run.variant, MODEL)
    return cards.loading(whole, lineage.read(MODEL), compute=compute, device=device, folder=to)


def _compute_and_device(run: params.Run) -> tuple[str, str]:
    """Return the type in which a variant computes on this machine, and the device."""
    from workflow.models.load import choose_compute, choose_device

    device = choose_device(run.hardware)
    compute = choose_compute(run.hardware, run.variant, device)
    return str(compute).removeprefix("torch."), device.type


def save_model(run: params.Run, form: str, to: Path) -> str:
    """Save a form that is a model of its own, as it was scored; return the code that loads it."""
    import torch
    from transformers import AutoConfig

    from workflow.data import cards, compatibility, lineage
    from workflow.evaluation.forms import serve
    from workflow.models.load import weights_bytes

    if not (MODEL / "config.json").is_file():
        raise UserError(f"{MODEL} is missing; `dvc repro fetch_model` makes it.")
    outputs.check_outputs(*filter(None, (MODEL, run.weights)))
    stored = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    quantized = form in (BASE, REQUANTIZED) and precisions.get(run.variant.precision).is_quantized
    check_space(to, stored // 4 if quantized else stored)
    model, served = serve(run, form, model_folder=MODEL, weights_folder=run.weights)
    if not served.precision.quantized_modules:
        model = model.to(AutoConfig.from_pretrained(MODEL, trust_remote_code=False).dtype)
    precision = served.precision
    if precision.quantized_modules:
        model = precisions.get(precision.base).savable(model, getattr(torch, precision.compute))
    check_space(to, weights_bytes(model))
    code, published_code = (
        cards.loading_model(
            compute=precision.compute,
            device=precision.device,
            folder=folder,
            precision=precisions.get(precision.base) if precision.quantized_modules else None,
        )
        for folder in (to, Path(to.name))
    )
    with whole_folder(to) as folder:
        model.save_pretrained(folder)
        lineage.copy_tokenizer(MODEL, folder)
        compatibility.make_compatible(folder)
        card = cards.served_card(
            run.variant,
            lineage.read(MODEL),
            form=form,
            run=run.name if run.seed is None else f"{run.name}/{run.seed}",
            code=published_code,
            scores=_scores(run, form),
        )
        write_text(folder / lineage.CARD, card)
    return code


def save_gguf(run: params.Run, form: str, to: Path) -> str:
    """Save a form that is a GGUF file, with its Modelfile; return the commands that serve it."""
    from workflow.evaluation.llama_cpp import extra, published

    extra.check_installed()
    if not (MODEL / "config.json").is_file():
        raise missing(MODEL)
    outputs.check_outputs(*filter(None, (MODEL, run.weights)))
    # The merged model and its 16-bit file are there, and then the GGUF file beside the latter.
    check_space(to, 2 * sum(file.stat().st_size for file in MODEL.glob("*.safetensors")))
    with whole_folder(to) as folder:
        scores = [] if run.seed is None else _scores(run, form)
        return published.write(folder, form, run, model_folder=MODEL, scores=scores)


def _scores(run: params.Run, form: str) -> list[dict]:
    """Return the metrics of a form, as its evaluation wrote them; empty where it was not scored."""
    from dataclasses import asdict

    from workflow.evaluation.results import read_result

    folder = evaluate_base_folder(run.name) if run.seed is None else evaluate_folder(run.name, run.seed)
    file = folder / "result.json"
    results = read_result(file).forms if file.is_file() else []
    return [asdict(metric) for result in results if result.form == form for metric in result.metrics]


def main() -> None:
    """Read the command line and save the form that it names."""
    parser = argparse.ArgumentParser(description="Write a run in a serving form as a folder of its own.")
    parser.add_argument("--variant", required=True, help="one of experiment.variants")
    parser.add_argument("--seed", type=int, help="the run's seed; none for --form base")
    parser.add_argument("--form", required=True, choices=[BASE, *FORMS], help="how it is served")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    with offline_command("save_served"):
        save_served(options.variant, options.seed, options.form, options.to)


if __name__ == "__main__":
    main()
