"""A training that several processes share gives the numbers of one process, and ends as a whole."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, run_stage_in, write_rows_to_train_on
from edit_params import set_training, set_variants
from peft import PeftModel
from plain_loss import plain_loss
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM

from workflow import params, precisions
from workflow.cost import memory
from workflow.methods.lora import adapter_parameters
from workflow.models import load
from workflow.runtime import launch
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import read_json, write_json
from workflow.runtime.paths import MODEL, train_folder
from workflow.training import checks, sharding
from workflow.training import train as training

# What sharing a training between two processes may change in float32 on a CPU: a loss (nats per token) or a
# gradient's norm, and a weight of the adapter after steps of 3e-3. Sums are taken in another order, and rows
# are padded that one process packs. 26 rows make 13 passes: in the last of an epoch one process has no rows.
LOSS, WEIGHT = 5e-6, 2e-5
SHARED = {
    "lora_16bit": {"optimizer": "adamw_torch_fused"},
    "qlora_nf4_dq": {"gradient_checkpointing": True, "log_every_steps": 3},
}


def content() -> dict:
    asked = YAML(typ="safe").load(params.complete_text("tiny"))
    asked["hardware"]["device"] = "cpu"
    set_training(asked, learning_rate=3e-3, steps=8)
    for name, changes in SHARED.items():
        asked["variants"][name]["training"] = changes
        asked["variants"][f"{name}_shared"] = asked["variants"][name] | {"processes": 2}
    set_variants(asked, [name for one in SHARED for name in (one, f"{one}_shared")])
    return asked


def put_params(folder: Path, asked: dict) -> None:
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(asked, file)


@pytest.fixture(scope="module")
def folder(tiny_model, splits, tmp_path_factory) -> Path:
    """Where the train stage finds all it reads."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / MODEL).symlink_to(tiny_model)
    write_rows_to_train_on(folder, splits)
    put_params(folder, content())
    return folder


def train(folder: Path, variant: str) -> subprocess.CompletedProcess:
    return run_stage_in(folder, "train", "--variant", variant, "--seed", "1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module", params=SHARED)
def pair(request, folder, tiny_model, splits) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """The folder of a run by one process, that of two by the stage's command, and what the two said."""
    asked = params.Params.model_validate(content())
    alone, shared = (folder / train_folder(n, 1) for n in (request.param, f"{request.param}_shared"))
    alone.mkdir(parents=True)
    trained = training.train(
        params.Run(request.param, asked.variants[request.param], 1, asked.training_of(request.param), CPU),
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        folder=alone,
    )
    write_json(alone / "result.json", trained.as_dict())
    done = train(folder, f"{request.param}_shared")
    assert (done.returncode, done.stderr) == (0, "")
    return alone, shared, done


def column(folder: Path, file: str, name: str) -> list[float]:
    with (folder / file).open() as lines:
        return [float(line[name]) for line in csv.DictReader(lines)]


def test_two_processes_lose_what_one_does(pair):
    alone, shared, _ = pair
    for name in ("step", "epoch", "learning_rate", "token_accuracy"):
        assert column(shared, "history.csv", name) == column(alone, "history.csv", name)
    for name in ("loss", "gradient_norm"):
        one, two = (column(folder, "history.csv", name) for folder in (alone, shared))
        assert len(one) >= 4 and two == pytest.approx(one, abs=LOSS, rel=LOSS)
    one, two = (column(folder, "validation.csv", "validation_loss") for folder in (alone, shared))
    assert len(one) == 3 and two == pytest.approx(one, abs=LOSS) and one[-1] < one[0] - 0.05


def test_two_processes_train_the_adapter_of_one(pair, tiny_model):
    adapters = [load_file(folder / "weights/adapter_model.safetensors") for folder in pair[:2]]
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) == 56
    for name, weight in adapters[0].items():
        assert weight.shape == adapters[1][name].shape and weight.dtype == adapters[1][name].dtype
        assert (weight - adapters[1][name]).abs().max() < WEIGHT < weight.abs().max() / 100
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, pair[1] / "weights")
    found = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, adapters[1][n.replace(".default", "")]) for n, p in found.items())


def test_a_shared_training_says_what_it_did(pair):
    alone, shared = (read_json(folder / "result.json") for folder in pair[:2])
    for name in ("steps", "rows_per_step", "rows", "tokens_seen", "trainable_parameters", "adapted_modules",
                 "trainable_dtype", "validation_tokens"):  # fmt: skip
        assert shared[name] == alone[name], name
    assert (alone["processes"], shared["processes"]) == (1, 2)
    assert shared["tokens_computed"] >= shared["tokens_seen"]
    assert shared["speed_ups"] == alone["speed_ups"]
    assert [name for name, used in alone["speed_ups"].items() if not used] == ["cuda_graphs"]  # on a CPU
    same = ("base", "double_quantization", "storage", "compute", "quantized_modules", "weights_gib")
    assert [shared["precision"][key] for key in same] == [alone["precision"][key] for key in same]


def test_each_process_holds_half_of_the_weights(pair):
    alone, shared = (read_json(folder / "result.json")["weights_gib_per_process"] for folder in pair[:2])
    assert shared < 0.52 * alone


def test_what_a_process_holds_is_what_the_plan_counts(pair, tiny_model):
    """Both hold all constants, so that the difference is what the other process holds."""
    asked = params.Params.model_validate(content())
    name = pair[0].parent.name
    variant, shape = asked.variants[name], memory.Shape.of(AutoConfig.from_pretrained(tiny_model))
    alone, shared = (read_json(folder / "result.json")["weights_gib_per_process"] for folder in pair[:2])
    half, _ = memory.weights(shape, variant, parts=2)
    # On a CPU what is not quantized is held in float32.
    is_quantized = precisions.get(variant.precision).is_quantized
    half += shape.parameters - is_quantized * memory.quantized_parameters(shape, variant)
    half += 4 * adapter_parameters(shape, asked.training_of(name)) / 2
    assert alone - shared == pytest.approx(half / memory.GIB, abs=2e-6)


def test_one_process_speaks_for_both(pair):
    said = pair[2].stdout.splitlines()
    assert sum("validation loss" in line for line in said) == 3
    assert sum("started" in line for line in said) == sum("done in" in line for line in said) == 1


def test_a_users_mistake_is_one_sentence(folder, tmp_path):
    (tmp_path / "results").symlink_to(folder / "results")
    asked = content()
    asked["variants"]["lora_16bit_shared"]["compute_dtype"] = "float16"
    put_params(tmp_path, asked)
    done = train(tmp_path, "lora_16bit_shared")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    begins = (
        "train, variant lora_16bit_shared, seed 1: failed: compute_dtype is float16, which a CPU does not"
    )
    assert done.stderr.startswith(begins)


def children(process: int) -> list[int]:
    """The Python processes that a process started: not those that copy its output into the log."""
    found = map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in found}
    return [pid for pid, command in commands.items() if "python" in command and "redaction.py" not in command]


def runs(process: int) -> bool:
    """Whether a process is there and more than an exit code that nobody has fetched."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_process_ends_the_stage_and_leaves_no_output(folder, tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("fetch_model", "sample"):
        (tmp_path / "results" / name).symlink_to(folder / "results" / name)
    asked = content()
    set_training(asked, steps=100_000)
    put_params(tmp_path, asked)
    command = [
        sys.executable,
        "-m",
        "workflow.stages.train",
        "--variant",
        "qlora_nf4_dq_shared",
        "--seed",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    stage = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while not stage.stdout.readline().startswith("  step 1 of"):
            assert stage.poll() is None
        ranks = children(stage.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = stage.communicate(timeout=30)
    finally:
        stage.kill()
    assert stage.returncode == 1
    assert errors == (
        "train, variant qlora_nf4_dq_shared, seed 1: failed: process 2 of 2 was killed by SIGKILL (out of memory, "
        "if nobody killed it), and the others were ended. Log: logs/train@qlora_nf4_dq_shared-1.log. "
        "Mend it and run the same command again: what is done is kept.\n"
    )
    assert not runs(ranks[0])
    left = {path.name for path in (tmp_path / train_folder("qlora_nf4_dq_shared", 1)).iterdir()}
    assert left == {"history.csv", "validation.csv", "checkpoints"}


@pytest.mark.skipif(sys.platform != "linux", reason="asks for SIGTERM as clusters send it")
def test_a_shared_training_goes_on_with_the_same_bits(folder, tiny_model, splits, tmp_path):
    """It keeps its best weights, of which each process holds a part, and saves them whole."""
    asked = content()
    set_training(asked, steps=60, dropout=0.1, learning_rate=6e-2, keep="best", validations=20)
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    for one in (whole, ended):
        (one / "results").mkdir(parents=True)
        for name in ("fetch_model", "sample"):
            (one / "results" / name).symlink_to(folder / "results" / name)
        put_params(one, asked)
    variant = "qlora_nf4_dq_shared"
    assert train(whole, variant).returncode == 0
    stage = subprocess.Popen(
        [sys.executable, "-m", "workflow.stages.train", "--variant", variant, "--seed", "1"],
        cwd=ended,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not stage.stdout.readline().startswith("  step 3 of"):
        assert stage.poll() is None
    stage.send_signal(signal.SIGTERM)
    _, errors = stage.communicate(timeout=60)
    assert stage.returncode == 128 + signal.SIGTERM and errors.count("\n") == 1, errors
    run = ended / train_folder(variant, 1)
    before, checkpoint = sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    assert {file.suffix for file in checkpoint.iterdir()} == {".json", ".safetensors"}
    # The part of the second process alone is damaged: both go on from the checkpoint before.
    part = checkpoint / "1.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x7f")
    done = train(ended, variant)
    assert done.returncode == 0 and f"goes on after step {before.name[5:]} of" in done.stdout, done.stderr
    assert done.stdout.count(f"{checkpoint.name} is damaged: 1.safetensors is not as it was written") == 1
    for name in ("loss", "gradient_norm", "token_accuracy"):
        assert column(run, "history.csv", name) == column(
            whole / train_folder(variant, 1), "history.csv", name
        )
    bits = [
        (one / train_folder(variant, 1) / "weights/adapter_model.safetensors").read_bytes()
        for one in (whole, ended)
    ]
    assert bits[0] == bits[1]
    result = read_json(whole / train_folder(variant, 1) / "result.json")
    losses = column(run, "validation.csv", "validation_loss")
    assert result["kept_step"] < result["steps"] and result["validation_loss_kept"] == min(losses)
    base, _ = load.load_base(
        tiny_model, params.load(whole / "params.yaml").variants["qlora_nf4_dq"], hardware=CPU
    )
    model = PeftModel.from_pretrained(base, run / "weights").eval()
    assert plain_loss(model, tiny_model, splits["validation"]) == pytest.approx(min(losses), abs=LOSS)


# The launcher alone, with modules that need no torch.
PROGRAM = """
import os, sys, time
from workflow.runtime import launch
launch.end_with_launcher()
print("process", launch.rank(), "of", launch.count(), flush=True)
{}
"""
LAUNCH = """
import sys
from workflow.runtime import launch
from workflow.runtime.errors import UserError
try:
    launch.launch("program", [], processes=3, label="stage x")
except UserError as error:
    sys.exit(f"stage x: {error}")
"""


def launched(folder: Path, body: str) -> subprocess.Popen:
    (folder / "program.py").write_text(PROGRAM.format(body))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "RANK": "7", "WORLD_SIZE": "9"}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("body", "code", "errors"),
    [
        ("", 0, ""),
        ("if launch.rank() == 0: print('a warning', file=sys.stderr)", 0, "a warning\n"),
        ("if launch.rank() == 1: sys.exit('stage x: the key is wrong.')\ntime.sleep(60)", 1,
         "stage x: the key is wrong.\n"),
        ("if launch.rank() == 2: os.kill(os.getpid(), 9)\ntime.sleep(60)", 1,
         "stage x: process 3 of 3 was killed by SIGKILL (out of memory, if nobody killed it), "
         "and the others were ended.\n"),
        ("if launch.rank() == 1: print('why', file=sys.stderr); os._exit(3)\ntime.sleep(60)", 1,
         "why\nstage x: process 2 of 3 ended with code 3, and the others were ended; "
         "its own words stand above.\n"),
    ],
)  # fmt: skip
def test_processes_end_together_with_one_sentence(tmp_path, body, code, errors):
    started = time.monotonic()
    launcher = launched(tmp_path, body)
    said, found = launcher.communicate(timeout=50)
    assert (launcher.returncode, found) == (code, errors)
    # One that is ended may not have come to speak.
    assert said == "process 0 of 3\n" or (code and not said)
    assert time.monotonic() - started < 50


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_do_not_outlive_their_launcher(tmp_path, number):
    launcher = launched(tmp_path, "time.sleep(60)")
    launcher.stdout.readline()
    while len(started := children(launcher.pid)) < 3:  # the first may speak before the last is there
        time.sleep(0.05)
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while any(map(runs, started)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "int8", "double_quantization": False, "block_size": None},
         ["variants.shared.processes is 2 and precision is int8", "16bit, nf4 or fp4"]),
        ({"method": "full", "precision": "16bit", "double_quantization": False, "block_size": None},
         ["variants.shared.processes is 2 and method is full", "method lora"]),
        ({"training": {"micro_batch_rows": 4}},
         ["variants.shared.processes is 2", "batch_rows (4)", "multiple of micro_batch_rows x processes (8)"]),
        ({"training": {"optimizer": "paged_adamw_8bit"}},
         ["variants.shared.processes is 2", "paged_adamw_8bit", "adamw_torch"]),
        ({"processes": 0}, ["variants.shared.processes is 0", "greater than 0"]),
        ({"processes": "2"}, ['variants.shared.processes is "2"', "integer"]),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_in_one_sentence(tmp_path, change, words):
    asked = content()
    asked["variants"]["shared"] = asked["variants"]["qlora_nf4_dq_shared"] | change
    asked["experiment"]["variants"] = [*asked["experiment"]["variants"], "shared"]
    put_params(tmp_path, asked)
    with pytest.raises(UserError) as error:
        params.load(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_float16_and_a_process_alone_are_refused(monkeypatch):
    two = params.Params.model_validate(content()).variants["lora_16bit_shared"]
    with pytest.raises(CheckError, match="processes is 2, and 1 of them compute"):
        checks.check_processes(two, CPU)
    monkeypatch.setattr(launch, "count", lambda: 2)
    checks.check_processes(two, CPU)
    monkeypatch.setattr(checks, "choose_compute", lambda *_: torch.float16)
    with pytest.raises(UserError, match="float16, whose scaled gradients .* use bfloat16 or float32"):
        checks.check_processes(two, CPU)
    monkeypatch.setattr(checks, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="processes is 2, which takes a GPU each, and torch sees 1"):
        checks.check_processes(two, CPU)


@pytest.mark.parametrize("rows", [1, 5, 24, 26, 31])
@pytest.mark.parametrize(("passes", "ranks"), [(1, 2), (3, 2), (2, 3)])
def test_each_optimizer_step_has_the_passes_of_one_process(rows, passes, ranks):
    def batches(rank: int, of: int, passes: int) -> list[list[int]]:
        shares = sharding.RankBatches(
            SequentialSampler(range(rows)), pass_rows=2, passes=passes, rank=rank, ranks=of
        )
        found = list(shares)
        assert len(shares) == len(found)
        return found

    def steps(batches: list[list[int]], passes: int) -> list[list[list[int]]]:
        return [batches[start : start + passes] for start in range(0, len(batches), passes)]

    alone = steps(batches(0, 1, passes * ranks), passes * ranks)
    shares = [steps(batches(rank, ranks, passes), passes) for rank in range(ranks)]
    assert all(len(share) == len(alone) for share in shares)
    for together, *parts in zip(alone, *shares, strict=True):
        assert len({len(part) for part in parts}) == 1  # every process takes part in every pass
        assert sorted(batch for part in parts for batch in part if batch) == together


def test_weights_that_are_not_in_parts_are_found():
    with pytest.raises(CheckError, match="weight has 6 rows, and this process holds 6 of them"):
        sharding.check_sharded(torch.nn.Linear(4, 6), ranks=2)
