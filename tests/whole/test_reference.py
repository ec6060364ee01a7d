"""The numbers of tiny trainings are those that are committed: an update that moves one is noticed, by name."""

from pathlib import Path

import measure_reference as reference
import pytest

from workflow import methods, precisions
from workflow.runtime.files import read_json

WANTED = read_json(reference.FILE)["variants"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    reference.prepare(folder)
    return folder


@pytest.mark.parametrize("name", reference.VARIANTS)
def test_the_numbers_of_a_variant_are_those_of_the_reference(folder, name):
    found = reference.differences(name, reference.measure(name, folder), WANTED[name])
    assert not found, "\n".join(
        [*found, "If that is meant: `make reference` renews tests/reference/tiny.json."]
    )


def test_the_reference_is_of_every_variant_of_the_preset_and_the_seed_recipe():
    """But those whose own tests pin their losses.

    A precision may need more than the locked packages and a CPU, and a training through the quantizer moves where a last
    digit carries a weight across the edge of its cell.
    """
    variants = reference.preset("tiny").variants
    precision = {name: precisions.get(variant.precision) for name, variant in variants.items()}
    anywhere = {
        name
        for name, p in precision.items()
        if not (p.package or p.compute_capability or methods.get(variants[name].method).through_quantizer)
    }
    assert set(WANTED) == {*anywhere, "seed_recipe"}
    assert len({tuple(numbers) for numbers in WANTED.values()}) == 1
    assert all(numbers["loss at step 4"] < numbers["loss at step 1"] for numbers in WANTED.values())


@pytest.mark.parametrize(
    ("name", "quantity", "moved", "shown"),
    [
        ("qlora_fp4", "loss at step 3", 1 + 2e-5, True),
        ("qlora_fp4", "loss at step 3", 1 + 5e-6, False),
        ("lora_int8", "validation loss after training", 1 + 5e-5, False),
        ("lora_int8", "validation loss after training", 1 - 2e-4, True),
        ("seed_recipe", "held-out loss as trained", 1 + 2e-5, True),
        ("qlora_nf4_dq", "predicted bytes of llama2_7b, total", 1 + 1e-9, True),
    ],
)
def test_a_number_that_moved_is_named_with_both_values(name, quantity, moved, shown):
    found = WANTED[name] | {quantity: WANTED[name][quantity] * moved}
    sentences = reference.differences(name, found, WANTED[name])
    if not shown:
        assert not sentences
        return
    (sentence,) = sentences
    assert sentence.startswith(
        f"{name}: {quantity} is {found[quantity]}, and {WANTED[name][quantity]} in the reference"
    )
    assert "; allowed is" in sentence


def test_a_number_that_is_missing_or_new_is_named():
    wanted = WANTED["lora_16bit"]
    fewer = {key: value for key, value in wanted.items() if key != "loss at step 2"}
    (missing,) = reference.differences("lora_16bit", fewer, wanted)
    (new,) = reference.differences("lora_16bit", wanted, fewer)
    assert "loss at step 2 is None, and" in missing and "and None in the reference" in new
