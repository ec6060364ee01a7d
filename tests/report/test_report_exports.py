"""The headline as Markdown and as CSV, and the adapters' cards, held against the comparison."""

import contextlib
import io
import re
from dataclasses import replace

import made_up_results
import pandas as pd
import pytest
from conftest import ROOT
from huggingface_hub import ModelCard
from made_up_results import BASELINE, write, write_lock
from report_reader import facts

from workflow import params
from workflow.comparison.model import ALL, Comparison
from workflow.data import cards
from workflow.data.lineage import Lineage
from workflow.report.cards import model_card
from workflow.report.model import Facts
from workflow.report.sections.answer import headline
from workflow.report.sections.limits import limits
from workflow.report.summary import summary_markdown, summary_table
from workflow.runtime.paths import weights_folder

QLORA = "qlora_nf4_dq"
PRIMARY = ("holdout_loss", "nats_per_token")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Comparison, Facts]:
    with contextlib.chdir(tmp_path_factory.mktemp("usual")):
        comparison = write()
        weights = weights_folder(QLORA, 2)
        weights.mkdir()
        (weights / "adapter_model.safetensors").write_bytes(b"an adapter")
        write_lock()
        return comparison, facts()


def test_the_markdown_has_the_pages_answer_and_a_row_for_each_form(made):
    comparison, found = made
    text = summary_markdown(found)
    sentence = headline(found).sentences[0].striptags().replace("\N{NO-BREAK SPACE}", " ")
    assert sentence in text
    assert sentence.startswith("4-bit QLoRA (NF4, double-quantized) is worse than 16-bit LoRA by 0.058")
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(rows) == 6
    by_arm = {
        (s.variant, s.form): s for s in comparison.scores if (s.task, s.metric, s.subset) == (*PRIMARY, ALL)
    }
    contrasts = {
        (c.variant, c.form): c
        for c in comparison.contrasts
        if (c.task, c.metric, c.subset) == (*PRIMARY, ALL) and c.kind in ("to_baseline", "form") and not (
            c.kind == "form" and c.variant != BASELINE)
    }  # fmt: skip
    arms = [(BASELINE, "as_trained"), (BASELINE, "merged_16bit")]
    arms += [(QLORA, form) for form in ("as_trained", "merged_16bit", "merged_dequantized", "requantized")]
    for arm, row in zip(arms, rows, strict=True):
        assert float(row[3]) == pytest.approx(by_arm[arm].value, abs=0.0005)
        if arm in contrasts:
            assert float(row[4].split()[0].replace("−", "-")) == pytest.approx(
                contrasts[arm].difference.value, abs=0.0005
            )
            assert row[5] == contrasts[arm].verdict
        else:
            assert row[5] == "baseline"


def test_text_in_markdown_is_only_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(title="A | <b>title</b> # & more")
    first = summary_markdown(facts()).splitlines()[0]
    assert first == "## A \\| &lt;b>title&lt;/b> # &amp; more"


def test_the_csv_is_tidy_and_complete(made):
    comparison, found = made
    table = pd.read_csv(io.StringIO(summary_table(found).to_csv(index=False)))
    assert not table.duplicated(["variant", "form", "task", "metric"]).any()
    scores = [s for s in comparison.scores if s.subset == ALL]
    assert len(table) == sum(map(len, (scores, comparison.cost, comparison.shares, comparison.divergences)))
    rows = table.set_index(["variant", "form", "task", "metric"])
    for score in scores:
        row = rows.loc[score.variant, score.form, score.task, score.metric]
        assert (
            row["value"] == score.value
            and row["items"] == score.items
            and row["seeds"] == len(score.per_seed)
        )
    for cost in comparison.cost:
        row = rows.loc[cost.variant, "training", "benchmark", cost.metric]
        assert (row["value"], row["ratio_to_baseline"]) == (cost.value, cost.ratio_to_baseline)
    one = rows.loc[QLORA, "requantized", *PRIMARY]
    contrast = next(
        c for c in comparison.contrasts
        if (c.kind, c.variant, c.form, c.task, c.metric, c.subset) == ("to_baseline", QLORA, "requantized", *PRIMARY, ALL)
    )  # fmt: skip
    assert [one["difference"], one["low"], one["high"]] == [
        contrast.difference.value, contrast.difference.low, contrast.difference.high,
    ]  # fmt: skip
    assert (one["verdict"], one["margin"]) == (contrast.verdict, made_up_results.MARGIN)
    assert rows.loc[QLORA, "base", *PRIMARY][["difference", "verdict"]].isna().all()


def test_a_card_is_in_the_hubs_format_with_the_runs_numbers_and_limits(made):
    comparison, found = made
    variant = next(v for v in found.variants if v.name == QLORA)
    text = model_card(found, variant, 2)
    card = ModelCard(text)  # parses the metadata, the model index among them
    told = card.data.to_dict()
    assert told["library_name"] == "peft" and told["tags"] == ["lora", "qlora"]
    assert card.data.get("base_model") is None  # the base is a file in a wheel and has no name on the hub
    score = next(
        s
        for s in comparison.scores
        if (s.variant, s.form, s.task, s.metric) == (QLORA, "as_trained", *PRIMARY)
    )
    result = next(r for r in card.data.eval_results if r.metric_type == "nats_per_token")
    assert result.metric_value == score.per_seed["2"] and result.dataset_split == "test"
    assert re.search(rf"\| +{score.per_seed['2']:.4f} \| +{score.value:.4f} \|", text)
    for limit in limits(found):
        assert f"- **{limit.head}.**" in text
    digest = found.lock.origins["results/train/qlora_nf4_dq/2/weights"].md5
    assert re.fullmatch(r"[0-9a-f]{32}\.dir", digest) and digest in text
    assert "`dvc repro train@qlora_nf4_dq-2`" in text
    assert "is worse than lora_16bit/as_trained" in text


def test_a_card_of_a_hub_model_names_its_base(made):
    _, found = made
    hub = {
        "source": "hub",
        "repository": "meta-llama/Llama-2-7b-hf",
        "revision": "0" * 40,
        "chat_template": "model",
        "chat_date": "2024-07-26",
        "end_token": None,
        "moved": None,
        "kept_layers": None,
    }
    settings = found.params.model_validate(found.params.model_dump() | {"model": hub})
    card = ModelCard(model_card(replace(found, params=settings), found.variants[0], 1))
    assert card.data.base_model == "meta-llama/Llama-2-7b-hf"
    assert f'"meta-llama/Llama-2-7b-hf", revision="{"0" * 40}", dtype=torch.' in card.text


def test_a_card_has_what_the_source_says_of_license_languages_and_base(made):
    _, found = made
    stored = {
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    card = ModelCard(
        model_card(replace(found, model=found.model | {"lineage": stored}), found.variants[0], 1)
    )
    assert {key: card.data.to_dict()[key] for key in stored} == stored
    assert card.data.datasets == ["made-up-corpus"]
    assert "descends from HuggingFaceTB/SmolLM2-135M-Instruct, whose own weights are others" in card.text


def test_the_readme_loads_an_adapter_as_the_cards_do():
    variant = params.load(ROOT / "params.yaml").variants[QLORA]
    code = cards.loading(variant, Lineage(), compute="float32", device="cpu", folder=weights_folder(QLORA, 1))
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text()
