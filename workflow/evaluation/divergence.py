"""How far a run's predictions lie from those of the baseline's run of the same seed, token by token.

Both read the same prompts and reference responses, those of task holdout_loss. At each token of a response, P is the
baseline's distribution of the next token over the whole vocabulary and Q that of the run in a serving form, and

    KL(P || Q) = sum over the vocabulary of P (log P - log Q), in nats    (Kullback and Leibler, 1951)

One model is in memory at a time. The baseline's logits are kept meanwhile in a file without a name, in the type in which
the model gives them, so nothing is rounded; softmax, logarithm and sum are in float32.
"""

import gc
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from workflow import params
from workflow.data.model_files import load_tokenizer
from workflow.evaluation import harness
from workflow.evaluation.forms import serve
from workflow.evaluation.items import items_sha256, scores
from workflow.evaluation.language_model import LanguageModel
from workflow.evaluation.prompt_checks import check_scored
from workflow.evaluation.results import DivergenceResult, FormDivergence
from workflow.models.load import LoadedPrecision
from workflow.runtime import inputs
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import whole_file, write_json
from workflow.runtime.forms import AS_TRAINED
from workflow.runtime.paths import MODEL
from workflow.runtime.stage import say
from workflow.runtime.versions import installed

TASK, SPLIT = "holdout_loss", "test"
ITEM = ("leaf", "item", "category", "held_out", "group")  # the columns that describe a token's row
COLUMNS = (*ITEM, "position", "divergence", "same_top")
CHUNK = 2**24  # logits that are compared at a time: bounds the float32 copies to 64 MiB each
GB = 10**9  # as disks are sold
ROUNDING = 1e-4  # nats; a sum over the vocabulary in float32 may lie so far below zero


@dataclass(frozen=True)
class Compared:
    """What two models predict at the tokens of one response."""

    divergence: np.ndarray  # [tokens], nats
    same_top: np.ndarray  # [tokens], bool


class KeptLogits:
    """Logits in a file that has no name, so that nothing is left of it however the process ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by `__exit__`)
        self.rows: dict[int, tuple[int, torch.Size, torch.dtype]] = {}

    def keep(self, places: list[int], all_tokens: int, rows: list[torch.Tensor]) -> None:
        """Append the logits of some rows.

        Raises:
            UserError: the disk has no room for those of all rows.
        """
        if not self.rows:
            size = all_tokens * rows[0].shape[-1] * rows[0].element_size()
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise UserError(
                    f"the baseline's logits at {all_tokens:,} tokens need {size / GB:.3g} GB beside {self.folder}, and its disk "
                    f"has {free / GB:.3g} GB free: make room, or lower evaluation.divergence_items."
                )
        for place, row in zip(places, rows, strict=True):
            self.rows[place] = (self.file.tell(), row.shape, row.dtype)
            self.file.write(row.contiguous().cpu().view(torch.uint8).numpy().tobytes())

    def row(self, place: int, device: torch.device) -> torch.Tensor:
        """The logits [tokens, vocabulary] of a row, as they were given."""
        start, shape, dtype = self.rows[place]
        content = bytearray(math.prod(shape) * dtype.itemsize)
        self.file.seek(start)
        self.file.readinto(content)
        return torch.frombuffer(content, dtype=dtype).view(shape).to(device)

    def __enter__(self) -> "KeptLogits":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def compare_logits(reference: torch.Tensor, logits: torch.Tensor) -> Compared:
    """Compare the predictions of two models.

    Two models agree on the top token if some token is the most likely one, or one of several equally likely ones, for
    both: in bfloat16 the two best logits are often equal.

    Args:
        reference, logits: [tokens, vocabulary], in any type.

    Raises:
        CheckError: they are over different vocabularies, or the divergence is not a number of at least zero.
    """
    if reference.shape != logits.shape:
        raise CheckError(
            f"the run predicts {tuple(logits.shape)} logits, and the baseline {tuple(reference.shape)}"
        )
    divergences, same = [], []
    step = max(1, CHUNK // logits.shape[-1])
    for start in range(0, len(logits), step):
        p_logits, q_logits = (part[start : start + step].float() for part in (reference, logits))
        p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
        tops = [part == part.max(-1, keepdim=True).values for part in (p_logits, q_logits)]
        same.append((tops[0] & tops[1]).any(-1))
    divergence = torch.cat(divergences).cpu().numpy()
    if not (divergence >= -ROUNDING).all():
        raise CheckError(f"a KL divergence is {divergence.min()}, which is not a number of at least zero")
    return Compared(np.maximum(divergence, 0), torch.cat(same).cpu().numpy())


@dataclass
class _Comparer:
    """Compares each row of logits with the kept ones of the baseline."""

    reference: KeptLogits
    rows: dict[int, Compared] = field(default_factory=dict)

    def receive(self, places: list[int], all_tokens: int, rows: list[torch.Tensor]) -> None:
        for place, logits in zip(places, rows, strict=True):
            self.rows[place] = compare_logits(self.reference.row(place, logits.device), logits)


def measure(settings: params.Params, name: str, *, baseline: str, seed: int, folder: Path) -> None:
    """Compare a run in each of its serving forms with the baseline's run of its seed.

    The baseline as trained is not compared with itself. Writes tokens.parquet, a row for each form and token, and
    result.json. Without `evaluation.divergence_items`, both say that nothing was compared.

    Raises:
        CheckError: the loaded model is not what the form says, or the compared texts are not what runs are trained on.
        UserError: a run cannot be loaded, or the disk has no room for the baseline's logits.
    """
    forms = [form for form in settings.forms_of(name) if (name, form) != (baseline, AS_TRAINED)]
    reference, digest, compared = None, None, []
    folder.mkdir(parents=True, exist_ok=True)
    if settings.evaluation.divergence_items is None:
        say("  evaluation.divergence_items is null, so nothing is compared")
    elif forms:
        with KeptLogits(folder) as kept:
            say(f"  {baseline}, {AS_TRAINED}: the predictions that the others are compared with")
            reference, results = _pass(settings, baseline, seed, AS_TRAINED, kept.keep)
            digest = items_sha256(results)
            for form in forms:
                compared.append(_compared(settings, name, seed, form, kept))
                if compared[-1].digest != digest:
                    raise CheckError(f"{form} of {name} was not compared on the rows of {baseline}")
    tables = [form.tokens for form in compared] or [pd.DataFrame(columns=[*COLUMNS, "form"])]
    with whole_file(folder / "tokens.parquet") as unfinished:
        pd.concat(tables).to_parquet(unfinished, index=False)
    result = DivergenceResult(
        variant=name,
        baseline=baseline,
        seed=seed,
        task=TASK,
        split=SPLIT,
        items_sha256=digest,
        reference=reference,
        forms=[form.result for form in compared],
        versions=installed(),
        inputs=inputs.recorded(),
    )
    write_json(folder / "result.json", result.as_dict())


@dataclass(frozen=True)
class _ComparedForm:
    result: FormDivergence
    tokens: pd.DataFrame
    digest: str  # of the rows that were read


def _compared(
    settings: params.Params, name: str, seed: int, form: str, reference: KeptLogits
) -> _ComparedForm:
    """Compare a run in one form with the kept predictions of the baseline, and say how far apart they are."""
    started, comparer = time.monotonic(), _Comparer(reference)
    precision, results = _pass(settings, name, seed, form, comparer.receive)
    tokens = _table(results, comparer.rows).assign(form=form)
    result = FormDivergence(
        form=form,
        precision=precision,
        items=tokens["item"].nunique(),
        tokens=len(tokens),
        mean=float(tokens["divergence"].mean()),
        same_top=float(tokens["same_top"].mean()),
        seconds=round(time.monotonic() - started, 1),
    )
    say(
        f"  {form}: KL divergence {result.mean:.4f} nats per token, the same top token at "
        f"{100 * result.same_top:.1f} % of {result.tokens:,}"
    )
    return _ComparedForm(result, tokens, items_sha256(results))


def _pass(
    settings: params.Params, name: str, seed: int, form: str, receive: Callable
) -> tuple[LoadedPrecision, dict]:
    """Serve a run, and read the responses with it; return its precision and the harness' results."""
    evaluation = settings.evaluation
    run = settings.run(name, seed)
    model, served = serve(run, form, model_folder=MODEL, weights_folder=run.weights)
    task = evaluation.tasks[TASK]
    items = min(evaluation.divergence_items, task.items or evaluation.divergence_items)
    task = task.model_copy(update={"items": items})
    call = harness.call_of(TASK, evaluation.model_copy(update={"tasks": {TASK: task}}))
    language_model = LanguageModel(
        model,
        load_tokenizer(MODEL),
        rows=evaluation.batch_rows,
        tokens=evaluation.batch_tokens,
        receive=receive,
    )
    results = harness.run(call, language_model)
    check_scored(results, language_model)
    del model, language_model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return served.precision, results


def _table(results: dict, rows: dict[int, Compared]) -> pd.DataFrame:
    """One row per token of a response: item, category, held_out, group, position, divergence and same_top.

    The harness scores the newline before a response too, which is no token of it.
    """
    _, items = scores(results, TASK)
    items = items[items["metric"] == "nats_per_token"].reset_index(drop=True)
    parts = []
    for place, item in items.iterrows():
        tokens, compared = int(item["denominator"]), rows[place]
        parts.append(
            pd.DataFrame(
                {column: item[column] for column in ITEM}
                | {
                    "position": np.arange(tokens, dtype=np.int32),
                    "divergence": compared.divergence[-tokens:].astype(np.float32),
                    "same_top": compared.same_top[-tokens:],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
