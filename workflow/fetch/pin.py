"""Write a model or a data set into params.yaml, pinned: looked up at the hub, or hashed where it lies.

    make pin MODEL=HuggingFaceTB/SmolLM2-360M-Instruct     # or a .gguf file, or a folder of safetensors
    make pin DATASET=tatsu-lab/alpaca                      # FILE=data/train.parquet names one of several files
    make pin FILE=my/questions.csv                         # a file of yours

Only this section of params.yaml changes, and nothing is written unless all of it fits.
"""

import argparse
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from workflow import params
from workflow.data import model_files
from workflow.data.guess_columns import FORMATS, guess_columns, named_columns, names_in
from workflow.data.read import read
from workflow.data.rows import Instruction
from workflow.fetch.sources import folder_sha256, hub_errors
from workflow.params import editing
from workflow.runtime import faults, variables
from workflow.runtime.errors import UserError, first_of
from workflow.runtime.files import expanded, read_yaml, sha256, write_text
from workflow.runtime.paths import PARAMS
from workflow.runtime.stage import quiet_libraries, say

REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
WEIGHTS, PICKLES = ".safetensors", (".bin", ".pt", ".pth")
# A column that has almost as many values as rows names the rows, and is no category.
MOST_CATEGORIES = 0.5
SHOWN = 60  # characters of a text


@dataclass(frozen=True)
class Pin:
    """What goes into params.yaml.

    Attributes:
        section: model or dataset.
        content: its keys.
        lines: what was found, for the terminal.
        categories: of a data set: how many rows each has.
    """

    section: str
    content: dict[str, Any]
    lines: list[str]
    categories: dict[str, int]


def pin_model(name: str, *, revision: str | None, before: dict[str, Any]) -> Pin:
    """Look a model up: at the hub, or where it lies if `name` is a path.

    Args:
        name: owner/name at the hub, a .gguf file, or a folder of safetensors.
        revision: a branch, tag or commit of the hub's; None for the newest.
        before: the section as it is, whose `chat_date` stays.

    Raises:
        UserError: there is no such model, or it cannot be used.
    """
    prompt = {
        "chat_template": "model",
        "chat_date": before.get("chat_date", "2024-07-26"),
        "end_token": None,
        "moved": None,
        "kept_layers": None,
    }
    path = expanded(name, key="MODEL")
    if path.exists():
        digest = folder_sha256(path, name=f"MODEL is {name}") if path.is_dir() else sha256(path)
        content = {"source": "file", "path": name, "sha256": digest, **prompt}
        return Pin("model", content, [f"model: {name}", f"  sha256 {digest}"], {})
    info = _look_up(name, "model", revision)
    repository = info.id
    sizes = {file.rfilename: file.size or 0 for file in info.siblings if "/" not in file.rfilename}
    weights = [file for file in sizes if file.endswith(WEIGHTS)]
    if not weights:
        raise UserError(_no_weights(repository, [file.rfilename for file in info.siblings]))
    with hub_errors(repository):
        from huggingface_hub import hf_hub_download

        config = Path(hf_hub_download(repository, "config.json", revision=info.sha))
    model_files.check_unquantized(model_files.json_object(config))
    content = {"source": "hub", "repository": repository, "revision": info.sha, **prompt}
    size = sum(sizes[file] for file in weights) / 1e9
    lines = [
        f"model: {repository}",
        f"  revision {info.sha}",
        f"  weights: {len(weights)} file{'s' if len(weights) > 1 else ''} of safetensors, {size:.2g} GB to download",
    ]
    return Pin("model", content, lines, {})


def pin_dataset(name: str | None, file: str | None, *, revision: str | None, columns: str | None) -> Pin:
    """Look a data set up, read every row of it, and guess its columns.

    Args:
        name: owner/name at the hub; None for a file of this machine.
        file: a file of the repository, or of this machine; None for the only one that the repository has.
        revision: a branch, tag or commit of the hub's; None for the newest.
        columns: which column is what, as `instruction=question,response=answer`; None to guess.

    Raises:
        UserError: there is no such data set, its columns are not known, or a row of it cannot be used.
    """
    if name is None:
        path = expanded(file, key="FILE")
        if not path.is_file():
            raise UserError(f"FILE is {file}, and there is no such file.")
        origin, title = {"source": "file", "path": file}, file
    else:
        info = _look_up(name, "dataset", revision)
        file = _file_of_data([sibling.rfilename for sibling in info.siblings], file, info.id)
        with hub_errors(info.id):
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(info.id, file, revision=info.sha, repo_type="dataset"))
        origin = {"source": "hub", "repository": info.id, "revision": info.sha, "file": file}
        title = f"{info.id}, {file}"
    form = _format_of(path)
    names = names_in(path, form)
    chosen = named_columns(columns, names) if columns else guess_columns(names)
    content = {**origin, "sha256": sha256(path), "format": form, "columns": chosen}
    rows = read(path, _dataset(content))
    categories = Counter(row.category for row in rows if row.category is not None)
    if not columns and len(categories) > MOST_CATEGORIES * len(rows):
        chosen["category"], categories = None, Counter()
    return Pin("dataset", content, _data_lines(title, content, rows, categories), dict(categories))


def write(pin: Pin, file: Path = PARAMS) -> list[str]:
    """Put what was pinned into a params file.

    Held-out categories that the new data do not have are taken out, since no run could hold them out.

    Returns:
        A line for each section that changed.

    Raises:
        UserError: the file is missing or cannot be edited.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: `make params` writes it.")
    text = editing.with_section(file.read_text(encoding="utf-8"), pin.section, pin.content)
    lines = [f"{file}: section {pin.section} is written."]
    if pin.section == "dataset":
        held_out = (read_yaml(file).get("sample") or {}).get("held_out_categories") or []
        known = [category for category in held_out if category in pin.categories]
        if known != held_out:
            text = editing.with_value(text, "sample", "held_out_categories", known)
            lines.append(
                f"{file}: sample.held_out_categories is {known}, since the data have none of the others."
            )
    write_text(file, text)
    return lines


def _look_up(name: str, kind: str, revision: str | None):
    """Return what the hub says of a repository: its commit and its files.

    Args:
        kind: model or dataset.
    """
    if not REPOSITORY.fullmatch(name):
        raise UserError(
            f"{kind.upper()} is {name}: neither a path of this machine nor a name at the hub such as owner/name."
        )
    with hub_errors(name):
        from huggingface_hub import HfApi

        return HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)


def _no_weights(repository: str, files: list[str]) -> str:
    gguf = [file for file in files if file.endswith(".gguf")]
    pickles = [file for file in files if file.endswith(PICKLES)]
    also = ""
    if gguf:
        also = f"; it has {gguf[0]}: download that file and give its path"
    elif pickles:
        also = f"; it has {pickles[0]}, a pickle, which is never read"
    return f"{repository} holds no safetensors, and nothing else is loaded from the hub{also}."


def _file_of_data(files: list[str], choice: str | None, repository: str) -> str:
    """Return the file of a repository that is read: the chosen one, the only one, or the only one for training."""
    tables = [file for file in files if Path(file).suffix in FORMATS]
    if choice:
        if choice not in files:
            raise UserError(f"{repository} has no file {choice}; it has {first_of(tables or files)}.")
        return choice
    if not tables:
        raise UserError(f"{repository} has no file in {', '.join(FORMATS)}; it has {first_of(files)}.")
    train = [file for file in tables if "train" in file]
    if len(tables) > 1 and len(train) != 1:
        raise UserError(
            f"{repository} has {len(tables)} files of data ({first_of(tables)}): choose one with FILE=NAME."
        )
    return tables[0] if len(tables) == 1 else train[0]


def _format_of(path: Path) -> str:
    form = FORMATS.get(path.suffix)
    if form is None:
        raise UserError(f"{path.name} is no {', '.join(FORMATS)}: write its rows as JSON, one object a line.")
    return form


def _dataset(content: dict[str, Any]) -> params.Dataset:
    kind = params.HubDataset if content["source"] == "hub" else params.FileDataset
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"dataset.{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def _data_lines(
    title: str, content: dict[str, Any], rows: list[Instruction], categories: Counter[str]
) -> list[str]:
    columns = ", ".join(f"{key}: {name or 'none'}" for key, name in content["columns"].items())
    common = ", ".join(f"{name} ({count:,})" for name, count in categories.most_common(4))
    return [
        f"dataset: {title}",
        *([f"  revision {content['revision']}"] if "revision" in content else []),
        f"  sha256 {content['sha256']}",
        f"  {len(rows):,} rows; columns: {columns}",
        *([f"  {len(categories)} categories, of which the most common are {common}"] if categories else []),
        f"  first row: {_shortened(rows[0].instruction)} -> {_shortened(rows[0].response)}",
    ]


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return repr(printable if len(printable) <= SHOWN else f"{printable[:SHOWN]}...")


def main() -> None:
    """Read the command line, pin what it names and write it into params.yaml."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.pin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="owner/name at the hub, a .gguf file, or a folder of safetensors")
    parser.add_argument("--dataset", help="owner/name at the hub")
    parser.add_argument("--file", help="a file of the data set's repository, or of this machine")
    parser.add_argument("--revision", help="a branch, tag or commit at the hub (default: the newest commit)")
    parser.add_argument(
        "--columns", help="instruction=NAME,response=NAME, or messages=NAME (default: guessed)"
    )
    options = parser.parse_args()
    if bool(options.model) == bool(options.dataset or options.file):
        parser.error("give MODEL=, DATASET= or FILE=, and a model and data one after the other")
    quiet_libraries()
    try:
        variables.check(os.environ, network=True)
        with faults.as_user_errors():
            if options.model:
                before = (read_yaml(PARAMS) or {}).get("model") if PARAMS.is_file() else None
                pin = pin_model(options.model, revision=options.revision, before=before or {})
            else:
                pin = pin_dataset(
                    options.dataset, options.file, revision=options.revision, columns=options.columns
                )
            for line in [*pin.lines, *write(pin)]:
                say(line)
    except UserError as error:
        sys.exit(f"pin: {error}")
    say("Check it with `.venv/bin/dvc repro sample`, which trains nothing; then run `make report`.")


if __name__ == "__main__":
    main()
