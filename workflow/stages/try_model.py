"""Stage try_model: try each variant on a few layers of the model, before rows are drawn and anything is trained."""

import tempfile
from pathlib import Path

from workflow import params
from workflow.runtime.files import write_text
from workflow.runtime.forms import GGUF_FORMS
from workflow.runtime.paths import MODEL, MODEL_READY
from workflow.runtime.stage import run_stage, say


def try_model() -> None:
    """Try every variant that params.yaml names, so that one that this model cannot do stops the run here."""
    experiment = params.load()
    from workflow.cost import trial

    if any(form in GGUF_FORMS for form in experiment.evaluation.forms):
        from workflow.evaluation.llama_cpp import write

        with tempfile.TemporaryDirectory() as folder:
            write.check_convertible(MODEL, Path(folder))
    trial.try_variants(MODEL, experiment)
    say(
        f"  a step of each variant was tried on layers of the model: {', '.join(experiment.experiment.variants)}"
    )
    # The sample waits for this file. It never changes, so another variant draws no rows and trains nothing again.
    write_text(MODEL_READY, "Every variant can be trained.\n")


if __name__ == "__main__":
    run_stage("try_model", try_model)
