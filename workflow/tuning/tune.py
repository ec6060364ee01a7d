"""Try a candidate: train its variant at its learning rate with each of the tuning seeds, and keep the losses alone."""

import gc
import tempfile
from pathlib import Path

import pandas as pd
import torch

from workflow import params
from workflow.data.rows import Instruction
from workflow.models.load import LoadedPrecision
from workflow.training import train
from workflow.training.checks import Diverged
from workflow.tuning.records import CandidateRun

CURVE = "validation.csv"


def try_candidate(
    settings: params.Params,
    name: str,
    *,
    model_folder: Path,
    train_rows: dict[int, list[Instruction]],
    validation_rows: list[Instruction],
) -> tuple[list[CandidateRun], pd.DataFrame, LoadedPrecision | None]:
    """Train a candidate with each of `tuning.seeds`, one after the other.

    Args:
        train_rows: by seed.

    Returns:
        What each run did; their validation curves, a line for each seed and step; and the precision of the base, None if
        every run diverged.

    Raises:
        UserError, CheckError: as for a training, unless its loss is not finite: that run counts as diverged.
    """
    candidate = settings.tuning.candidates[name]
    runs, curves, precision = [], [], None
    for seed in settings.tuning.seeds:
        run = settings.run(candidate.variant, seed, learning_rate=candidate.learning_rate)
        with tempfile.TemporaryDirectory() as scratch:
            folder, diverged, trained = Path(scratch), None, None
            try:
                trained = train.train(
                    run,
                    model_folder=model_folder,
                    train_rows=train_rows[seed],
                    validation_rows=validation_rows,
                    folder=folder,
                )
                precision = trained.precision
            except Diverged as error:
                diverged = str(error)
            curve = pd.read_csv(folder / CURVE)
        runs.append(_run(seed, curve, trained, diverged))
        curves.append(curve.assign(seed=seed)[["seed", *curve]])
        _free_memory()
    return runs, pd.concat(curves, ignore_index=True), precision


def _run(seed: int, curve: pd.DataFrame, trained: train.Trained | None, diverged: str | None) -> CandidateRun:
    best = None if trained is None else curve.loc[curve["validation_loss"].idxmin()]
    return CandidateRun(
        seed=seed,
        diverged=diverged,
        validation_loss_before=curve["validation_loss"].iloc[0],
        validation_loss_after=trained and trained.validation_loss_after,
        validation_loss_kept=trained and trained.validation_loss_kept,
        kept_step=trained and trained.kept_step,
        best_validation_loss=None if best is None else best["validation_loss"],
        best_step=None if best is None else int(best["step"]),
        steps=trained and trained.steps,
        tokens_seen=trained and trained.tokens_seen,
        order_sha256=trained and trained.order_sha256,
        seconds=trained and trained.seconds,
    )


def _free_memory() -> None:
    """Give back what the last run held: its trainer and its model know each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
