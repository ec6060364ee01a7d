"""What tiny trainings give, per variant: measured here, and committed as tests/reference/tiny.json.

`make reference` writes that file anew; tests/whole/test_reference.py holds what is measured to it, so that a library
update which moves a number fails by variant and by name. The model is the `tiny` preset's, and the rows are made
up, so that nothing is fetched.
"""

import csv
import math
import shutil
import tempfile
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

from conftest import CPU, ROOT, made_up_rows
from transformers import AutoConfig, AutoTokenizer

from workflow import params
from workflow.cost import memory
from workflow.data.choices import scored_rows
from workflow.data.rows import Instruction
from workflow.data.split import split as split_rows
from workflow.evaluation import score
from workflow.fetch import sources
from workflow.runtime.files import write_json, write_jsonl
from workflow.runtime.paths import MODEL, split_file, weights_folder
from workflow.runtime.versions import installed
from workflow.training import train

FILE = ROOT / "tests" / "reference" / "tiny.json"
VARIANTS = (
    "lora_16bit",
    "qlora_nf4",
    "qlora_nf4_dq",
    "qlora_fp4",
    "qlora_nf4_blocks_32",
    "qlora_nf4_dynamic",
    "qlora_mxfp4",
    "qlora_nvfp4",
    "lora_int8",
    "lora_rslora",
    "lora_plus",
    "lora_pissa",
    "lora_olora",
    "dora_16bit",
    "qdora_nf4_dq",
    "loftq_nf4_dq",
    "full_16bit",
    "seed_recipe",
)
SEED, STEPS, LEARNING_RATE = 1, 4, 1e-2  # so large that a few steps tell
SHAPE, TOKENS = "llama2_7b", 1024  # for which memory is predicted, beside the tiny model's own shape
# Shares of a number. Other vector units, threads and library versions were seen to move these by up to 5e-7 in float32,
# and by up to 4e-6 where int8 rounds activations; the FP4 numbers of bitsandbytes 0.49 by 6e-4.
TOLERANCE = 1e-5
TOLERANCE_INT8 = 1e-4


def preset(name: str) -> params.Params:
    return params.preset(name)


def asked_of(name: str) -> tuple[params.Variant, params.Training]:
    """A variant and how it is trained: the seed recipe with all its faults, as far as a CPU can run it."""
    tiny = preset("tiny")
    if name != "seed_recipe":
        training = tiny.training_of(name)
        changed = {"steps": STEPS, "learning_rate": LEARNING_RATE / training.b_rate_factor}
        return tiny.variants[name], training.model_copy(update=changed)
    recipe = preset("seed_recipe")
    keys = (
        "rank",
        "alpha",
        "dropout",
        "target_modules",
        "schedule",
        "warmup_fraction",
        "weight_decay",
        "max_gradient_norm",
    )
    own = {key: getattr(recipe.training, key) for key in keys} | recipe.variants[name].training
    changed = {"steps": STEPS, "learning_rate": LEARNING_RATE} | own
    return (
        recipe.variants[name].model_copy(update={"compute_dtype": None}),
        tiny.training.model_copy(update=changed),
    )


def prepare(folder: Path) -> None:
    """Make of a folder a repository with the tiny model and the test split."""
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / MODEL).mkdir(parents=True)
    sources.fetch_model(preset("tiny").model, folder / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    scored = scored_rows(splits()["test"], tokenizer, choice_seed=55, held_out_categories=[])
    write_jsonl(folder / split_file("test"), scored)


def splits() -> dict[str, list[Instruction]]:
    return split_rows(made_up_rows(), validation=6, test=8, seed=3, held_out_categories=[])


def measure(name: str, folder: Path) -> dict[str, float]:
    """Every number of a variant, by what it is; `folder` was prepared."""
    variant, plan = asked_of(name)
    with chdir(folder):
        weights = weights_folder(name, SEED)
        weights.parent.mkdir(parents=True)
        run = params.Run(name, variant, SEED, plan, CPU)
        trained = train.train(
            run,
            model_folder=MODEL,
            train_rows=splits()["train"],
            validation_rows=splits()["validation"],
            folder=weights.parent,
        )
        with (weights.parent / "history.csv").open() as file:
            losses = {f"loss at step {line['step']}": float(line["loss"]) for line in csv.DictReader(file)}
        config = AutoConfig.from_pretrained(MODEL)
        return {
            **losses,
            "validation loss before training": trained.validation_loss_before,
            "validation loss after training": trained.validation_loss_after,
            "held-out loss of the base": holdout_loss(replace(run, seed=None), "base"),
            "held-out loss as trained": holdout_loss(run, "as_trained"),
            "GiB of the base as loaded": trained.precision.weights_gib,
            "trained parameters": trained.trainable_parameters,
            **predicted("tiny model", memory.Shape.of(config), variant, plan),
            **predicted(
                SHAPE,
                memory.Shape.of(AutoConfig.from_pretrained(params.SHAPES / f"{SHAPE}.json")),
                variant,
                plan,
            ),
        }


def holdout_loss(run: params.Run, form: str) -> float:
    """Nats per token of the test split, by the harness."""
    tiny = preset("tiny").evaluation
    wanted = tiny.model_copy(update={"tasks": {"holdout_loss": tiny.tasks["holdout_loss"]}})
    (scored,) = score.evaluate(run, [form], wanted)
    return next(metric.value for metric in scored.result.metrics if metric.metric == "nats_per_token")


def predicted(
    what: str, shape: memory.Shape, variant: params.Variant, plan: params.Training
) -> dict[str, int]:
    found = memory.predict(shape, variant, plan, tokens=TOKENS)
    return {
        f"predicted bytes of {what}, {key}": getattr(found, key)
        for key in (*found.__dataclass_fields__, "total")
    }


def tolerance(name: str, quantity: str) -> float:
    """How far a number may be from the reference, as a share of it; what is counted must be the same."""
    if quantity.startswith(("GiB", "trained", "predicted")):
        return 0.0
    return TOLERANCE_INT8 if asked_of(name)[0].precision == "int8" else TOLERANCE


def differences(name: str, found: dict[str, float], wanted: dict[str, float]) -> list[str]:
    """A sentence for each number of a variant that is not the reference's."""
    sentences = []
    for quantity in [*wanted, *(key for key in found if key not in wanted)]:
        now, then = found.get(quantity), wanted.get(quantity)
        allowed = tolerance(name, quantity)
        if None in (now, then) or not math.isclose(now, then, rel_tol=allowed):
            off = "" if None in (now, then) or not then else f", off by {abs(now / then - 1):.1e} of it"
            sentences.append(
                f"{name}: {quantity} is {now}, and {then} in the reference{off}; allowed is {allowed:g}"
            )
    return sentences


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        found = {name: measure(name, Path(scratch)) for name in VARIANTS}
    write_json(FILE, {"versions": installed(), "variants": found})


if __name__ == "__main__":
    main()
