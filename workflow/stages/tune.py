"""Stage tune: train a candidate, and score the validation rows."""

from workflow import params
from workflow.data.rows import from_rows
from workflow.runtime import inputs
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_jsonl, write_json, write_text
from workflow.runtime.paths import MODEL, TUNING_ROWS, split_file, tune_folder
from workflow.runtime.stage import run_stage, say
from workflow.runtime.versions import installed


def tune(candidate: str) -> None:
    """Train one candidate with each of the tuning seeds, and keep its validation losses. No test row is read."""
    settings = params.load()
    check_candidate(settings, candidate)
    from workflow.tuning import tune as tuning
    from workflow.tuning.records import described

    asked, folder = settings.tuning.candidates[candidate], tune_folder(candidate)
    runs, curves, precision = tuning.try_candidate(
        settings,
        candidate,
        model_folder=MODEL,
        train_rows={drawn["seed"]: from_rows(drawn["rows"]) for drawn in read_jsonl(TUNING_ROWS)},
        validation_rows=from_rows(read_jsonl(split_file("validation"))),
    )
    for run in runs:
        loss = (
            run.diverged
            or f"validation loss {run.validation_loss_kept:.4f} nats per token at step {run.kept_step}"
        )
        say(f"  {asked.variant} at {asked.learning_rate:g}, seed {run.seed}: {loss}")
    write_text(folder / tuning.CURVE, curves.to_csv(index=False))
    write_json(
        folder / "result.json",
        described(
            candidate=candidate,
            variant=asked.variant,
            learning_rate=asked.learning_rate,
            runs=[run.model_dump() for run in runs],
            precision=precision and precision.as_dict(),
            versions=installed(),
            inputs=inputs.recorded(),
        ),
    )


def check_candidate(settings: params.Params, name: str) -> None:
    """Raise a UserError that lists the candidates unless `name` is one of them."""
    if name not in settings.tuning.candidates:
        known = ", ".join(settings.tuning.candidates) or "none"
        raise UserError(f"{name} is not a candidate; tuning.candidates has {known}.")


def gpus_needed(candidate: str) -> int:
    """One GPU, unless params say `cpu`."""
    settings = params.load()
    check_candidate(settings, candidate)
    return 0 if settings.hardware.device == "cpu" else 1


if __name__ == "__main__":
    run_stage("tune", tune, arguments={"candidate": str}, gpus_needed=gpus_needed)
