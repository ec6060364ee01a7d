"""A precision that is not in the repository goes through every stage to the page once it is registered."""

import hashlib
import json
from pathlib import Path

import pytest

from workflow import params, precisions
from workflow.precisions.base import Facts, Loading, Precision, dtype_name
from workflow.runtime.errors import UserError

STEP = 1 / 256
VARIANTS = ("lora_16bit", "lora_grid")


def linears(model):
    """The linear layers besides the output head."""
    from torch import nn

    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def on_grid(weight):
    return (weight / STEP).round() * STEP


def quantize(model, loading):
    for layer in linears(model):
        layer.weight.data = on_grid(layer.weight.data)
        layer.step = STEP
    return model


def dequantize(model, compute):
    for layer in linears(model):
        del layer.step
    return model.to(compute)


def facts(layer) -> Facts:
    is_on_grid = bool((on_grid(layer.weight) == layer.weight).all())
    return {"quantization": "grid", "storage": dtype_name(layer.weight.dtype), "on the grid": is_on_grid}


def expected_facts(loading: Loading) -> Facts:
    return {"quantization": "grid", "storage": dtype_name(loading.weights), "on the grid": True}


GRID = Precision(
    name="grid",
    label=lambda method, quantization: f"{method} on a coarse grid",
    short=lambda quantization: "Grid",
    in_words="multiples of 1/256",
    is_quantized=True,
    is_4_bit=False,
    can_be_double_quantized=False,
    can_be_trained=False,
    can_be_sharded=False,
    can_be_packed=True,
    can_be_fused=True,
    can_be_captured=True,
    can_be_merged=True,
    can_be_requantized=True,
    recognizes=lambda layer: hasattr(layer, "step"),
    expected_facts=expected_facts,
    facts=facts,
    storage=lambda layer: "a grid of float32",
    tensor_bytes=lambda inputs, outputs, quantization: ([4 * inputs * outputs], []),
    quantize=quantize,
    dequantize=dequantize,
    requantize=quantize,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A clone in which every stage ran, each in a process that registered the precision as it began."""
    from real_pipeline import TINY, clone
    from warm_stages import WarmStages

    rows = "".join(
        json.dumps({"q": f"Say number {n} in words", "a": f"This is answer {n}, " + "and more " * (n % 4)}) + "\n"
        for n in range(24)
    )  # fmt: skip

    def change(content: dict) -> None:
        content["experiment"]["variants"] = list(VARIANTS)
        content["variants"]["lora_grid"] = content["variants"]["lora_16bit"] | {"precision": GRID.name}
        content["hardware"]["device"] = "cpu"
        content["dataset"] = {
            "source": "file",
            "path": "rows.jsonl",
            "sha256": hashlib.sha256(rows.encode()).hexdigest(),
            "format": "jsonl",
            "columns": {"instruction": "q", "context": None, "response": "a", "category": None},
        }
        content["sample"] |= {"rows": 24, "validation_rows": 3, "test_rows": 6}

    folder = clone(tmp_path_factory.mktemp("clone"), TINY, change)
    (folder / "rows.jsonl").write_text(rows)
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_made_up_precision import GRID\nfrom workflow import precisions\nprecisions.register(GRID)\n"
    )
    stages = WarmStages(site)
    try:
        for stage in ("environment", "fetch_model", "fetch_dataset", "fetch_tasks", "sample", "try_model"):
            run(stages, folder, stage)
        for variant in VARIANTS:
            run(stages, folder, "train", "--variant", variant, "--seed", "1")
            run(stages, folder, "evaluate_base", "--variant", variant)
            run(stages, folder, "evaluate", "--variant", variant, "--seed", "1")
            run(stages, folder, "benchmark", "--variant", variant)
        for variant in VARIANTS:
            pair = ("--variant", variant, "--baseline", VARIANTS[0])
            run(stages, folder, "divergence", *pair, "--seed", "1")
        for stage in ("compare", "report"):
            run(stages, folder, stage)
    finally:
        stages.close()
    return folder


def run(stages, folder: Path, *command: str) -> None:
    ended = stages.run(folder, *command)
    assert ended.code == 0, (command, ended.out[-2000:], ended.err[-2000:])


def test_a_made_up_precision_goes_through_every_stage_to_the_page(finished):
    comparison = json.loads((finished / "results/compare/comparison.json").read_text())
    precision = comparison["precisions"]["lora_grid"]
    assert (precision["base"], precision["storage"]) == ("grid", "a grid of float32")
    assert precision["quantized_modules"] == precision["linear_modules"] == 7 * 4
    forms = {score["form"] for score in comparison["scores"] if score["variant"] == "lora_grid"}
    assert forms == {"base", "as_trained", "merged_16bit", "merged_dequantized", "requantized"}
    assert "LoRA on a coarse grid" in (finished / "report/index.html").read_text()


def test_an_unknown_precision_is_refused_by_name(tmp_path):
    from real_pipeline import TINY

    known = ", ".join(precisions.names())
    with pytest.raises(UserError, match=rf"^nf5 is not a known precision; known are {known} \(did"):
        precisions.get("nf5")
    path = tmp_path / "params.yaml"
    path.write_text(TINY.replace("precision: int8", "precision: grid"))
    *others, last = map(repr, precisions.names())
    sentence = f'variants.lora_int8.precision is "grid": input should be {", ".join(others)} or {last}'
    with pytest.raises(UserError, match=sentence):
        params.load(path)
