"""No two splits share an instruction, and near-duplicates are counted as brute force counts them."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, run_stage_in
from ruamel.yaml import YAML

from workflow import params
from workflow.data import near_duplicates
from workflow.data.read import read as read_dataset
from workflow.data.rows import Instruction, as_rows, from_scored_rows, normal
from workflow.data.split import draw as draw_rows
from workflow.data.split import split as split_rows
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import read_jsonl, write_jsonl
from workflow.runtime.paths import INSTRUCTIONS, MODEL, SAMPLE, split_file, train_rows_file

DOLLY = ROOT.parent / "shared" / "data" / "dolly-15k.jsonl"
WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "window",
    "garden",
    "letter",
    "market",
    "silver",
    "winter",
    "bridge",
    "candle",
    "forest",
    "hammer",
]


def row(number: int, instruction: str, *, context: str = "", earlier: tuple = ()) -> Instruction:
    return Instruction(number, instruction, context, f"answer {number}", None, list(earlier))


def made_splits(rows: int = 300) -> dict[str, list[Instruction]]:
    """Prompts of random words, a third of which another one was copied into with some words changed."""
    draw = random.Random(1)
    texts: list[str] = []
    for number in range(rows):
        words = draw.choice(texts).split() if number > 20 and number % 3 == 0 else draw.choices(WORDS, k=14)
        texts.append(" ".join(draw.choice(WORDS) if draw.random() < 0.06 else word for word in words))
    made = [row(number, text) for number, text in enumerate(texts)]
    draw.shuffle(made)
    return {"test": made[:60], "validation": made[60:90], "train": made[90:]}


def by_brute_force(splits: dict[str, list[Instruction]], threshold: float) -> set[tuple[int, int]]:
    """Pairs of ids whose prompts' sets of 5-grams overlap so much, each pair looked at."""

    def grams(instruction: Instruction) -> set[str]:
        text = instruction.instruction + (" " + instruction.context if instruction.context else "")
        letters = "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower())
        joined = " ".join(letters.split())
        return {joined[i : i + 5] for i in range(len(joined) - 4)}

    others = [(other.id, grams(other)) for name in ("train", "validation") for other in splits[name]]
    pairs = set()
    for test in splits["test"]:
        mine = grams(test)
        pairs |= {
            (test.id, number)
            for number, theirs in others
            if len(mine & theirs) >= threshold * len(mine | theirs)
        }
    return pairs


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_minhash_finds_the_pairs_that_brute_force_finds(threshold):
    splits = made_splits()
    pairs = near_duplicates.near_duplicates(splits, threshold=threshold)
    expected = by_brute_force(splits, threshold)
    assert len(expected) > 5 and {(pair.test.id, pair.other.id) for pair in pairs} == expected
    assert [pair.similarity for pair in pairs] == sorted((pair.similarity for pair in pairs), reverse=True)
    assert pairs == near_duplicates.near_duplicates(splits, threshold=threshold)


def test_what_is_almost_alike_is_what_the_user_says():
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a fruit that grows on trees."},
    ]
    long = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening comes."
    splits = {
        "test": [
            row(0, "How do I bake bread at home?"),
            row(1, "Who jumps?", context=long),
            row(2, "Another one, please.", earlier=said),
            row(3, "What is the tallest mountain?"),
        ],
        "validation": [row(4, "How do I bake bread, at home"), row(5, "Nothing alike")],
        "train": [row(6, "Who sleeps?", context=long), row(7, "Another one please!", earlier=said[1:]), row(8, "Else?")],
    }  # fmt: skip
    pairs = near_duplicates.near_duplicates(splits, threshold=0.7)
    assert [(pair.test.id, pair.other.id) for pair in pairs] == [(0, 4), (2, 7), (1, 6)]
    assert pairs[0].similarity == pairs[1].similarity == 1 > pairs[2].similarity
    left = near_duplicates.without(splits, pairs)
    assert [[instruction.id for instruction in left[name]] for name in ("test", "validation")] == [
        [0, 1, 2, 3],
        [5],
    ]
    with pytest.raises(
        UserError, match="near_duplicates is drop, which leaves nothing to train on: every train row"
    ):
        near_duplicates.without(splits | {"train": splits["train"][:2]}, pairs)


@pytest.mark.parametrize("pair", [("train", "test"), ("validation", "test"), ("train", "validation")])
def test_an_instruction_in_two_splits_is_refused(pair):
    splits = {name: [row(place, f"Say {name}")] for place, name in enumerate(("test", "validation", "train"))}
    near_duplicates.check_apart(splits)
    splits[pair[0]].append(row(7, "what is  this"))
    splits[pair[1]].append(row(8, "What is this?!"))
    names = [name for name in splits if name in pair]
    with pytest.raises(
        CheckError, match=f'the {names[0]} and {names[1]} splits share .* alone: "what is this"'
    ):
        near_duplicates.check_apart(splits)


def test_rows_that_differ_in_case_spacing_and_punctuation_are_split_together(rows):
    copies = [
        replace(instruction, id=instruction.id + 100, instruction=f"“{instruction.instruction.upper()}”?")
        for instruction in rows[:20]
    ]
    splits = split_rows([*copies, *rows], validation=6, test=12, seed=3, held_out_categories=[])
    near_duplicates.check_apart(splits)
    assert sum(map(len, splits.values())) == 60
    assert normal("Don't — stop!") == "don t stop" and normal(" ?! ") == "?!"


def a_folder(folder: Path, tiny_model: Path, rows: list[Instruction], **sample) -> Path:
    """A folder in which the stage sample can run, on 40 rows."""
    yaml = YAML()
    content = yaml.load(params.complete_text("tiny"))
    content["sample"] |= {"rows": len(rows), "split_seed": 3, "validation_rows": 6, "test_rows": 8} | sample
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / MODEL).symlink_to(tiny_model)
    write_jsonl(folder / INSTRUCTIONS, as_rows(rows))
    return folder


@pytest.mark.parametrize("action", ["report", "drop"])
def test_the_stage_counts_near_duplicates_and_drops_them_if_asked(tmp_path, tiny_model, rows, action):
    """The rows differ in a number alone: `Say number 11 in words`."""
    folder = a_folder(tmp_path, tiny_model, rows, near_duplicate_threshold=0.75, near_duplicates=action)
    done = run_stage_in(folder, "sample")
    assert done.returncode == 0, done.stderr
    counts = json.loads((folder / SAMPLE / "counts.json").read_text())
    files = {name: split_file(name) for name in ("validation", "test")} | {"train": train_rows_file(1)}
    splits = {name: from_scored_rows(read_jsonl(folder / file)) for name, file in files.items()}
    whole = split_rows(rows, validation=6, test=8, seed=3, held_out_categories=[])
    pairs = by_brute_force(whole, 0.75)
    tests, others = ({pair[side] for pair in pairs} for side in (0, 1))
    assert 0 < len(others) < 32 and 0 < len(tests) <= 8
    if action == "report":
        assert splits["train"] == whole["train"] and splits["validation"] == whole["validation"]
        assert (counts["near_duplicate_test_rows"], counts["near_duplicates_dropped"]) == (len(tests), 0)
    else:
        assert splits["train"] == [
            instruction for instruction in whole["train"] if instruction.id not in others
        ]
        assert not by_brute_force(splits, 0.75)
        assert (counts["near_duplicate_test_rows"], counts["near_duplicates_dropped"]) == (0, len(others))
        assert f", of which {len(others)} are dropped" in done.stdout
    assert (
        f"{len(tests)} test rows have a near-duplicate among the training and validation rows" in done.stdout
    )
    assert done.stdout.count('" and "Say number') == 3


def test_the_stage_stops_where_splits_share_an_instruction(tmp_path, tiny_model, rows):
    """A split that forgets what belongs together, in a process of its own."""
    folder = a_folder(tmp_path, tiny_model, rows, test_rows=7)  # the rows are in pairs
    (folder / "sitecustomize.py").write_text(
        "from workflow.data.rows import Instruction\n"
        "Instruction.group = property(lambda self: f'{self.id} {self.instruction}')\n"
        "from workflow.data import near_duplicates\n"
        "check = near_duplicates.check_apart\n"
        "def with_true_groups(splits):\n"
        "    Instruction.group = property(lambda self: self.instruction)\n"
        "    check(splits)\n"
        "near_duplicates.check_apart = with_true_groups\n"
    )
    done = run_stage_in(folder, "sample", PYTHONPATH=f"{folder}:{ROOT}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "sample: failed: the test and" in line and "splits share an instruction" in line
    assert not (folder / SAMPLE).exists()


@pytest.mark.skipif(not DOLLY.is_file(), reason="the Dolly file is not part of the repository")
def test_dolly_is_looked_through_in_two_seconds():
    columns = params.Columns(instruction="instruction", context="context", response="response", category=None)
    dataset = params.FileDataset(source="file", path="x", sha256="0" * 64, format="jsonl", columns=columns)
    drawn = draw_rows(read_dataset(DOLLY, dataset), size=1000, seed=55)
    splits = split_rows(drawn, validation=50, test=150, seed=55, held_out_categories=[])
    near_duplicates.near_duplicates(
        {name: rows[:5] for name, rows in splits.items()}, threshold=0.7
    )  # imports
    started = time.process_time()
    pairs = near_duplicates.near_duplicates(splits, threshold=0.7)
    assert time.process_time() - started < 2
    (pair,) = pairs
    assert pair.similarity == pytest.approx(0.976, abs=5e-4)
    assert (
        pair.test.context[:60] == pair.other.context[:60] and pair.test.instruction != pair.other.instruction
    )
