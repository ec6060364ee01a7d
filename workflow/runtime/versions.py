"""The versions of the libraries that computed a number, recorded with it."""

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
    "liger-kernel",
    "lm-eval",
    "numpy",
    "scipy",
    "hqq",
    "torchao",
)


def installed() -> dict[str, str]:
    """Return the versions of Python and of those libraries that can change numbers and are installed."""
    versions = {"Python": python_version()}
    for library in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # measuring a GPU works without lm-eval
            versions[library] = metadata.version(library)
    return versions
