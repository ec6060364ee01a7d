"""What this machine lacks is said before anything is computed, and only if something is to be computed."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from workflow import params
from workflow.engine import machine
from workflow.runtime.errors import UserError


def tiny(**changes):
    """The tiny preset with other settings of its training and hardware."""
    preset = params.preset("tiny")
    hardware = preset.hardware.model_copy(update=changes.pop("hardware", {}))
    training = preset.training.model_copy(update=changes.pop("training", {}))
    return preset.model_copy(update={"hardware": hardware, "training": training, **changes})


def stale(monkeypatch, *metas: dict | None):
    stages = [SimpleNamespace(meta=meta) for meta in metas]
    monkeypatch.setattr(machine, "stale_stages", lambda repo: stages)


COMPUTES, COLLECTS = {"resources": {"gpu": 1, "mem_mb": 1}}, {"resources": {"mem_mb": 1}}


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (tiny(hardware={"device": "cuda"}), "hardware.device is cuda, and torch sees no CUDA device; use auto or cpu."),
        (tiny(training={"optimizer": "paged_adamw_8bit"}), "training.step.optimizer is paged_adamw_8bit, which pages"),
        (tiny(hardware={"compute_dtype": "float16"}), "compute_dtype is float16, which a CPU does not train in"),
    ],
)  # fmt: skip
def test_what_a_cpu_cannot_do_is_said_if_a_stage_would_compute(monkeypatch, cpu, settings, sentence):
    stale(monkeypatch, COLLECTS, COMPUTES)
    with pytest.raises(UserError) as error:
        machine.check(settings, nullcontext)
    assert str(error.value).startswith(f"params.yaml: {sentence}")
    stale(monkeypatch, COLLECTS, None)  # the results of another machine may be drawn here
    machine.check(settings, nullcontext)


def test_everything_that_is_lacking_is_said_at_once(monkeypatch, cpu):
    stale(monkeypatch, COMPUTES)
    preset = tiny(hardware={"compute_dtype": "float16"}, training={"optimizer": "paged_adamw_32bit"})
    name = preset.experiment.variants[0]
    variant = preset.variants[name].model_copy(update={"precision": "hqq4"})
    monkeypatch.setattr("workflow.precisions.find_spec", lambda package: None)
    with pytest.raises(UserError) as error:
        machine.check(preset.model_copy(update={"variants": preset.variants | {name: variant}}), nullcontext)
    head, *lines = str(error.value).splitlines()
    assert head == "params.yaml has 3 problems:"
    assert ["hqq" in lines[0], "paged_adamw_32bit" in lines[1], "float16" in lines[2]] == [True] * 3


def test_nothing_is_looked_up_for_params_that_any_device_can_run(monkeypatch):
    def unexpected():
        raise AssertionError("the repository was opened")

    machine.check(tiny(), unexpected)
