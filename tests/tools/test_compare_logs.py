"""Two logs of the harness are compared item by item, with numbers that a second computation finds again."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CPU
from scipy import stats

from workflow.models.load import load_base
from workflow.runtime.files import write_jsonl
from workflow.tools import compare_logs, logs
from workflow.tools.totals import scores_of

GROUP = """group: all_choices
task: [{group}_one, {group}_other]
aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: true}}]
metadata: {{version: 1}}
"""
CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metadata: {{version: 1}}
"""
SUMS = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "[invalid]"
generation_kwargs: {{max_gen_toks: 3, until: ["."]}}
filter_list:
  - {{name: strict-match, filter: [{{function: regex, regex_pattern: "(e)"}}, {{function: take_first}}]}}
  - {{name: flexible-extract, filter: [{{function: take_first}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
TEXT = """task: text
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metadata: {{version: 1}}
"""


@pytest.fixture(scope="module")
def folders(tiny, tiny_model, tmp_path_factory):
    """Log folders of the tiny model and of one with other weights, as the harness writes them."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("logs")
    questions = [
        {
            "question": f"Is {n} an even number?",
            "label": n % 2,
            "choices": [f" {chr(97 + n % 26)}{n:02d}", f" {n:02d}{chr(122 - n % 26)}"],
        }
        for n in range(40)
    ]
    for name, rows in (("one", questions[:25]), ("other", questions[25:])):
        write_jsonl(folder / f"{name}.jsonl", rows)
        text = CHOICE.format(name=f"choice_{name}", file=folder / f"{name}.jsonl")
        (folder / f"choice_{name}.yaml").write_text(text)
    (folder / "group.yaml").write_text(GROUP.format(group="choice"))
    for name, text in (("sums", SUMS), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(text.format(file=folder / "one.jsonl"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for name in "ab":
        model, _ = load_base(tiny_model, tiny.variants["lora_16bit"], hardware=CPU)
        if name == "b":
            torch.manual_seed(1)
            for weight in model.parameters():
                weight.data += weight.data.std() * torch.randn_like(weight) / 4
        results = lm_eval.simple_evaluate(
            HFLM(model, tokenizer=tokenizer, max_length=128, batch_size=8),
            tasks=["all_choices", "sums", "text"],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        tracker = EvaluationTracker(output_path=str(folder / name))
        tracker.general_config_tracker.log_experiment_args("hf", f"pretrained={name}", None, None, False)
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in samples:
            tracker.save_results_samples(task_name=task, samples=samples[task])
    return folder


@pytest.fixture
def pair(folders, tmp_path):
    """A copy of the two folders."""
    return [shutil.copytree(folders / name, tmp_path / name) for name in "ab"]


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_logs", *map(str, arguments)])
    compare_logs.main()


def compared(monkeypatch, tmp_path, *arguments: object) -> pd.DataFrame:
    run(monkeypatch, *arguments, "--csv", tmp_path / "out.csv", "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["differences"]
    table = pd.read_csv(tmp_path / "out.csv")
    assert [row["difference"] for row in rows] == pytest.approx(table["difference"].tolist())
    return table.set_index(["task", "metric", "filter"])


def samples_of(folder, task: str, metric: str, filter_name: str = "none") -> list:
    """The scores of a task by another reader than the one that is tested."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    table = pd.read_json(file, lines=True)
    return table[table["filter"] == filter_name].sort_values("doc_id")[metric].tolist()


def test_real_logs_are_compared_in_every_task_and_metric(pair, monkeypatch, tmp_path, capsys):
    table = compared(monkeypatch, tmp_path, *pair, "--margin", "acc=0.5")
    assert {(task, filter_name) for task, _, filter_name in table.index} == {
        ("choice_one", "none"),
        ("choice_other", "none"),
        ("all_choices", "none"),
        ("sums", "strict-match"),
        ("sums", "flexible-extract"),
        ("text", "none"),
    }
    for task, items in (("choice_one", 25), ("choice_other", 15), ("all_choices", 40)):
        row = table.loc[(task, "acc", "none")]
        assert row["items"] == items and row["unit"] == "share of items" and row["margin"] == 0.5
    differences = np.subtract(*[samples_of(folder, "choice_one", "acc") for folder in pair])
    row = table.loc[("choice_one", "acc", "none")]
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["p_exact"] == pytest.approx(
        stats.binomtest(int((differences > 0).sum()), int((differences != 0).sum())).pvalue
    )
    assert table.loc[("sums", "exact_match", "strict-match"), "a"] == np.mean(
        samples_of(pair[0], "sums", "exact_match", "strict-match")
    )
    assert table.loc[("sums", "exact_match", "flexible-extract"), ["a", "b"]].tolist() == [0, 0]
    # Perplexity over words is compared as its logarithm, in which the items add up.
    row = table.loc[("text", "word_perplexity", "none")]
    results = [json.loads(next(folder.rglob("results_*.json")).read_text()) for folder in pair]
    a, b = (np.log(result["results"]["text"]["word_perplexity,none"]) for result in results)
    assert row["difference"] == pytest.approx(a - b) and row["low"] < a - b < row["high"]
    assert not row["higher_is_better"]
    # Holm's correction by hand, over all that is compared.
    p = np.maximum(table["p_interval"], table["p_exact"].fillna(0)).to_numpy()
    order = np.argsort(p)
    by_hand = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    assert table["p_adjusted"].to_numpy()[order] == pytest.approx(by_hand)
    text = capsys.readouterr().out
    assert "more is better" in text and "less is better" in text and "| verdict on a" in text


def test_the_interval_is_that_of_a_paired_t_test_where_the_items_are_many(monkeypatch, tmp_path, folders):
    """The bootstrap of a mean over items of equal weight, beside Student's interval of the same differences."""
    random = np.random.default_rng(1)
    scores = random.normal(size=(2, 400)) + random.normal(size=400)
    pair = [made_up(tmp_path / name, {"rouge": row.tolist()}) for name, row in zip("ab", scores, strict=True)]
    row = compared(monkeypatch, tmp_path, *pair).loc[("made_up", "rouge", "none")]
    interval = stats.ttest_rel(*scores).confidence_interval()
    assert row["low"] == pytest.approx(interval.low, abs=0.01)
    assert row["high"] == pytest.approx(interval.high, abs=0.01)
    assert row["test"] == compare_logs.PAIRED_T


def made_up(folder, scores: dict[str, list], *, totals: dict | None = None, model: str = "m", **changes):
    """A log of one task with these scores of its items."""
    folder.mkdir(parents=True)
    date = "2026-01-02T03-04-05.678901"
    totals = totals or {f"{metric},none": float(np.mean(values)) for metric, values in scores.items()}
    results = {
        "results": {"made_up": totals},
        "configs": {"made_up": {}},
        "versions": {"made_up": 1},
        "n-samples": {"made_up": {"effective": len(next(iter(scores.values())))}},
        "higher_is_better": {"made_up": dict.fromkeys(scores, True)},
        "model_name": model,
        **changes,
    }
    (folder / f"results_{date}.json").write_text(json.dumps(results))
    rows = [
        {
            "doc_id": index,
            "doc": {"text": f"{index}", "passage": index // 2},
            "arguments": {"gen_args_0": {"arg_0": f"{index}"}},
            "target": "x",
            "filter": "none",
            "metrics": list(scores),
            **dict(zip(scores, values, strict=True)),
        }
        for index, values in enumerate(zip(*scores.values(), strict=True))
    ]
    write_jsonl(folder / f"samples_made_up_{date}.jsonl", rows)
    return folder


def right(*counts: int) -> list[list[float]]:
    """Answers of two models: both right, only the first, only the second, neither."""
    first = np.repeat([1.0, 1.0, 0.0, 0.0], counts)
    second = np.repeat([1.0, 0.0, 1.0, 0.0], counts)
    return [first.tolist(), second.tolist()]


def test_an_accuracy_has_mcnemars_test_and_an_unpaired_test_would_miss_it(monkeypatch, tmp_path):
    pair = [
        made_up(tmp_path / name, {"acc": row})
        for name, row in zip("ab", right(540, 52, 26, 382), strict=True)
    ]
    row = compared(monkeypatch, tmp_path, *pair).loc[("made_up", "acc", "none")]
    assert row["p_exact"] == pytest.approx(2 * stats.binom.cdf(26, 78, 0.5))
    a, b, n = row["a"], row["b"], 1000
    unpaired = 2 * stats.norm.sf((a - b) / np.sqrt((a * (1 - a) + b * (1 - b)) / (n - 1)))
    assert row["p_exact"] < 0.01 < 0.2 < unpaired
    assert row["verdict"] == "better" and row["test"] == compare_logs.MCNEMAR


def test_each_verdict_follows_the_rule(monkeypatch, tmp_path):
    def verdict_of(name: str, counts: tuple, *arguments: object) -> pd.Series:
        pair = [
            made_up(tmp_path / name / side, {"acc": row})
            for side, row in zip("ab", right(*counts), strict=True)
        ]
        return compared(monkeypatch, tmp_path, *pair, *arguments).loc[("made_up", "acc", "none")]

    assert verdict_of("worse", (300, 10, 60, 30))["verdict"] == "worse"
    assert verdict_of("same", (900, 5, 5, 90), "--margin", "0.02")["verdict"] == "equivalent"
    undecided = verdict_of("open", (40, 12, 8, 20), "--margin", "0.02")
    assert undecided["verdict"] == "undecided"
    # As many items as that, with the same shares of answers, give 80 % power by the textbook's formula for McNemar's test.
    shares = np.array([12, 8]) / 80
    z = stats.norm.ppf(0.975), stats.norm.ppf(0.8)
    gap, discordant = shares[0] - shares[1], shares.sum()
    textbook = ((z[0] * np.sqrt(discordant) + z[1] * np.sqrt(discordant - gap**2)) / gap) ** 2
    assert undecided["items_for_difference"] == pytest.approx(textbook, rel=0.15)
    assert undecided["items_for_equivalence"] == pytest.approx(
        (discordant - gap**2) * ((stats.norm.ppf(0.95) + stats.norm.ppf(0.9)) / 0.02) ** 2, rel=0.15
    )


def test_runs_of_several_seeds_are_paired_in_their_order(monkeypatch, tmp_path):
    random = np.random.default_rng(2)
    items = random.normal(size=200)
    scores = [items + shift + random.normal(size=200) / 4 for shift in (0.3, 0.4, 0.35, 0.0, 0.1, 0.05)]
    paths = [made_up(tmp_path / str(n), {"rouge": row.tolist()}) for n, row in enumerate(scores)]
    table = compared(monkeypatch, tmp_path, "--a", *paths[:3], "--b", *paths[3:])
    row = table.loc[("made_up", "rouge", "none")]
    gaps = [np.mean(a - b) for a, b in zip(scores[:3], scores[3:], strict=True)]
    assert row["difference"] == pytest.approx(np.mean(gaps)) and row["runs"] == 3
    alone = compared(monkeypatch, tmp_path, "--a", *paths[:3], "--b", paths[3])
    assert alone.loc[("made_up", "rouge", "none"), "b"] == pytest.approx(scores[3].mean())


def test_items_of_one_passage_are_drawn_together(monkeypatch, tmp_path):
    random = np.random.default_rng(3)
    rows = [np.repeat(random.normal(size=100), 2), np.zeros(200)]  # both items of a passage have one score
    pair = [made_up(tmp_path / name, {"rouge": list(row)}) for name, row in zip("ab", rows, strict=True)]
    single, paired = (
        compared(monkeypatch, tmp_path, *pair, *arguments).loc[("made_up", "rouge", "none")]
        for arguments in ([], ["--cluster", "passage"])
    )
    assert (single["documents"], paired["documents"]) == (200, 100)
    assert paired["standard_error"] / single["standard_error"] == pytest.approx(np.sqrt(2), rel=0.05)


@pytest.mark.parametrize(
    ("scores", "total", "value"),
    [
        ([1.0, 0.0, 1.0], 2 / 3, 2 / 3),
        ([True, False, True], 2 / 3, 2 / 3),
        ([[2.0, 4.0], [1.0, 1.0]], 0.6, 0.6),  # weighted
        ([[1, 0, 1], [0]], 0.5, 0.5),  # several answers of an item
        ([-1.0, -3.0], np.exp(2), 2.0),
        ([[-6.0, 2.0], [-2.0, 2.0]], np.exp(2), 2.0),
        ([[-6.0, 2.0], [-2.0, 2.0]], 2 / np.log(2), 2 / np.log(2)),  # bits per byte
    ],
)
def test_the_total_says_what_the_scores_mean(scores, total, value):
    found = scores_of([(scores, total)], "metric")
    assert found.numerators.sum() / found.denominators.sum() == pytest.approx(value)


@pytest.mark.parametrize("scores", [[["a", "b"], ["a", "c"]], [None, 1.0], [0.1, 0.2], [[1, 0], [1, 1]]])
def test_what_is_no_mean_of_items_is_left_out(scores):
    assert scores_of([(scores, 0.777)], "f1") is None


def edit(folder, change) -> None:
    """Rewrite the samples of the made-up task."""
    (file,) = folder.glob("samples_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_jsonl(file, change(rows))


def other_text(rows):
    return [{**row, "doc": {**row["doc"], "text": "else"}} if row["doc_id"] < 3 else row for row in rows]


def other_prompt(rows):
    return [
        {**row, "arguments": {"gen_args_0": {"arg_0": "Q"}}} if row["doc_id"] < 2 else row for row in rows
    ]


def damaged(folder, *, kind: str) -> None:
    (samples,), (results,) = folder.glob("samples_*.jsonl"), folder.glob("results_*.json")
    record = json.loads(results.read_text())
    match kind:
        case "no samples":
            samples.unlink()
        case "no results":
            results.unlink()
        case "cut":
            samples.write_text(samples.read_text()[:-20])
        case "cut at a line":
            edit(folder, lambda rows: rows[:-4])
        case "results cut":
            results.write_text(results.read_text()[:-5])
        case "results of another":
            results.write_text("[]")
        case "other items":
            edit(folder, other_text)
        case "other prompts":
            edit(folder, other_prompt)
        case "other version":
            results.write_text(json.dumps({**record, "versions": {"made_up": 2}}))
        case "other task":
            samples.rename(samples.with_name(samples.name.replace("made_up", "piqa")))
            results.write_text(results.read_text().replace("made_up", "piqa"))
        case "not finite":
            edit(folder, lambda rows: [{**row, "acc": float("nan")} for row in rows])
        case "twice":
            edit(folder, lambda rows: [*rows, rows[0]])
        case "no scores":
            edit(folder, lambda rows: [{k: v for k, v in row.items() if k != "acc"} for row in rows])
        case "a gap":
            edit(folder, lambda rows: [{k: v for k, v in rows[0].items() if k != "acc"}, *rows[1:]])
        case "two models":
            shutil.copytree(folder, folder / "other")
        case "text":
            samples.write_text("hello\n")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "no samples",
            "samples_made_up_.* is missing: the items of made_up are only logged with --log_samples",
        ),
        ("no results", "holds no results_DATE.json"),
        ("cut", "line 20, is no whole JSON: the file is cut short"),
        ("cut at a line", "holds 16 items of made_up, and results_.* counts 20"),
        ("results cut", "is no whole JSON file"),
        ("results of another", "is no results file of lm-evaluation-harness"),
        ("other items", "do not have the same items of made_up: 3 of 20 and 20 differ"),
        ("other prompts", "do not ask made_up in the same words: 2 of 20 prompts differ"),
        ("other version", "ran made_up in versions 1 and 2"),
        ("other task", "have no task in common: made_up and piqa"),
        ("not finite", "a score of acc is not a finite number"),
        ("twice", "line 21 scores item 0 of made_up a second time"),
        (
            "no scores",
            "nothing to compare. made_up: acc is left out: 1 of the 2 logs have no score of each item",
        ),
        ("a gap", "has no acc of 1 of its 20 items"),
        ("two models", "holds logs of 2 models: name the folder of one"),
        ("text", "line 1, is no whole JSON"),
    ],
)
def test_bad_logs_end_in_a_sentence(monkeypatch, tmp_path, kind, sentence):
    pair = [made_up(tmp_path / name, {"acc": row}) for name, row in zip("ab", right(5, 5, 5, 5), strict=True)]
    damaged(pair[1], kind=kind)
    with pytest.raises(SystemExit, match=sentence):
        run(monkeypatch, *pair)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "piqa"], "has no task piqa; it has made_up"),
        (["--metrics", "f1"], "nothing to compare"),
        (["--cluster", "page"], "has no field page in its document"),
    ],
)
def test_what_the_logs_do_not_have_is_said(monkeypatch, tmp_path, arguments, sentence):
    pair = [made_up(tmp_path / name, {"acc": row}) for name, row in zip("ab", right(5, 5, 5, 5), strict=True)]
    with pytest.raises(SystemExit, match=sentence):
        run(monkeypatch, *pair, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [["a"], ["a", "b", "c"], ["--a", "x"], ["--a", "1", "2", "--b", "1", "2", "3"], ["a", "b", "--margin", "0"],
     ["a", "b", "--margin", "acc=x"], ["a", "b", "--confidence", "95"]],
)  # fmt: skip
def test_a_wrong_command_line_ends_with_code_2(monkeypatch, arguments):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2


def test_a_missing_and_an_empty_folder_are_said(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="does not exist"):
        run(monkeypatch, tmp_path / "none", tmp_path)
    with pytest.raises(SystemExit, match="holds no results_DATE.json"):
        run(monkeypatch, tmp_path, tmp_path)


def test_a_metric_of_one_log_alone_is_named(monkeypatch, tmp_path, capsys):
    one, other = right(5, 5, 5, 5)
    pair = [made_up(tmp_path / "a", {"acc": one, "rouge": one}), made_up(tmp_path / "b", {"acc": other})]
    table = compared(monkeypatch, tmp_path, *pair)
    assert list(table.index) == [("made_up", "acc", "none")]
    assert "made_up: rouge is left out: 1 of the 2 logs have no score" in capsys.readouterr().out


def test_other_prompts_are_compared_if_that_is_asked_for(monkeypatch, tmp_path):
    pair = [made_up(tmp_path / name, {"acc": row}) for name, row in zip("ab", right(5, 5, 5, 5), strict=True)]
    edit(pair[1], other_prompt)
    assert len(compared(monkeypatch, tmp_path, *pair, "--other-prompts")) == 1


def test_lines_of_an_older_version_have_the_only_filter_of_the_totals(tmp_path):
    folder = made_up(tmp_path / "a", {"acc": [1.0, 0.0]})
    edit(
        folder,
        lambda rows: [{k: v for k, v in row.items() if k not in ("filter", "metrics")} for row in rows],
    )
    assert logs.read(folder).tasks["made_up"].scores == {("acc", "none"): [1.0, 0.0]}


def test_the_last_run_of_a_task_counts(tmp_path):
    folder = made_up(tmp_path / "a", {"acc": [1.0, 0.0]})
    later = made_up(tmp_path / "later", {"acc": [0.0, 0.0]})
    for file in later.iterdir():
        shutil.copy(file, folder / file.name.replace("2026", "2027"))
    log = logs.read(folder)
    assert log.tasks["made_up"].totals == {("acc", "none"): 0.0}
    assert log.notes == [f"{folder} ran made_up more than once; its last run is compared."]
