"""Stage divergence: compare a run's predictions with those of the baseline's run of the same seed."""

from workflow import params
from workflow.runtime.paths import divergence_folder
from workflow.runtime.stage import run_stage


def divergence(variant: str, baseline: str, seed: int) -> None:
    """Measure how far a run's predictions lie from the baseline's, in every serving form that the run has."""
    settings = params.load()
    for name in (variant, baseline):
        params.check_variant(settings, name)
    from workflow.evaluation.divergence import measure

    measure(settings, variant, baseline=baseline, seed=seed, folder=divergence_folder(variant, seed))


if __name__ == "__main__":
    run_stage(
        "divergence",
        divergence,
        arguments={"variant": str, "baseline": str, "seed": int},
        gpus_needed=params.gpus_needed,
    )
