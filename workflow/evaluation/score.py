"""Score a run in each of its serving forms with lm-evaluation-harness, and keep the score of each item."""

import functools
import gc
import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import lm_eval
import pandas as pd
import torch

from workflow import params
from workflow.data.model_files import load_tokenizer
from workflow.evaluation import harness
from workflow.evaluation.commands import commands
from workflow.evaluation.forms import Served, serve
from workflow.evaluation.items import answers_of, scores, task_record
from workflow.evaluation.language_model import LanguageModel
from workflow.evaluation.llama_cpp import agreement, extra, write
from workflow.evaluation.llama_cpp.record import Agreement
from workflow.evaluation.llama_cpp.serve import serve as serve_gguf
from workflow.evaluation.prompt_checks import check_answers_fit, check_scored
from workflow.evaluation.results import EvaluationResult, FormResult, HarnessRecord, Metric, TaskRecord
from workflow.runtime import inputs
from workflow.runtime.errors import CheckError
from workflow.runtime.files import read_jsonl, whole_file, write_json, write_jsonl
from workflow.runtime.forms import GGUF_FORMS
from workflow.runtime.paths import MODEL, gguf_folder, split_file
from workflow.runtime.stage import say
from workflow.runtime.versions import installed


@dataclass(frozen=True)
class Scored:
    """The evaluation of one form: totals, one row per item and metric, and the generated answers."""

    result: FormResult
    items: pd.DataFrame
    answers: list[dict]


def score(run: params.Run, forms: list[str], evaluation: params.Evaluation, *, folder: Path) -> None:
    """Score a run, or a variant's untouched base, and write result.json, items.parquet and answers.jsonl.

    Args:
        forms: in which it is served.
        folder: where the files are written.

    Raises:
        CheckError, UserError: as `evaluate` does.
    """
    scored = []
    for form in evaluate(run, forms, evaluation):
        for command in form.result.harness.commands:
            say(f"    the same by hand: {command}")
        scored.append(form)
    with whole_file(folder / "items.parquet") as unfinished:
        pd.concat([form.items for form in scored]).to_parquet(unfinished, index=False)
    write_jsonl(folder / "answers.jsonl", [answer for form in scored for answer in form.answers])
    result = EvaluationResult(
        variant=run.name,
        seed=run.seed,
        forms=[form.result for form in scored],
        versions=installed(),
        inputs=inputs.recorded(),
    )
    write_json(folder / "result.json", result.as_dict())


def evaluate(run: params.Run, forms: list[str], evaluation: params.Evaluation) -> Iterator[Scored]:
    """Score a run, or the untouched base, in each form. A form is loaded once for all tasks.

    Raises:
        CheckError: the loaded model is not what the form says, or the scored texts are not what runs are trained on.
        UserError: a task or the run cannot be loaded, or an answer may exceed the model's context.
    """
    gguf = gguf_folder(run.name, run.seed)
    # What an evaluation that was ended left there is of other weights.
    shutil.rmtree(gguf, ignore_errors=True)
    if any(form in GGUF_FORMS for form in forms):
        extra.check_installed()
    tokenizer = load_tokenizer(MODEL)
    check_answers_fit(evaluation)
    if any(task in params.OWN_TASKS for task in evaluation.tasks):
        read_jsonl(split_file("test"))  # names what is wrong with the file, which the harness would not
    for place, form in enumerate(forms, start=1):
        started = time.monotonic()
        load = functools.partial(serve_gguf, folder=gguf) if form in GGUF_FORMS else serve
        model, served = load(run, form, model_folder=MODEL, weights_folder=run.weights)
        say(
            f"  form {place} of {len(forms)}, {form}: {served.precision.base} base, {served.precision.quantized_modules} modules quantized, "
            f"{served.adapters} adapters, computing in {served.precision.compute}"
        )
        language_model = LanguageModel(
            model, tokenizer, rows=evaluation.batch_rows, tokens=evaluation.batch_tokens
        )
        file = gguf / write.FILE if served.gguf else None
        tasks = [
            _score_task(task, evaluation, language_model, form=form, gguf_file=file)
            for task in evaluation.tasks
        ]
        served = _with_agreement(served, tasks)
        by_hand = commands(served, run, evaluation)
        yield Scored(
            result=FormResult.of(
                served,
                metrics=[metric for task in tasks for metric in task.metrics],
                harness=_harness_record(evaluation, language_model, tasks, commands=by_hand),
                seconds=time.monotonic() - started,
            ),
            items=pd.concat([task.items for task in tasks])
            .assign(variant=run.name, seed=run.seed, form=form)
            .astype({"seed": "Int64"}),
            answers=[{**answer, "form": form} for task in tasks for answer in task.answers],
        )
        del model, language_model
        _release_memory()
    shutil.rmtree(gguf, ignore_errors=True)


@dataclass(frozen=True)
class _ScoredTask:
    record: TaskRecord
    metrics: list[Metric]
    items: pd.DataFrame
    answers: list[dict]
    agreement: Agreement | None


def _with_agreement(served: Served, tasks: list[_ScoredTask]) -> Served:
    """Add to a GGUF file's record how llama.cpp itself scores it."""
    compared = next((task.agreement for task in tasks if task.agreement), None)
    return replace(served, gguf=replace(served.gguf, agreement=compared)) if served.gguf else served


def _release_memory() -> None:
    """Give back what a model held that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _harness_record(
    evaluation: params.Evaluation,
    language_model: LanguageModel,
    tasks: list[_ScoredTask],
    *,
    commands: list[str],
) -> HarnessRecord:
    """Record how the harness was called for a form."""
    template = language_model.tokenizer.chat_template or ""
    return HarnessRecord(
        name="lm-evaluation-harness",
        version=lm_eval.__version__,
        batch_rows=evaluation.batch_rows,
        batch_tokens=evaluation.batch_tokens,
        add_bos_token=bool(language_model.add_bos_token),
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest(),
        tasks=[task.record for task in tasks],
        commands=commands,
    )


def _score_task(
    task: str,
    evaluation: params.Evaluation,
    language_model: LanguageModel,
    *,
    form: str,
    gguf_file: Path | None,
) -> _ScoredTask:
    """Score one task, and say what it scored.

    Args:
        gguf_file: from which the model was read, if it was; llama.cpp then scores some rows as well.

    Raises:
        CheckError: the scored texts are not what runs are trained on, a score is not finite, or llama.cpp gives
            others.
        UserError: the task cannot be loaded.
    """
    call = harness.call_of(task, evaluation)
    results = harness.run(call, language_model)
    cut = check_scored(results, language_model) if task in params.OWN_TASKS else 0
    if cut:
        say(f"    {task}: {cut} prompts are longer than the model's context, which cuts their beginning")
    metrics, items = scores(results, task)
    answers = answers_of(results) if task == "holdout_generation" else []
    if not all(math.isfinite(metric.value) for metric in metrics):
        raise CheckError(f"{task} gives {form} a score that is not finite")
    say(f"    {task}: " + ", ".join(f"{m.metric} {m.value:.4f}" for m in metrics))
    record = task_record(call, results, language_model, prompts_cut=cut)
    compared = None
    if gguf_file is not None and task == agreement.TASK:
        compared = agreement.compare(results, language_model, gguf_file)
    if compared:
        say(
            f"    llama.cpp itself: {compared.llama_cpp:.4f} nats per token of {compared.rows} rows, and transformers "
            f"{compared.transformers:.4f}"
        )
    return _ScoredTask(record, metrics, items, answers, compared)
