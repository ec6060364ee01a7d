"""Write a run of params.yaml, or its untouched base, in a serving form as a model of its own.

    python -m workflow.save_served --variant qlora_nf4_dq --seed 1 --form merged_16bit --to .cache/served/mine

For publishing it, and for libraries that cannot quantise while they load (lm-evaluation-harness' command
line is one), which can then load exactly what the stages scored.
"""

import argparse
import sys
from pathlib import Path

from workflow import faults, params
from workflow.console import go_offline, quiet_libraries
from workflow.errors import UserError
from workflow.files import whole_folder
from workflow.paths import MODEL, weights_folder


def save_served(variant: str, seed: int | None, form: str, to: Path) -> None:
    """Save a run (of a base: no seed) in a form, with its tokenizer, in the folder `to`.

    Raises:
        UserError: params.yaml has no such variant, or the variant no such form.
    """
    asked = params.load()
    params.check_variant(asked, variant)
    if form != "base" and not params.can_be_served(asked.variants[variant], form):
        raise UserError(f"{variant} cannot be served as {form}.")
    if (seed is None) != (form == "base"):
        raise UserError("--seed names a run, and form base has none: give one or the other.")
    from transformers import AutoConfig, AutoTokenizer

    from workflow.serving import serve

    weights = None if seed is None else weights_folder(variant, seed)
    model, served = serve(
        form,
        model_folder=MODEL,
        weights_folder=weights,
        variant=asked.variants[variant],
        hardware=asked.hardware,
    )
    if served.adapters:
        raise UserError(f"{form} is an adapter on its base: {weights} is what there is to save.")
    if not served.precision.quantized_modules:
        model = model.to(AutoConfig.from_pretrained(MODEL, trust_remote_code=False).dtype)
    with whole_folder(to) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a run in a serving form as a model of its own.")
    parser.add_argument("--variant", required=True, help="one of experiment.variants")
    parser.add_argument("--seed", type=int, help="the run's seed; none for --form base")
    parser.add_argument("--form", required=True, choices=["base", *params.FORMS], help="how it is served")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    go_offline()
    quiet_libraries()
    try:
        with faults.as_user_errors():
            save_served(options.variant, options.seed, options.form, options.to)
    except UserError as error:
        sys.exit(f"save_served: {error}")


if __name__ == "__main__":
    main()
