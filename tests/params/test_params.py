"""params.yaml is strict: each mistake is one sentence that names the key, what was found, what is allowed."""

import json
import re
import subprocess
import sys
from datetime import date

import pytest
from conftest import PRESETS, ROOT
from edit_params import drop, error_of, put, set_variants
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from workflow import params
from workflow.runtime.errors import UserError
from workflow.runtime.forms import OWN_FORMS

TASK = {"items": 5, "few_shot": 0, "chat_template": False, "files": None}
TABLE = {"instruction": "q", "context": None, "response": "a", "category": None}
CHATS = {"source": "file", "path": "a.jsonl", "sha256": "0" * 64, "format": "jsonl",
         "columns": {"messages": "messages", "category": None}}  # fmt: skip


def content() -> dict:
    return YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())


def running(variant: str, **values):
    """Change a variant, and have it run."""

    def change(changed: dict) -> None:
        set_variants(changed, list(dict.fromkeys(["lora_16bit", variant])))
        changed["variants"][variant].update(values)

    return change


def refused(tmp_path, change) -> str:
    """The sentence with which `load` refuses the default params after a change."""
    changed = content()
    change(changed)
    path = tmp_path / "params.yaml"
    sentence = error_of(path, changed)
    assert "\n" not in sentence and sentence.endswith((".", "?"))
    return sentence.removeprefix(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("training.schedule.learning_rat", 1.0), ["training.schedule.learning_rat is not a key; did you mean learning_rate?"]),
        (put("optimizer", {}), ["optimizer", "not a known key", "training"]),
        (put("model.revison", "x"), ["model.revison", "not a known key", "sha256"]),
        (drop("training.step.rank"), ["training.step.rank", "missing"]),
        (put("training.step.rank", "16"), ["training.step.rank", '"16"', "integer"]),
        (put("training.step.rank", 0), ["training.step.rank", "0", "greater than 0"]),
        (put("training.schedule.learning_rate", True), ["training.schedule.learning_rate", "true", "number"]),
        (put("training.schedule.learning_rate", -1.0), ["training.schedule.learning_rate", "-1.0", "greater than 0"]),
        (put("training.schedule.schedule", "cosin"), ["training.schedule.schedule", "cosin", "'cosine'"]),
        (put("training.schedule.epochs", 3.0), ["epochs is 3.0", "steps is 12", "exactly one"]),
        (put("training.schedule.micro_batch_rows", 5), ["batch_rows is 16", "multiple of micro_batch_rows (5)"]),
        (put("training.step.dropout", 1.0), ["training.step.dropout", "less than 1"]),
        (put("training.step.initialization", "pisa"), ["training.step.initialization", "pisa", "'default', 'pissa', 'olora' or 'loftq'"]),
        (put("training.schedule.b_rate_factor", 0), ["training.schedule.b_rate_factor", "0", "greater than 0"]),
        (running("qlora_nf4", training={"initialization": "pissa"}),
         ["variants.qlora_nf4.precision is nf4 and its initialization pissa, whose residual weights cannot be written",
          "such a base allows default or loftq."]),
        (running("lora_int8", training={"initialization": "olora"}), ["precision is int8 and its initialization olora"]),
        (running("lora_16bit", training={"initialization": "loftq"}),
         ["variants.lora_16bit.precision is 16bit and its initialization loftq", "nothing is quantized",
          "such a base allows default or pissa or olora."]),
        (running("full_16bit", training={"rank_stabilized": True}),
         ["variants.full_16bit.method is full, which has no adapter, and its rank_stabilized true",
          "set rank_stabilized to false in its training."]),
        (running("full_16bit", training={"b_rate_factor": 16.0}), ["which has no adapter, and its b_rate_factor 16.0"]),
        (running("lora_pissa", processes=2),
         ["variants.lora_pissa.processes is 2 and its initialization pissa, which was not tried in a sharded training"]),
        (running("lora_plus", processes=2), ["processes is 2 and its b_rate_factor 16.0, which was not tried"]),
        (put("variants.dora_16bit.precision", "int8"),
         ["variants.dora_16bit.precision is int8, whose layers do not multiply with their dequantized weight alone",
          "method dora needs the norms of what they multiply with; it allows 16bit, nf4, fp4"]),
        (put("variants.dora_16bit.processes", 2), ["processes is 2 and method is dora, which is not sharded"]),
        (put("experiment.variants", []), ["experiment.variants", "[]", "at least 1"]),
        (put("experiment.variants", ["lora_16bit", "qlora"]), ["names qlora", "qlora_nf4_dq"]),
        (put("experiment.variants", ["lora_16bit", "lora_16bit"]), ["lora_16bit more than once"]),
        (put("experiment.baseline", "full_16bit"), ["experiment.baseline is full_16bit", "lora_16bit"]),
        (put("benchmark.variants", ["lora_16bit", "qlora_nf4"]),
         ["benchmark.variants names qlora_nf4, which is none of experiment.variants: lora_16bit, qlora_nf4_dq (did you mean qlora_nf4_dq?)."]),
        (put("benchmark.variants", ["lora_16bit", "lora_16bit"]), ["benchmark.variants names lora_16bit more than once."]),
        (put("benchmark.variants", ["qlora_nf4_dq"]),
         ["benchmark.variants is qlora_nf4_dq, which must have the baseline lora_16bit among them", "or be []."]),
        (put("benchmark.variants", "all"), ["benchmark.variants", '"all"', "list"]),
        (put("benchmark.variants", None), ["benchmark.variants is null", "list"]),
        (drop("benchmark.variants"), ["benchmark.variants", "missing"]),
        (put("experiment.seeds", [1, 1]), ["experiment.seeds names 1 more than once"]),
        (put("experiment.seeds", [-1]), ["experiment.seeds.0", "-1", "greater than or equal to 0"]),
        (put("hardware.device", "gpu"), ["hardware.device", "gpu", "'cuda'"]),
        (put("model.source", "pypi"), ["model.source is pypi", "hub", "wheel", "file", "random"]),
        (put("model.sha256", "abc"), ["model.sha256", "abc", "[0-9a-f]{64}"]),
        (put("model", {"source": "hub", "repository": "a/b", "revision": "main", "chat_template": "model",
                       "chat_date": "2024-07-26", "end_token": None, "moved": None, "kept_layers": None}),
         ["model.revision", "main", "[0-9a-f]{40}"]),
        (put("dataset.format", "xml"), ["dataset.format", "xml", "'jsonl'"]),
        (put("dataset.format", "jsonl"), ["columns must be given", "jsonl"]),
        (put("model.chat_template", "my/alpaca.jinja"),
         ["model.chat_template is my/alpaca.jinja", "model, instruction, llama2_inst", "workflow/data/chat_templates"]),
        (put("model.chat_date", date(2025, 1, 31)),
         ["model.chat_date is \"2025-01-31\": must stand in quotes, as \"2025-01-31\"."]),
        (put("model.chat_date", "2025-02-30"), ["model.chat_date is \"2025-02-30\": must be a day of the calendar"]),
        (put("model.chat_date", "26 Jul 2024"), ["model.chat_date is \"26 Jul 2024\"", "[0-9]{4}-[0-9]{2}"]),
        (put("model.end_token", 7), ["model.end_token is 7", "string"]),
        (put("model.kept_layers", 0), ["model.kept_layers is 0", "greater than 0"]),
        (put("model.kept_layers", "all"), ["model.kept_layers is \"all\"", "integer"]),
        (put("model.moved", {"cells": 0.25}), ["model.moved.seed is missing"]),
        (put("model.moved", {"cells": 0.6, "seed": 1}), ["model.moved.cells is 0.6", "less than or equal to 0.5"]),
        (put("model.moved", {"cells": 0, "seed": 1}), ["model.moved.cells is 0", "greater than 0"]),
        (put("model", {"source": "hub", "repository": "a/b", "revision": "0" * 40, "chat_template": "model",
                       "chat_date": "2024-07-26", "end_token": None, "moved": {"cells": 0.25, "seed": 1}, "kept_layers": None}),
         ["model.moved must be null where source is hub: only a GGUF file"]),
        (put("model", {"source": "file", "path": "some/folder", "sha256": "0" * 64, "chat_template": "model",
                       "chat_date": "2024-07-26", "end_token": None, "moved": {"cells": 0.25, "seed": 1}, "kept_layers": None}),
         ["model.moved must be null where path is some/folder: only a GGUF file"]),
        (put("dataset", {**CHATS, "columns": {"messages": "m", "instruction": "q", "category": None}}),
         ["dataset.columns.instruction", "not a known key", "known here are messages, category."]),
        (put("dataset", {**CHATS, "columns": {**TABLE, "topic": None}}),
         ["dataset.columns.topic", "not a known key", "known here are instruction, context, response, category."]),
        (put("dataset", {**CHATS, "columns": {"messages": "m"}}), ["dataset.columns.category is missing"]),
        (put("dataset", {**CHATS, "columns": {"messages": None, "category": None}}),
         ["dataset.columns.messages is null", "string"]),
        (put("dataset", {**CHATS, "columns": "messages"}), ['dataset.columns is "messages"', "dictionary"]),
        (lambda changed: changed.update(dataset=CHATS) or put("evaluation.tasks.holdout_loss.few_shot", 2)(changed),
         [" evaluation.tasks.holdout_loss.few_shot is 2", "must be 0", "messages"]),
        (put("sample.test_rows", 990), ["validation_rows + test_rows is 1030", "below rows (1000)"]),
        (put("training.schedule.keep", "first"), ["training.schedule.keep", "first", "'last' or 'best'"]),
        (put("training.schedule.rows", 0), ["training.schedule.rows is 0", "greater than 0"]),
        (put("training.schedule.rows", 1001), ["training.schedule.rows is 1001, and sample.rows draws only 1000"]),
        (put("variants.qlora_nf4_dq.training", {"rows": 2000}), ["variants.qlora_nf4_dq.training.rows is 2000, and sample.rows"]),
        (put("training.schedule.left_out_categories", "ai"), ["training.schedule.left_out_categories", '"ai"', "list"]),
        (put("variants.qlora_nf4_dq.training", {"left_out_categories": ["ai", "sports"]}),
         ["variants.qlora_nf4_dq.training.left_out_categories names sports, which sample.held_out_categories keeps"]),
        (put("variants.qlora_nf4.precision", "nf5"), ["variants.qlora_nf4.precision", "nf5", "'nf4'"]),
        (put("variants.lora_int8.double_quantization", True), ["double_quantization is true", "int8"]),
        (put("variants.full_16bit.precision", "nf4"), ["precision is nf4", "full", "16bit alone"]),
        (put("variants.full_16bit.training", {"ranc": 1}), ["variants.full_16bit.training.ranc is not a key; did you mean rank?"]),
        (put("variants.full_16bit.training", {"steps": 0}), ["variants.full_16bit.training.steps", "0"]),
        (lambda changed: changed["variants"].update({"My-Variant": changed["variants"]["lora_16bit"]}), ["variants.My-Variant", "[a-z0-9_]+"]),
        (put("evaluation.tasks", ["mmlu"]), ["evaluation.tasks", "mmlu", "dictionary"]),
        (put("evaluation.tasks", {}), ["evaluation.tasks", "{}", "at least 1"]),
        (put("evaluation.tasks.piqa", {key: value for key, value in TASK.items() if key != "items"}), ["evaluation.tasks.piqa.items", "missing"]),
        (put("evaluation.tasks.holdout_loss.item", 1), ["tasks.holdout_loss.item", "not a known key", "few_shot"]),
        (put("evaluation.tasks.piqa", {**TASK, "files": {"test": {"path": "a.txt", "sha256": "0" * 64}}}),
         ["evaluation.tasks.piqa.files.test.path", "a.txt", "jsonl"]),
        (put("evaluation.tasks.holdout_loss.chat_template", False), ["tasks.holdout_loss", "chat_template true"]),
        (put("evaluation.forms", ["merged_16bit"]), ["evaluation.forms", "as_trained among them"]),
        (put("evaluation.forms", ["merged"]), ["evaluation.forms.0", "merged", "'requantized'"]),
        (put("evaluation.forms", ["as_trained", "as_trained"]), ["forms names as_trained more than once"]),
        (put("sample.held_out_categories", "ai"), ["sample.held_out_categories", '"ai"', "list"]),
        (put("sample.near_duplicates", "keep"), ["sample.near_duplicates", '"keep"', "report"]),
        (put("sample.near_duplicate_threshold", 0), ["sample.near_duplicate_threshold", "greater than 0"]),
        (lambda changed: (put("evaluation.tasks.piqa", changed["evaluation"]["tasks"].pop("holdout_loss"))(changed),
                          changed["comparison"].update(primary="piqa/acc", margins={}, family={"kinds": [], "metrics": []})),
         ["evaluation.divergence_items is 40", "has no holdout_loss", "null is for none"]),
        (put("evaluation.divergence_items", 0), ["evaluation.divergence_items is 0", "greater than 0"]),
        (put("comparison.primary", "piqa/acc"), ["comparison.primary names piqa/acc", "holdout_loss"]),
        (put("comparison.primary", "loss"), ["comparison.primary", "loss"]),
        (put("comparison.margins", {"piqa/acc": 0.1}), ["comparison.margins names piqa/acc", "evaluation.tasks"]),
        (put("comparison.margins", {"holdout_loss/nats_per_token": 0.0}), ["nats_per_token", "greater than 0"]),
        (put("comparison.family.kinds", ["all"]), ["comparison.family.kinds.0", "all", "'to_baseline'"]),
        (put("comparison.family.metrics", ["mmlu/acc"]), ["comparison.family.metrics names mmlu/acc"]),
        (put("comparison.repairs", {"x": {"faulty": "qlora_nf4", "repaired": "qlora_nf4_dq"}}),
         ["comparison.repairs.x.faulty is qlora_nf4, which is not evaluated"]),
        (put("comparison.repairs", {"x": {"faulty": "lora_16bit/requantized", "repaired": "lora_16bit"}}),
         ["comparison.repairs.x.faulty is lora_16bit/requantized, which is not evaluated"]),
        (put("benchmark.steps", 1), ["benchmark.steps", "1", "3"]),
        (put("comparison.confidence", 95), ["comparison.confidence", "95", "less than 1"]),
        (put("report.title", ""), ["report.title"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path, change, words):
    sentence = refused(tmp_path, change)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: [", ["not valid YAML", "line"]),
        ("- 1", ["mapping"]),
        ("", ["mapping"]),
        ("a: 1\na: 2", ["YAML", "duplicate"]),
    ],
)
def test_what_is_not_a_params_file_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        params.load(path)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_missing_params_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="missing: `make params PRESET=default` writes params.yaml"):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_every_params_file_loads_and_fits_the_schema(name, tmp_path):
    (tmp_path / "params.yaml").write_text(params.complete_text(name))
    loaded = params.load(tmp_path / "params.yaml")
    assert loaded == params.preset(name)
    assert loaded.experiment.baseline in loaded.experiment.variants
    Draft202012Validator(params.schema()).validate(YAML(typ="safe").load(params.complete_text(name)))


def test_a_key_is_described_by_its_comment_in_the_default_params():
    schema = params.schema()
    definitions = schema["$defs"]
    assert definitions["TrainingSchedule"]["properties"]["steps"]["description"] == (
        "One of the two is null: passes over the training rows, or optimizer steps."
    )
    for name in ("HubModel", "WheelModel", "FileModel", "RandomModel"):
        assert "as today's" in definitions[name]["properties"]["chat_date"]["description"]
    assert definitions["Grid"]["properties"]["lengths"]["description"] == "Tokens of each row."
    assert schema["properties"]["variants"]["description"].startswith("method: lora, dora (")
    assert definitions["Variant"]["properties"]["processes"]["description"].startswith(
        "that share the weights"
    )
    assert definitions["Task"]["properties"]["items"]["description"].endswith("null for all.")


def test_every_key_is_described_in_the_schema():
    schema = params.schema()
    undescribed = [
        f"{name}.{key}"
        for name, section in [("params", schema), *schema["$defs"].items()]
        for key, value in section.get("properties", {}).items()
        if not value.get("description")
    ]
    assert not undescribed


@pytest.mark.parametrize("name", PRESETS)
def test_a_complete_file_names_its_schema_in_its_first_line(name):
    """An editor with a YAML language server completes and explains the file by it."""
    files = [params.complete_text(name), (ROOT / "params.yaml").read_text()]
    for text in files:
        begins, _, schema = text.splitlines()[0].partition("=")
        assert begins == "# yaml-language-server: $schema"
        Draft202012Validator.check_schema(json.loads((ROOT / schema).read_text()))


def test_the_committed_schema_is_that_of_the_model():
    written = json.loads((ROOT / "workflow/params/schemas/params.schema.json").read_text())
    assert written == params.schema(), "run `make schema`"


@pytest.mark.parametrize("name", PRESETS)
def test_every_section_of_keys_is_commented(name):
    """Each key stands below a comment, or below keys that share one."""
    commented = False
    for line in params.complete_text(name).splitlines():
        if line.lstrip().startswith("#"):
            commented = True
        elif not line.strip():
            commented = False
        elif re.match(r"^  \w+:", line):
            assert commented, f"{name}: no comment above {line.strip()!r}"


def test_the_original_question_is_a_preset():
    preset = params.preset("llama2_7b_dolly")
    assert preset.model.repository == "meta-llama/Llama-2-7b-hf"
    assert preset.dataset.repository == "databricks/databricks-dolly-15k"
    assert (preset.sample.rows, preset.sample.seed, preset.training.epochs) == (1000, 55, 3)
    assert len(preset.experiment.seeds) == 3
    assert preset.experiment.variants == list(preset.variants)
    assert {"lora_16bit", "qlora_nf4", "qlora_nf4_dq", "qlora_fp4", "lora_int8", "seed_recipe"} == set(
        preset.variants
    )


@pytest.mark.parametrize("name", ["seed_recipe", "llama2_7b_dolly", "smollm2_dolly", "reference_study"])
def test_the_seed_recipe_has_its_settings(name):
    preset = params.preset(name)
    variant, training = preset.variants["seed_recipe"], preset.training_of("seed_recipe")
    assert (variant.precision, variant.double_quantization, variant.compute_dtype) == (
        "nf4",
        False,
        "float16",
    )
    assert (training.rank, training.alpha, training.dropout) == (64, 16, 0.1)
    assert training.target_modules == ["q_proj", "v_proj"]
    assert (training.epochs, training.batch_rows, training.learning_rate) == (3, 4, 2e-4)
    assert (training.schedule, training.warmup_fraction, training.weight_decay) == ("cosine", 0.03, 0.001)
    assert (training.max_gradient_norm, training.optimizer) == (0.3, "paged_adamw_32bit")
    assert (training.use_context, training.loss_on) == (False, "prompt_and_response")
    assert (training.learn_end_token, training.second_bos) == (False, True)


def test_each_fault_of_the_seed_recipe_is_switched_alone():
    preset = params.preset("seed_recipe")
    repaired = preset.variants["repaired"]
    for name in preset.experiment.variants:
        if name.startswith("fault_"):
            fault = preset.variants[name]
            changed = [key for key in ("precision", "double_quantization", "compute_dtype")
                       if getattr(fault, key) != getattr(repaired, key)]  # fmt: skip
            assert len(changed) + len(fault.training) == 1, name
            assert preset.comparison.repairs[name.removeprefix("fault_")].faulty == name
    assert preset.comparison.repairs["merge_into_4_bits"].faulty == "repaired/requantized"


def test_a_variant_is_scored_in_the_forms_that_it_has():
    default = params.load(ROOT / "params.yaml")
    assert default.forms_of("qlora_nf4_dq") == list(OWN_FORMS)
    assert default.forms_of("lora_16bit") == ["as_trained", "merged_16bit"]
    assert default.forms_of("full_16bit") == ["as_trained"]


def test_columns_of_a_table_and_of_a_chat_are_told_apart(tmp_path):
    for columns, kind in (
        (CHATS["columns"], params.ChatColumns),
        (TABLE, params.Columns),
    ):
        changed = content() | {"dataset": CHATS | {"columns": columns}}
        with (tmp_path / "params.yaml").open("w") as file:
            YAML().dump(changed, file)
        assert isinstance(params.load(tmp_path / "params.yaml").dataset.columns, kind)
        Draft202012Validator(params.schema()).validate(changed)


RATES = {
    "low": {"variant": "lora_16bit", "learning_rate": 1e-4},
    "high": {"variant": "lora_16bit", "learning_rate": 1e-3},
}


def tuned(seeds: tuple[int, ...] = (11,), **candidates):
    """Two candidates of the baseline, and changes of theirs."""

    def change(changed: dict) -> None:
        changed["tuning"] = {"candidates": RATES | candidates, "seeds": list(seeds)}

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (tuned(wrong={"variant": "lora_16", "learning_rate": 1e-4}), r"tuning.candidates.wrong.variant is lora_16, which variants does not define; .*\(did you mean lora_16bit\?\)\."),
        (tuned(low={"variant": "lora_16bit", "learning_rate": "low"}), r'tuning.candidates.low.learning_rate is "low": input should be a valid number\.'),
        (tuned(low={"variant": "lora_16bit", "learning_rate": 1e-4, "steps": 3}), r"tuning.candidates.low.steps is not a known key; known here are variant, learning_rate\."),
        (tuned(again={"variant": "lora_16bit", "learning_rate": 1e-3}), r"tuning.candidates.again has the variant and the learning_rate \(0.001\) of high\."),
        (tuned(alone={"variant": "qlora_nf4", "learning_rate": 1e-3}), r"tuning.candidates.alone is the only candidate of qlora_nf4; a choice takes two at least\."),
        (tuned(seeds=()), r"tuning.seeds is \[\], and tuning.candidates is not empty: each is trained with one seed at least\."),
        (tuned(seeds=(11, 11)), r"tuning.seeds names 11 more than once\."),
        (tuned(seeds=(11, 3)), r"tuning.seeds names 3, and experiment.seeds does too; no seed may be in both, so that no choice rests"),
        (put("training.schedule.learning_rate", "lora_16bit"), r'training.schedule.learning_rate is "lora_16bit", which must be a number or a variant that has tuning.candidates, and there are none\.'),
        (put("training.schedule.learning_rate", "1e-3"), r'training.schedule.learning_rate is "1e-3", which must be a number or a variant'),
        (put("variants.qlora_nf4.training.learning_rate", "qlora_nf4"), r'variants.qlora_nf4.training.learning_rate is "qlora_nf4", which must be a number or'),
        (put("variants.qlora_nf4.training.learning_rate", 11.0), r"variants.qlora_nf4.training.learning_rate is 11.0: input should be less than or equal to 10\."),
    ],
)  # fmt: skip
def test_a_mistake_in_tuning_is_one_sentence(tmp_path, change, sentence):
    assert re.match(f": {sentence}", refused(tmp_path, change)), refused(tmp_path, change)


def test_a_rate_by_name_is_of_a_variant_with_candidates(tmp_path):
    def change(changed: dict) -> None:
        tuned()(changed)
        changed["training"]["schedule"]["learning_rate"] = "lora_16bi"

    assert "a variant that tuning.candidates has rates for: lora_16bit (did you mean lora_16bit?)" in refused(
        tmp_path, change
    )


def test_a_sharded_variant_takes_the_rate_of_another(tmp_path):
    def change(changed: dict) -> None:
        tuned()(changed)
        changed["variants"]["lora_16bit"]["processes"] = 2

    with pytest.raises(
        UserError, match="a candidate is trained in one: try the rates of an unsharded variant"
    ):
        changed = content()
        change(changed)
        with (tmp_path / "params.yaml").open("w") as file:
            YAML().dump(changed, file)
        params.load(tmp_path / "params.yaml")


def test_a_variant_with_a_tuned_rate_has_settings_before_it_is_chosen():
    changed = content()
    tuned()(changed)
    changed["training"]["schedule"]["learning_rate"] = "lora_16bit"
    settings = params.Params.model_validate(changed)
    Draft202012Validator(params.schema()).validate(changed)
    assert settings.rate_of("qlora_nf4_dq") == "lora_16bit" and settings.rate_of("full_16bit") == 1e-4
    assert settings.training_of("qlora_nf4_dq").learning_rate == 1e-4  # the first candidate's
    assert settings.run("qlora_nf4_dq", 1, learning_rate=0.01).training.learning_rate == 0.01
    assert settings.training_of("full_16bit").learning_rate == 1e-4


def test_params_do_not_import_torch():
    code = "import sys; from workflow import params; params.load(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("in_sections", [True, False])
def test_a_published_study_may_be_older_than_a_key(tmp_path, in_sections):
    older = content()
    for key in params.SINCE["model"]:
        del older["model"][key]
    for key in ("initialization", "rank_stabilized"):
        del older["training"]["step"][key]
    for key in ("b_rate_factor", "keep", "rows", "left_out_categories"):
        del older["training"]["schedule"][key]
    del older["evaluation"]["divergence_items"]
    del older["tuning"], older["benchmark"]["variants"]
    if not in_sections:
        older["training"] = older["training"]["schedule"] | older["training"]["step"]
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(older, file)
    loaded, now = params.load(tmp_path / "params.yaml", published=True), params.load(ROOT / "params.yaml")
    evaluation = now.evaluation.model_copy(update={"divergence_items": None})
    assert loaded == now.model_copy(update={"evaluation": evaluation})
    with pytest.raises(UserError, match=r"model.chat_date is missing"):
        params.load(tmp_path / "params.yaml")
