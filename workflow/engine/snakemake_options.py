"""Options of Snakemake that would mislead here, because DVC alone decides what is up to date."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from snakemake.cli import get_argument_parser

from workflow.runtime.errors import UserError

_DVC_DECIDES = (
    "it would run no stage again, since DVC alone decides what is up to date: `dvc repro --force` runs all stages "
    "again, and `dvc repro --force --single-item STAGE` one"
)
_TOUCH = "it would call no stage up to date, since DVC alone decides that: `dvc status` says which are not"
_CHANGES = (
    "it would find none, since DVC alone knows them: `dvc status` and `dvc params diff` say what changed"
)
_OTHER_PARAMS = "DVC reads params.yaml alone: edit it, or write a preset over it"
REFUSED = {
    "forceall": _DVC_DECIDES,
    "force": _DVC_DECIDES,
    "forcerun": _DVC_DECIDES,
    "touch": _TOUCH,
    "delete_all_output": "it would delete marks and the report, and leave the models: delete what you like below results",
    "all_temp": "it would delete the report as soon as that is there",
    "list_changes": _CHANGES,
    "list_input_changes": _CHANGES,
    "list_params_changes": _CHANGES,
    "list_untracked": "it would name files that DVC's stages read: `git status` says what is not committed",
    "config": _OTHER_PARAMS,
    "configfile": _OTHER_PARAMS,
}


def check(folder: Path, workdir: Path | str | None) -> None:
    """Check the command line for options that have no effect here, or another effect than they say.

    Args:
        folder: the Snakefile's folder.
        workdir: the value of `--directory`.

    Raises:
        UserError: there is such an option.
    """
    if workdir is not None and Path(workdir).resolve() != folder.resolve():
        raise UserError(
            f"--directory {workdir} is not the folder of the Snakefile ({folder}), and DVC works there alone: leave "
            f"it out, or clone the repository into {workdir}."
        )
    parser = get_argument_parser()
    options = _parsed(parser)
    if options is None:
        return
    for name, reason in REFUSED.items():
        # `--config` without a value, or `--forcerun` without a target, is an empty list.
        if (value := getattr(options, name)) != parser.get_default(name) and value is not False:
            raise UserError(f"Snakemake's --{name.replace('_', '-')} is refused here: {reason}.")
    if options.executor == "touch":
        raise UserError(f"Snakemake's --executor touch is refused here: {_TOUCH}.")


def only_plans() -> bool:
    """Return whether the command line asks for a plan alone (`--dry-run`)."""
    options = _parsed(get_argument_parser())
    return options is not None and bool(options.dryrun)


def _parsed(parser: ArgumentParser) -> Namespace | None:
    """Return the options of Snakemake's command line; None where it was called by its API."""
    if Path(sys.argv[0]).name not in ("snakemake", "__main__.py"):
        return None
    return parser.parse_known_args(sys.argv[1:])[0]
