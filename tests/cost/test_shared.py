"""What a card needs of a training that several processes share: held to what FSDP2 really has in memory at once."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from conftest import ROOT
from live_tensors import Live
from peft import get_peft_model
from plan_command import run_plan
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from workflow import params
from workflow.cost import memory, plan
from workflow.methods.lora import LORA
from workflow.runtime.files import read_json
from workflow.runtime.paths import PARAMS
from workflow.training.sharding import FSDP

SMALL, LARGE = 64, 24000  # tokens of a vocabulary whose head is less than a decoder layer, and more than two


@pytest.fixture(scope="module")
def asked() -> params.Params:
    return params.load(PARAMS)


def shape_of(name: str) -> memory.Shape:
    return memory.Shape.of(AutoConfig.from_pretrained(params.SHAPES / f"{name}.json"))


def peak_of_a_step(config: LlamaConfig, training: params.Training, *, processes: int, passes: int) -> int:
    """The most bytes of one of so many processes in its second step, of passes of two tokens, on a CPU.

    The other processes are made up: what is gathered from them is noise, which takes as much memory.
    """
    distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LORA.peft_config(training)
        )
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=FSDP["version"],
            reshard_after_forward=FSDP["reshard_after_forward"],
            cpu_ram_efficient_loading=FSDP["cpu_ram_efficient_loading"],
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no",
            is_main_process=True,
            device=torch.device("cpu"),
        )
        fsdp2_prepare_model(accelerator, model.train())
        live = Live()
        for parameter in model.parameters():
            live.add(parameter)
        for _ in range(2):
            live.peak = 0
            model.zero_grad()
            with live:
                for number in range(passes):
                    model.set_requires_gradient_sync(number == passes - 1)  # accelerate's `no_sync`
                    model(input_ids=torch.arange(2)[None], use_cache=False).logits.sum().backward()
        return live.peak
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("processes", "rank", "checkpointing", "tied", "vocabulary", "passes"),
    [
        # The peak is in the last decoder layer in forward,
        (2, 16, True, False, SMALL, 1),
        (2, 16, False, False, SMALL, 1),
        (4, 16, True, False, SMALL, 1),
        (2, 16, True, False, SMALL, 2),
        (2, 16, True, True, SMALL, 1),
        # at the head, at a tied embedding,
        (2, 16, True, False, LARGE, 1),
        (4, 16, True, True, LARGE, 2),
        # in the last decoder layer in backward, and at the embedding at the end.
        (4, 128, True, False, SMALL, 2),
        (2, 128, True, True, SMALL, 1),
        (2, 128, True, False, LARGE, 1),
    ],
)
def test_a_process_holds_what_the_formula_counts(
    asked, processes, rank, checkpointing, tied, vocabulary, passes
):
    """Weights, gathered ones and gradients, on passes so short that little else is in memory."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    training = asked.training.model_copy(
        update={
            "rank": rank,
            "gradient_checkpointing": checkpointing,
            "batch_rows": processes * passes,
            "micro_batch_rows": 1,
        }
    )
    need = memory.predict_shared(
        memory.Shape.of(config), asked.variants["lora_16bit"], training, tokens=2, processes=processes
    )
    expected = need.total - need.optimizer - need.workspace
    found = peak_of_a_step(config, training, processes=processes, passes=passes)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4", "qlora_nf4_dq"])
@pytest.mark.parametrize("shape", ["llama2_70b", "qwen2_5_0_5b"])
def test_each_of_n_cards_holds_an_nth_of_the_weights_and_all_constants(asked, name, shape):
    shape, variant = shape_of(shape), asked.variants[name]
    whole, constants = memory.weights(shape, variant)
    alone = memory.predict(shape, variant, asked.training, tokens=512)
    totals = []
    for processes in (2, 3, 4, 8):
        need = memory.predict_shared(shape, variant, asked.training, tokens=512, processes=processes)
        tensors = shape.layers * len(shape.linears) + 1  # each is rounded up
        assert whole / processes <= need.weights <= whole / processes + tensors * memory.ALLOCATION
        assert need.quantization_constants == constants
        assert 0 <= need.adapters - alone.adapters / processes < 4
        assert 0 <= need.optimizer - alone.optimizer / processes < 8
        assert need.total > constants + need.gathered + need.activations
        totals.append(need.total)
    assert totals == sorted(totals, reverse=True)
    many = memory.predict_shared(shape, variant, asked.training, tokens=512, processes=10**9)
    shared = many.weights + many.adapters + many.optimizer
    assert many.total - shared < totals[-1] and shared < 0.01 * many.total


def test_one_process_needs_what_was_predicted_before(asked):
    shape, variant = shape_of("llama2_7b"), asked.variants["qlora_nf4_dq"]
    need = memory.predict(shape, variant, asked.training, tokens=2048)
    assert memory.predict_per_card(shape, variant, asked.training, tokens=2048, processes=1) == need
    shared = memory.predict_shared(shape, variant, asked.training, tokens=2048, processes=2)
    assert memory.predict_per_card(shape, variant, asked.training, tokens=2048, processes=2) == shared


def test_gradients_are_whole_where_a_step_has_several_passes(asked):
    shape, variant = shape_of("llama2_7b"), asked.variants["lora_16bit"]
    one, several = (
        memory.predict_shared(
            shape,
            variant,
            asked.training.model_copy(update={"batch_rows": rows, "micro_batch_rows": 2}),
            tokens=4096,
            processes=2,
        )
        for rows in (4, 8)
    )
    whole = memory.predict(shape, variant, asked.training, tokens=4096).gradients
    assert one.gradients < 0.6 * whole < whole <= several.gradients < 1.05 * whole


def test_the_largest_fit_on_a_card_grows_with_their_number(asked):
    shape, variant = shape_of("llama2_13b"), asked.variants["lora_16bit"]
    most = [
        memory.largest_fit(shape, variant, asked.training, gib=memory.usable_gib(24), processes=processes)
        for processes in (1, 2, 4)
    ]
    assert most[0] == 0 < most[1] < most[2]
    need = memory.predict_shared(shape, variant, asked.training, tokens=most[1] + 64, processes=2)
    assert not memory.fits(need, memory.usable_gib(24))


MEASURED = read_json(ROOT / "results/sharding/nvidia_h200.json")
SHARED = [point for point in MEASURED["points"] if point["processes"] > 1]


def predicted(point: dict) -> list[float]:
    """GiB of each process of a measured training."""
    settings = params.preset("mechanism")
    shape = replace(shape_of(point["shape"]), vocabulary=MEASURED["vocabulary"])
    names = ("gradient_checkpointing", "batch_rows", "micro_batch_rows")
    training = settings.training_of(point["variant"]).model_copy(update={name: point[name] for name in names})
    variant, processes = settings.variants[point["variant"]], point["processes"]
    return [
        memory.predict_per_card(shape, variant, training, tokens=tokens, processes=processes).gib()["total"]
        for tokens in point["longest_pass_tokens"]
    ]


def said_of_two_gpus() -> str:
    return (ROOT / "docs/sharding.md").read_text(encoding="utf-8").partition("## On two GPUs")[2]


@pytest.mark.parametrize("point", SHARED, ids=lambda point: f"{point['shape']}-{point['variant']}")
def test_two_gpus_were_measured_to_need_what_is_predicted(point):
    # Of the smallest, the loss is the peak, and a chunk of logits stayed beside the next when it was measured.
    tolerance = 0.11 if point["shape"] == "smollm2_135m" else 0.005
    assert predicted(point) == pytest.approx(point["peak_allocated_gib"], rel=tolerance)
    measured, foreseen = max(point["peak_allocated_gib"]), max(predicted(point))
    if point["shape"] == "smollm2_135m":
        assert f"{measured:.2f}" in said_of_two_gpus() and f"{foreseen:.2f}" in said_of_two_gpus()
    else:
        held = point["weights_gib_per_process"]
        (line,) = [line for line in said_of_two_gpus().splitlines() if f"| {measured:.1f} " in line]
        assert f"| {held:.2f} " in line and line.endswith(f"| {foreseen:.1f} |")


def test_the_docs_say_what_two_gpus_lost_and_how_fast_they_were():
    said = said_of_two_gpus()
    by_name = {
        (point["shape"], point["variant"], point["processes"], point["micro_batch_rows"]): point
        for point in MEASURED["points"]
    }
    one, two = (by_name["llama2_7b", "qlora_nf4_dq", processes, 16] for processes in (1, 2))
    apart = max(abs(a - b) for a, b in zip(one["loss"], two["loss"], strict=True))
    assert f"| {apart:.4f} |" in said and one["loss"][:2] == two["loss"][:2]
    for place, digits in ((0, 6), (1, 4)):
        pair = [f"{point['validation_loss'][place]:.{digits}f}" for point in (one, two)]
        assert f"| {' | '.join(pair)} |" in said
    rates = []
    for variant in ("lora_16bit", "qlora_nf4_dq"):
        for processes in (1, 2):
            point = by_name["llama2_7b", variant, processes, 16]
            # Graphs were captured in the second step.
            steps = list(zip(point["step_tokens"], point["tokens_per_second"], strict=True))[2:]
            of_a_size = [
                [(tokens, rate) for tokens, rate in steps if least <= tokens < most]
                for least, most in ((0, 4000), (4000, 9000), (9000, 30000))
            ]
            rates.append([sum(t for t, _ in group) / sum(t / r for t, r in group) for group in of_a_size])
    means = [sum(t for t, _ in group) / len(group) for group in of_a_size]
    for mean, *row in zip(means, *rates, strict=True):
        cells = " | ".join(f"{round(rate, -2):,.0f}" for rate in row)
        assert f"| {round(mean, -2):,.0f} | {cells} |" in said


LARGEST = ("--model", "llama2_70b", "--length", "1024", "--gpu")
SHAREABLE = ("lora_16bit", "qlora_nf4", "qlora_nf4_dq", "qlora_fp4")


def rows_of(text: str) -> dict[tuple[str, str], str]:
    """A plan's lines of its first table, by variant and checkpointing."""
    table = text.split("By component")[0]
    return {tuple(line.split()[:2]): line for line in table.splitlines() if len(line.split()) > 2}


def components(text: str) -> dict[str, dict[str, float]]:
    """A plan's table of GiB by component, by variant."""
    header, *lines = text.split("checkpointing:\n\n")[1].splitlines()
    return {
        line.split()[0]: dict(zip(header.split()[1:], map(float, line.split()[1:]), strict=True))
        for line in lines
    }


def test_a_model_that_is_larger_than_a_card_fits_on_several(capsys, monkeypatch):
    one, two, four = (
        run_plan(capsys, monkeypatch, *LARGEST, "24", "--gpus", number) for number in ("1", "2", "4")
    )
    assert "does not fit" in rows_of(one)["qlora_nf4_dq", "yes"]
    assert "does not fit" in rows_of(two)["qlora_nf4_dq", "yes"]
    fitting = rows_of(four)["qlora_nf4_dq", "yes"].split()
    assert len(fitting) == 5 and int(fitting[2]) >= 1 and float(fitting[3]) < memory.usable_gib(24)
    assert "4 GPUs of 24 GB, of each of which a training can use 21.6 GiB" in four
    for name in SHAREABLE:
        whole, half, quarter = (components(text)[name] for text in (one, two, four))
        assert half["weights"] == pytest.approx(whole["weights"] / 2, abs=0.002)
        assert quarter["weights"] == pytest.approx(whole["weights"] / 4, abs=0.002)
        assert whole["constants"] == half["constants"] == quarter["constants"]
        assert whole["total"] > half["total"] > quarter["total"] > quarter["gathered"] + whole["constants"]
    assert "gathered" not in one.split("By component")[1]


def test_the_docs_say_what_is_predicted(capsys, monkeypatch):
    said = " ".join((ROOT / "docs/sharding.md").read_text(encoding="utf-8").split())
    for number in ("1", "2", "4", "8"):
        found = components(run_plan(capsys, monkeypatch, *LARGEST, "24", "--gpus", number))
        totals = [f"{found[name]['total']:.1f}" for name in ("qlora_nf4_dq", "lora_16bit")]
        assert f"| {number} | {' | '.join(totals)} |" in said
    short = run_plan(
        capsys, monkeypatch, *LARGEST[:2], "--gpu", "24", "--gpus", "2", "--length", "512", "--rank", "8"
    )
    rows, peak = rows_of(short)["qlora_nf4_dq", "yes"].split()[2:4]
    assert rows == "1" and f"one of 512 tokens, in {float(peak):.1f} GiB" in said
    large = run_plan(
        capsys, monkeypatch, "--model", "llama3_1_70b", "--gpu", "48", "--gpus", "2", "--length", "256"
    )
    rows, peak = rows_of(large)["qlora_nf4_dq", "no"].split()[2:4]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"with {rows} rows ({float(peak):.0f} GiB on each)" in readme


def test_one_gpu_is_planned_as_without_the_option(capsys, monkeypatch):
    without = run_plan(capsys, monkeypatch, *LARGEST, "80")
    assert run_plan(capsys, monkeypatch, *LARGEST, "80", "--gpus", "1") == without
    assert "not shared" not in without and "minutes, H100" in without


def test_no_time_is_invented_for_shared_trainings(capsys, monkeypatch):
    said = run_plan(capsys, monkeypatch, *LARGEST, "h100", "--gpus", "2", "--price", "2")
    assert not any(column in said.split("No time")[0] for column in ("minutes", "time / 16-bit", "cost"))
    assert "No time or cost is estimated" in said and "docs/sharding.md" in said and "NCCL" in said


def test_what_cannot_be_shared_is_said_with_its_reason(capsys, monkeypatch, tmp_path):
    said = run_plan(capsys, monkeypatch, *LARGEST, "80", "--gpus", "2")
    for name, reason in {
        "lora_int8": "precision is int8, which is not sharded",
        "full_16bit": "method is full, which is not sharded",
        "lora_plus": "its b_rate_factor 16.0, which was not tried",
    }.items():
        (line,) = [line for line in said.splitlines() if line.startswith(f"{name} ")]
        assert f"not shared ({reason}" in line and name not in components(said)
    assert "int8 keeps PEFT's own layers" not in said  # no line is a lower bound for it
    paged = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    assert text.count("optimizer: adamw_torch\n") == 1
    paged.write_text(text.replace("optimizer: adamw_torch\n", "optimizer: paged_adamw_32bit\n"))
    said = run_plan(capsys, monkeypatch, *LARGEST, "80", "--gpus", "2", "--params", str(paged))
    assert "not shared (its optimizer paged_adamw_32bit, which cannot update a part of a weight" in said
    assert "By component" not in said  # nothing is left to list
    said = run_plan(capsys, monkeypatch, "--model", "llama2_7b", "--gpu", "t4", "--gpus", "2")
    assert "not shared (it computes in float16" in said


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", "1025"])
def test_a_number_of_gpus_that_is_none_is_refused(capsys, monkeypatch, number):
    monkeypatch.setattr("sys.argv", ["plan", *LARGEST, "24", f"--gpus={number}"])
    with pytest.raises(SystemExit) as end:
        plan.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"argument --gpus: invalid value {number}: input should be" in said


def test_the_option_decides_and_not_the_processes_of_a_variant(capsys, monkeypatch, tmp_path):
    shared = tmp_path / "params.yaml"
    shared.write_text((ROOT / "params.yaml").read_text().replace("processes: 1", "processes: 2", 1))
    arguments = ("--model", "llama2_7b", "--gpu", "24", "--params")
    said = "as --gpus says: the `processes` of lora_16bit (docs/sharding.md) are not used"
    assert f"Each is planned on one GPU, {said}" in run_plan(capsys, monkeypatch, *arguments, str(shared))
    assert "as --gpus says" not in run_plan(capsys, monkeypatch, *arguments, str(ROOT / "params.yaml"))
    arguments = (*arguments, str(shared), "--gpus")
    assert "as --gpus says" not in run_plan(capsys, monkeypatch, *arguments, "2")
    assert f"Each is planned on 4 GPUs, {said}" in run_plan(capsys, monkeypatch, *arguments, "4")
