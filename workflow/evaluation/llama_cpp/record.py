"""What a result says of a GGUF file, as data classes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fallback:
    """Tensors whose rows the file type's own type does not divide into blocks, so that they have another type.

    Attributes:
        tensors: their name, with `*` for the layer, as in `blk.*.attn_q.weight`.
        count: how many they are.
        width: the weights of a row.
        intended, stored: GGUF's names of the type that the file type gives them, and of the one that they have.
    """

    tensors: str
    count: int
    width: int
    intended: str
    stored: str


@dataclass(frozen=True)
class Agreement:
    """The same rows scored by transformers, with the dequantized weights, and by llama.cpp itself.

    Attributes:
        task: whose first rows were scored.
        rows, tokens: how many, the tokens being those of the responses.
        transformers, llama_cpp: negative log-likelihood over all of these tokens, in nats per token.
        largest_difference: of the same in a single row, as a size.
        tolerance: what the difference over all tokens may be, in nats per token.
    """

    task: str
    rows: int
    tokens: int
    transformers: float
    llama_cpp: float
    largest_difference: float
    tolerance: float

    @property
    def difference(self) -> float:
        return self.llama_cpp - self.transformers


@dataclass(frozen=True)
class GgufRecord:
    """A GGUF file.

    Attributes:
        file_type: llama.cpp's name of it.
        size: of the file, in bytes.
        weights_size: of its tensors, in bytes.
        types: the number of tensors by type.
        fallbacks: the tensors that could not have the type that the file type gives them.
        largest_error: of the first rows of any quantized tensor, the norm of what rounding changed over their own.
        converter, llama_cpp: the packages that wrote it, with their versions.
        agreement: None where the file was not scored by llama.cpp.
    """

    file_type: str
    size: int
    weights_size: int
    types: dict[str, int]
    fallbacks: list[Fallback]
    largest_error: float
    converter: str
    llama_cpp: str
    agreement: Agreement | None = None
