"""Tasks are found, mapped to local files and loaded before anything is trained, or refused in one sentence."""

import io
import json

import pandas as pd
import pytest
from conftest import run_stage_in
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from ruamel.yaml import YAML
from stub_hub import REVISION, start_hub

from workflow import params
from workflow.evaluation import harness, task_checks, task_data
from workflow.runtime.errors import UserError
from workflow.runtime.files import sha256, write_jsonl
from workflow.runtime.paths import FETCHED_TASKS

ENDINGS = [
    {
        "ind": index,
        "activity_label": "Counting",
        "ctx_a": f"She counts to {index}.",
        "ctx_b": "then she",
        "ctx": f"She counts to {index}. Then she",
        "endings": ["stops.", "flies.", "melts.", "rusts."],
        "source_id": f"x~{index}",
        "split": "val",
        "split_type": "indomain",
        "label": str(index % 4),
    }
    for index in range(5)
]
SCIENCE = [
    {
        "id": f"q{index}",
        "question": f"What is {index} and {index}?",
        "choices": {"text": [str(2 * index), "a stone", "a song"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    }
    for index in range(1, 6)
]
SUMS = [{"question": f"What is {n} plus 1?", "answer": f"Add one. #### {n + 1}"} for n in range(6)]


@pytest.fixture
def evaluation(tiny, tmp_path, monkeypatch):
    """Make an Evaluation of one task in an empty folder, with its files written there."""
    monkeypatch.chdir(tmp_path)

    def make(name, rows=None, *, few_shot=0, items=None, sha=None, **files) -> params.Evaluation:
        mapped = {}
        for split, content in {**({"validation": rows} if rows else {}), **files}.items():
            write_jsonl(tmp_path / f"{split}.jsonl", content)
            digest = sha or sha256(tmp_path / f"{split}.jsonl")
            mapped[split] = params.LocalFile(path=f"{split}.jsonl", sha256=digest)
        task = params.Task(items=items, few_shot=few_shot, chat_template=False, files=mapped or None)
        return tiny.evaluation.model_copy(update={"tasks": {name: task}})

    return make


@pytest.mark.parametrize(
    ("name", "files", "kind"),
    [
        (
            "hellaswag",
            {"validation": ENDINGS},
            "multiple_choice",
        ),  # its rows go through code of the task's own
        ("arc_easy", {"test": SCIENCE}, "multiple_choice"),  # it has train, validation and test
        ("arc_easy", {"validation": SCIENCE}, "multiple_choice"),
        ("gsm8k", {"test": SUMS, "train": SUMS}, "generate_until"),
    ],
)
def test_a_task_of_the_harness_is_read_from_local_files(evaluation, name, files, kind):
    (found,) = task_data.fetch(evaluation(name, **files))
    (rows,) = [rows for split, rows in files.items() if split != "train"]
    assert (found["leaf"], found["output_type"], found["items"]) == (name, kind, len(rows))
    assert (FETCHED_TASKS / f"{name}.yaml").is_file()
    assert [path.suffix for path in (FETCHED_TASKS / name).iterdir()] == [".parquet"] * len(files)


PIQA = [{"goal": f"What grows {n}?", "sol1": "Grass", "sol2": "Stone", "label": n % 2} for n in range(8)]


@pytest.fixture(scope="module")
def index():
    """The harness' index of its tasks, read once: it takes seconds."""
    return harness.manager.__wrapped__(None, "{}")


@pytest.fixture
def piqa(index, tmp_path, monkeypatch):
    """Put a file in the place of PIQA's validation split as the stage does, and try every item."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "manager", lambda *_: index)

    def make(file: str, *, items: int | None = None, few_shot: int = 0, name: str = "piqa") -> tuple:
        mapped = params.LocalFile(path=file, sha256=sha256(tmp_path / file))
        splits = task_data._map_files(name, {"validation": mapped}, FETCHED_TASKS)
        written = YAML(typ="safe").load((FETCHED_TASKS / f"{name}.yaml").read_text())["task"][0]
        config = load_yaml(index.task_index[name].yaml_path)
        leaf = ConfigurableTask(config=config | written | {"num_fewshot": few_shot})
        where = task_data._where(leaf, splits)
        notes = task_checks.check_items(leaf, items=items, mapped=set(splits), where=where)
        return leaf, notes

    return make


@pytest.mark.parametrize(
    ("row", "change", "sentence"),
    [
        (6, {"label": -1}, "line 7 has the label -1, and its choices are numbered 0 to 1"),
        (6, {"label": 2}, "line 7 has the label 2, and its choices are numbered 0 to 1"),
        (6, {"label": None}, "line 7 has the label null, and must have the number of a choice, 0 to 1"),
        (6, {"goal": None}, "line 7 cannot be put into the task's form .*holds nothing"),
        (6, {"sol1": None}, "line 7 has the choice null, which is not text"),
        (6, {"sol2": " "}, "line 7 has a choice without text"),
    ],
)
def test_every_row_of_a_file_is_tried_and_a_label_that_cannot_be_is_refused(
    piqa, tmp_path, row, change, sentence
):
    rows = [{**item, **change} if place == row else item for place, item in enumerate(PIQA)]
    write_jsonl(tmp_path / "piqa.jsonl", rows)
    with pytest.raises(ValueError, match=f"piqa.jsonl {sentence}"):
        piqa("piqa.jsonl")
    if "label" in change:
        assert piqa("piqa.jsonl", items=row)  # the first so many alone are scored
        with pytest.raises(ValueError, match=sentence):
            piqa("piqa.jsonl", items=row, few_shot=1)  # but any may be an example


@pytest.mark.parametrize("label", [1.0, "1", "Grass tree"])
def test_a_label_of_another_type_is_refused_with_its_value(piqa, tmp_path, label):
    write_jsonl(tmp_path / "piqa.jsonl", [{**row, "label": label} for row in PIQA])
    with pytest.raises(ValueError, match=f"line 1 has the label {json.dumps(label)}, .* .and 7 more rows."):
        piqa("piqa.jsonl")


def test_a_csv_keeps_its_text_and_only_its_labels_become_numbers(piqa, tmp_path):
    cells = ["0.10", "001", "2", "None", "NA", "null", "nan", "1e3", "True", "2024-01-01"]
    lines = ["goal,sol1,sol2,label", *(f"{cell},{cell},x{cell},{n % 2}" for n, cell in enumerate(cells))]
    (tmp_path / "piqa.csv").write_text("\n".join(lines) + "\n")
    leaf, notes = piqa("piqa.csv")
    docs = list(leaf.eval_docs)
    assert [leaf.doc_to_text(doc) for doc in docs] == [f"Question: {cell}\nAnswer:" for cell in cells]
    assert [leaf.doc_to_choice(doc) for doc in docs] == [[cell, f"x{cell}"] for cell in cells]
    assert [leaf.doc_to_target(doc) for doc in docs] == [0, 1] * 5 and not notes


def test_a_csv_of_lists_is_refused(piqa, tmp_path):
    rows = [f"g{n},a,b,{n % 2},\"['a', 'b']\"" for n in range(8)]
    (tmp_path / "piqa.csv").write_text("\n".join(["goal,sol1,sol2,label,choices", *rows]) + "\n")
    with pytest.raises(
        UserError, match="piqa.csv has lists in column choices, .*: write the file as JSON lines"
    ):
        piqa("piqa.csv")


def test_json_keeps_dates_and_late_columns_and_what_fits_no_column_is_left_out(piqa, tmp_path, capsys):
    odd = [{"when": "2024-01-01", "id": 1, "size": 1}, {"id": "x", "size": 2**70}]
    rows = [row | odd[n % 2] | ({"late": "x"} if n > 5 else {}) for n, row in enumerate(PIQA)]
    (tmp_path / "piqa.json").write_text(json.dumps(rows))
    leaf, _ = piqa("piqa.json")
    assert leaf.eval_docs[0]["when"] == "2024-01-01" and leaf.eval_docs[7]["late"] == "x"
    assert set(leaf.features) == {"goal", "sol1", "sol2", "label", "when", "late"}
    said = capsys.readouterr().out
    assert "left out is column id (item 2 has text where those before it have a whole number)" in said
    assert "left out is column size (item 2 has a whole number that does not fit" in said


def test_labels_that_are_all_the_same_are_said(piqa, tmp_path):
    write_jsonl(tmp_path / "piqa.jsonl", [{**row, "label": 0, "sol2": "Grass"} for row in PIQA])
    assert piqa("piqa.jsonl")[1] == [
        "the right answer of all 8 items is 0",
        "8 of 8 items have the right choice twice",
    ]


def test_columns_that_a_template_reckons_with_are_numbers_of_a_csv():
    used = task_checks.columns_used_as_numbers
    assert used("{{['no', 'yes'][label]}} {{goal}}") == {"label"}
    assert used("{{ 'yes' if label == 1 else other }}{{ place + 1 }}") == {"label", "place"}
    assert used("{{goal.strip()}} {{choices[0]}} {{'a' if name == 'b'}}") == set()


def test_examples_in_the_prompt_come_from_the_mapped_split(evaluation):
    assert task_data.fetch(evaluation("gsm8k", few_shot=2, test=SUMS, train=SUMS))
    with pytest.raises(UserError, match="evaluation.tasks.arc_easy cannot be loaded"):
        task_data.fetch(evaluation("arc_easy", few_shot=9, validation=SCIENCE))  # five rows are too few


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("piqqa", {}, "names piqqa, which is no task of lm-evaluation-harness 0.4.13; near to it are .*piqa"),
        (
            "hellaswag",
            {"rows": ENDINGS, "sha": "0" * 64},
            "validation.jsonl has sha256 .*params.yaml names 0000",
        ),
        ("hellaswag", {"train": ENDINGS}, "files has train, and the task is scored on validation"),
        ("hellaswag", {"rows": [{"goal": "x"}]}, "hellaswag cannot be loaded: "),
        ("mmlu", {"rows": ENDINGS}, "mmlu is not a single task"),
        ("humaneval", {}, "humaneval cannot be loaded: "),
        ("piqa", {}, "piqa cannot be loaded: "),  # its data are on a hub, and there is none here
    ],
)
def test_a_task_that_cannot_be_loaded_is_one_sentence(evaluation, name, options, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        task_data.fetch(evaluation(name, **options))
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
    assert not FETCHED_TASKS.exists()


def test_a_file_that_is_missing_is_named(evaluation, tmp_path):
    wanted = evaluation("hellaswag", ENDINGS)
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(
        UserError, match="tasks.hellaswag.files.validation.path is validation.jsonl, which is not"
    ):
        task_data.fetch(wanted)


def test_our_own_tasks_need_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert task_data.fetch(tiny.evaluation) == []


def test_a_task_of_the_hub_is_fetched_once_and_then_read_from_the_cache(tmp_path):
    """Stage fetch_tasks alone uses the network; an evaluation loads the same task without one."""
    hub = start_hub()
    rows = io.BytesIO()
    pd.DataFrame(
        [{"goal": f"Reach {n}.", "sol1": "Go.", "sol2": "Sleep.", "label": 0} for n in range(6)]
    ).to_parquet(rows)
    splits = [f"{{split: {name}, path: {name}.parquet}}" for name in ("train", "validation")]
    card = f"---\nconfigs:\n- config_name: plain_text\n  data_files: [{', '.join(splits)}]\n---\n"
    hub.files = {
        "train.parquet": rows.getvalue(),
        "validation.parquet": rows.getvalue(),
        "README.md": card.encode(),
    }
    text = params.complete_text("tiny")
    own = "    holdout_loss: {items: null,"
    piqa = "    piqa: {items: 5, few_shot: 0, chat_template: false, files: null}\n"
    (tmp_path / "params.yaml").write_text(text.replace(own, piqa + own))
    online = {f"HF_{name}_OFFLINE": "0" for name in ("HUB", "DATASETS", "EVALUATE")}
    home = {"HF_HOME": str(tmp_path / "cache")}
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    done = run_stage_in(tmp_path, "fetch_tasks", **home, **online, **endpoint)
    hub.shutdown()
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "results/fetch_tasks/tasks/loaded.json").read_text())["tasks"]
    assert (found["leaf"], found["items"], found["revision"]) == ("piqa", 6, REVISION)
    again = run_stage_in(tmp_path, "fetch_tasks", **home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert again.returncode == 0, again.stderr


def test_the_stage_stops_before_training_and_leaves_nothing(tmp_path):
    text = params.complete_text("tiny")
    piqa = "    piqa: {items: 5, few_shot: 0, chat_template: false, files: null}\n"
    own = "    holdout_loss: {items: null,"
    (tmp_path / "params.yaml").write_text(text.replace(own, piqa + own))
    done = run_stage_in(tmp_path, "fetch_tasks", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "fetch_tasks: failed: evaluation.tasks.piqa cannot be loaded: " in done.stderr
    assert not (tmp_path / "results/fetch_tasks/ready").exists()


def test_the_file_that_trainings_wait_for_does_not_depend_on_the_tasks(tmp_path):
    text = params.complete_text("tiny")
    found = []
    for tasks in (text, text.replace("items: 6,", "items: 5,")):
        (tmp_path / "params.yaml").write_text(tasks)
        assert run_stage_in(tmp_path, "fetch_tasks").returncode == 0
        found.append((tmp_path / "results/fetch_tasks/ready").read_bytes())
    assert found[0] == found[1]
    loaded = json.loads((tmp_path / "results/fetch_tasks/tasks/loaded.json").read_text())
    assert loaded == {"harness": harness.NAME, "tasks": []}
