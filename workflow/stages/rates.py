"""Stage rates: the learning rate of each variant's runs."""

from workflow import params
from workflow.runtime.files import whole_folder, write_json
from workflow.runtime.paths import RATE_CHOICES, rate_file
from workflow.runtime.stage import run_stage, say
from workflow.tuning.choose import choose
from workflow.tuning.records import described


def rates() -> None:
    """Write the rate of each variant, and how those that params leave to tuning were chosen.

    A training reads its variant's rate alone: a candidate that changes no choice trains no run again.
    """
    settings = params.load()
    chosen = choose(settings)
    with whole_folder(rate_file("").parent) as folder:
        for name, rate in chosen.variants.items():
            write_json(folder / rate_file(name).name, {"variant": name, "learning_rate": rate.learning_rate})
    choices = {
        name: choice.model_dump() | {"warning": choice.warning} for name, choice in chosen.choices.items()
    }
    content = {"chosen_by": "the lowest mean over the tuning seeds, of the step that is kept",
               "seeds": settings.tuning.seeds, "choices": choices}  # fmt: skip
    write_json(
        RATE_CHOICES,
        described(variants={n: rate.model_dump() for n, rate in chosen.variants.items()}, **content),
    )
    for choice in chosen.choices.values():
        say(f"  {choice.variant}: {choice.learning_rate:g}{f' ({choice.warning})' if choice.warning else ''}")


if __name__ == "__main__":
    run_stage("rates", rates)
