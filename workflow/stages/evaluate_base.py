"""Stage evaluate_base: score the untouched base in a variant's precision."""

from workflow.console import run_stage
from workflow.paths import evaluate_base_folder
from workflow.stages.evaluate import score


def evaluate_base(variant: str) -> None:
    """Score the base model, before any training, in the precision of a variant."""
    score(variant, seed=None, form="base", weights=None, folder=evaluate_base_folder(variant))


if __name__ == "__main__":
    run_stage("evaluate_base", evaluate_base, arguments={"variant": str})
