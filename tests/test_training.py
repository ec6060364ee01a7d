"""Training is alike in all but the precision, learns what it should, and gives a plain PEFT adapter."""

import csv
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from workflow import params, precision, training
from workflow.errors import CheckError, UserError

CPU = params.Hardware(device="cpu", compute_dtype="float32")
VARIANTS = ["lora_16bit", "qlora_nf4", "qlora_nf4_dq", "qlora_fp4", "lora_int8", "full_16bit"]

# Loss in nats per token at each step, on the tiny model with seed 1; pinned, so that a change of a
# library or of the recipe is noticed. Tolerance: other CPUs round the same products differently.
LOSSES = {
    "lora_16bit": [5.7512, 5.7665, 5.5132, 5.4198],
    "qlora_nf4": [5.7569, 5.7714, 5.5088, 5.4094],
    "qlora_nf4_dq": [5.7571, 5.7715, 5.5090, 5.4095],
    "qlora_fp4": [5.7631, 5.7772, 5.4994, 5.4082],
    "lora_int8": [5.7513, 5.7666, 5.5128, 5.4196],
    "full_16bit": [5.7512, 5.7665, 5.4151, 4.4480],
}
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def asked(tiny) -> params.Params:
    faster = tiny.training.model_copy(update={"learning_rate": 1e-2, "steps": 4})
    return tiny.model_copy(update={"training": faster})


def run(asked, tiny_model, splits, folder, *, name="lora_16bit", seed=1, **changes) -> training.Trained:
    return training.train(
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        variant=asked.variants[name],
        training=asked.training.model_copy(update=changes),
        hardware=CPU,
        seed=seed,
        weights_folder=folder / "weights",
        history_file=folder / "history.csv",
        validation_file=folder / "validation.csv",
    )


@pytest.fixture(scope="module")
def runs(asked, tiny_model, splits, tmp_path_factory) -> dict:
    """Every variant trained once: the result and its folder."""
    trained = {}
    for name in VARIANTS:
        folder = tmp_path_factory.mktemp(name)
        trained[name] = (run(asked, tiny_model, splits, folder, name=name), folder)
    return trained


def losses(folder) -> list[float]:
    with (folder / "history.csv").open() as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_sequence_is_the_pinned_one(runs, name):
    assert losses(runs[name][1]) == pytest.approx(LOSSES[name], abs=TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_helps_and_says_what_it_did(runs, name):
    result, folder = runs[name]
    assert result.validation_loss_after < result.validation_loss_before - 0.05
    assert result.steps == 4 and result.trainable_dtype == "float32"
    assert result.adapted_modules == (0 if name == "full_16bit" else result.precision.linear_modules)
    with (folder / "history.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4]
    assert all(
        float(line[key]) > 0 for line in lines for key in ("loss", "gradient_norm", "tokens_per_second")
    )
    with (folder / "validation.csv").open() as file:
        steps = [int(line["step"]) for line in csv.DictReader(file)]
    assert steps == [0, 2, 4]


def test_variants_differ_in_precision_alone(runs):
    facts = {(r.rows, r.steps, r.tokens_seen) for r, _ in runs.values()}
    assert len(facts) == 1
    adapters = {r.trainable_parameters for name, (r, _) in runs.items() if name != "full_16bit"}
    assert len(adapters) == 1


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    asked, tiny_model, splits, runs, tmp_path
):
    again = run(asked, tiny_model, splits, tmp_path / "again", name="qlora_nf4_dq")
    other = run(asked, tiny_model, splits, tmp_path / "other", name="qlora_nf4_dq", seed=2)
    first, folder = runs["qlora_nf4_dq"]
    bits = [
        (f / "weights/adapter_model.safetensors").read_bytes()
        for f in (folder, tmp_path / "again", tmp_path / "other")
    ]
    assert bits[0] == bits[1] != bits[2]
    assert again.validation_loss_after == first.validation_loss_after != other.validation_loss_after


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_the_adapter_loads_in_plain_peft(runs, tiny_model, asked, splits, name):
    """The validation loss by a script that knows only PEFT and transformers."""
    result, folder = runs[name]
    base, _ = precision.load_base(tiny_model, asked.variants[name], hardware=CPU)
    model = PeftModel.from_pretrained(base, folder / "weights").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    loss = tokens = 0
    for row in splits["validation"]:
        prompt = f"<s>### Instruction:\n{row.user_message()}\n\n### Response:\n"
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(f"{prompt}{row.response}</s>", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].log_softmax(-1)
        loss -= sum(scores[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))
        tokens += ids.shape[1] - start
    assert tokens == result.validation_tokens
    assert loss / tokens == pytest.approx(result.validation_loss_after, abs=1e-5)


def test_a_full_fine_tuning_is_saved_as_a_16_bit_model(runs):
    folder = runs["full_16bit"][1] / "weights"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(folder)


def build(asked, tiny_model, rows, *, name="lora_16bit", seed=1, scratch=None, **changes):
    model, found = precision.load_base(tiny_model, asked.variants[name], hardware=CPU)
    return training.build_trainer(
        model,
        AutoTokenizer.from_pretrained(tiny_model),
        train_rows=rows,
        validation_rows=rows[:2],
        variant=asked.variants[name],
        training=asked.training.model_copy(update=changes),
        precision=found,
        seed=seed,
        scratch=scratch,
    )


def test_adapters_begin_alike_in_every_precision(asked, tiny_model, rows, tmp_path):
    """TRL rounds adapters on a quantised base to bfloat16, which would change two things at once."""
    begun = []
    for name in ("lora_16bit", "qlora_nf4_dq", "lora_int8"):
        trainer = build(asked, tiny_model, rows, name=name, scratch=tmp_path)
        begun.append({n: p for n, p in training.model_of(trainer).named_parameters() if p.requires_grad})
    for other in begun[1:]:
        assert other.keys() == begun[0].keys()
        assert all(p.dtype == torch.float32 and torch.equal(p, begun[0][n]) for n, p in other.items())


def test_the_loss_is_on_the_response_and_its_end_token_alone(asked, tiny_model, rows, tmp_path):
    trainer = build(asked, tiny_model, rows, scratch=tmp_path, max_length=512)
    tokenizer = trainer.processing_class
    for row, made in zip(rows, trainer.train_dataset, strict=True):
        text = tokenizer.decode(made["input_ids"])
        assert text.startswith("<s>###") and text.count("<s>") == 1 and text.count("</s>") == 1
        assert row.user_message() in text
        learned = [token for token in made["labels"] if token != training.IGNORED]
        assert tokenizer.decode(learned) == row.response + "</s>"


def test_context_and_the_loss_on_the_prompt_are_switches(asked, tiny_model, rows, tmp_path):
    trainer = build(
        asked, tiny_model, rows, scratch=tmp_path, use_context=False, loss_on="prompt_and_response"
    )
    for made in trainer.train_dataset:
        assert "Use small letters" not in trainer.processing_class.decode(made["input_ids"])
        assert made["labels"] == made["input_ids"]


def test_rows_that_are_cut_or_dropped_are_counted(asked, tiny_model, rows, tmp_path):
    length = 75  # tokens: the shortest prompts fit with a part of the response
    trainer = build(asked, tiny_model, rows, scratch=tmp_path, max_length=length)
    cut = asked.training.model_copy(update={"max_length": length})
    counted = training.check_rows(
        trainer.train_dataset, trainer.processing_class, asked=len(rows), training=cut
    )
    # A token is a byte; <s> and </s> are a token each.
    prompts = [1 + len(f"### Instruction:\n{row.user_message()}\n\n### Response:\n") for row in rows]
    whole = [prompt + len(row.response) + 1 for prompt, row in zip(prompts, rows, strict=True)]
    assert counted.rows_dropped == sum(prompt >= length for prompt in prompts) > 0
    assert counted.rows_cut == sum(total > length for total in whole) - counted.rows_dropped > 0
    with pytest.raises(UserError, match="leaves no response to learn"):
        run(asked, tiny_model, {"train": rows, "validation": rows[:2]}, tmp_path, max_length=8)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"input_ids": [0, 0, 5, 1], "labels": [-100, -100, 5, 1]}, "begins with 2 BOS tokens"),
        ({"input_ids": [0, 5, 6], "labels": [-100, 5, 6]}, "does not teach the end token"),
    ],
)
def test_rows_that_would_teach_something_wrong_are_refused(asked, tiny_model, row, sentence):
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(CheckError, match=sentence):
        training.check_rows(Dataset.from_list([row]), tokenizer, asked=1, training=asked.training)


def test_a_validation_in_between_does_not_change_the_training(
    asked, tiny_model, splits, tmp_path, monkeypatch
):
    """On some CPUs an eval pass makes bitsandbytes cut the gradients of 4-bit layers."""
    run(asked, tiny_model, splits, tmp_path / "with", name="qlora_nf4_dq")
    monkeypatch.setattr(
        training.History, "validate", lambda self, *, step: self.validated.append((step, 0.0, 0.0))
    )
    run(asked, tiny_model, splits, tmp_path / "without", name="qlora_nf4_dq")
    with_it, without = (tmp_path / name / "weights/adapter_model.safetensors" for name in ("with", "without"))
    assert with_it.read_bytes() == without.read_bytes()


def test_two_micro_batches_give_the_gradient_of_one_batch(asked, tiny_model, splits, tmp_path):
    run(asked, tiny_model, splits, tmp_path / "one", micro_batch_rows=4)
    run(asked, tiny_model, splits, tmp_path / "two", micro_batch_rows=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-4)


def test_paged_optimizers_are_refused_on_a_cpu(asked, tiny_model, splits, tmp_path):
    with pytest.raises(UserError, match="training.optimizer is paged_adamw_32bit"):
        run(asked, tiny_model, splits, tmp_path, optimizer="paged_adamw_32bit")


def test_a_window_of_one_batch_is_a_random_order():
    lengths = list(range(100))
    order = list(training.LikeLengthSampler(lengths, batch_rows=5, window=1, seed=1))
    batches = [order[start : start + 5] for start in range(0, 100, 5)]
    assert all(max(batch) - min(batch) > 10 for batch in batches)


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_batches_of_like_length_cover_every_row_once_with_little_padding(rows):
    lengths = np.random.default_rng(0).integers(5, 200, rows).tolist()
    sampler = training.LikeLengthSampler(lengths, batch_rows=8, window=8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(rows)) and order == list(sampler)
    sampler.set_epoch(1)
    assert rows <= 8 or list(sampler) != order

    def padded(order):
        return sum(
            max(lengths[i] for i in order[s : s + 8]) * len(order[s : s + 8]) for s in range(0, rows, 8)
        )

    if rows >= 64:
        assert padded(order) < 1.25 * sum(lengths) < padded(range(rows))
        means = [np.mean([lengths[i] for i in order[s : s + 8]]) for s in range(0, rows - 7, 8)]
        assert sorted(means) != means and sorted(means, reverse=True) != means


def test_planned_steps_count_a_last_smaller_batch():
    plan = params.load(params.PARAMS_FILE).training.model_copy(
        update={"steps": None, "epochs": 3.0, "batch_rows": 16}
    )
    assert math.ceil(training.planned_steps(33, plan)) == 9
