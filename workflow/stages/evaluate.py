"""Stage evaluate: score one run, served as it was trained. Stage evaluate_base calls the same."""

from pathlib import Path

from workflow import params
from workflow.console import run_stage, say
from workflow.files import read_jsonl, whole_file, write_json, write_jsonl
from workflow.instructions import from_scored_rows
from workflow.paths import MODEL, evaluate_folder, split_file, weights_folder
from workflow.versions import installed


def evaluate(variant: str, seed: int) -> None:
    """Score one run on the test split with lm-evaluation-harness, and write its answers."""
    score(variant, seed=seed, form="as_trained", weights=weights_folder(variant, seed),
          folder=evaluate_folder(variant, seed))  # fmt: skip


def score(variant: str, *, seed: int | None, form: str, weights: Path | None, folder: Path) -> None:
    """Score a variant's base, or a run, and write result, items, answers and metrics into `folder`."""
    asked = params.load()
    params.check_variant(asked, variant)
    from workflow import evaluation  # after the params are checked: it takes seconds to import

    scored = evaluation.evaluate(
        model_folder=MODEL,
        weights_folder=weights,
        variant=asked.variants[variant],
        evaluation=asked.evaluation,
        hardware=asked.hardware,
        test_rows=from_scored_rows(read_jsonl(split_file("test"))),
    )
    for metric in scored.metrics:
        say(f"  {metric.task}: {metric.value:.4f} {metric.unit} on {metric.items} {metric.split} rows")
    for command in scored.harness["commands"]:
        say(f"  the same by hand: {command}")
    with whole_file(folder / "items.parquet") as beside:
        scored.items.to_parquet(beside, index=False)
    write_jsonl(folder / "answers.jsonl", scored.answers)
    about = {"variant": variant, "seed": seed, "form": form}
    write_json(folder / "result.json", about | scored.as_dict() | {"versions": installed()})
    write_json(folder / "metrics.json", {f"{m.task}_{m.metric}": m.value for m in scored.metrics})


if __name__ == "__main__":
    run_stage("evaluate", evaluate, arguments={"variant": str, "seed": int})
