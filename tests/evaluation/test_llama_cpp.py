"""GGUF files: which type each tensor gets, how it is rounded, and who reads it."""

import json
import re
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_models import write_gguf
from transformers import AutoModelForCausalLM

from workflow import params
from workflow.data.gguf_cards import fallback_words
from workflow.evaluation.llama_cpp import agreement, extra, library, serve, types, write
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.forms import GGUF_FORMS


@pytest.fixture(scope="module")
def packages():
    """The packages of the extra; without them, the tests that need them are skipped."""
    try:
        extra.check_installed()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def file(tiny_model, tmp_path_factory) -> Path:
    """The tiny model as a GGUF file that is not quantized."""
    file = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    write_gguf(tiny_model, file)
    return file


def llama(width: int, inner: int, layers: int, *, tied: bool) -> dict[str, list[int]]:
    """The shapes of a Llama's tensors by their names in a GGUF file."""
    shapes = {"token_embd.weight": [32000, width], "output_norm.weight": [width]}
    if not tied:
        shapes["output.weight"] = [32000, width]
    for layer in range(layers):
        shapes |= {f"blk.{layer}.attn_{part}.weight": [width, width] for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{part}.weight": [inner, width] for part in ("gate", "up")}
        shapes |= {f"blk.{layer}.{part}_norm.weight": [width] for part in ("attn", "ffn")}
        shapes[f"blk.{layer}.ffn_down.weight"] = [width, inner]
    return shapes


def chosen(shapes, form, **facts) -> dict[str, types.Choice]:
    layers = sum(name.endswith("ffn_down.weight") for name in shapes)
    return types.choose(shapes, form, **{"architecture": "llama", "layers": layers, "grouped": False} | facts)


@pytest.mark.parametrize(
    ("form", "counts"),
    [
        # What llama.cpp lists as it loads its own files of Llama-2-7B.
        ("gguf_q4_k_m", {None: 65, "Q4_K": 193, "Q6_K": 33}),
        ("gguf_q4_0", {None: 65, "Q4_0": 225, "Q6_K": 1}),
        ("gguf_q8_0", {None: 65, "Q8_0": 226}),
    ],
)
def test_tensors_of_llama_2_7b_have_the_types_of_llama_cpps_own_files(form, counts):
    choices = chosen(llama(4096, 11008, 32, tied=False), form)
    stored = [choice.stored for choice in choices.values()]
    assert {kind: stored.count(kind) for kind in set(stored)} == counts
    assert all(choice.stored == choice.intended for choice in choices.values())


def test_values_and_second_projections_of_some_layers_have_more_bits():
    choices = chosen(llama(4096, 11008, 32, tied=False), "gguf_q4_k_m")
    # The first and last eighth, and every third between them.
    expected = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for part in ("attn_v", "ffn_down"):
        assert {n for n in range(32) if choices[f"blk.{n}.{part}.weight"].stored == "Q6_K"} == expected


def test_rows_that_blocks_do_not_divide_fall_back_as_in_llama_cpp():
    """SmolLM2-135M: rows of 576 weights but for the second projection, whose 1,536 are six blocks of 256."""
    shapes = llama(576, 1536, 30, tied=True)
    choices = chosen(shapes, "gguf_q4_k_m", grouped=True)
    stored = [choice.stored for choice in choices.values()]
    assert {kind: stored.count(kind) for kind in set(stored)} == {
        None: 61, "Q5_0": 166, "Q8_0": 15, "Q4_K": 16, "Q6_K": 14,
    }  # fmt: skip
    found = {
        (f.tensors, f.intended, f.stored): f.count for f in types.fallbacks(choices, shapes, "gguf_q4_k_m")
    }
    assert found["token_embd.weight", "Q6_K", "Q8_0"] == 1
    assert found["blk.*.attn_q.weight", "Q4_K", "Q5_0"] == 30
    assert found["blk.*.attn_v.weight", "Q6_K", "Q8_0"] == 14
    assert not any("ffn_down" in name for name, *_ in found)
    words = fallback_words([vars(f) for f in types.fallbacks(choices, shapes, "gguf_q4_k_m")])
    assert words.startswith("Rows of 576 weights hold no whole number of blocks")
    assert (
        "Q5_0 in place of Q4_K: blk.*.attn_q.weight (30)" in words and "Q8_0 in place of Q6_K: token" in words
    )
    assert types.fallbacks(chosen(shapes, "gguf_q8_0"), shapes, "gguf_q8_0") == []
    assert fallback_words([]) == ""


def test_rows_that_no_block_divides_stay_in_16_bits():
    assert [types.fitting("Q4_0", 48), types.fitting("Q4_K", 48), types.fitting("Q8_0", 64)] == [
        "F16",
        "F16",
        "Q8_0",
    ]


def test_a_large_model_with_shared_values_keeps_more_of_their_bits():
    shapes = llama(8192, 28672, 80, tied=False)
    for grouped, kinds in ((True, {"Q5_K", "Q6_K"}), (False, {"Q4_K", "Q6_K"})):
        choices = chosen(shapes, "gguf_q4_k_m", grouped=grouped)
        assert {choices[f"blk.{layer}.attn_v.weight"].stored for layer in range(80)} == kinds


@pytest.mark.parametrize(
    ("extra_shapes", "architecture", "kind"),
    [({"blk.0.ffn_up_exps.weight": [8, 64, 64]}, "llama", "a mixture of experts"), ({}, "falcon", "falcon")],
)
def test_a_model_for_which_llama_cpp_has_other_rules_is_refused(extra_shapes, architecture, kind):
    with pytest.raises(UserError, match=f"^gguf_q4_0 cannot be written: the model is {kind}, for which"):
        chosen(llama(64, 128, 2, tied=True) | extra_shapes, "gguf_q4_0", architecture=architecture)


@pytest.mark.parametrize("package", extra.MODULES)
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(package, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(extra, "FOLDER", tmp_path)
    extra.site_of.cache_clear()
    with pytest.raises(
        UserError, match=f"need the Python package {package}, which is not .*; `make gguf` installs it"
    ):
        extra.site_of(package)


def test_a_run_is_served_as_gguf_if_a_16_bit_model_can_be_made_of_it(tiny):
    variants = params.preset("default").variants
    for form in GGUF_FORMS:
        assert all(
            params.can_be_served(variants[name], form)
            for name in ("lora_16bit", "qlora_nf4_dq", "full_16bit")
        )
        assert form not in params.preset("default").evaluation.forms


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "Q5_1"])
def test_llama_cpp_rounds_as_the_package_gguf_does(packages, name):
    weights = np.random.default_rng(0).normal(size=(600, 96)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    assert np.array_equal(library.quantized(weights, int(kind)), gguf.quantize(weights, kind))


@pytest.mark.parametrize(("name", "bits"), [("Q4_K", 4), ("Q6_K", 6)])
def test_blocks_of_256_hold_the_weights_to_their_bits(packages, name, bits):
    """A normal weight's block spans some 5 standard deviations, in 2**bits steps, whose rounding is uniform."""
    weights = np.random.default_rng(0).normal(size=(300, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    error = np.linalg.norm(gguf.dequantize(library.quantized(weights, int(kind)), kind) - weights)
    share = error / np.linalg.norm(weights)
    assert 0.5 * 4 / 2**bits / np.sqrt(12) < share < 1.2 * 5 / 2**bits / np.sqrt(12)


@pytest.mark.parametrize("form", GGUF_FORMS)
def test_a_file_keeps_all_that_it_says_and_both_programs_read_the_same(
    packages, file, tiny_model, tmp_path, form
):
    written = tmp_path / write.FILE
    record = write.quantize(file, written, form)
    before, after = gguf.GGUFReader(file), gguf.GGUFReader(written)
    new = gguf.Keys.General.FILE_TYPE
    assert {key for key in after.fields if not key.startswith("GGUF.")} == {
        key for key in before.fields if not key.startswith("GGUF.")
    } | {new}
    assert after.fields[new].contents() == types.FILE_TYPES[form].number
    for key in before.fields:
        assert (
            key == new
            or key.startswith("GGUF.")
            or before.fields[key].contents() == after.fields[key].contents()
        )
    assert record.size == written.stat().st_size and 0 < record.largest_error < 0.15
    assert sum(record.types.values()) == len(after.tensors)
    assert ("fallbacks", bool(record.fallbacks)) == ("fallbacks", form != "gguf_q8_0")

    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=write.FILE, dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    weight, expected = (m.model.layers[0].mlp.down_proj.weight.detach() for m in (model, own))
    assert 0 < (weight - expected).norm() / expected.norm() < 0.15
    texts = [[1, *range(5, 40)], list(range(60, 80))]
    for text, scored in zip(texts, library.log_probabilities(written, texts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, :-1].double()
        expected = logits.log_softmax(-1)[range(len(text) - 1), text[1:]].numpy()
        assert scored.shape == expected.shape
        np.testing.assert_allclose(scored, expected, atol=0.1)
        assert abs(scored.mean() - expected.mean()) < agreement.TOLERANCE / 10


def test_the_converter_replaces_no_locked_package(packages):
    site = extra.site_of(extra.CONVERTER)
    assert (site / "gguf" / "__init__.py").is_file()  # its own copy
    assert not Path(gguf.__file__).is_relative_to(site) and str(site) not in sys.path


def test_a_file_that_llama_cpp_cannot_read_is_named(packages, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match=r"^llama.cpp cannot load .*no.gguf: "):
        library.log_probabilities(tmp_path / "no.gguf", [[1, 2]])


def test_a_tensor_that_is_no_longer_the_one_it_was_is_refused(packages, file, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "quantized", lambda weights, kind: gguf.quantize(weights[::-1], kind))
    with pytest.raises(CheckError, match=r"in Q8_0 differs from its weights by 1\.\d+ of their norm"):
        write.quantize(file, tmp_path / "turned.gguf", "gguf_q8_0")
    assert not (tmp_path / "turned.gguf").exists()


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("LlamaForCausalLM", "it does not know the tokenizer"),
        ("NoSuchForCausalLM", "Model NoSuchForCausalLM is not supported"),
    ],
)
def test_what_the_converter_does_not_know_is_one_sentence(
    packages, tiny_model, tmp_path, architecture, reason
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    with pytest.raises(UserError, match=rf"converter cannot write .*model as GGUF: {re.escape(reason)}\.$"):
        write.check_convertible(folder, tmp_path)


def test_a_file_with_another_chat_template_is_refused(file, tiny_model, tmp_path):
    shutil.copyfile(file, tmp_path / write.FILE)
    with pytest.raises(CheckError, match="another chat template than the model"):
        serve.check_tokenizer(tmp_path / write.FILE, tiny_model)


@pytest.mark.parametrize(("shift", "refused"), [(0.0, False), (agreement.TOLERANCE * 1.5, True)])
def test_numbers_that_part_from_llama_cpps_are_refused(monkeypatch, shift, refused):
    class Model:
        max_length = 64

        def _encode_pair(self, prompt, response):
            return list(prompt), list(response)

    samples = [{"arguments": [([1, 2, 3], [4, 5])], "nats_per_token": (4.0, 2)},
               {"arguments": [([1] * 64, [4])], "nats_per_token": (9.0, 1)},  # longer than the context
               {"arguments": [([1, 2], [4, 5, 6])], "nats_per_token": (3.0, 3)}]  # fmt: skip
    scores = [np.array([-9, -9, -1.5, -2.5 - 2 * shift]), np.array([-9, -1, -1, -1 - 3 * shift])]
    monkeypatch.setattr(library, "log_probabilities", lambda file, texts: scores)
    results = {"samples": {"holdout_loss": samples}}
    if refused:
        with pytest.raises(
            CheckError, match=r"gives 2 rows of holdout_loss 1\.6250 nats per token, .* 1\.4000"
        ):
            agreement.compare(results, Model(), Path("x.gguf"))
        return
    found = agreement.compare(results, Model(), Path("x.gguf"))
    assert (found.rows, found.tokens, found.transformers, found.llama_cpp) == (2, 5, 1.4, 1.4)
    assert found.largest_difference == 0 and found.difference == 0


def test_a_tensor_that_no_block_divides_is_written_in_16_bits(packages, file, tmp_path, monkeypatch):
    monkeypatch.setattr(types, "fitting", lambda intended, width: "F16")
    record = write.quantize(file, tmp_path / write.FILE, "gguf_q4_0")
    assert record.types.keys() == {"F16", "F32"} and record.largest_error < 2**-11
    for before, after in zip(
        gguf.GGUFReader(file).tensors, gguf.GGUFReader(tmp_path / write.FILE).tensors, strict=True
    ):
        np.testing.assert_allclose(after.data.astype(np.float32), before.data, rtol=2**-10, atol=1e-7)
