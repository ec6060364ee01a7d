"""Command line for what `make report` and Snakemake's jobs run.

`python -m workflow.pipeline report` runs what is stale and shows one line for each stage; the rest is in logs/.
`python -m workflow.pipeline prune` removes what is left of stages that dvc.yaml no longer has.
`python -m workflow.pipeline dvc ...` runs `dvc ...` so that it can be killed at any moment and waits for other engines.
"""

import argparse
import sys
from contextlib import ExitStack

from workflow.engine import (
    dvc_patch_recording,
    dvc_patch_state,
    machine,
    progress,
    quiet_dvc,
    stage_times,
    warm_stages,
)
from workflow.engine.dvc_repository import check_path, open_repo
from workflow.engine.engine_locks import job_lock, only_engine
from workflow.engine.prune import prune_and_report
from workflow.params import load
from workflow.runtime import faults
from workflow.runtime.errors import UserError
from workflow.runtime.stage import say


def run_dvc(arguments: list[str], *, to_log: bool = False) -> int:
    """Run DVC as `make report` and Snakemake's jobs do.

    Args:
        arguments: of DVC's command line.
        to_log: whether stages write to their logs alone.

    Returns:
        DVC's exit code.

    Raises:
        UserError: DVC cannot work in this folder.
    """
    check_path()
    runs_pipeline = (
        "repro" in arguments and "--single-item" not in arguments
    )  # else it is a job of Snakemake's
    if runs_pipeline:
        settings, options = load(), arguments[arguments.index("repro") + 1 :]
        if all(option.startswith("-") for option in options):  # no target, which may compute nothing
            machine.check(settings, open_repo)
    with ExitStack() as stack:
        stack.enter_context(only_engine() if runs_pipeline else job_lock().read_lock())
        stack.enter_context(dvc_patch_recording.applied())
        if runs_pipeline:
            stack.enter_context(warm_stages.applied(to_log=to_log))
        return dvc_patch_state.run(arguments, say=say)


def run_shown() -> int:
    """Prune, and run what is stale with one line for each stage.

    Returns:
        DVC's exit code.

    Raises:
        UserError: params.yaml or the repository cannot be used.
    """
    load()
    with only_engine():
        prune_and_report()
        with open_repo() as repo:
            plan = progress.plan(repo)
    shown = progress.Progress(plan, stage_times.load(), sys.stdout)
    shown.introduce()
    if not plan.labels:
        return 0
    with quiet_dvc.shown_by(shown):
        return run_dvc(["repro"], to_log=True)


def main() -> None:
    """Parse the command line and run it; exit with code 1 and one sentence on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m workflow.pipeline", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("report")
    actions.add_parser("prune")
    actions.add_parser("dvc", add_help=False)
    options, arguments = parser.parse_known_args()
    try:
        with faults.as_user_errors():
            if options.action == "dvc":
                sys.exit(run_dvc(arguments))
            if options.action == "report":
                sys.exit(run_shown())
            load()
            with only_engine():
                prune_and_report()
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
