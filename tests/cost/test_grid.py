"""A point that does not fit, dies or hangs is a result like any other, and the grid goes on."""

import json
import os
import signal
from dataclasses import replace

import pytest

from workflow import params
from workflow.cost import benchmark, grid, hardware, memory, processes
from workflow.cost.gauge import uncounted
from workflow.runtime.errors import UserError
from workflow.runtime.files import write_jsonl


@pytest.fixture(scope="module")
def job(tiny, tiny_model) -> grid.Job:
    return next(grid.jobs(tiny, "qlora_nf4_dq", "own", model_folder=tiny_model))


@pytest.fixture(scope="module")
def points(job) -> dict[str, dict]:
    """One grid of five points, of which three go wrong."""
    waiting = {
        "measured": job,
        "too large": replace(job, micro_batch_rows=4096, batch_rows=4096, length=1024, memory_limit_gib=3.0),
        "dies": replace(job, model_folder="/nowhere"),
        "plain": replace(job, loop="plain"),
        "checkpointed": replace(job, gradient_checkpointing=True),
    }
    return dict(zip(waiting, grid.run(list(waiting.values()), time_limit=300), strict=True))


def test_every_point_has_a_result(points):
    assert {name: point["outcome"] for name, point in points.items()} == {
        "measured": "measured",
        "too large": "does not fit",
        "dies": "died",
        "plain": "measured",
        "checkpointed": "measured",
    }
    assert points["too large"]["requested_gib"] > 0
    assert "/nowhere" in points["dies"]["detail"]
    for point in points.values():
        assert {*grid.POINT, "rank", "outcome"} <= point.keys() and point["rows"] is None
        assert grid.describe(point)


def test_a_measured_point_says_what_it_measured(points, job):
    point = points["measured"]
    held = point["memory_gib"]
    assert 0 < held["after_load"] <= held["peak_resident"] and held["after_optimizer"] > 0
    tokens = job.micro_batch_rows * job.length
    assert point["tokens_per_step"] == point["longest_pass_tokens"] == tokens
    steps = point["step_seconds"]
    assert 0 < steps["low"] <= steps["median"] <= steps["high"]
    assert len(point["step_seconds_of_repeats"]) == job.repeats
    assert point["useful_tokens_per_second"]["median"] == pytest.approx(tokens / steps["median"], rel=0.2)
    assert point["optimizer_steps"] == uncounted(job.warmup_steps) + job.steps * job.repeats
    assert 0 < point["model_flop_utilisation"] < 1 and point["matmul_tflops"] > 0
    assert point["joules_per_1000_tokens"] is None  # no GPU here
    assert point["speed_ups"]["packing"] and not points["plain"]["speed_ups"]["packing"]


@pytest.mark.parametrize("loop", ["ours", "plain"])
def test_the_peak_is_that_of_the_epochs_longest_pass_whatever_the_order_of_the_rows(job, tmp_path, loop):
    """One row is long, and the few steps that are measured would not come to it."""
    lengths = [20] * 39 + [200]
    write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths])
    ragged = replace(
        job, rows_file=str(tmp_path / "rows.jsonl"), loop=loop, batch_rows=2, micro_batch_rows=2, length=256,
        warmup_steps=0, steps=2, repeats=1, seed=3, training=job.training | {"length_window": 1},
    )  # fmt: skip
    point = grid.measure(ragged)
    longest = 220 if loop == "ours" else 400  # a pack has no padding
    assert point["peak_pass_tokens"] == point["epoch_longest_pass_tokens"] == longest
    assert point["longest_pass_tokens"] == longest  # what the prediction is for
    assert point["tokens_per_step"] == 40 and point["optimizer_steps"] == 4  # the long step is not counted
    assert point["memory_gib"]["peak_resident"] > 0


def test_a_process_that_hangs_is_ended_and_one_that_is_killed_is_named(job):
    worker = processes.Worker("workflow.cost.grid")
    assert worker.ask(job.as_dict(), time_limit=0.2)["outcome"] == "timed out"
    assert worker.process.returncode == -signal.SIGKILL
    worker = processes.Worker("workflow.cost.grid")
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    answer = worker.ask(job.as_dict(), time_limit=60)
    assert (answer["outcome"], answer["detail"]) == ("died", "killed by SIGKILL")


def test_out_of_memory_on_a_gpu_names_the_size_that_was_asked_for():
    message = "CUDA out of memory. Tried to allocate 184.00 MiB. GPU 0 has a total capacity of 79.18 GiB"
    assert grid._no_room(message)["requested_gib"] == pytest.approx(184 / 1024)


def test_operations_are_counted_as_autograd_does_them(tiny):
    """Against PyTorch's own counter of a forward and a backward pass of an adapted model."""
    import torch
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from workflow.methods.lora import LORA

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        attn_implementation="eager",
    )
    model = get_peft_model(LlamaForCausalLM(config), LORA.peft_config(tiny.training))
    ids = torch.arange(48)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    shape, run = memory.Shape.of(config), tiny.run("lora_16bit", 1)
    counted = benchmark.model_operations(shape, run, lengths=[48])
    # Eager attention computes the whole square, of which causal attention asks for the lower half.
    counted += 3 * shape.layers * shape.query * 2 * 48**2
    # The first layer's input needs no gradient: q, k and v of one layer go without theirs.
    first = (
        2
        * 48
        * sum(a * b for name, (a, b) in shape.linears.items() if name in ("q_proj", "k_proj", "v_proj"))
    )
    assert counter.get_total_flops() == pytest.approx(counted - first, rel=0.02)


def test_what_is_measured_already_is_not_measured_again(tiny, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(hardware, "HARDWARE", tmp_path)
    monkeypatch.setattr(hardware, "_device_name", lambda: "A Card 80GB")
    monkeypatch.setattr(hardware, "tokenize", lambda *_: ([{"input_ids": [1, 2], "labels": [1, 2]}], 9000))
    measured = []

    def pretend(waiting, **_):
        for job in waiting:
            measured.append(job)
            what = {key: value for key, value in job.as_dict().items() if key in grid.POINT}
            yield {**what, "rank": job.training["rank"], "outcome": "timed out", "detail": "made up"}

    monkeypatch.setattr(grid, "run", pretend)
    rows_file = tmp_path / "rows.jsonl"
    write_jsonl(rows_file, [])
    arguments = {"rows": rows_file, "tokenizer": tmp_path, "parts": ["paths", "grid"], "again": False}
    path = hardware.measure(tiny, **arguments)
    settings = len(hardware.PATHS) + 4
    assert path.name == "a_card_80gb.json" and len(measured) == settings * 2
    # The run's rows hold tokens that a shape's own vocabulary can be too small for.
    assert {(job.vocabulary, job.rows_file is None) for job in measured} == {(9000, False), (None, True)}
    assert len(json.loads(path.read_text())["points"]) == len(measured)
    hardware.measure(tiny, **arguments)
    assert len(measured) == settings * 2
    hardware.measure(tiny, **(arguments | {"again": True}))
    assert len(measured) == settings * 4 and len(json.loads(path.read_text())["points"]) == settings * 2


def test_an_unknown_shape_is_named(tiny):
    content = tiny.model_dump()
    content["benchmark"]["grid"]["shapes"] = ["llama9"]
    with pytest.raises(ValueError, match="shapes names llama9; allowed is one of own, llama2_13b"):
        params.Params.model_validate(content)


def test_a_benchmark_can_be_narrowed_to_variants_and_shapes():
    preset = params.preset(hardware.PRESET)
    one = hardware.select(preset, variants=["seed_recipe"], shapes=["llama2_13b", "llama3_8b"])
    assert one.experiment.variants == ["seed_recipe"]
    assert one.benchmark.grid.shapes == ["llama2_13b", "llama3_8b"]
    assert hardware.select(preset, variants=None, shapes=None) == preset
    for asked, word in (
        ({"variants": ["seed"]}, "--variants names seed"),
        ({"shapes": ["7b"]}, "--shapes names 7b"),
    ):
        with pytest.raises(UserError, match=f"^{word}, and the params file has l"):
            hardware.select(preset, **({"variants": None, "shapes": None} | asked))


def test_the_preset_covers_the_shapes_of_the_study_and_the_recipe_beside_our_default():
    preset = params.preset(hardware.PRESET)
    assert {"llama2_7b", "llama2_13b", "llama3_8b"} <= set(preset.benchmark.grid.shapes)
    assert preset.benchmark.grid.shapes[0] == "llama2_7b"  # where the run's own rows are measured
    assert {"lora_16bit", "qlora_nf4_dq", "seed_recipe"} <= set(preset.variants)
    jobs = list(grid.jobs(hardware.select(preset, variants=["seed_recipe"], shapes=["llama2_7b"]),
                          "seed_recipe", "llama2_7b", model_folder=None))  # fmt: skip
    assert {(job.training["rank"], job.variant_params["compute_dtype"]) for job in jobs} == {(64, "float16")}
