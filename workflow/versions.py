"""The versions of what computed a number, recorded beside it."""

from importlib import metadata
from platform import python_version

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "lm-eval",
    "numpy",
    "scipy",
)


def installed() -> dict[str, str]:
    """Python's version and those of the libraries that move numbers, as they are installed here."""
    return {"Python": python_version()} | {library: metadata.version(library) for library in LIBRARIES}
