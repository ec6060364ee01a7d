"""Stage try_model: try each variant on a few layers of the model, before rows are drawn and anything is trained."""

from workflow import params
from workflow.console import run_stage, say
from workflow.files import write_text
from workflow.paths import MODEL, MODEL_READY


def try_model() -> None:
    """Try every variant that params.yaml names, so that one that this model cannot do stops the run here."""
    experiment = params.load()
    from workflow import trial  # after the params are checked: it takes seconds to import

    trial.try_variants(MODEL, experiment)
    say(
        f"  a step of each variant was tried on layers of the model: {', '.join(experiment.experiment.variants)}"
    )
    # The sample waits for this file. It never changes, so another variant draws no rows and trains nothing again.
    write_text(MODEL_READY, "Every variant can be trained.\n")


if __name__ == "__main__":
    run_stage("try_model", try_model)
