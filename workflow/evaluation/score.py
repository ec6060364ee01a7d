"""Score a run in every serving form with lm-evaluation-harness, and keep each item's score."""

import gc
import hashlib
import json
import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from numbers import Real

import lm_eval
import pandas as pd
import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from workflow import methods, params
from workflow.data import chat
from workflow.data.model_files import context_length, load_tokenizer
from workflow.data.rows import as_rows, from_scored_rows
from workflow.evaluation import harness
from workflow.evaluation.forms import Served, serve
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import read_jsonl
from workflow.runtime.paths import AS_TRAINED, BASE, MODEL, served_folder, split_file, weights_folder
from workflow.runtime.stage import say

UNITS = {
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
    "acc": "share of items",
    "acc_norm": "share of items",
    "exact_match": "share of items",
    "rouge_l": "ROUGE-L F-measure",
    "chrf": "chrF, 0 to 100",
    "ended": "share of answers",
    "length": "tokens",
}
SOFTMAX = "float32"  # the type of log-probabilities, whatever the model computes in
MOST_DIFFERENCE = 1e-9  # between the harness' total and that of the items, as a share of the total


@dataclass(frozen=True)
class Metric:
    """One number, with what it is. `per_item`: its items add up to it, so that it can be compared in pairs."""

    task: str
    metric: str
    value: float
    unit: str
    higher_is_better: bool | None  # None: no direction is better
    split: str
    items: int
    per_item: bool


@dataclass(frozen=True)
class Scored:
    """What the evaluation of one form found: totals, one row per item and metric, and the answers."""

    served: Served
    metrics: list[Metric]
    items: pd.DataFrame
    answers: list[dict]
    harness: dict
    seconds: float

    def as_dict(self) -> dict:
        return {
            **self.served.as_dict(),
            "metrics": [asdict(metric) for metric in self.metrics],
            "harness": self.harness,
            "seconds": round(self.seconds, 1),
        }


def evaluate(
    forms: list[str],
    *,
    name: str,
    seed: int | None,
    variant: params.Variant,
    evaluation: params.Evaluation,
    hardware: params.Hardware,
    training: params.Training | None = None,
) -> Iterator[Scored]:
    """Score a run of params (of the untouched base: no seed) in each form; a form is loaded once for all tasks.

    Args:
        training: what the run was trained with; its adapter is held to it.

    Raises:
        CheckError: what was loaded is not what the form names, or what is scored is not what was trained.
        UserError: a task or the run cannot be loaded, or an answer may be longer than the model's context.
    """
    tokenizer = load_tokenizer(MODEL)
    check_answers_fit(evaluation)
    if any(task in params.OWN_TASKS for task in evaluation.tasks):
        read_jsonl(split_file("test"))  # the harness would say less of what is wrong with it
    for place, form in enumerate(forms, start=1):
        started = time.monotonic()
        model, served = serve(
            form,
            model_folder=MODEL,
            weights_folder=None if seed is None else weights_folder(name, seed),
            variant=variant,
            hardware=hardware,
            training=training,
        )
        say(
            f"  form {place} of {len(forms)}, {form}: {served.precision.base} base, {served.precision.quantized_modules} modules quantized, "
            f"{served.adapters} adapters, computing in {served.precision.compute}"
        )
        language_model = LanguageModel(
            model, tokenizer, rows=evaluation.batch_rows, tokens=evaluation.batch_tokens
        )
        metrics, items, answers, tasks = [], [], [], []
        for task in evaluation.tasks:
            call = harness.call_of(task, evaluation)
            results = harness.run(call, language_model)
            cut = check_scored(results, language_model) if task in params.OWN_TASKS else 0
            if cut:
                say(
                    f"    {task}: {cut} prompts are longer than the model's context, which cuts their beginning"
                )
            found, rows = scores(results, task)
            metrics += found
            items.append(rows)
            answers += _answers(results) if task == "holdout_generation" else []
            if not all(math.isfinite(metric.value) for metric in found):
                raise CheckError(f"{task} gives {form} a score that is not finite")
            tasks.append({**_record(call, results, language_model), "prompts_cut": cut})
            say(f"    {task}: " + ", ".join(f"{m.metric} {m.value:.4f}" for m in found))
        yield Scored(
            served=served,
            metrics=metrics,
            items=pd.concat(items).assign(variant=name, seed=seed, form=form).astype({"seed": "Int64"}),
            answers=[{**answer, "form": form} for answer in answers],
            harness={
                "name": "lm-evaluation-harness",
                "version": lm_eval.__version__,
                "batch_rows": evaluation.batch_rows,
                "batch_tokens": evaluation.batch_tokens,
                "add_bos_token": bool(language_model.add_bos_token),
                "chat_template_sha256": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
                "tasks": tasks,
                "commands": commands(served, name=name, seed=seed, variant=variant, evaluation=evaluation),
            },
            seconds=time.monotonic() - started,
        )
        del model, language_model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class LanguageModel(HFLM):
    """The harness' own, with log-probabilities in float32, and no forward pass of more than so many tokens.

    In a 16-bit type the harness rounds each log-probability, and their sum over a response, to its 8 or 11 bits: in
    bfloat16 a response of 200 nats to a whole nat, so that options of a question tie.

    Args:
        rows: in a forward pass.
        tokens: in a forward pass that scores, padding included, at most, in place of `rows` (a row that is longer
            has a pass of its own); None for `rows`.
    """

    def __init__(self, model, tokenizer, *, rows: int, tokens: int | None):
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=rows, softmax_dtype=SOFTMAX)
        self.rows, self.tokens = rows, tokens

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        if self.tokens is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        answers = [None] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as progress:
            for batch in batches(lengths, tokens=self.tokens):
                self.batch_size_per_gpu = len(batch)
                scored = super()._loglikelihood_tokens([requests[place] for place in batch], True)
                for place, answer in zip(batch, scored, strict=True):
                    answers[place] = answer
                progress.update(len(batch))
        self.batch_size_per_gpu = self.rows
        return answers


def batches(lengths: list[int], *, tokens: int) -> Iterator[list[int]]:
    """Places of `lengths`, the longest first: no more than `tokens` when all of a batch are padded to its longest."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        count = max(1, tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def check_scored(results: dict, language_model: HFLM) -> int:
    """Check that our own tasks score rows as they are trained on, and count prompts that the context cuts.

    Raises:
        CheckError: a prompt is not the text that stage sample rendered, does not begin with as many BOS tokens as the
            chat template gives it, or is scored as other tokens than these texts have; a response has no token that
            is scored, or another number of them than the sample stage counted.
    """
    tokenizer, longest = language_model.tokenizer, language_model.max_length
    wanted, cut = int(chat.begins_with_bos(tokenizer)), 0
    for sample in (sample for samples in results["samples"].values() for sample in samples):
        row = f"row {sample['doc']['id']} of the test split"
        for prompt, asked in sample["arguments"]:
            if not isinstance(asked, str):  # settings of an answer that is generated
                text, prompt_ids = prompt, language_model.tok_encode(prompt)
                room = longest - asked["max_gen_toks"]
            else:
                text = prompt + asked
                prompt_ids, scored_ids = language_model._encode_pair(prompt, asked)
                room = longest + 1 - len(scored_ids)  # the last token is predicted, and no input
                if not scored_ids or room < 1:
                    raise CheckError(
                        f"of the response of {row} {len(scored_ids)} tokens are scored, and the model's context has "
                        f"{longest}"
                    )
            if (bos := chat.leading(prompt_ids, tokenizer.bos_token_id)) != wanted:
                raise CheckError(
                    f"the prompt of {row} is scored with {bos} BOS tokens, and rows are trained with {wanted}, as the "
                    "chat template has them"
                )
            check_text(prompt, sample["doc"]["chat_prompt"], row)
            if language_model.tok_encode(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
                raise CheckError(
                    f"{row} is scored as other tokens than its text has, which rows are trained on"
                )
            cut += len(prompt_ids) > room
        if "nats_per_token" in sample:
            # The harness counts the whitespace that ends a prompt among what is scored.
            prompt, response = sample["arguments"][0]
            scored = len(language_model.tok_encode(prompt + response)) - len(
                language_model.tok_encode(prompt)
            )
            if scored != sample["doc"]["response_tokens"] or scored < 1:
                raise CheckError(
                    f"{scored} tokens of the response of {row} are scored, and the sample stage counted "
                    f"{sample['doc']['response_tokens']}"
                )
    return cut


def check_text(prompt: str, rendered: str, row: str) -> None:
    """Raise a CheckError unless a prompt is scored as the text that stage sample made of it, on whatever day."""
    if prompt != rendered:
        raise CheckError(
            f"the prompt of {row} is scored as another text than stage sample rendered: "
            + chat.parting(prompt, rendered)
        )


def items_sha256(results: dict) -> str:
    """The sha256 of all that a task asks of a model and scores it by: ids, prompts, continuations and targets."""
    items = sorted(
        json.dumps(
            [leaf, sample["doc_id"], sample["arguments"], sample["target"]], sort_keys=True, default=str
        )
        for leaf, samples in results["samples"].items()
        for sample in samples
    )
    return hashlib.sha256("\n".join(items).encode()).hexdigest()


def check_answers_fit(evaluation: params.Evaluation) -> None:
    """Raise a UserError if an answer as long as params allow leaves no room for a prompt."""
    longest = context_length(MODEL)
    if "holdout_generation" in evaluation.tasks and longest and evaluation.answer_tokens >= longest:
        raise UserError(
            f"evaluation.answer_tokens is {evaluation.answer_tokens}, and the model's context holds {longest} tokens, "
            "the prompt's among them."
        )


def commands(
    served: Served, *, name: str, seed: int | None, variant: params.Variant, evaluation: params.Evaluation
) -> list[str]:
    """The shell commands that give a form's numbers with the harness' own command line, from this folder."""
    adapter, prepare = None, None
    if served.form == BASE and variant.precision == "16bit":
        model = MODEL
    elif served.form == AS_TRAINED and not methods.get(variant.method).leaves_adapter:
        model = weights_folder(name, seed)
    else:
        kept = (name, seed, served.form)
        if served.form == AS_TRAINED:
            adapter, kept = weights_folder(name, seed), (name, None, BASE)
        model = MODEL
        if kept[2] != BASE or variant.precision != "16bit":
            model = served_folder(*kept)
            run = [] if kept[1] is None else ["--seed", kept[1]]
            prepare = ["python", "-m", "workflow.save_served", "--variant", name, *run,
                       "--form", kept[2], "--to", model]  # fmt: skip
    arguments = f"pretrained={model},dtype={served.precision.compute},softmax_dtype={SOFTMAX}" + (
        f",peft={adapter}" if adapter else ""
    )
    calls = [
        ["lm_eval", "run", "--model", "hf", "--model_args", arguments,
         "--batch_size", evaluation.batch_rows, "--device", served.precision.device,
         *harness.call_of(task, evaluation).arguments()]
        for task in evaluation.tasks
    ]  # fmt: skip
    return [shlex.join(map(str, command)) for command in [*([prepare] if prepare else []), *calls]]


def scores(results: dict, task: str) -> tuple[list[Metric], pd.DataFrame]:
    """The totals of one task, and a row per item and metric: numerator and denominator of a ratio of sums.

    Of a group the total is that over all items of its leaf tasks. A metric whose items do not add up to the
    harness' own total (a perplexity, a corpus' BLEU) is kept as a total alone.
    """
    items = pd.DataFrame(
        row for leaf, samples in results["samples"].items() for row in _items(leaf, samples, task, results)
    )
    metrics = []
    keys = {(m, f): None for leaf in results["samples"] for m, f in _reported(results["results"][leaf])}
    for metric, filtered in keys:
        name = _metric_name(metric, filtered)
        leaves = [leaf for leaf in results["samples"] if f"{metric},{filtered}" in results["results"][leaf]]
        rows = items[items["metric"] == name] if len(items) else items
        adds_up = len(rows) > 0 and all(
            _adds_up(rows[rows["leaf"] == leaf], results["results"][leaf][f"{metric},{filtered}"])
            for leaf in leaves
        )
        if not adds_up:
            items = items[items["metric"] != name] if len(items) else items
            if len(leaves) > 1:
                continue  # there is no one total of several leaf tasks
        alone = results["results"][leaves[0]][f"{metric},{filtered}"]
        pooled = rows["numerator"].sum() / rows["denominator"].sum() if adds_up else alone
        config = results["configs"][leaves[0]]
        metrics.append(
            Metric(
                task=task,
                metric=name,
                value=float(alone if len(leaves) == 1 else pooled),
                unit=UNITS.get(metric, f"{metric}, as the task defines it"),
                higher_is_better=results["higher_is_better"][leaves[0]].get(metric),
                split=config.get("test_split") or config.get("validation_split"),
                items=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                per_item=adds_up,
            )
        )
    return metrics, items


def _reported(values: dict) -> Iterator[tuple[str, str]]:
    for key in values:
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filtered


def _metric_name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}_{filtered}"


def _adds_up(rows: pd.DataFrame, total: float) -> bool:
    if not len(rows):
        return False
    return abs(rows["numerator"].sum() / rows["denominator"].sum() - total) <= MOST_DIFFERENCE * max(
        1, abs(total)
    )


def _items(leaf: str, samples: list[dict], task: str, results: dict) -> Iterator[dict]:
    own = task in params.OWN_TASKS
    for sample in samples:
        doc = sample["doc"]
        several = len(results["samples"]) > 1
        about = {
            "task": task,
            "leaf": leaf,
            "item": str(doc["id"]) if own else str(sample["doc_id"]),
            "category": doc["category"] if own else leaf if several else None,
            "held_out": doc["held_out"] if own else None,
            # Items with one instruction, or one prompt, are not independent.
            "group": from_scored_rows([doc])[0].group if own else sample["prompt_hash"],
        }
        for metric in sample["metrics"]:
            pair = _ratio(sample[metric])
            if pair:
                name = _metric_name(metric, sample["filter"])
                yield {**about, "metric": name, "numerator": pair[0], "denominator": pair[1]}


def _ratio(value: object) -> tuple[float, float] | None:
    """An item's score as numerator and denominator; None for what is no number."""
    match value:
        case Real():
            return float(value), 1.0
        case (Real(), Real()) if isinstance(value, tuple):
            return float(value[0]), float(value[1])
        case list() if value and all(isinstance(part, Real) for part in value):
            return float(sum(value)), float(len(value))
    return None


def _answers(results: dict) -> list[dict]:
    """The greedy answers, each with its row."""
    return [
        {
            **as_rows(from_scored_rows([sample["doc"]]))[0],
            "answer": sample["filtered_resps"][0]
            .strip()
            .removeprefix(sample["doc"]["opening"].strip())
            .strip(),
            "stopped": bool(sample["ended"]),
        }
        for samples in results["samples"].values()
        for sample in samples
    ]


def _record(call: harness.Call, results: dict, language_model: HFLM) -> dict:
    """How the harness was called for a task, and which version of the task it was."""
    leaves = list(results["samples"])
    first = results["samples"][leaves[0]][0]["arguments"][0][0]
    beginning = language_model.tok_encode(first)[:4]
    return {
        "task": call.task,
        "leaves": leaves,
        "version": str(results["versions"][leaves[0]]),
        "items": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
        "few_shot": results["n-shot"][leaves[0]],
        "chat_template": call.chat_template,
        "items_sha256": items_sha256(results),
        "bos_per_prompt": sum(token == language_model.tokenizer.bos_token_id for token in beginning),
    }
