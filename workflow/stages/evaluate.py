"""Stage evaluate: score one run in its serving forms. Stage evaluate_base calls the same."""

from pathlib import Path

import pandas as pd

from workflow import params
from workflow.runtime import inputs
from workflow.runtime.files import whole_file, write_json, write_jsonl
from workflow.runtime.paths import evaluate_folder
from workflow.runtime.stage import run_stage, say
from workflow.runtime.versions import installed


def evaluate(variant: str, seed: int) -> None:
    """Score one run with lm-evaluation-harness, in every serving form that it has."""
    asked = params.load()
    params.check_variant(asked, variant)
    score(asked, variant, seed=seed, forms=asked.forms_of(variant), folder=evaluate_folder(variant, seed))


def score(asked: params.Params, variant: str, *, seed: int | None, forms: list[str], folder: Path) -> None:
    """Score a variant's base, or a run, and write result, items and answers into `folder`."""
    from workflow.evaluation import score as evaluation

    scored = []
    for one in evaluation.evaluate(
        forms,
        name=variant,
        seed=seed,
        variant=asked.variants[variant],
        evaluation=asked.evaluation,
        hardware=asked.hardware,
        training=asked.training_of(variant),
    ):
        for command in one.harness["commands"]:
            say(f"    the same by hand: {command}")
        scored.append(one)
    with whole_file(folder / "items.parquet") as beside:
        pd.concat([one.items for one in scored]).to_parquet(beside, index=False)
    write_jsonl(folder / "answers.jsonl", [answer for one in scored for answer in one.answers])
    write_json(
        folder / "result.json",
        {
            "variant": variant,
            "seed": seed,
            "forms": [one.as_dict() for one in scored],
            "versions": installed(),
            "inputs": inputs.recorded(),
        },
    )


if __name__ == "__main__":
    run_stage("evaluate", evaluate, arguments={"variant": str, "seed": int}, gpus_needed=params.gpus_needed)
