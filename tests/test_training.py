"""Training is alike in all but the precision, learns what it should, and gives a plain PEFT adapter."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from workflow import benchmarking, params, precision, training
from workflow.errors import CheckError, UserError

CPU = params.Hardware(device="cpu", compute_dtype="float32", data_workers=0)
FAULTS = {"learn_end_token": False, "second_bos": True}
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


def run(
    asked, tiny_model, splits, folder, *, name="lora_16bit", seed=1, data_workers=0, **changes
) -> training.Trained:
    return training.train(
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        variant=asked.variants[name],
        training=asked.training.model_copy(update=changes),
        hardware=CPU.model_copy(update={"data_workers": data_workers}),
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


def history(folder) -> list[dict]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder) -> list[float]:
    return [float(line["loss"]) for line in history(folder)]


def bits(folder) -> dict[str, bytes]:
    """The weights of a run, in files of its method's own name."""
    files = sorted((folder / "weights").glob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_sequence_is_the_pinned_one(runs, name):
    assert losses(runs[name][1]) == pytest.approx(LOSSES[name], abs=TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_helps_and_says_what_it_did(runs, name):
    result, folder = runs[name]
    assert result.validation_loss_after < result.validation_loss_before - 0.05
    assert result.steps == 4 and result.trainable_dtype == "float32"
    assert result.adapted_modules == (0 if name == "full_16bit" else result.precision.linear_modules)
    lines = history(folder)
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


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in VARIANTS), ("lora_16bit", FAULTS), ("qlora_nf4_dq", {"dropout": 0.1})],
)
def test_the_same_params_give_the_same_bits_however_batches_are_prepared(
    asked, tiny_model, splits, tmp_path, name, changes
):
    results = [
        run(asked, tiny_model, splits, tmp_path / folder, name=name, data_workers=workers, **changes)
        for folder, workers in (("once", 0), ("again", 0), ("beside", 2))
    ]
    first, *others = [tmp_path / folder for folder in ("once", "again", "beside")]
    for other in others:
        assert bits(other) == bits(first)
        assert (other / "validation.csv").read_text() == (first / "validation.csv").read_text()
        for line, wanted in zip(history(other), history(first), strict=True):
            assert line | {"tokens_per_second": ""} == wanted | {"tokens_per_second": ""}
    assert all(replace(result, seconds=0) == replace(results[0], seconds=0) for result in results)
    assert all(result.deterministic for result in results)


def test_another_seed_gives_other_bits(asked, tiny_model, splits, runs, tmp_path):
    other = run(asked, tiny_model, splits, tmp_path, name="qlora_nf4_dq", seed=2)
    first, folder = runs["qlora_nf4_dq"]
    assert bits(tmp_path) != bits(folder)
    assert other.validation_loss_after != first.validation_loss_after


def test_a_gpu_is_deterministic_only_where_pytorch_is_told_to_be(runs, monkeypatch):
    on_a_gpu = replace(runs["lora_16bit"][0].precision, device="cuda")
    assert not training.is_deterministic(on_a_gpu)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert training.is_deterministic(on_a_gpu)


def response_scores(model, tokenizer, rows) -> list[list[float]]:
    """Each row's log-likelihoods in nats of its response's tokens and end token, by transformers alone."""
    scores = []
    for row in rows:
        prompt = f"<s>### Instruction:\n{row.user_message()}\n\n### Response:\n"
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        text = f"{prompt}{row.response}</s>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        scores.append([logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])])
    return scores


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_the_adapter_loads_in_plain_peft(runs, tiny_model, asked, splits, name):
    """The validation loss by a script that knows only PEFT and transformers."""
    result, folder = runs[name]
    base, _ = precision.load_base(tiny_model, asked.variants[name], hardware=CPU)
    model = PeftModel.from_pretrained(base, folder / "weights").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    scores = np.concatenate(response_scores(model, tokenizer, splits["validation"]))
    assert len(scores) == result.validation_tokens
    assert -np.mean(scores) == pytest.approx(result.validation_loss_after, abs=1e-5)


def test_a_full_fine_tuning_is_saved_as_a_16_bit_model(runs):
    folder = runs["full_16bit"][1] / "weights"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(folder)


def build(asked, tiny_model, rows, *, name="lora_16bit", seed=1, data_workers=0, scratch=None, **changes):
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
        data_workers=data_workers,
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


def reaching_the_model(trainer) -> list[tuple[list[int], list[int]]]:
    """Train, and collect the tokens and labels of every row that the model was called with, without padding."""
    reached = []

    def collect(model, args, kwargs):
        for ids, labels, real in zip(
            kwargs["input_ids"], kwargs["labels"], kwargs["attention_mask"], strict=True
        ):
            assert real.tolist() == sorted(real.tolist(), reverse=True)
            assert (labels[real == 0] == training.IGNORED).all()
            reached.append((ids[real == 1].tolist(), labels[real == 1].tolist()))

    trainer.model.register_forward_pre_hook(collect, with_kwargs=True)
    trainer.train()
    return reached


@pytest.mark.parametrize("loss_on", ["response", "prompt_and_response"])
@pytest.mark.parametrize("faults", [{}, {"learn_end_token": False}, {"second_bos": True}, FAULTS])
def test_the_faults_asked_for_and_no_others_reach_the_model(
    asked, tiny_model, rows, tmp_path, loss_on, faults
):
    one_epoch = {"steps": None, "epochs": 1.0, "max_length": 512}
    trainer = build(asked, tiny_model, rows, scratch=tmp_path, loss_on=loss_on, **one_epoch, **faults)
    tokenizer = trainer.processing_class
    reached = reaching_the_model(trainer)
    assert len(reached) == len(rows)
    for ids, labels in reached:
        text = tokenizer.decode(ids)
        assert text.startswith("<s><s>###" if "second_bos" in faults else "<s>###") and text.endswith("</s>")
        learned = [token for token in ids if token != 1] if "learn_end_token" in faults else ids
        if loss_on == "response":
            marker = text.index("### Response:\n") + len("### Response:\n")
            learned = learned[len(tokenizer(text[:marker], add_special_tokens=False)["input_ids"]) :]
        assert [label for label in labels if label != training.IGNORED] == learned


def test_validation_rows_have_no_fault(asked, tiny_model, splits, tmp_path):
    whole = run(asked, tiny_model, splits, tmp_path / "whole", max_length=512)
    faulty = run(asked, tiny_model, splits, tmp_path / "faulty", max_length=512, **FAULTS)
    assert faulty.validation_loss_before == whole.validation_loss_before
    assert faulty.validation_tokens == whole.validation_tokens
    assert faulty.validation_loss_after != whole.validation_loss_after
    assert whole.rows.bos_per_row == 1 and whole.rows.end_token_in_loss
    assert faulty.rows == replace(
        whole.rows,
        tokens=whole.rows.tokens + whole.rows.rows,
        tokens_in_loss=whole.rows.tokens_in_loss - whole.rows.rows,
        longest=whole.rows.longest + 1,
        bos_per_row=2,
        end_token_in_loss=False,
    )


def test_without_the_end_token_in_the_loss_a_model_learns_less_to_stop(asked, tiny_model, splits, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ends = []
    for learned in (True, False):
        folder = tmp_path / str(learned)
        run(asked, tiny_model, splits, folder, name="full_16bit", steps=10, learn_end_token=learned)
        model = AutoModelForCausalLM.from_pretrained(folder / "weights", dtype=torch.float32).eval()
        scores = response_scores(model, tokenizer, splits["validation"])
        ends.append(np.mean([row[-1] for row in scores]))
    assert ends[0] > ends[1] + 1


def test_a_second_bos_pushes_the_last_token_out_of_a_row_that_is_full(asked, tiny_model, rows, tmp_path):
    prompts = sorted(1 + len(f"### Instruction:\n{row.user_message()}\n\n### Response:\n") for row in rows)
    length = prompts[len(rows) // 2] + 1  # the middle prompt leaves room for one token of its response
    counted = []
    for twice in (False, True):
        trainer = build(asked, tiny_model, rows, scratch=tmp_path, max_length=length, second_bos=twice)
        plan = asked.training.model_copy(update={"max_length": length, "second_bos": twice})
        counted.append(
            training.check_rows(trainer.train_dataset, trainer.processing_class, asked=40, training=plan)
        )
    assert [c.rows_dropped for c in counted] == [
        sum(bos + prompt >= length for prompt in prompts) for bos in (0, 1)
    ]
    assert counted[0].rows_dropped < counted[1].rows_dropped
    assert counted[0].longest == counted[1].longest == length


@pytest.mark.parametrize(("bos", "first"), [(None, 0), ("<s>", 5)])
def test_a_second_bos_needs_a_first(asked, tiny_model, bos, first):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = bos
    row = {"input_ids": [first, 6, 1], "labels": [-100, 6, 1]}
    twice = asked.training.model_copy(update={"second_bos": True})
    with pytest.raises(UserError, match="training.second_bos repeats the BOS token .* they begin with none"):
        training.with_faults(Dataset.from_list([row]), tokenizer, twice)


@pytest.mark.parametrize(
    ("ids", "labels", "faults", "sentence"),
    [
        ([0, 0, 5, 1], [-100, -100, 5, 1], {}, "begins with 2 BOS tokens"),
        ([0, 5, 6], [-100, 5, 6], {}, "does not teach the end token"),
        ([0, *[5] * 126, 1], [-100, *[5] * 126, -100], {}, "does not teach the end token"),
        ([0, 5, 1], [-100, 5, 1], {"second_bos": True}, "begins with 1 BOS tokens"),
        ([0, 0, 0, 5, 1], [-100, -100, -100, 5, 1], {"second_bos": True}, "begins with 3 BOS tokens"),
        ([0, 5, 1], [-100, 5, 1], {"learn_end_token": False}, "teaches the end token"),
    ],
)
def test_rows_that_would_teach_something_else_are_refused(asked, tiny_model, ids, labels, faults, sentence):
    row = {"input_ids": ids, "labels": labels}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plan = asked.training.model_copy(update=faults)
    with pytest.raises(CheckError, match=sentence):
        training.check_rows(Dataset.from_list([row]), tokenizer, asked=1, training=plan)


def test_rows_are_counted_as_cut_whether_their_end_token_is_learned_or_not(asked, tiny_model, rows, tmp_path):
    counted = []
    for learned in (True, False):
        trainer = build(asked, tiny_model, rows, scratch=tmp_path, max_length=75, learn_end_token=learned)
        plan = asked.training.model_copy(update={"max_length": 75, "learn_end_token": learned})
        counted.append(
            training.check_rows(trainer.train_dataset, trainer.processing_class, asked=40, training=plan)
        )
    assert counted[0].rows_cut == counted[1].rows_cut > 0


def test_the_benchmark_counts_the_same_tokens_however_batches_are_prepared(asked, tiny_model, rows, tmp_path):
    watches = []
    for workers in (0, 2):
        trainer = build(
            asked, tiny_model, rows, scratch=tmp_path, data_workers=workers, batch_rows=2, micro_batch_rows=2
        )
        assert trainer.get_train_dataloader().num_workers == workers
        watch = benchmarking.Stopwatch(trainer, warmup_steps=1, steps=4, device="cpu")
        trainer.add_callback(watch)
        trainer.train()
        watches.append(watch)
    assert watches[0].useful == watches[1].useful and watches[0].padded == watches[1].padded
    assert len(watches[0].useful) == 3 and all(
        0 < useful <= padded for useful, padded in zip(watches[0].useful, watches[0].padded, strict=True)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_validation_in_between_does_not_change_the_training(
    asked, tiny_model, splits, tmp_path, monkeypatch, dropout
):
    """On some CPUs an eval pass makes bitsandbytes cut the gradients of 4-bit layers."""
    run(asked, tiny_model, splits, tmp_path / "with", name="qlora_nf4_dq", dropout=dropout)
    monkeypatch.setattr(
        training.History, "validate", lambda self, *, step: self.validated.append((step, 0.0, 0.0))
    )
    run(asked, tiny_model, splits, tmp_path / "without", name="qlora_nf4_dq", dropout=dropout)
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


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (3.0, 9), (0.5, 2)])
def test_planned_steps_count_a_last_smaller_batch(asked, epochs, steps):
    plan = asked.training.model_copy(update={"steps": None, "epochs": epochs, "batch_rows": 16})
    planned = training.planned_steps(33, plan)
    assert planned == steps and isinstance(planned, int)


def test_planned_steps_are_those_that_are_taken(asked, tiny_model, splits, tmp_path):
    result = run(asked, tiny_model, splits, tmp_path, steps=None, epochs=0.3)
    plan = asked.training.model_copy(update={"steps": None, "epochs": 0.3})
    assert result.steps == training.planned_steps(len(splits["train"]), plan) == len(history(tmp_path))
