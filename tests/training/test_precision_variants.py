"""Each further precision trains to the losses that it did, with the speed-ups on, and is served in every form."""

import csv
from dataclasses import replace

import pytest
from conftest import CPU

from workflow import params
from workflow.evaluation import forms
from workflow.training import train

# Training losses of three steps, and the validation loss after them.
PINNED = {
    "qlora_nf4_blocks_32": [5.758974, 5.773539, 5.517830, 5.435005],
    "qlora_nf4_dynamic": [5.757498, 5.771932, 5.509778, 5.423533],
    "qlora_mxfp4": [5.749354, 5.765581, 5.524866, 5.424249],
    "qlora_nvfp4": [5.760490, 5.775863, 5.508997, 5.432773],
}


@pytest.fixture(scope="module", params=list(PINNED))
def trained(request, tiny, tiny_model, splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = tiny.training.model_copy(update={"learning_rate": 1e-2, "steps": 3})
    run = params.Run(request.param, tiny.variants[request.param], 1, settings, CPU)
    result = train.train(
        run, model_folder=tiny_model, train_rows=splits["train"], validation_rows=splits["validation"], folder=folder
    )  # fmt: skip
    return run, result, folder


def test_the_losses_are_those_that_were(trained):
    run, result, folder = trained
    with (folder / "history.csv").open() as file:
        losses = [float(line["loss"]) for line in csv.DictReader(file)]
    assert [*losses, result.validation_loss_after] == pytest.approx(PINNED[run.name], abs=2e-4)
    assert result.validation_loss_after < result.validation_loss_before - 0.05


def test_the_speed_ups_of_a_cpu_are_on(trained):
    _, result, _ = trained
    assert result.speed_ups == replace(result.speed_ups, packing=True, fused_adapters=True, fused_loss=True)
    assert result.adapted_modules == result.precision.linear_modules


@pytest.mark.parametrize("form", ["as_trained", "merged_16bit", "merged_dequantized", "requantized"])
def test_it_is_served_in_every_form(trained, tiny_model, form):
    run, result, folder = trained
    model, served = forms.serve(run, form, model_folder=tiny_model, weights_folder=folder / "weights")
    plain = form.startswith("merged")
    quantized = result.precision.linear_modules - len(result.precision.layers_in_16_bits)
    assert served.precision.quantized_modules == (0 if plain else quantized)
    assert served.precision.base == ("16bit" if plain else run.variant.precision)
    assert forms.probe(model).isfinite().all()
