"""The versions of what computed a number, recorded beside it."""

from contextlib import suppress
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
    """Python's version and those of the libraries that move numbers, as far as they are installed here."""
    versions = {"Python": python_version()}
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # measuring a GPU needs no harness
            versions[library] = metadata.version(library)
    return versions
