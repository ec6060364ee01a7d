"""Stage candidates: list the learning rates that are tried, so that there is a list even where there are none."""

from workflow import params
from workflow.runtime.files import write_json
from workflow.runtime.paths import CANDIDATES
from workflow.runtime.stage import run_stage, say


def candidates() -> None:
    """Write the candidates and the seeds that they are trained with."""
    tuning = params.load().tuning
    write_json(CANDIDATES, tuning.model_dump(mode="json"))
    for name, candidate in tuning.candidates.items():
        say(f"  {name}: {candidate.variant} at {candidate.learning_rate:g}")


if __name__ == "__main__":
    run_stage("candidates", candidates)
