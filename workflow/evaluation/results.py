"""What an evaluation writes: the schema of result.json, as data classes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from workflow.evaluation.forms import Served
from workflow.evaluation.llama_cpp.record import GgufRecord
from workflow.models.load import LoadedPrecision


@dataclass(frozen=True)
class Metric:
    """One number, and what it is.

    Attributes:
        task: the name of the task in params.
        metric: the name of the metric in the task, with its filter appended where there is one.
        value: the total over all items.
        unit: of the value, in words.
        higher_is_better: None where neither direction is better.
        split: the split of the task that was scored.
        items: how many were scored.
        per_item: whether the scores of the items add up to the value, so that two runs can be compared item by item.
    """

    task: str
    metric: str
    value: float
    unit: str
    higher_is_better: bool | None
    split: str | None
    items: int
    per_item: bool


@dataclass(frozen=True)
class TaskRecord:
    """How the harness was called for one task.

    Attributes:
        task: the name of the task in params.
        leaves: the tasks of the harness that it consists of; more than one for a group.
        version: of the task's definition.
        items: how many were scored.
        few_shot: examples in each prompt.
        chat_template: whether prompts were rendered by the chat template.
        items_sha256: digest of ids, prompts, continuations and targets: equal digests mean equal questions.
        bos_per_prompt: BOS tokens at the beginning of the first prompt.
        prompts_cut: prompts of our own tasks that the model's context cuts.
    """

    task: str
    leaves: list[str]
    version: str
    items: int
    few_shot: int
    chat_template: bool
    items_sha256: str
    bos_per_prompt: int
    prompts_cut: int


@dataclass(frozen=True)
class HarnessRecord:
    """How the harness was called for one form.

    Attributes:
        name, version: of the harness.
        batch_rows, batch_tokens: limits of a forward pass, as in params.
        add_bos_token: whether the harness adds a BOS token by itself.
        chat_template_sha256: digest of the template's text.
        tasks: in the order of params.
        commands: shell commands that give the same numbers with the harness' own command line.
    """

    name: str
    version: str
    batch_rows: int
    batch_tokens: int | None
    add_bos_token: bool
    chat_template_sha256: str
    tasks: list[TaskRecord]
    commands: list[str]


@dataclass(frozen=True)
class FormResult:
    """The scores of one serving form.

    Attributes:
        form: `base`, or a name in `workflow.runtime.forms`.
        precision: the precision in which the model was found to be when it was loaded.
        adapters: modules that have an adapter.
        adapter_dtype: the type of their weights; None without adapters.
        metrics: in the order of tasks.
        harness: how the numbers were made.
        seconds: wall-clock time of loading and scoring.
        gguf: the file that was scored, and how llama.cpp scores it; None for a form that is no GGUF file.
    """

    form: str
    precision: LoadedPrecision
    adapters: int
    adapter_dtype: str | None
    metrics: list[Metric]
    harness: HarnessRecord
    seconds: float
    gguf: GgufRecord | None = None

    @classmethod
    def of(
        cls, served: Served, *, metrics: list[Metric], harness: HarnessRecord, seconds: float
    ) -> "FormResult":
        """Combine what was served with what it scored."""
        return cls(**vars(served), metrics=metrics, harness=harness, seconds=round(seconds, 1))


@dataclass(frozen=True)
class EvaluationResult:
    """The whole of result.json.

    Attributes:
        variant: its name in params.
        seed: of the run; None for the untouched base.
        forms: in the order of params.
        versions: of Python and the libraries.
        inputs: params and digests of the dependencies that the stage read; empty outside of a stage.
    """

    variant: str
    seed: int | None
    forms: list[FormResult]
    versions: dict[str, str]
    inputs: dict[str, Any]

    def as_dict(self) -> dict:
        """Return the content of result.json."""
        return asdict(self)


@dataclass(frozen=True)
class FormDivergence:
    """How far one serving form's predictions lie from the baseline's.

    Attributes:
        form: a name in `workflow.runtime.forms`.
        precision: the precision in which the model was found to be when it was loaded.
        items, tokens: the responses, and the tokens in them at which predictions were compared.
        mean: KL divergence in nats per token.
        same_top: share of the tokens at which both predict the same token.
        seconds: wall-clock time of loading and comparing.
    """

    form: str
    precision: LoadedPrecision
    items: int
    tokens: int
    mean: float
    same_top: float
    seconds: float


@dataclass(frozen=True)
class DivergenceResult:
    """The whole of a divergence's result.json.

    Attributes:
        variant, seed: of the run.
        baseline: the variant whose run of that seed it is compared with, as trained.
        task, split: whose prompts and responses are read.
        items_sha256: digest of them, as of `TaskRecord`; None if nothing was compared.
        reference: the baseline's precision as it was loaded; None if nothing was compared.
        forms: in the order of params.
        versions: of Python and the libraries.
        inputs: params and digests of the dependencies that the stage read; empty outside of a stage.
    """

    variant: str
    baseline: str
    seed: int
    task: str
    split: str
    items_sha256: str | None
    reference: LoadedPrecision | None
    forms: list[FormDivergence]
    versions: dict[str, str]
    inputs: dict[str, Any]

    def as_dict(self) -> dict:
        """Return the content of result.json."""
        return asdict(self)


def read_result(file: Path) -> EvaluationResult:
    """Read a result.json.

    Raises:
        pydantic.ValidationError: the file does not have this schema.
    """
    return TypeAdapter(EvaluationResult).validate_json(file.read_bytes())
