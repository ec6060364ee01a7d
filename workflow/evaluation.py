"""Score a model with lm-evaluation-harness, and let it answer the same test rows as every other."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import lm_eval
import pandas as pd
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from workflow import params
from workflow.console import say
from workflow.instructions import Instruction, one_per_instruction
from workflow.precision import Precision, describe, load_base

TASKS = Path("workflow/tasks")
UNITS = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}


@dataclass(frozen=True)
class Metric:
    """One number, with what it is."""

    task: str
    metric: str
    value: float
    unit: str
    higher_is_better: bool
    split: str
    items: int


@dataclass(frozen=True)
class Scored:
    """What an evaluation found: totals, one row per item and metric, and the answers."""

    precision: Precision
    metrics: list[Metric]
    items: pd.DataFrame
    answers: list[dict]
    harness: dict

    def as_dict(self) -> dict:
        return {
            "precision": self.precision.as_dict(),
            "metrics": [asdict(metric) for metric in self.metrics],
            "harness": self.harness,
        }


def evaluate(
    *,
    model_folder: Path,
    weights_folder: Path | None,
    variant: params.Variant,
    evaluation: params.Evaluation,
    hardware: params.Hardware,
    test_rows: list[Instruction],
) -> Scored:
    """Score the base (no `weights_folder`) or a run served as it was trained.

    Args:
        weights_folder: the run's adapter or, of a full fine-tuning, its model.
        test_rows: the test split, for the answers; the tasks read the same file themselves.

    Raises:
        CheckError: what was loaded is not in the variant's precision.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    model, precision = load(model_folder, weights_folder, variant=variant, hardware=hardware)
    say(
        f"  {precision.base} base, {precision.quantized_modules} modules quantised, computing in {precision.compute}"
    )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=evaluation.batch_rows)
    results = lm_eval.simple_evaluate(
        model=harness,
        tasks=list(evaluation.tasks),
        num_fewshot=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,  # the harness' own intervals are unpaired; ours are taken over the items
    )
    answers = answer(
        model,
        tokenizer,
        one_per_instruction(test_rows)[: evaluation.answers],
        tokens=evaluation.answer_tokens,
    )
    return Scored(
        precision=precision,
        metrics=_metrics(results),
        items=_items(results),
        answers=answers,
        harness={
            "name": "lm-evaluation-harness",
            "version": lm_eval.__version__,
            "batch_rows": evaluation.batch_rows,
            "chat_template": True,
            "commands": commands(
                model_folder, weights_folder, variant=variant, evaluation=evaluation, precision=precision
            ),
        },
    )


def load(
    model_folder: Path, weights_folder: Path | None, *, variant: params.Variant, hardware: params.Hardware
) -> tuple[torch.nn.Module, Precision]:
    """The base in the variant's precision, with the run's adapter on it where one is given."""
    if weights_folder is not None and variant.method == "full":
        model_folder, weights_folder = weights_folder, None
    # A full fine-tuning is served in 16 bits like any other model: its float32 weights were for training.
    served = variant.model_copy(update={"method": "lora"})
    model, precision = load_base(model_folder, served, hardware=hardware)
    if weights_folder is not None:
        model = PeftModel.from_pretrained(model, weights_folder)
        precision = describe(model, served, compute=getattr(torch, precision.compute))
    return model.eval(), precision


def commands(
    model_folder: Path,
    weights_folder: Path | None,
    *,
    variant: params.Variant,
    evaluation: params.Evaluation,
    precision: Precision,
) -> list[str]:
    """The shell commands that give the same numbers with the harness' own command line."""
    before = []
    if weights_folder is not None and variant.method == "full":
        base, adapter = weights_folder, None
    else:
        base, adapter = model_folder, weights_folder
    if variant.precision != "16bit":
        base = Path(".cache/bases") / "-".join(
            [variant.precision, *(["dq"] if variant.double_quantization else []), precision.compute]
        )
        before = [["python", "-m", "workflow.save_base", "--model", model_folder, "--to", base,
                   "--precision", variant.precision, "--compute", precision.compute,
                   *(["--double-quantization"] if variant.double_quantization else [])]]  # fmt: skip
    arguments = f"pretrained={base},dtype={precision.compute}" + (f",peft={adapter}" if adapter else "")
    run = ["lm_eval", "run", "--model", "hf", "--model_args", arguments, "--include_path", TASKS,
           "--tasks", ",".join(evaluation.tasks), "--apply_chat_template",
           "--batch_size", evaluation.batch_rows, "--device", precision.device]  # fmt: skip
    return [shlex.join(map(str, command)) for command in [*before, run]]


def _metrics(results: dict) -> list[Metric]:
    metrics = []
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if kind != "none" or name.endswith("_stderr"):
                continue
            metrics.append(
                Metric(
                    task=task,
                    metric=name,
                    value=float(value),
                    unit=UNITS[name],
                    higher_is_better=results["higher_is_better"][task][name],
                    split="test",
                    items=results["n-samples"][task]["effective"],
                )
            )
    return metrics


def _items(results: dict) -> pd.DataFrame:
    """One row per item and metric: a ratio's numerator and denominator, so that sums can be taken."""
    rows = []
    for task, samples in results["samples"].items():
        for sample in samples:
            for metric in UNITS:
                numerator, denominator = sample[metric]
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "item": sample["doc"]["id"],
                        "category": sample["doc"]["category"],
                        "group": Instruction(**_own(sample["doc"])).group,
                        "numerator": float(numerator),
                        "denominator": int(denominator),
                    }
                )
    return pd.DataFrame(rows)


def _own(doc: dict) -> dict:
    return {key: doc[key] for key in Instruction.__dataclass_fields__}


def answer(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[Instruction], *, tokens: int
) -> list[dict]:
    """Let the model answer each row greedily, in one batch.

    Returns:
        The rows with `answer`, and `stopped`: whether the model ended by itself within `tokens`.
    """
    if not rows:
        return []
    chats = [[{"role": "user", "content": row.user_message()}] for row in rows]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    ).to(model.device)
    with torch.no_grad():
        output = model.generate(
            **batch, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    answers = []
    for row, ids in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        stopped = tokenizer.eos_token_id in ids
        kept = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
        text = tokenizer.decode(kept, skip_special_tokens=True).strip()
        answers.append({**asdict(row), "answer": text, "stopped": stopped})
    return answers
