"""Write a run of params.yaml, or its untouched base, in a serving form as a folder of its own.

    python -m workflow.save_served --variant qlora_nf4_dq --seed 1 --form merged_16bit --to .cache/served/mine

The folder can be published. Libraries that cannot quantize while they load, such as the command line of
lm-evaluation-harness, can load from it exactly what the stages scored.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from workflow import methods, params, precisions
from workflow.runtime import faults, outputs, variables
from workflow.runtime.errors import UserError
from workflow.runtime.files import whole_folder, write_text
from workflow.runtime.forms import AS_TRAINED, BASE, FORMS, GGUF_FORMS, REQUANTIZED
from workflow.runtime.paths import (
    CARDS,
    MODEL,
    RESULTS,
    evaluate_base_folder,
    evaluate_folder,
    weights_folder,
)
from workflow.runtime.stage import go_offline, quiet_libraries, say

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
    weights = None if seed is None else weights_folder(variant, seed)
    if form == AS_TRAINED and methods.get(settings.variants[variant].method).leaves_adapter:
        code = save_adapter(settings, variant, weights, to)
    elif form in GGUF_FORMS:
        code = save_gguf(settings, variant, seed, form, to)
    else:
        code = save_model(settings, variant, seed, form, to)
    size = sum(file.stat().st_size for file in to.iterdir()) / GB
    run = "the untouched base of " + variant if seed is None else f"{variant}, seed {seed},"
    say(f"{to}: {size:.3g} GB, {run} as {form}. To load it:\n\n{code}\n")


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


def save_adapter(settings: params.Params, variant: str, weights: Path, to: Path) -> str:
    """Copy a run's adapter with its tokenizer and the card that has its numbers; return the code that loads it."""
    from workflow.data import cards, lineage
    from workflow.evaluation import forms

    if not weights.is_dir():
        raise UserError(f"{weights} is missing; `dvc repro` makes it.")
    outputs.check_outputs(MODEL, weights)
    method = methods.get(settings.variants[variant].method)
    forms.check_adapter(weights, MODEL, method, settings.training_of(variant))
    check_space(to, sum(file.stat().st_size for file in weights.iterdir()))
    card = CARDS / variant / weights.parent.name / lineage.CARD
    compute, device = _compute_and_device(settings, variant)
    with whole_folder(to) as folder:
        for file in weights.iterdir():
            shutil.copyfile(file, folder / file.name)
        if card.is_file():
            shutil.copyfile(card, folder / lineage.CARD)
    return cards.loading(
        settings.variants[variant], lineage.read(MODEL), compute=compute, device=device, folder=to
    )


def _compute_and_device(settings: params.Params, variant: str) -> tuple[str, str]:
    """Return the type in which a variant computes on this machine, and the device."""
    from workflow.models.load import choose_compute, choose_device

    device = choose_device(settings.hardware)
    compute = choose_compute(settings.hardware, settings.variants[variant], device)
    return str(compute).removeprefix("torch."), device.type


def save_model(settings: params.Params, variant: str, seed: int | None, form: str, to: Path) -> str:
    """Save a form that is a model of its own, as it was scored; return the code that loads it."""
    from transformers import AutoConfig

    from workflow.data import cards, compatibility, lineage
    from workflow.evaluation.forms import serve
    from workflow.models.load import weights_bytes

    if not (MODEL / "config.json").is_file():
        raise UserError(f"{MODEL} is missing; `dvc repro fetch_model` makes it.")
    weights = None if seed is None else weights_folder(variant, seed)
    outputs.check_outputs(*filter(None, (MODEL, weights)))
    stored = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    quantized = (
        form in (BASE, REQUANTIZED) and precisions.get(settings.variants[variant].precision).is_quantized
    )
    check_space(to, stored // 4 if quantized else stored)
    model, served = serve(
        form,
        model_folder=MODEL,
        weights_folder=weights,
        variant=settings.variants[variant],
        hardware=settings.hardware,
        training=settings.training_of(variant),
    )
    if not served.precision.quantized_modules:
        model = model.to(AutoConfig.from_pretrained(MODEL, trust_remote_code=False).dtype)
    check_space(to, weights_bytes(model))
    precision = served.precision
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
            settings.variants[variant],
            lineage.read(MODEL),
            form=form,
            run="/".join([variant, *([] if seed is None else [str(seed)])]),
            code=published_code,
            scores=_scores(variant, seed, form),
        )
        write_text(folder / lineage.CARD, card)
    return code


def save_gguf(settings: params.Params, variant: str, seed: int | None, form: str, to: Path) -> str:
    """Save a form that is a GGUF file, with its Modelfile; return the commands that serve it."""
    from workflow.evaluation.llama_cpp import extra, published

    extra.check_installed()
    if not (MODEL / "config.json").is_file():
        raise UserError(f"{MODEL} is missing; `dvc repro fetch_model` makes it.")
    weights = None if seed is None else weights_folder(variant, seed)
    outputs.check_outputs(*filter(None, (MODEL, weights)))
    # The merged model and its 16-bit file are there, and then the GGUF file beside the latter.
    check_space(to, 2 * sum(file.stat().st_size for file in MODEL.glob("*.safetensors")))
    run = "/".join([variant, *([] if seed is None else [str(seed)])])
    with whole_folder(to) as folder:
        return published.write(
            folder,
            form,
            settings.variants[variant],
            model_folder=MODEL,
            weights_folder=weights,
            run=published.Run(run, settings.hardware, settings.training_of(variant)),
            scores=_scores(variant, seed, form) if seed is not None else [],
        )


def _scores(variant: str, seed: int | None, form: str) -> list[dict]:
    """Return the metrics of a form, as its evaluation wrote them; empty where it was not scored."""
    from dataclasses import asdict

    from workflow.evaluation.results import read_result

    folder = evaluate_base_folder(variant) if seed is None else evaluate_folder(variant, seed)
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
    go_offline()
    quiet_libraries()
    try:
        variables.check(os.environ, network=False)
        with faults.as_user_errors():
            save_served(options.variant, options.seed, options.form, options.to)
    except UserError as error:
        sys.exit(f"save_served: {error}")


if __name__ == "__main__":
    main()
