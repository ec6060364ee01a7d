"""The held-out loss of several models on the same rows, and their differences."""

import gc
from dataclasses import dataclass

import numpy as np
import torch

from workflow import params
from workflow.comparison.contrasts import bootstrap
from workflow.comparison.inference import Difference, difference
from workflow.data.model_files import load_tokenizer
from workflow.evaluation import harness
from workflow.evaluation.forms import serve
from workflow.evaluation.items import scores
from workflow.evaluation.language_model import LanguageModel
from workflow.evaluation.prompt_checks import check_scored
from workflow.models.load import LoadedPrecision
from workflow.runtime.errors import UserError
from workflow.runtime.paths import MODEL, split_file

TASK, METRIC, UNIT = "holdout_loss", "nats_per_token", "nats per token"


@dataclass(frozen=True)
class Loss:
    """The loss of one model on rows of the test split.

    Attributes:
        numerators: [rows], nats of each response.
        tokens: [rows], of each response.
        groups: [rows], equal for rows of one instruction.
    """

    precision: LoadedPrecision
    numerators: np.ndarray
    tokens: np.ndarray
    groups: np.ndarray

    @property
    def value(self) -> float:
        """Nats per token."""
        return float(self.numerators.sum() / self.tokens.sum())


def check_ready() -> None:
    """Raise a UserError if the model or the test rows are missing."""
    for path, stage in ((MODEL / "config.json", "try_model"), (split_file("test"), "sample")):
        if not path.is_file():
            raise UserError(f"{path} is missing; `dvc repro {stage}` makes it.")


def measure(settings: params.Params, run: params.Run, form: str, *, rows: int) -> Loss:
    """Score the first rows of the test split with a run, or its untouched base, in a serving form.

    Raises:
        UserError: the run is missing or damaged.
        CheckError: what was loaded is not the form, or the rows are not scored as they are trained on.
    """
    model, served = serve(run, form, model_folder=MODEL, weights_folder=run.weights)
    task = params.Task(items=rows, few_shot=0, chat_template=True, files=None)
    evaluation = settings.evaluation.model_copy(update={"tasks": {TASK: task}})
    language_model = LanguageModel(
        model, load_tokenizer(MODEL), rows=evaluation.batch_rows, tokens=evaluation.batch_tokens
    )
    results = harness.run(harness.call_of(TASK, evaluation), language_model)
    check_scored(results, language_model)
    del model, language_model
    release_memory()
    _, items = scores(results, TASK)
    items = items[items["metric"] == METRIC]
    return Loss(
        served.precision,
        *(items[column].to_numpy() for column in ("numerator", "denominator", "group")),
    )


def release_memory() -> None:
    """Give back what a model held that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def minus(loss: Loss, other: Loss, settings: params.Params, *, trained: bool) -> Difference:
    """The difference of two losses on the same rows, in nats per token, with its paired interval."""
    return difference(
        (loss.numerators - other.numerators)[np.newaxis],
        loss.tokens,
        loss.groups,
        bootstrap(settings.comparison),
        trained=trained,
    )


def in_words(d: Difference) -> str:
    """A difference with its interval."""
    return f"{d.value:+.4f} ({100 * d.confidence:.4g} % interval {d.low:+.4f} to {d.high:+.4f})"
