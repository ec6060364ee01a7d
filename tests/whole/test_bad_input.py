"""Bad input, case by case: what is spoilt, which stage meets it, and the sentence with which it stops.

Each case is a stage as its process runs it (forked from one that has imported the libraries), in a folder where all
before it went well. It must end with exit code 1 and one line of failure, without a traceback on the terminal or in
the log, and leave no file but its log. What is odd and yet valid stands in a table of its own, with what comes of it.
"""

import gzip
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, run_stage_in
from edit_params import drop, put, set_training
from gguf_models import write_gguf
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from turn_templates import TURN_ENDS, end_turns_as
from warm_stages import Ended, WarmStages

from workflow import params
from workflow.cost import plan
from workflow.data.model_files import INDEX
from workflow.runtime import variables
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, read_jsonl, write_jsonl
from workflow.runtime.paths import (
    INSTRUCTIONS,
    MODEL,
    MODEL_SOURCE,
    split_file,
    train_folder,
    train_rows_file,
    weights_folder,
)
from workflow.runtime.paths import TASKS as TASKS_FOLDER

TRAIN = ("train", "--variant", "lora_16bit", "--seed", "1")
EVALUATE = ("evaluate", "--variant", "lora_16bit", "--seed", "1")
COLUMNS = {"instruction": "q", "context": None, "response": "a", "category": None}
CHATS = {"messages": "m", "category": None}
OWN = {"holdout_loss": {"items": 2, "few_shot": 0, "chat_template": True, "files": None}}
ROWS = [
    {"q": f"Say number {n} in words", "a": f"This is answer {n}, " + "and more " * (n % 4)} for n in range(24)
]
SUMS = [{"question": f"What is {n} plus 1?", "answer": f"Add one. #### {n + 1}"} for n in range(6)]

Spoil = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """One row of the table: `spoil` is called with the folder in which `stage` then runs."""

    name: str
    spoil: Spoil
    stage: tuple[str, ...]
    sentence: str


def edit(folder: Path, *changes: Callable[[dict], None]) -> None:
    yaml = YAML()
    content = yaml.load((folder / "params.yaml").read_text())
    for change in changes:
        change(content)
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# What is spoilt: params.yaml


def param(*changes: Callable[[dict], None]) -> Spoil:
    return lambda folder: edit(folder, *changes)


def text(change: Callable[[str], str | bytes]) -> Spoil:
    """params.yaml as another text."""

    def spoil(folder: Path) -> None:
        changed = change((folder / "params.yaml").read_text())
        (folder / "params.yaml").write_bytes(changed if isinstance(changed, bytes) else changed.encode())

    return spoil


def rank(value: str) -> Spoil:
    """params.yaml with another text as the value of training.step.rank."""
    return text(lambda whole: re.sub(r"(?m)^    rank: 16$", lambda _: f"    rank: {value}", whole))


def bomb(key: str) -> str:
    """A list of lists of lists, nine to the tenth of them, under a few aliases."""
    lists = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    return f"a0: &a0 [x, x]\n{lists}{key}"


# What is spoilt: the dataset's file


def data(content: bytes | str, form: str = "jsonl", *, columns=COLUMNS, name: str | None = None) -> Spoil:
    """A dataset of this content, its hash as it is."""
    content = content.encode() if isinstance(content, str) else content

    def spoil(folder: Path) -> None:
        path = folder / "my" / (name or f"rows.{form}")
        path.write_bytes(content)
        section = {"source": "file", "path": f"my/{path.name}", "sha256": sha256(content), "format": form}
        edit(folder, put("dataset", section | {"columns": None if form == "chatterbot" else columns}))

    return spoil


def line(**row: Any) -> str:
    return json.dumps(row) + "\n"


def parquet(table: dict | pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.table(table), sink)
    return sink.getvalue().to_pybytes()


def damaged(content: bytes) -> bytes:
    return content[:40] + b"\xff" * 300 + content[340:]


def path(where: str) -> Spoil:
    return param(put("dataset", {"source": "file", "path": where, "sha256": "0" * 64, "format": "jsonl",
                                 "columns": COLUMNS}))  # fmt: skip


def drawn(rows: list[tuple[str, str]], *changes) -> Spoil:
    """Other rows for stage sample to draw from."""

    def spoil(folder: Path) -> None:
        table = [{"id": n, "instruction": q, "context": "", "response": a, "category": None}
                 for n, (q, a) in enumerate(rows)]  # fmt: skip
        write_jsonl(folder / INSTRUCTIONS, table)
        edit(folder, *changes)

    return spoil


PAIRS = [(row["q"], row["a"]) for row in ROWS]


# What is spoilt: the model


def model(spoil: Spoil, where: str = "my/model") -> Spoil:
    """A model that is spoilt in its folder, its hash as it then is."""

    def whole(folder: Path) -> None:
        source = folder / "my" / "model"
        shutil.copytree(folder / MODEL, source)
        spoil(source)
        place = folder / where
        if place.is_dir():
            parts = [
                f"{sha256(file.read_bytes())}  {file.name}\n" for file in sorted(place.glob("*.safetensors"))
            ]
            digest = sha256("".join(parts).encode())
        else:
            digest = sha256(place.read_bytes())
        edit(
            folder,
            put(
                "model",
                {
                    "source": "file",
                    "path": where,
                    "sha256": digest,
                    "chat_template": "model",
                    "chat_date": "2024-07-26",
                    "end_token": None,
                    "moved": None,
                    "kept_layers": None,
                },
            ),
        )

    return whole


def weights(change: Callable[[dict], dict], file: str = "model.safetensors") -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        save_file(change(tensors), folder / file, metadata={"format": "pt"})

    return spoil


def of(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    """Change the weight of that name alone."""
    return lambda tensors: tensors | {name: value(tensors[name])}


def first(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = number
        return tensor

    return change


def less(part: str) -> Callable[[dict], dict]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def json_file(file: str, *gone: str, **new: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        kept = {key: value for key, value in content.items() if key not in gone}
        (folder / file).write_text(json.dumps(kept | new))

    return spoil


def without_an_end(folder: Path) -> None:
    json_file("tokenizer_config.json", "eos_token")(folder)
    json_file("generation_config.json", "eos_token_id")(folder)
    json_file("config.json", "eos_token_id", eos_token_id=None)(folder)


def written(file: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / file).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def removed(*files: str) -> Spoil:
    return lambda folder: [(folder / file).unlink() for file in files]


def cut(file: str, length: int) -> Spoil:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:length])


def pickled(file: str, *, only: bool = True, name: str = "pytorch_model.bin") -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / file).items()}
        torch.save(tensors, folder / name)
        if only:
            (folder / file).unlink()

    return spoil


def smaller_vocabulary(rows: int) -> Spoil:
    def spoil(folder: Path) -> None:
        json_file("config.json", vocab_size=rows)(folder)
        ends = ("model.embed_tokens.weight", "lm_head.weight")
        weights(lambda tensors: tensors | {name: tensors[name][:rows].clone() for name in ends})(folder)

    return spoil


def in_parts(spoil: Spoil = lambda folder: None) -> Spoil:
    def whole(folder: Path) -> None:
        LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100kB")
        (folder / "model.safetensors").unlink(missing_ok=True)
        spoil(folder)

    return whole


def another(make: Callable[[], torch.nn.Module]) -> Spoil:
    """The weights and config of another architecture, with the same tokenizer."""
    return lambda folder: make().to(torch.bfloat16).save_pretrained(folder)


BERT = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 128}  # fmt: skip
T5 = T5Config(vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
GPT2 = GPT2Config(
    vocab_size=320, n_embd=64, n_layer=1, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=1
)


def headless(folder: Path) -> None:
    LlamaModel.from_pretrained(folder).save_pretrained(folder)


def tied(folder: Path) -> None:
    whole = LlamaForCausalLM.from_pretrained(folder)
    whole.config.tie_word_embeddings = True
    whole.tie_weights()
    whole.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def as_gguf(spoil: Callable[[bytes], bytes]) -> Spoil:
    """The model as a GGUF file in a folder of its own, which is then spoilt."""

    def whole(folder: Path) -> None:
        def write(source: Path) -> None:
            file = folder / "my" / "model.Q8_0.gguf"
            write_gguf(source, file)
            file.write_bytes(spoil(file.read_bytes()))

        model(write, "my/model.Q8_0.gguf")(folder)

    return whole


# What is spoilt: what a stage before wrote


def result(file: Path | str, spoil: Spoil) -> Spoil:
    return lambda folder: spoil(folder / Path(file).parent)


def longer(file: Path, number: int | None = None) -> Spoil:
    """Instructions of 500 characters in a file's first rows, or in all."""

    def spoil(folder: Path) -> None:
        rows = read_jsonl(folder / file)
        for row in rows[:number]:
            row["instruction"] = "x" * 500
        write_jsonl(folder / file, rows)

    return spoil


def adapter(spoil: Spoil) -> Spoil:
    return lambda folder: spoil(folder / weights_folder("lora_16bit", 1))


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UP = "base_model.model.model.layers.2.mlp.up_proj"


# What is spoilt: the tasks


def task(name: str, **asked: Any) -> Spoil:
    whole = {"items": None, "few_shot": 0, "chat_template": False, "files": None} | asked
    return param(put("evaluation.tasks", OWN | {name: whole}))


def files(
    content: bytes, *, split: str = "test", file: str = "sums.jsonl", digest: str | None = None, **asked
):
    """The task gsm8k on a local file."""

    def spoil(folder: Path) -> None:
        (folder / "my" / file).write_bytes(content)
        named = {split: {"path": f"my/{file}", "sha256": digest or sha256(content)}}
        task("gsm8k", files=named, **asked)(folder)

    return spoil


SUM_LINES = "".join(line(**row) for row in SUMS).encode()

PARAMS = [
    ("a key that there is not", param(put("training.schedule.learning_rat", 1.0)), r"training.schedule.learning_rat is not a key; did you mean learning_rate\?"),
    ("a key too few", param(drop("sample.split_seed")), "sample.split_seed is missing"),
    ("text for a number", param(put("training.step.rank", "16")), 'training.step.rank is "16": input should be a valid integer'),
    ("a truth for a number", param(put("sample.rows", True)), "sample.rows is true: input should be a valid integer"),
    ("a broken number of rows", param(put("sample.rows", 60.5)), "sample.rows is 60.5: input should be a valid integer"),
    ("not a number", param(put("training.schedule.learning_rate", float("nan"))), "training.schedule.learning_rate is NaN: input should be a finite"),
    ("an infinite number", param(put("training.schedule.weight_decay", float("inf"))), "training.schedule.weight_decay is Infinity: input should be a finite"),
    ("endless epochs", param(put("training.schedule.epochs", 1e308), put("training.schedule.steps", None)), "training.schedule.epochs is 1e.308: .* less than or equal to 1000000"),
    ("a learning rate that ends all learning", param(put("training.schedule.learning_rate", 1e30)), "training.schedule.learning_rate is 1e.30: .* less than or equal to 10"),
    ("a negative number", param(put("sample.test_rows", -5)), "sample.test_rows is -5: input should be greater than 0"),
    ("no rows", param(put("sample.rows", 0)), "sample.rows is 0: input should be greater than 0"),
    ("a rank larger than any layer", param(put("training.step.rank", 10**18)), "training.step.rank is 1000000000000000000: .* less than or equal to"),
    ("a number beyond floats", param(put("training.schedule.learning_rate", 10**400)), "training.schedule.learning_rate is .*many digits.* valid number"),
    ("thousands of digits", rank("9" * 5000), "params.yaml is not valid YAML: Exceeds the limit .4300 digits."),
    ("a seed that numpy does not take", param(put("experiment.seeds", [2**40])), "experiment.seeds.0 is 1099511627776: .* less than 4294967296"),
    ("a vocabulary of a million millions", param(put("model.vocabulary", 10**12)), "model.vocabulary is 1000000000000: .* less than or equal to"),
    ("heads that do not divide", param(put("model.attention_heads", 3)), "hidden_size is 64, which attention_heads .3. does not divide"),
    ("heads of an odd size", param(put("model.hidden_size", 60)), "hidden_size is 60, which makes heads of an odd size .15."),
    ("one seed twice", param(put("experiment.seeds", [1, 1])), "experiment.seeds names 1 more than once"),
    ("one variant twice", param(put("experiment.variants", ["lora_16bit"] * 2)), "experiment.variants names lora_16bit more than once"),
    ("a variant that there is not", param(put("experiment.variants", ["lora_16bit", "qlora"])), "experiment.variants names qlora, which variants does not define"),
    ("a baseline that is not run", param(put("experiment.baseline", "full_16bit")), "experiment.baseline is full_16bit, which must be one of experiment.variants"),
    ("a variant with a slash", param(lambda whole: whole["variants"].update({"a/b": whole["variants"]["lora_16bit"]})), r"variants.a/b.*should match pattern '\^\[a-z0-9_\]"),
    ("a variant with a dash", param(put("experiment.variants", ["lora-16bit"])), "experiment.variants.0 is .lora-16bit.*should match pattern"),
    ("a variant with a long name", param(put("experiment.variants", ["a" * 300])), "experiment.variants.0 is .aaa.*at most 64 characters"),
    ("batches that do not divide", param(put("training.schedule.micro_batch_rows", 3)), "batch_rows is 2, which must be a multiple of micro_batch_rows .3."),
    ("constants quantized in 16 bits", param(put("variants.lora_16bit.double_quantization", True)), "variants.lora_16bit.double_quantization is true, which precision 16bit does not have"),
    ("blocks of a size that there is not", param(put("variants.qlora_nf4.block_size", 48)), "variants.qlora_nf4.block_size is 48; precision nf4 allows 32, 64, 128 or 256"),
    ("blocks without a size", param(put("variants.qlora_nf4.block_size", None)), "variants.qlora_nf4.block_size is null; precision nf4 allows 32, 64, 128 or 256"),
    ("blocks in 8 bits", param(put("variants.lora_int8.block_size", 64)), "variants.lora_int8.block_size is 64; precision int8 allows null alone"),
    ("a block size in words", param(put("variants.qlora_nf4.block_size", "64")), 'variants.qlora_nf4.block_size is "64": input should be a valid integer'),
    ("layers apart in 16 bits", param(put("variants.lora_16bit.layers_in_16_bits", ["up_proj"])), "variants.lora_16bit.layers_in_16_bits names up_proj, and precision 16bit quantizes no layer"),
    ("a layer's name with a space", param(put("variants.qlora_nf4.layers_in_16_bits", ["up proj"])), 'variants.qlora_nf4.layers_in_16_bits.0 is "up proj": string should match pattern'),
    ("real MXFP4", param(put("variants.qlora_nf4.precision", "mxfp4")), 'variants.qlora_nf4.precision is "mxfp4": it cannot be trained on: .*; use mxfp4_emulated'),
    ("torchao's 4 bits", param(put("variants.qlora_nf4.precision", "int4")), 'variants.qlora_nf4.precision is "int4": it cannot be trained on: .*; use nf4'),
    ("full training in 4 bits", param(put("variants.full_16bit.precision", "nf4")), "precision is nf4, but method full trains every weight"),
    ("epochs and steps", param(put("training.schedule.epochs", 1.0)), "epochs is 1.0 and steps is 1: exactly one of the two must be null"),
    ("neither epochs nor steps", param(put("training.schedule.steps", None)), "epochs is None and steps is None: exactly one"),
    ("a warm-up without an end", param(put("training.schedule.warmup_fraction", 0.1)), "warmup_fraction is 0.1 and steps 1, which leaves no step after the warm-up"),
    ("a layer without a name", param(put("training.step.target_modules", ["q_proj", ""])), 'training.step.target_modules.1 is "": string should have at least 1 character'),
    ("a margin of no metric", param(put("comparison.margins", {"holdout_loss/loss": 0.1})), "comparison.margins names holdout_loss/loss, and holdout_loss has only nats_per_token, bits_per_byte"),
    ("a metric of no task", param(put("comparison.primary", "piqa/acc")), "comparison.primary names piqa/acc, and evaluation.tasks has only holdout_loss"),
    ("a misspelled task", param(put("evaluation.tasks.hellaswagg", OWN["holdout_loss"]), put("comparison.primary", "hellaswag/acc")), "evaluation.tasks names hellaswagg, and comparison.primary names hellaswag/acc; one of the two is misspelled"),
    ("a misspelled task of a metric", param(put("comparison.primary", "holdout_lss/bits_per_byte")), "names holdout_lss/bits_per_byte, .* .did you mean holdout_loss.."),
    ("a misspelled metric", param(put("comparison.margins", {"holdout_loss/bits_per_bite": 0.1})), "comparison.margins names holdout_loss/bits_per_bite, .* .did you mean bits_per_byte.."),
    ("a misspelled baseline", param(put("experiment.baseline", "lora_16bi")), "experiment.baseline is lora_16bi, .* .did you mean lora_16bit.."),
    ("no items", param(put("evaluation.tasks.holdout_loss.items", 0)), "evaluation.tasks.holdout_loss.items is 0: .* greater than 0"),
    ("more items than test rows", param(put("evaluation.tasks.holdout_loss.items", 500)), "evaluation.tasks.holdout_loss.items is 500, and sample.test_rows only 5"),
    ("more examples than test rows", param(put("evaluation.tasks.holdout_loss.few_shot", 5)), "evaluation.tasks.holdout_loss.few_shot is 5, which must be below sample.test_rows .5."),
    ("one column for two things", param(put("dataset.columns", COLUMNS | {"a": "q", "response": "q"}), drop("dataset.columns.a")), "columns: instruction and response are both q"),
    ("a path without a name", path(""), 'dataset.path is "": string should have at least 1 character'),
    ("a path with a zero byte", path("a\0b"), r'dataset.path is "a\\u0000b": must be one line of text, without control'),
    ("a title with a terminal's command", param(put("report.title", "a\x1b[2Jb\nc")), r'report.title is "a\\u001b\[2Jb\\nc": must be one line'),
    ("a template with a line break", param(put("model.chat_template", "my\ntemplate")), r"model.chat_template is my\\ntemplate; allowed is one of"),
    ("two values for a key", text(lambda whole: whole.replace("    rank: 16", "    rank: 16\n    rank: 8")), r"params.yaml is not valid YAML .line \d+, column \d+.: rank is a duplicate key"),
    ("a bracket that is not closed", text(lambda whole: whole.replace("training:", "training: [", 1)), r"params.yaml is not valid YAML .line \d+, column \d+.: a list that is not closed by"),
    ("a tab", text(lambda whole: whole.replace("    rank: 16", "\trank: 16")), r"params.yaml is not valid YAML .line \d+, column \d+.: a tab stands where spaces must be"),
    ("a bell", text(lambda whole: whole.replace("What does", "\a")), r"params.yaml is not valid YAML .line \d+, column \d+.: unacceptable character #x0007"),
    ("an alias of nothing", rank("*other"), r"params.yaml is not valid YAML .line \d+, column \d+.: .other refers to an anchor &other that there is not"),
    ("an object of Python", rank("!!python/object/apply:os.system ['touch pwned']"), "python/object/apply:os.system is a tag, which may not be here"),
    ("a date that there is not", rank("2001-99-99"), "params.yaml is not valid YAML: month must be in 1..12"),
    ("a date", rank("2001-01-01"), 'training.step.rank is "2001-01-01": input should be a valid integer'),
    ("brackets without end", rank("[" * 2000 + "]" * 2000), "params.yaml is not valid YAML: it is nested too deeply"),
    ("aliases that grow", text(lambda whole: bomb(whole.replace("  rank: 16", "  rank: *a9"))), "params.yaml has 11 problems, which stand above"),
    ("a value that holds itself", rank("&r [*r]"), "training.step.rank is .*: input should be a valid integer"),
    ("no text at all", text(lambda whole: ""), "params.yaml must hold a mapping of sections, and holds nothing"),
    ("a list", text(lambda whole: "- 1\n"), "params.yaml must hold a mapping of sections, and holds a list"),
    ("Latin-1", text(lambda whole: whole.replace("What does", "Grüße").encode("latin-1")), r"params.yaml is not UTF-8 .line \d+."),
    ("UTF-16", text(lambda whole: whole.encode("utf-16")), "params.yaml is not UTF-8 .it is UTF-16: save it as UTF-8"),
    ("no file", removed("params.yaml"), "params.yaml is missing: `make params PRESET=default` writes params.yaml"),
    ("a folder", lambda folder: [(folder / "params.yaml").unlink(), (folder / "params.yaml").mkdir()], "params.yaml is a folder, and must be a file"),
]  # fmt: skip

DATASETS = [
    ("no row", data(""), "rows.jsonl has no rows"),
    ("blank lines alone", data("\n  \n\n"), "rows.jsonl has no rows"),
    ("Latin-1", data(b'{"q": "a", "a": "b"}\n{"q": "Gr\xfc\xdfe", "a": "b"}\n'), "rows.jsonl is not UTF-8 .line 2."),
    ("UTF-16", data(line(q="a", a="b").encode("utf-16")), "rows.jsonl is not UTF-8 .it is UTF-16: save it as UTF-8."),
    ("gzip", data(gzip.compress(line(q="a", a="b").encode()), name="rows.jsonl.gz"), "rows.jsonl.gz is not UTF-8 .it is compressed by gzip: unpack it"),
    ("parquet called jsonl", data(parquet({"q": ["a"], "a": ["b"]})), "rows.jsonl is not UTF-8 .it is a parquet file"),
    ("CSV called jsonl", data("q,a\nx,y\n"), "rows.jsonl line 1 is not JSON: Expecting value"),
    ("one array", data('[\n{"q": "a", "a": "b"}\n]'), "rows.jsonl line 1 begins a JSON array, and format jsonl is one object a line"),
    ("an object over several lines", data('{\n"q": "a",\n"a": "b"\n}\n'), "rows.jsonl line 1 is not JSON"),
    ("a last line that is cut", data(line(q="a", a="b") * 3 + '{"q": "wh'), "rows.jsonl line 4 is not JSON: Unterminated string"),
    ("a tab in a text as it is", data('{"q": "a\tb", "a": "b"}\n'), "rows.jsonl line 1 is not JSON: Invalid control character"),
    ("a number alone", data("42\n"), "rows.jsonl line 1 is not a JSON object"),
    ("a key twice", data('{"q": "a", "q": "b", "a": "c"}\n'), "rows.jsonl line 1 is not JSON: it has the key q twice"),
    ("brackets without end", data('{"q": ' + "[" * 100_000 + "]" * 100_000 + "}\n"), "rows.jsonl line 1 is not JSON: it is nested too deeply"),
    ("thousands of digits", data('{"q": ' + "9" * 5000 + ', "a": "b"}\n'), "rows.jsonl line 1 is not JSON: Exceeds the limit"),
    ("no such column", data(line(q="a", a="b") + line(q="c")), "rows.jsonl line 2 has no column a, which dataset.columns.response names; it has q"),
    ("no response", data(line(q="a", a=None)), "rows.jsonl line 1 has no response; every row needs one"),
    ("a response of spaces", data(line(q="a", a=" \u3000\t\n")), "rows.jsonl line 1 has no response"),
    ("a response that no one sees", data(line(q="a", a="\u200b\ufeff\x00")), "rows.jsonl line 1 has no response"),
    ("a number for a text", data(line(q=3, a="b")), "rows.jsonl line 1 has an instruction that is not text but a number"),
    ("an object for a text", data(line(q="a", a={"text": "b"})), "rows.jsonl line 1 has a response that is not text but an object"),
    ("half of a surrogate pair", data('{"q": "a \\ud83d", "a": "b"}\n'), r"rows.jsonl line 1 has an instruction with half of a surrogate pair .\\ud83d, character 3."),
    ("the same in a conversation", data('{"m": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}', columns=CHATS), "message 1 of rows.jsonl line 1 has a text with half of a surrogate pair"),
    ("messages as text that is none", data(line(m="[{"), columns=CHATS), "rows.jsonl line 1 has messages that are text and not JSON"),
    ("the user's last word", data(line(m=[{"role": "user", "content": "a"}]), columns=CHATS), "rows.jsonl line 1 ends with a message of the user"),
    ("a column named to clear the screen", data(line(**{"\x1b[2J": "a"})), r"rows.jsonl line 1 has no column q, .* it has \\x1b\[2J"),
    ("CSV: a row too short", data("q,a\nx,y\nz\n", "csv"), "rows.csv row 2 has 1 cells, and the line of names 2"),
    ("CSV: a row too long", data("q,a\nx,y,z\n", "csv"), "rows.csv row 1 has 3 cells, and the line of names 2"),
    ("CSV: a quote that is not closed", data('q,a\nx,"y\nz,w\n', "csv"), r"rows.csv is not a CSV from line \d on: unexpected end of data"),
    ("CSV: a name twice", data("q,a,a\nx,y,z\n", "csv"), "rows.csv has two columns a"),
    ("CSV: semicolons", data("q;a\nx;y\n", "csv"), "rows.csv row 1 has no column q, which dataset.columns.instruction names; it has q;a"),
    ("CSV: names alone", data("q,a\n", "csv"), "rows.csv has no rows"),
    ("parquet: cut", data(parquet({"q": ["a"], "a": ["b"]})[:200], "parquet"), "rows.parquet cannot be read as parquet: .*magic bytes"),
    ("parquet: damaged within", data(damaged(parquet({"q": [f"q{n}" for n in range(500)], "a": ["b"] * 500})), "parquet"), "rows.parquet cannot be read as parquet: "),
    ("parquet: numbers for texts", data(parquet({"q": [1], "a": ["b"]}), "parquet"), "rows.parquet row 1 has an instruction that is not text but a number"),
    ("parquet: bytes for texts", data(parquet({"q": [b"x"], "a": ["b"]}), "parquet"), "rows.parquet row 1 has an instruction that is not text but bytes"),
    ("parquet: a name twice", data(parquet(pyarrow.table([["a"], ["b"], ["c"]], names=["q", "a", "a"])), "parquet"), "rows.parquet has two columns a"),
    ("parquet: a date beyond Python's", data(parquet({"q": ["b", "a"], "a": pyarrow.array([1, 10**7], pyarrow.int32()).cast(pyarrow.date32())}), "parquet"), "rows.parquet row 2 has a value that cannot be read .date32.day.: .* in column a"),
    ("parquet: bytes that are no UTF-8", data(parquet({"q": ["b"], "a": pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())}), "parquet"), "rows.parquet row 1 has bytes that are not UTF-8 in column a"),
    ("JSON lines called parquet", data(line(q="a", a="b"), "parquet"), "rows.parquet cannot be read as parquet"),
    ("chatterbot: no YAML", data("conversations:\n- - a\n  b: [", "chatterbot"), r"rows.chatterbot is not valid YAML .line 3, column 3."),
    ("chatterbot: an object of Python", data("conversations: !!python/object/apply:os.system ['touch pwned']\n", "chatterbot"), "rows.chatterbot is not valid YAML .line 1, column 16.: tag:yaml.org,2002:python/object/apply:os.system is a tag, which may not be here"),
    ("chatterbot: aliases that grow", data(bomb("conversations: [*a9]\n"), "chatterbot"), "rows.chatterbot conversation 1 has an instruction that is not text but a list"),
    ("chatterbot: no conversations", data("- a\n", "chatterbot"), "rows.chatterbot has no list of conversations"),
    ("chatterbot: a number for turns", data("conversations:\n- 7\n", "chatterbot"), "rows.chatterbot conversation 1 is not a list of turns"),
    ("chatterbot: one turn", data("conversations:\n- - a\n", "chatterbot"), "rows.chatterbot conversation 1 has no response"),
    ("chatterbot: Latin-1", data(b"conversations:\n- - Gr\xfc\n  - b\n", "chatterbot"), "rows.chatterbot is not UTF-8 .line 2."),
    ("a folder", path("my"), "dataset.path is my, which is a folder; name the file in it"),
    ("no file", path("my/none.jsonl"), "dataset.path is my/none.jsonl, and there is no such file"),
    ("another hash", path("my/rows.jsonl"), "the sha256 of rows.jsonl is .*, but dataset.sha256 in params.yaml expects 0000"),
]  # fmt: skip

SAMPLES = [
    ("fewer rows than asked for", drawn(PAIRS[:10]), "sample.rows asks for 24 rows, and the dataset has 10"),
    ("one row again and again", drawn(PAIRS[:1] * 24), "leave nothing to train on, since rows with the same instruction stay together"),
    ("one response to everything", drawn([(q, "Yes.") for q, _ in PAIRS]), "has 0 other responses to set beside that of row"),
    ("the model's end token in a response", drawn([*PAIRS[:-1], ("Quote it", "It is </s> and on")]), "row 23 of the dataset, counted from 0, has the model's own token </s> in its response"),
    ("the model's first token in an instruction", drawn([*PAIRS[:-2], ("<s> it", "a"), ("no <s>", "b")]), "row 22 of the dataset.* token <s> in its instruction .and 1 more rows., which would end or forge a turn"),
    ("responses longer than the context", drawn([(q, a + "x" * 3000) for q, a in PAIRS]), "cannot be scored: .* has 30[0-9][0-9] tokens, and the model's context holds 2048"),
    ("a category of no row", drawn(PAIRS, put("sample.held_out_categories", ["x"])), "sample.held_out_categories needs rows with a category"),
    ("no rows of the stage before", removed(str(INSTRUCTIONS)), "results/fetch_dataset/instructions.jsonl is missing; `dvc repro` makes it"),
    ("no model of the stage before", lambda folder: shutil.rmtree(folder / MODEL), "results/fetch_model/model is missing; `dvc repro` makes it"),
]  # fmt: skip

MODELS = [
    ("no config.json", model(removed("config.json")), "the model has no config.json"),
    ("a config.json that is no JSON", model(written("config.json", "{")), "the model's config.json is not JSON: Expecting property name"),
    ("a config.json with a list", model(written("config.json", "[]")), "the model's config.json holds no JSON object"),
    ("no model_type", model(json_file("config.json", "model_type")), "the model's config.json names no model_type"),
    ("an architecture that no one knows", model(json_file("config.json", model_type="zorg")), "the model is a zorg, which transformers .* does not know"),
    ("an architecture with code of its own", model(json_file("config.json", model_type="zorg", auto_map={"AutoConfig": "evil.Config"})), "does not know; it comes with code of its own, which is never run"),
    ("heads that do not divide", model(json_file("config.json", num_attention_heads=3)), "config.json is refused: .*hidden size .64. is not a multiple of the number of attention heads .3."),
    ("a size in words", model(json_file("config.json", hidden_size="big")), "config.json is refused: .*hidden_size"),
    ("an encoder", model(another(lambda: BertForMaskedLM(BertConfig(**BERT)))), "the model is BertForMaskedLM, says config.json, which is no causal language model"),
    ("an encoder with a decoder's name", model(another(lambda: BertLMHeadModel(BertConfig(**BERT)))), "the model is an encoder .bert without is_decoder"),
    ("an encoder and decoder", model(another(lambda: T5ForConditionalGeneration(T5))), "the model is T5ForConditionalGeneration, .* which is no causal language model"),
    ("a model without its head", model(headless), "the model is LlamaModel, says config.json, which is no causal language model; of llama that is LlamaForCausalLM"),
    ("no linear layer", model(another(lambda: GPT2LMHeadModel(GPT2))), "the model .gpt2. has no linear layer"),
    ("quantized already", model(json_file("config.json", quantization_config={"quant_method": "gptq"})), "the model's weights are quantized already .gptq"),
    ("a weight too few", model(weights(less("layers.2.mlp.up_proj"))), "the model lacks model.layers.2.mlp.up_proj.weight, which config.json asks for"),
    ("no head", model(weights(less("lm_head"))), "the model lacks lm_head.weight"),
    ("a layer too few", model(json_file("config.json", num_hidden_layers=5)), "the model lacks model.layers.4.* and 8 more weights"),
    ("a layer too many", model(json_file("config.json", num_hidden_layers=3)), "the model holds model.layers.3.* and 8 more weights, which config.json has no place for"),
    ("a weight of another shape", model(weights(of("model.layers.0.mlp.up_proj.weight", lambda w: w.T.contiguous()))), "has model.layers.0.mlp.up_proj.weight in the shape 64 x 128, and config.json asks for 128 x 64"),
    ("a weight that is not a number", model(weights(of("model.layers.1.mlp.up_proj.weight", first(float("nan"))))), "holds a number in model.layers.1.mlp.up_proj.weight that is not finite"),
    ("a weight too large for 16 bits", model(weights(lambda tensors: {name: first(3.4e38)(w.float()) for name, w in tensors.items()})), "holds a number in .* that is not finite .in 16 bits."),
    ("weights in 64 bits", model(weights(lambda tensors: {name: w.double() for name, w in tensors.items()})), "holds .* in F64; weights in F32, F16 or BF16 are read"),
    ("weights in 8 bits", model(weights(of("lm_head.weight", lambda w: w.to(torch.int8)))), "holds lm_head.weight in I8"),
    ("safetensors that are cut", model(cut("model.safetensors", 200_000)), "model.safetensors is no whole safetensors file .incomplete metadata"),
    ("safetensors cut in their header", model(cut("model.safetensors", 200)), "model.safetensors is no whole safetensors file .invalid header"),
    ("no bytes", model(written("model.safetensors", b"")), "model.safetensors is no whole safetensors file .header too small"),
    ("a page of HTML for safetensors", model(written("model.safetensors", "<!doctype html><html>")), "model.safetensors is no whole safetensors file .header too large"),
    ("a pickle called safetensors", model(pickled("model.safetensors", only=False, name="model.safetensors")), "model.safetensors is no whole safetensors file"),
    ("a pickle in place of safetensors", model(pickled("model.safetensors")), "my/model, a folder without a .safetensors file; pytorch_model.bin is a pickle, which is never read"),
    ("a pickle by its path", model(pickled("model.safetensors"), "my/model/pytorch_model.bin"), "pytorch_model.bin is neither a .gguf file nor a folder of safetensors"),
    ("a part that is missing", model(in_parts(removed("model-00002-of-00004.safetensors"))), "the model's model.safetensors.index.json names model-00002-of-00004.safetensors, which is not there"),
    ("parts without their index", model(in_parts(removed(INDEX))), "the model has neither model.safetensors nor model.safetensors.index.json"),
    ("an index that is no JSON", model(in_parts(written(INDEX, "{"))), "the model's model.safetensors.index.json is not JSON"),
    ("an index of files elsewhere", model(in_parts(written(INDEX, '{"weight_map": {"a": "../../my/model/config.json"}}'))), "model.safetensors.index.json names .*, which is not there"),
    ("no tokenizer", model(removed("tokenizer.json", "tokenizer_config.json")), "the model has no tokenizer: neither tokenizer.json nor tokenizer.model"),
    ("a tokenizer that is no JSON", model(written("tokenizer.json", "{")), "the model's tokenizer cannot be loaded: Expecting property name"),
    ("a tokenizer of nothing", model(written("tokenizer.json", '{"version": "1.0"}')), "the model's tokenizer cannot be loaded: it has no 'added_tokens'"),
    ("no end token", model(without_an_end), "the model's tokenizer has no end token .*; name one as model.end_token"),
    ("more tokens than the model has", model(smaller_vocabulary(280)), "the tokenizer|the model's tokenizer has the token .<unused_60>. with the number 319, and the model's embedding only 280 rows"),
    ("an end token beyond the vocabulary", model(json_file("config.json", eos_token_id=99_999)), "the model's config.json has the eos_token_id 99999, and its embedding only 320 rows"),
    ("the same where answers are made", model(json_file("generation_config.json", eos_token_id=[1, 99_999])), "the model's generation_config.json has the eos_token_id 99999"),
    ("a template that raises", model(written("chat_template.jinja", "{{ raise_exception('No, thanks') }}")), "the chat template stops with: No, thanks"),
    ("a template with an error", model(written("chat_template.jinja", "{% for")), "the chat template stops with: .*end of template"),
    ("a template that divides by zero", model(written("chat_template.jinja", "{{ 1 / 0 }}")), "the chat template stops with: division by zero"),
    ("a template that calls itself", model(written("chat_template.jinja", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")), "the chat template stops with: maximum recursion depth"),
    ("a template that leaves its sandbox", model(written("chat_template.jinja", "{{ ''.__class__.__mro__ }}")), "the chat template stops with: access to attribute '__class__' .* unsafe"),
    ("a template without the response", model(written("chat_template.jinja", "{{ messages[0]['content'] }}")), "the chat template leaves out the response"),
    ("a template that is not UTF-8", model(written("chat_template.jinja", b"\xff")), "the model's tokenizer cannot be loaded: 'utf-8' codec"),
    ("a GGUF file that is none", as_gguf(lambda whole: b"hello"), "model.Q8_0.gguf cannot be read as GGUF: model.Q8_0.gguf does not start with the GGUF magic bytes"),
    ("a GGUF file without bytes", as_gguf(lambda whole: b""), "model.Q8_0.gguf cannot be read as GGUF"),
    ("a GGUF file cut in its header", as_gguf(lambda whole: whole[:3000]), "model.Q8_0.gguf cannot be read as GGUF: unpack_from requires a buffer"),
    ("a GGUF file cut in its weights", as_gguf(lambda whole: whole[:200_000]), "model.Q8_0.gguf cannot be read as GGUF: cannot reshape"),
    ("a GGUF file of another version", as_gguf(lambda whole: b"GGUF\xff\xff\xff\xff" + whole[8:]), "model.Q8_0.gguf cannot be read as GGUF: .* is GGUF v4294967295"),
]  # fmt: skip

TRAININGS = [
    ("16 bits that a CPU has not", param(put("hardware.compute_dtype", "float16")), "compute_dtype is float16, which a CPU does not train in"),
    ("an optimizer for a GPU", param(put("training.step.optimizer", "paged_adamw_8bit")), "training.step.optimizer is paged_adamw_8bit, which pages its state"),
    ("a GPU that is not there", param(put("hardware.device", "cuda")), "hardware.device is cuda, and torch sees no CUDA device"),
    ("layers that there are not", param(put("training.step.target_modules", ["q_proj", "query_key_value"])), "training.step.target_modules names query_key_value, and no linear layer of the model has that name; they are down_proj, .*v_proj"),
    ("rows longer than the context", param(put("training.step.max_length", 4096)), "training.step.max_length is 4096 tokens, and the model's context .* holds 2048"),
    ("prompts that leave no response", longer(train_rows_file(1)), "training.step.max_length is 128 tokens, which leaves no response to learn"),
    ("none to validate on", longer(split_file("validation")), "training.step.max_length is 128 tokens, which leaves no response to learn in any validation row"),
    ("no row", written(str(train_rows_file(1)), ""), "there are no rows to train or to validate on"),
    ("rows that are cut", cut(str(train_rows_file(1)), 900), "results/sample/train/1.jsonl is damaged .*: delete it, and `dvc repro` makes it again"),
    ("rows that are missing", removed(str(train_rows_file(1))), "results/sample/train/1.jsonl is missing; `dvc repro` makes it"),
    ("a model that was cut since", cut(str(MODEL / "model.safetensors"), 1000), "results/fetch_model/model holds no model that can be loaded: invalid header length"),
    ("a model that lost a weight since", result(MODEL / "x", weights(less("layers.2.mlp.up_proj"))), "results/fetch_model/model lacks model.layers.2.mlp.up_proj.weight"),
]  # fmt: skip

TASKS = [
    ("a name that there is not", task("piqqa"), "evaluation.tasks names piqqa, which is no task of lm-evaluation-harness .*; near to it are .*piqa"),
    ("a hub that cannot be reached", task("piqa"), "evaluation.tasks.piqa cannot be loaded: the hub could not be reached, and the local cache does not hold it"),
    ("another hash", files(SUM_LINES, digest="0" * 64), "evaluation.tasks.gsm8k.files.test: my/sums.jsonl has sha256 .*, and params.yaml names 0000"),
    ("more items than there are", files(SUM_LINES, items=500), "evaluation.tasks.gsm8k cannot be loaded: items is 500, and there are 6"),
    ("more examples than there are", files(SUM_LINES, few_shot=20), "evaluation.tasks.gsm8k cannot be loaded: few_shot is 20, and there are not so many examples"),
    ("columns that are missing", files(line(prompt="a").encode()), "evaluation.tasks.gsm8k cannot be loaded: 'question' is undefined"),
    ("no row", files(b""), "evaluation.tasks.gsm8k.files.test: my/sums.jsonl is empty"),
    ("not UTF-8", files(b'{"question": "\xff"}\n'), "evaluation.tasks.gsm8k cannot be loaded: sums.jsonl is not UTF-8 .line 1."),
    ("no JSON", files(b'{"question":\n'), "evaluation.tasks.gsm8k cannot be loaded: sums.jsonl line 1 is not JSON"),
    ("parquet that is none", files(SUM_LINES, file="sums.parquet"), "evaluation.tasks.gsm8k cannot be loaded: sums.parquet cannot be read as parquet: Parquet magic bytes not found"),
    ("a split that is not scored", files(SUM_LINES, split="dev"), "evaluation.tasks.gsm8k.files has dev, and the task is scored on test"),
]  # fmt: skip

ADAPTERS = [
    ("none", adapter(shutil.rmtree), "results/train/lora_16bit/1/weights is missing; `dvc repro` makes it"),
    ("no weights", adapter(removed(WEIGHTS)), "adapter_model.safetensors is missing; `dvc repro` trains it again"),
    ("a pickle in their place", adapter(pickled(WEIGHTS, name="adapter_model.bin")), "adapter_model.safetensors is missing; adapter_model.bin is a pickle, which is never read"),
    ("a pickle under their name", adapter(pickled(WEIGHTS, only=False, name=WEIGHTS)), "adapter_model.safetensors is no whole safetensors file"),
    ("weights that are cut", adapter(cut(WEIGHTS, 5000)), "adapter_model.safetensors is no whole safetensors file"),
    ("a number that is not finite", adapter(weights(of(f"{UP}.lora_A.weight", first(float("nan"))), WEIGHTS)), "holds a number in .*up_proj.lora_A.weight that is not finite"),
    ("weights in 16 bits", adapter(weights(lambda tensors: {name: w.bfloat16() for name, w in tensors.items()}, WEIGHTS)), "in torch.bfloat16, and runs are trained in torch.float32"),
    ("a weight too few", adapter(weights(less("layers.2.mlp.up_proj.lora_B"), WEIGHTS)), "adapter_model.safetensors lacks .*layers.2.mlp.up_proj.lora_B.weight"),
    ("a layer too few", adapter(weights(less("layers.2."), WEIGHTS)), "adapter_model.safetensors lacks .*layers.2.* and 13 more"),
    ("a weight too many", adapter(weights(lambda tensors: tensors | {f"{UP.replace('2', '9')}.lora_A.weight": torch.zeros(16, 64)}, WEIGHTS)), "adapter_model.safetensors holds, in vain, .*layers.9"),
    ("weights for a smaller base", adapter(weights(lambda tensors: {name: w[:, :32].clone() for name, w in tensors.items()}, WEIGHTS)), "an adapter that does not fit the base: .*size mismatch"),
    ("no configuration", adapter(removed(CONFIG)), "adapter_config.json is missing; `dvc repro` trains it again"),
    ("a configuration that is no JSON", adapter(written(CONFIG, "{")), "adapter_config.json is not JSON"),
    ("another method", adapter(json_file(CONFIG, peft_type="IA3")), "adapter_config.json is not that of a LoRA adapter"),
    ("a base on a hub", adapter(json_file(CONFIG, base_model_name_or_path="meta-llama/Llama-2-7b-hf")), "names the base meta-llama/Llama-2-7b-hf, and the base of this run is results/fetch_model/model"),
    ("another rank", adapter(json_file(CONFIG, r=8)), "has an adapter of rank 8, and params.yaml asks for 16"),
    ("another alpha", adapter(json_file(CONFIG, lora_alpha=99)), "has an adapter of alpha 99, and params.yaml asks for 32"),
    ("layers that the base has not", adapter(json_file(CONFIG, target_modules=["query_key_value"])), "an adapter that does not fit the base: Target modules .*query_key_value.* not found"),
    ("test rows that are cut", cut(str(split_file("test")), 900), "results/sample/test.jsonl is damaged"),
    ("answers longer than the context", param(put("evaluation.tasks.holdout_generation", OWN["holdout_loss"]), put("evaluation.answer_tokens", 5000)), "evaluation.answer_tokens is 5000, and the model's context holds 2048 tokens"),
]  # fmt: skip

TABLE = [
    Case(f"{kind}: {name}", spoil, stage, sentence)
    for kind, stage, table in (
        ("params", ("fetch_dataset",), PARAMS),
        ("dataset", ("fetch_dataset",), DATASETS),
        ("sample", ("sample",), SAMPLES),
        ("model", ("fetch_model",), MODELS),
        ("training", TRAIN, TRAININGS),
        ("task", ("fetch_tasks",), TASKS),
        ("adapter", EVALUATE, ADAPTERS),
    )
    for name, spoil, sentence in table
]


@pytest.fixture(scope="module")
def stages():
    running = WarmStages()
    yield running
    running.close()


@pytest.fixture(scope="module")
def good(stages, tmp_path_factory) -> Path:
    """A folder in which every stage up to an evaluation has done its work."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "my").mkdir()
    # The tasks look for the rows in the folder that they lie in; all else is this repository's.
    shutil.copytree(ROOT / TASKS_FOLDER, folder / TASKS_FOLDER, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "params.yaml").write_text(params.complete_text("tiny"))
    data("".join(line(**row) for row in ROWS))(folder)
    edit(
        folder,
        lambda content: content["sample"].update(rows=24, validation_rows=3, test_rows=5),
        lambda content: set_training(content, steps=1, batch_rows=2, micro_batch_rows=2, warmup_fraction=0.0),
        put("hardware.device", "cpu"),
        put("evaluation.tasks", OWN),
        put("evaluation.forms", ["as_trained"]),
        put("comparison.margins", {}),
    )
    for stage in (("fetch_model",), ("fetch_dataset",), ("fetch_tasks",), ("sample",), TRAIN, EVALUATE):
        ended = stages.run(folder, *stage)
        assert ended.code == 0, (stage, ended)
    shutil.rmtree(folder / "logs")
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "folder")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, but logs and the locks of running stages."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
        and not {"logs", "running", "__pycache__"}.intersection(file.relative_to(folder).parts)
    }


def check_refusal(case: Case, folder: Path, before: dict[str, bytes], ended: Ended) -> None:
    stage, *options = case.stage
    label = ", ".join(
        [stage, *(f"{name[2:]} {value}" for name, value in zip(*[iter(options)] * 2, strict=True))]
    )
    assert ended.code == 1, ended
    assert "Traceback" not in ended.out + ended.err
    failures = [text for text in ended.err.splitlines() if "failed:" in text]
    assert len(failures) == 1 and failures == ended.err.splitlines()[-1:], ended.err
    match = re.fullmatch(rf"{re.escape(label)}: failed: (.+?)\.? Log: (logs/\S+)\. .+", failures[0])
    assert match and re.search(case.sentence, match[1]), failures[0]
    log = (folder / match[2]).read_text()
    assert failures[0] in log and "Traceback" not in log
    after = contents(folder)
    assert not after.items() - before.items()
    # Tasks that cannot be loaded take those that were there before with them: nobody may read the old ones for new.
    assert all(lost.startswith("results/fetch_tasks/") for lost in before.keys() - after.keys())


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_bad_input_is_one_sentence_and_leaves_nothing(stages, folder, case):
    case.spoil(folder)
    before = contents(folder)
    check_refusal(case, folder, before, stages.run(folder, *case.stage))


@pytest.mark.parametrize(
    "name", ["params: a tab", "model: a pickle called safetensors", "sample: no model of the stage before"]
)
def test_the_same_without_the_fork(folder, name):
    """The stage's own command, in a process that has imported nothing."""
    (case,) = [case for case in TABLE if case.name == name]
    case.spoil(folder)
    before = contents(folder)
    done = run_stage_in(folder, *case.stage, python=sys.executable)
    check_refusal(case, folder, before, Ended(done.returncode, done.stdout, done.stderr))


def test_the_table_is_long_and_its_names_differ():
    assert len({case.name for case in TABLE}) == len(TABLE) >= 100


# What is odd and yet valid: the rows that come of it

FAMILY, BIDIRECTIONAL = "👩‍👩‍👧 e\u0301", "שלום \u202eabc\u202c"

ODD = [
    ("a byte order mark", data(b"\xef\xbb\xbf" + line(q="a", a="b").encode()), [("a", "b")]),
    ("Windows' line ends", data('{"q": "a", "a": "b"}\r\n\r\n{"q": "c", "a": "d"}\r\n'), [("a", "b"), ("c", "d")]),
    ("no line end", data(line(q="a", a="b").rstrip("\n")), [("a", "b")]),
    ("text from right to left", data(line(q="مرحبا", a=BIDIRECTIONAL)), [("مرحبا", BIDIRECTIONAL)]),
    ("emoji and combining marks", data(line(q=FAMILY, a="e\u0301")), [(FAMILY, "e\u0301")]),
    ("a whole surrogate pair", data('{"q": "\\ud83d\\ude00", "a": "b"}'), [("😀", "b")]),
    ("control characters", data(line(q="a\0\x07b", a="c\x1b[2Jd")), [("a\0\x07b", "c\x1b[2Jd")]),
    ("line separators of Unicode", data(json.dumps({"q": "a\u2028b", "a": "c\x85d"}, ensure_ascii=False)), [("a\u2028b", "c\x85d")]),
    ("one id for all", data(line(id=1, q="a", a="b") + line(id=1, q="c", a="d")), [("a", "b"), ("c", "d")]),
    ("rows twice", data(line(q="a", a="b") * 3), [("a", "b")] * 3),
    ("an instruction of a million characters", data(line(q="x" * 10**6, a="b")), [("x" * 10**6, "b")]),
    ("CSV of Excel", data('\ufeffq,a\r\nx,"y, ""z""\r\nw"\r\n', "csv"), [("x", 'y, "z"\r\nw')]),
    ("CSV with a column without a name", data(",q,a\n0,x,y\n1,z,w\n", "csv"), [("x", "y"), ("z", "w")]),
    ("parquet with odd columns that no key names", data(parquet({"q": ["x"], "a": ["y"], "when": pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32()), "at": pyarrow.array([0], pyarrow.timestamp("ns", tz="Nowhere/Land")), "url": pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())}), "parquet"), [("x", "y")]),
    ("parquet with large and repeated texts", data(parquet(pyarrow.table({"q": pyarrow.array(["a", "a"]).dictionary_encode(), "a": pyarrow.array(["b", "c"], pyarrow.large_string())})), "parquet"), [("a", "b"), ("a", "c")]),
    ("chatterbot without a dash", data("conversations:\n- a\n  - '22'\n- - b\n  - c\n", "chatterbot"), [("a", "22"), ("b", "c")]),
    ("params of Windows", text(lambda whole: ("\ufeff" + whole).replace("\n", "\r\n")), [(row["q"], row["a"].strip()) for row in ROWS]),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "rows"), [odd[1:] for odd in ODD], ids=[odd[0] for odd in ODD])
def test_odd_data_is_read_as_it_is(stages, folder, spoil, rows):
    spoil(folder)
    ended = stages.run(folder, "fetch_dataset")
    assert ended.code == 0, ended.err
    found = read_jsonl(folder / INSTRUCTIONS)
    assert [(row["instruction"], row["response"]) for row in found] == rows


@pytest.mark.parametrize(
    ("spoil", "bos", "scored"),
    [
        (tied, 1, True),
        (json_file("tokenizer_config.json", "pad_token"), 1, True),
        (json_file("tokenizer_config.json", "bos_token"), 0, True),
        (removed("chat_template.jinja"), 1, False),
        (in_parts(), 1, False),
    ],
    ids=["tied embeddings", "no pad token", "no BOS token", "no chat template", "weights in parts"],
)
def test_odd_models_are_trained_and_scored(stages, folder, spoil, bos, scored):
    model(spoil)(folder)
    for stage in (("fetch_model",), ("sample",), TRAIN, *([EVALUATE] if scored else [])):
        ended = stages.run(folder, *stage)
        assert ended.code == 0, ended.err
    rows = read_json(folder / train_folder("lora_16bit", 1) / "result.json")["rows"]
    assert (rows["bos_per_row"], rows["end_token_in_loss"], rows["rows_dropped"]) == (bos, True, 0)


@pytest.mark.parametrize("name", TURN_ENDS)
def test_models_whose_turns_have_an_end_of_their_own_are_trained_and_scored(stages, folder, name):
    model(lambda source: end_turns_as(name, source))(folder)
    whole = {"items": 3, "few_shot": 0, "chat_template": True, "files": None}
    edit(folder, put("evaluation.tasks", {"holdout_loss": whole, "holdout_generation": whole}))
    for stage in (("fetch_model",), ("fetch_tasks",), ("sample",), TRAIN, EVALUATE):
        ended = stages.run(folder, *stage)
        assert ended.code == 0, ended.err
    assert read_json(folder / MODEL_SOURCE)["end_token"] == TURN_ENDS[name][2]
    assert read_json(folder / train_folder("lora_16bit", 1) / "result.json")["rows"]["end_token_in_loss"]
    row = read_jsonl(folder / split_file("test"))[0]
    assert TURN_ENDS[name][1] in row["chat_prompt"] and ("26 Jul 2024" in row["chat_prompt"]) == (
        name == "Llama 3"
    )


def test_a_gguf_file_is_read_alone(stages, folder):
    """A config.json and a tokenizer beside it are of another model, and are not read."""

    def write(source: Path) -> None:
        write_gguf(source, source / "model.Q8_0.gguf")
        json_file("config.json", num_hidden_layers=1, rope_theta=5.0)(source)
        json_file("tokenizer_config.json", "eos_token")(source)

    model(write, "my/model/model.Q8_0.gguf")(folder)
    ended = stages.run(folder, "fetch_model")
    assert ended.code == 0, ended.err
    assert read_json(folder / MODEL / "config.json")["num_hidden_layers"] == 4
    assert AutoTokenizer.from_pretrained(folder / MODEL).eos_token == "</s>"


def test_a_row_that_leaves_no_response_is_dropped_and_counted(stages, folder):
    longer(train_rows_file(1), 2)(folder)
    assert stages.run(folder, *TRAIN).code == 0
    rows = read_json(folder / train_folder("lora_16bit", 1) / "result.json")["rows"]
    assert rows["rows_dropped"] == 2 and rows["rows"] + 2 == len(read_jsonl(folder / train_rows_file(1)))


def test_test_rows_beyond_the_context_are_said_and_counted(stages, folder):
    drawn([(q + "x" * 3000, a) for q, a in PAIRS])(folder)
    ended = stages.run(folder, "sample")
    assert ended.code == 0 and "5 test rows are longer than the model's context of 2048 tokens" in ended.out
    assert read_json(folder / "results/sample/counts.json")["longer_than_context"] == 5


# The plan, which reads a config.json before anything is downloaded


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("{", "the model's config.json is not JSON"),
        ("[]", "the model's config.json holds no JSON object"),
        ('{"model_type": "zorg"}', "the model is a zorg, which transformers .* does not know"),
        ('{"model_type": "bert"}', "the model is an encoder .bert"),
        ('{"model_type": "llama", "hidden_size": "big"}', "config.json is refused: .*hidden_size"),
        ('{"model_type": "gpt2"}', "config.json has no n_embd, so the model's size is not known"),
    ],
)
def test_a_config_that_cannot_be_planned_for_is_one_sentence(tmp_path, monkeypatch, config, sentence):
    (tmp_path / "config.json").write_text(config)
    monkeypatch.setattr("sys.argv", ["plan", "--model", str(tmp_path / "config.json"), "--gpu", "24"])
    with pytest.raises(SystemExit, match=f"plan: .*{sentence}") as end:
        plan.main()
    assert "\n" not in str(end.value.code)


@pytest.mark.parametrize(
    "option",
    ["--gpu=-3", "--gpu=nan", "--gpu=inf", "--gpu=1e9", "--gpu=big", "--length=0", "--length=1.5", "--rank=0",
     "--rank=1000000000000000000000", "--mean-length=-1"],
)  # fmt: skip
def test_the_plan_takes_numbers_within_bounds(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["plan", "--model", "llama2_7b", "--gpu", "24", option])
    with pytest.raises(SystemExit) as end:
        plan.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"argument {option.partition('=')[0]}: invalid value" in said


ENVIRONMENT = {  # variable, value: what is said that it must be; None where it is right
    ("HF_HUB_DOWNLOAD_TIMEOUT", "abc"): "a whole number of seconds above zero",
    ("HF_HUB_DOWNLOAD_TIMEOUT", "30"): None,
    ("HF_HUB_ETAG_TIMEOUT", ""): "a whole number of seconds above zero",
    ("HF_HUB_ETAG_TIMEOUT", "-1"): "a whole number of seconds above zero",
    ("HF_HOME", "{here}/file"): "a folder, and is a file",
    ("HF_HOME", "~/new/folder"): None,
    ("HF_HOME", ""): None,
    ("HF_HUB_CACHE", "{here}/file/x"): "a folder, and {here}/file is a file",
    ("XDG_CACHE_HOME", "{here}/file"): "a folder, and is a file",
    ("HF_ENDPOINT", "huggingface.co"): "an address such as http://host:8080",
    ("HF_ENDPOINT", "https://hub.example/hf"): None,
    ("HF_TOKEN", "secret_é"): "a token",
    ("HF_TOKEN", "secret\none"): "a token",
    ("HF_TOKEN", "hf_secret\n"): None,
    ("HF_TOKEN_PATH", "{here}"): "a file that holds a token (Is a directory)",
    ("HF_TOKEN_PATH", "{here}/none"): None,
    ("HTTPS_PROXY", "http://me:secret@host:12x"): "an address such as http://host:8080",
    ("HTTPS_PROXY", "http://me:secret@host"): None,
    ("http_proxy", "host:8080"): None,
    ("https_proxy", "http://"): "an address such as http://host:8080",
    ("ALL_PROXY", "ftp://me:secret@host"): "an address such as http://host:8080",
    ("ALL_PROXY", "http://[::1:3128"): "an address such as http://host:8080",
    ("SSL_CERT_FILE", "{here}/none.pem"): "a file of certificates, and there is none of that name",
    ("SSL_CERT_FILE", "{here}"): "a file of certificates in PEM form, and it is a folder",
    ("REQUESTS_CA_BUNDLE", "{here}/file"): "a file of certificates in PEM form (it holds none)",
    ("REQUESTS_CA_BUNDLE", "{here}"): None,
    ("CURL_CA_BUNDLE", "{here}/none.pem"): "a file of certificates, and there is none of that name",
    ("PIP_TIMEOUT", "abc"): "a number of seconds above zero",
    ("PIP_TIMEOUT", "0.5"): None,
    ("OMP_NUM_THREADS", "0"): "a whole number above zero",
    ("OMP_NUM_THREADS", "abc"): "a whole number above zero",
    ("OMP_NUM_THREADS", "4,2"): None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ENVIRONMENT)
def test_a_variable_of_the_environment_is_right_or_one_sentence(name, value, tmp_path):
    (tmp_path / "file").touch()
    allowed, value = ENVIRONMENT[name, value], value.replace("{here}", str(tmp_path))
    if allowed is None:
        variables.check({name: value}, network=True)
        return
    with pytest.raises(UserError) as error:
        variables.check({name: value}, network=True)
    said = str(error.value)
    assert said.startswith(f"the environment variable {name} is ")
    assert f"; it must be {allowed.replace('{here}', str(tmp_path))}" in said and "secret" not in said


def test_proxies_of_socks_need_a_package(monkeypatch):
    monkeypatch.setattr(variables, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="is 'socks5://host:1'; .* the package socksio is missing"):
        variables.check({"ALL_PROXY": "socks5://me:secret@host:1"}, network=True)


@pytest.mark.parametrize("stage", ["fetch_model", "train --variant lora_16bit --seed 1", "report"])
def test_a_stage_says_which_variable_is_wrong_before_a_library_reads_it(stage, tmp_path):
    done = run_stage_in(tmp_path, *stage.split(), python=sys.executable, HF_HUB_ETAG_TIMEOUT="1e9")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "failed: the environment variable HF_HUB_ETAG_TIMEOUT is '1e9'; it must be" in done.stderr
