"""What the page says of the weights that were kept, and of the categories that single variants left out."""

import pytest
from made_up_results import AFTER, write
from report_reader import Reader, facts, read

from workflow.report import drawing
from workflow.report.cards import model_card
from workflow.report.page import render
from workflow.runtime.files import read_json, write_json
from workflow.runtime.paths import COMPARISON, train_folder

QLORA, QLORA_LABEL = "qlora_nf4_dq", "4-bit QLoRA (NF4, double-quantized)"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "matplotlib_svg", lambda *_, **__: "<svg></svg>")


def test_the_page_and_the_card_say_which_weights_were_kept():
    write(training={QLORA: {"keep": "best"}})
    for seed, kept in ((1, 6), (2, 9)):
        path = train_folder(QLORA, seed) / "result.json"
        write_json(path, read_json(path) | {"kept_step": kept, "validation_loss_kept": 2.1234})
    found = facts()
    after = f"{AFTER[QLORA]:.3f}"
    assert (
        f"The saved weights of {QLORA_LABEL} are those of the lowest validation loss: with seed 1 step 6 of 12 (2.123 nats "
        f"per token; the last step {after}) and with seed 2 step 9 of 12 (2.123 nats per token; the last step {after})."
    ) in Reader(render(found)).text
    assert "the weights of step 9, whose validation loss was the lowest" in model_card(
        found, found.others[0], 2
    )
    write()
    assert "lowest validation loss" not in read().text


def test_the_page_says_which_variant_left_out_what():
    write(held_out=(), training={QLORA: {"left_out_categories": ["poetry"]}})
    path = COMPARISON
    content = read_json(path)
    of_categories = [
        s for s in content["scores"] if s["subset"] == "category/poetry" and s["variant"] == QLORA
    ]
    content["scores"] += [s | {"subset": "held_out"} for s in of_categories]
    content["left_out_categories"] = {QLORA: ["poetry"]}
    write_json(path, content)
    page = read()
    said = f"{QLORA_LABEL} was not trained on poetry. “Held out of training, together” is of each variant its own categories"
    assert said in page.text and "No category was held out" not in page.text
    assert page.tables["Table by category"][1] == ["Held out of training, together 53 items"]
    assert (
        f"between runs, save to {QLORA_LABEL}, whose validation rows leave out other categories." in page.text
    )
