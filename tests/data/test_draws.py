"""`sample.per_seed`: each seed's training rows are drawn anew, and what is tested and validated on is never among them."""

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from ruamel.yaml import YAML

from workflow import params
from workflow.data.draws import draw_all
from workflow.data.near_duplicates import near_duplicates
from workflow.data.rows import Instruction, as_rows, normal
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, read_jsonl, write_jsonl
from workflow.runtime.paths import (
    INSTRUCTIONS,
    MODEL,
    SAMPLE_COUNTS,
    TRAIN_ROWS,
    TUNING_ROWS,
    split_file,
    train_rows_file,
)
from workflow.stages.sample import sample

SEEDS = [3, 1, 2]
COLORS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def dataset() -> list[Instruction]:
    """600 rows of four categories; every third instruction stands in two rows, apart from case and punctuation."""
    rows = []
    for number in range(600):
        of = number - 1 if number % 3 == 1 else number
        text = f"What is the {hashlib.sha256(str(of).encode()).hexdigest()[:12]}?"
        text = text.upper() if of != number else text
        rows.append(Instruction(number, text, "", f"answer {number}", COLORS[number % 4]))
    return rows


def settings(**changes) -> params.Sample:
    asked = {
        "rows": 100,
        "seed": 55,
        "per_seed": True,
        "split_seed": 7,
        "validation_rows": 20,
        "test_rows": 50,
    }
    own = {
        "held_out_categories": [],
        "near_duplicate_threshold": 0.7,
        "near_duplicates": "report",
        "longest_response": None,
    }
    return params.Sample.model_validate(asked | own | {"choice_seed": 1} | changes)


def shuffled(rows: list[Instruction], generator_seed) -> list[Instruction]:
    """Rows in numpy's own order, by which the library `datasets` shuffles."""
    return [rows[place] for place in np.random.default_rng(generator_seed).permutation(len(rows))]


def ids(rows: list[Instruction]) -> set[int]:
    return {row.id for row in rows}


def test_the_first_seed_trains_on_the_recipes_own_rows(dataset):
    draws = draw_all(dataset, settings(), SEEDS)
    recipe = datasets.Dataset.from_dict({"id": range(600)}).shuffle(seed=55).select(range(100))
    assert list(draws.train) == SEEDS and ids(draws.train[3]) == set(recipe["id"])


def test_test_and_validation_rows_are_in_the_hashs_order_and_in_no_seeds_rows(dataset):
    draws = draw_all(dataset, settings(), SEEDS)
    own = {normal(row.instruction) for row in draws.train[3]}
    groups: dict[str, list[Instruction]] = {}
    for row in dataset:
        groups.setdefault(normal(row.instruction), []).append(row)

    def key(group: str) -> str:
        texts = (" ".join(row.instruction.casefold().split()) for row in groups[group])
        return min(hashlib.sha256(f"7\0{text}".encode()).hexdigest() for text in texts)

    expected: dict[str, set[int]] = {"test": set(), "validation": set()}
    for group in sorted(groups.keys() - own, key=key):
        name = "test" if len(expected["test"]) < 50 else "validation"
        if len(expected["validation"]) < 20:
            expected[name] |= ids(groups[group])
    assert expected == {"test": ids(draws.test), "validation": ids(draws.validation)}
    scored = {normal(row.instruction) for row in [*draws.test, *draws.validation]}
    for rows in draws.train.values():
        assert len(rows) == 100 and not scored & {normal(row.instruction) for row in rows}


def test_every_other_seed_draws_by_the_rule_that_is_documented(dataset):
    draws = draw_all(dataset, settings(), SEEDS)
    scored = {normal(row.instruction) for row in [*draws.test, *draws.validation]}
    pool = [row for row in dataset if normal(row.instruction) not in scored]
    assert draws.pool == len(pool)
    for seed in (1, 2):
        word = np.random.SeedSequence(55, spawn_key=(seed,)).generate_state(1, np.uint64)[0]
        assert ids(draws.train[seed]) == ids(shuffled(pool, int(word))[:100])


def test_draws_of_two_seeds_share_no_more_rows_than_chance(dataset):
    draws = draw_all(dataset, settings(), list(range(40)))
    sets = [ids(rows) for rows in draws.train.values()]
    shared = [len(a & b) for place, a in enumerate(sets[1:]) for b in sets[1:][:place]]
    chance = 100 * 100 / draws.pool
    assert np.mean(shared) == pytest.approx(chance, abs=0.5) and max(shared) < 100


def test_another_seed_and_another_order_of_the_later_ones_change_no_row(dataset):
    few, many = draw_all(dataset, settings(), SEEDS), draw_all(dataset, settings(), [3, 9, 2, 8, 1])
    assert few.test == many.test and few.validation == many.validation
    assert all(few.train[seed] == many.train[seed] for seed in SEEDS)
    assert few.train[1] != few.train[2] != few.train[3]


def test_held_out_categories_are_neither_trained_nor_validated_on(dataset):
    free, held = (draw_all(dataset, settings(held_out_categories=out), SEEDS) for out in ([], ["red"]))
    assert held.test == free.test and any(row.category == "red" for row in held.test)
    assert held.validation == [row for row in free.validation if row.category != "red"]
    assert held.train[3] == [row for row in free.train[3] if row.category != "red"]
    assert held.left_out == {
        "train": 100 - len(held.train[3]),
        "validation": len(free.validation) - len(held.validation),
    }
    for seed in (1, 2):  # they lose nothing: they are drawn from the rest
        assert len(held.train[seed]) == 100 and not any(row.category == "red" for row in held.train[seed])


def test_near_duplicates_are_dropped_from_every_seeds_rows(dataset):
    draws = draw_all(dataset, settings(), SEEDS)
    near = near_duplicates(draws.splits, threshold=0.3)
    alike = {pair.other.id for pair in near}
    assert all(alike & ids(rows) for rows in draws.train.values())
    remaining = draws.without(near)
    for seed, rows in remaining.train.items():
        assert rows == [row for row in draws.train[seed] if row.id not in alike]
    assert remaining.validation == [row for row in draws.validation if row.id not in alike]
    assert remaining.test == draws.test


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 601}, "sample.rows asks for 601 rows, and the dataset has 600"),
        ({"rows": 480, "held_out_categories": ["red"]}, "rows asks for 480 rows for each seed, and 4.. rows of the dataset are neither tested nor validated on"),
        ({"test_rows": 500}, r"test_rows \(500\) and sample.validation_rows \(20\) are more than the 4.. rows of the dataset"),
        ({"held_out_categories": ["blu"]}, "names blu, and no remaining row is of it; there are black, blue, .*blue"),
        ({"held_out_categories": list(COLORS)}, "leaves nothing to validate on"),
    ],
)  # fmt: skip
def test_draws_that_the_dataset_cannot_give_are_refused(dataset, changes, said):
    small = {"test_rows": 10, "validation_rows": 5} if "rows" in changes else {}
    with pytest.raises(UserError, match=said):
        draw_all(dataset, settings(**small | changes), SEEDS)


def test_more_test_rows_than_training_rows_are_refused_only_where_they_are_drawn_together():
    content = YAML(typ="safe").load(params.complete_text("tiny"))
    content["sample"] |= {"rows": 60, "test_rows": 200, "per_seed": True}
    assert params.Params.model_validate(content).sample.test_rows == 200
    content["sample"]["per_seed"] = False
    with pytest.raises(ValueError, match="which must be below rows"):
        params.Params.model_validate(content)


def put(folder: Path, seeds: list[int], *, tuning: list[int] = (), **changes) -> None:
    yaml = YAML()
    content = yaml.load(params.complete_text("tiny"))
    content["sample"] |= settings(rows=60, test_rows=12, validation_rows=8, **changes).model_dump()
    content["experiment"]["seeds"], content["tuning"]["seeds"] = seeds, list(tuning)
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)


@pytest.fixture
def of_dataset(dataset, tiny_model, tmp_path, monkeypatch) -> None:
    """Work in a folder with the dataset and a model whose tokens are bytes."""
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(tiny_model)
    write_jsonl(tmp_path / INSTRUCTIONS, as_rows(dataset))
    monkeypatch.chdir(tmp_path)


def test_the_stage_writes_a_file_for_each_seed_which_no_other_seed_changes(of_dataset, tmp_path, capsys):
    put(tmp_path, [3, 1])
    sample()
    files = [train_rows_file(3), train_rows_file(1), split_file("validation"), split_file("test")]
    before = [file.read_bytes() for file in files]
    assert "each seed trains on rows of its own: 60 of seed 3, 60 of seed 1" in capsys.readouterr().out
    put(tmp_path, [3, 1, 4])
    sample()
    assert [file.read_bytes() for file in files] == before
    assert sorted(file.name for file in TRAIN_ROWS.iterdir()) == ["1.jsonl", "3.jsonl", "4.jsonl"]
    trained = [{row["id"] for row in read_jsonl(train_rows_file(seed))} for seed in (3, 1, 4)]
    counts = read_json(SAMPLE_COUNTS)
    assert counts["train_rows_by_seed"] == {"3": 60, "1": 60, "4": 60} and counts["train_rows"] == 60
    assert counts["train_rows_of_all_seeds"] == len(set.union(*trained)) > 100
    assert counts["rows_to_draw_from"] == 600 - counts["test_rows"] - counts["validation_rows"]


def test_tuning_seeds_draw_rows_of_their_own_and_change_no_others(of_dataset, tmp_path, capsys):
    put(tmp_path, [3, 1])
    sample()
    assert read_jsonl(TUNING_ROWS) == []
    files = [train_rows_file(3), train_rows_file(1), split_file("validation"), split_file("test")]
    before = [file.read_bytes() for file in files]
    put(tmp_path, [3, 1], tuning=[101, 102])
    sample()
    assert [file.read_bytes() for file in files] == before
    assert sorted(file.name for file in TRAIN_ROWS.iterdir()) == ["1.jsonl", "3.jsonl"]
    drawn = {line["seed"]: {row["id"] for row in line["rows"]} for line in read_jsonl(TUNING_ROWS)}
    assert [len(rows) for rows in drawn.values()] == [60, 60] and drawn[101] != drawn[102]
    tested = {row["id"] for split in ("validation", "test") for row in read_jsonl(split_file(split))}
    assert not tested & set.union(*drawn.values())


def test_a_long_response_is_scored_up_to_the_asked_tokens_and_counted(of_dataset, tmp_path, capsys):
    put(tmp_path, [3])
    sample()
    whole = {row["id"]: row["response"] for row in read_jsonl(split_file("test"))}
    put(tmp_path, [3], longest_response=9)
    sample()
    rows = read_jsonl(split_file("test"))
    assert {row["id"]: row["response"] for row in rows} == {
        number: text[:9] for number, text in whole.items()
    }
    longer = sum(len(text) > 9 for text in whole.values())
    assert 0 < longer == read_json(SAMPLE_COUNTS)["shortened_responses"]
    assert all(len(choice) <= 9 for row in rows for choice in row["choices"])


def test_a_special_token_in_the_rows_of_any_seed_is_refused(dataset, tiny_model, tmp_path, monkeypatch):
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    put(tmp_path, [3, 1])
    draws = draw_all(dataset, settings(rows=60, test_rows=12, validation_rows=8), [3, 1])
    (number, *_) = sorted(ids(draws.train[1]) - ids(draws.train[3]))
    rows = as_rows(dataset)
    rows[number]["response"] = "It is </s> over."
    (tmp_path / INSTRUCTIONS).parent.mkdir(parents=True)
    (tmp_path / INSTRUCTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"row {number} of the dataset.*</s> in its response"):
        sample()
