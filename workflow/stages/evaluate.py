"""Stage evaluate: score one run in each of its serving forms."""

from workflow import params
from workflow.runtime.paths import evaluate_folder
from workflow.runtime.stage import run_stage


def evaluate(variant: str, seed: int) -> None:
    """Score one run with lm-evaluation-harness, in every serving form that it has."""
    settings = params.load()
    params.check_variant(settings, variant)
    from workflow.evaluation.score import score

    run, folder = settings.run(variant, seed), evaluate_folder(variant, seed)
    score(run, settings.forms_of(variant), settings.evaluation, folder=folder)


if __name__ == "__main__":
    run_stage("evaluate", evaluate, arguments={"variant": str, "seed": int}, gpus_needed=params.gpus_needed)
