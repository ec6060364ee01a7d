"""Stage evaluate_base: score the untouched base in a variant's precision."""

from workflow import params
from workflow.runtime.forms import BASE
from workflow.runtime.paths import evaluate_base_folder
from workflow.runtime.stage import run_stage


def evaluate_base(variant: str) -> None:
    """Score the base model, before any training, in the precision of a variant."""
    settings = params.load()
    params.check_variant(settings, variant)
    from workflow.evaluation.score import score

    score(settings.run(variant, None), [BASE], settings.evaluation, folder=evaluate_base_folder(variant))


if __name__ == "__main__":
    run_stage("evaluate_base", evaluate_base, arguments={"variant": str}, gpus_needed=params.gpus_needed)
