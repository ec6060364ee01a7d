"""llama.cpp itself, by its C interface (llama.h, ggml.h), from the shared library in the wheel of xllamacpp.

That package's own interface neither quantizes nor gives the log-probabilities of a prompt. Of llama.h, only what has
kept its layout is used: parameters are passed on as llama.cpp fills them, but for the first two numbers of a context's.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from functools import cache
from pathlib import Path

import numpy as np

from workflow.evaluation.llama_cpp.extra import LLAMA_CPP, site_of
from workflow.runtime.errors import CheckError, UserError

ROWS_AT_ONCE = 256  # that a thread quantizes
PARAMETER_WORDS = 256  # more than any of llama.cpp's structures of parameters has
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR


class _Parameters(ctypes.Structure):
    """A structure of parameters: llama.cpp reads no further than its own end."""

    _fields_ = (("words", c_uint32 * PARAMETER_WORDS),)


class _Batch(ctypes.Structure):
    """llama_batch: the tokens of a forward pass."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    )


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SIGNATURES = {
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "llama_log_set": (None, [_Log, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Parameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _Parameters]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
    "llama_context_default_params": (_Parameters, []),
    "llama_init_from_model": (c_void_p, [c_void_p, _Parameters]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_get_one": (_Batch, [POINTER(c_int32), c_int32]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_free": (None, [c_void_p]),
}


class _Library:
    """The functions of the shared library, and what llama.cpp said last when something went wrong."""

    def __init__(self, file: Path):
        self.functions = ctypes.CDLL(str(file))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments
        self.last_error = ""
        self._log = _Log(self._note)  # llama.cpp calls it for as long as the library is loaded
        self.functions.llama_log_set(self._log, None)
        self.functions.llama_backend_init()

    def _note(self, level: int, text: bytes, _: object) -> None:
        if level == ERROR_LEVEL:
            self.last_error = text.decode(errors="replace").strip()


@cache
def _library() -> _Library:
    """Load the shared library.

    Raises:
        UserError: the package is not installed, or has no library that can be loaded here.
    """
    folder = site_of(LLAMA_CPP) / "xllamacpp"
    file = next(
        (path for path in sorted(folder.glob("xllamacpp*")) if path.suffix in (".so", ".pyd")), folder
    )
    try:
        return _Library(file)
    except (OSError, AttributeError) as error:
        raise UserError(
            f"{file} has no llama.cpp that can be used here ({error}); `make gguf` installs it."
        ) from None


def threads() -> int:
    """Return how many threads this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quantized(weights: np.ndarray, type_number: int) -> np.ndarray:
    """Round weights [rows, width] in float32 to one of GGUF's types, as `llama-quantize` does.

    Args:
        type_number: GGUF's number of the type, whose blocks must divide the rows.

    Returns:
        The blocks as bytes, [rows, bytes of a row].
    """
    functions = _library().functions
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    rows, width = weights.shape
    blocks = np.empty((rows, functions.ggml_row_size(type_number, width)), dtype=np.uint8)

    def quantize(first: int) -> None:
        count = min(ROWS_AT_ONCE, rows - first)
        functions.ggml_quantize_chunk(
            type_number, weights.ctypes.data, blocks.ctypes.data, first * width, count, width, None
        )

    # The first call fills tables that all threads then share.
    quantize(0)
    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(quantize, range(ROWS_AT_ONCE, rows, ROWS_AT_ONCE)))
    return blocks


def log_probabilities(file: Path, texts: list[list[int]]) -> list[np.ndarray]:
    """Return the natural log-probability that llama.cpp gives each token of a text but the first, after those before it.

    Args:
        file: a GGUF file.
        texts: of two tokens or more.

    Raises:
        UserError: llama.cpp cannot load the file.
        CheckError: it does not do as llama.h says.
    """
    library = _library()
    functions = library.functions
    model = functions.llama_model_load_from_file(str(file).encode(), functions.llama_model_default_params())
    if not model:
        raise UserError(f"llama.cpp cannot load {file}: {library.last_error or 'it does not say why'}.")
    try:
        longest = max(map(len, texts))
        parameters = functions.llama_context_default_params()
        parameters.words[0] = parameters.words[1] = longest  # n_ctx and n_batch
        context = functions.llama_init_from_model(model, parameters)
        if not context or functions.llama_n_ctx(context) < longest:
            raise CheckError(
                f"llama.cpp makes no context of {longest} tokens for {file}: {library.last_error}"
            )
        functions.llama_set_n_threads(context, threads(), threads())
        vocabulary = functions.llama_vocab_n_tokens(functions.llama_model_get_vocab(model))
        try:
            return [_scored(functions, context, text, vocabulary) for text in texts]
        finally:
            functions.llama_free(context)
    finally:
        functions.llama_model_free(model)


def _scored(functions: ctypes.CDLL, context: int, text: list[int], vocabulary: int) -> np.ndarray:
    """Return the log-probability [tokens - 1] of each token but the first, in one forward pass."""
    functions.llama_memory_clear(functions.llama_get_memory(context), True)
    tokens = (c_int32 * len(text))(*text)
    wants_logits = (c_int8 * len(text))(*[1] * len(text))
    batch = functions.llama_batch_get_one(tokens, len(text))
    batch.logits = ctypes.addressof(wants_logits)
    if code := functions.llama_decode(context, batch):
        raise CheckError(
            f"llama.cpp does not compute a text of {len(text)} tokens: llama_decode returns {code}"
        )
    logits = np.ctypeslib.as_array(functions.llama_get_logits(context), (len(text), vocabulary))[:-1].astype(
        np.float64
    )
    highest = logits.max(axis=1)
    totals = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return logits[np.arange(len(text) - 1), text[1:]] - totals
