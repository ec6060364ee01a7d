# Snakemake's front end of dvc.yaml: one rule per DVC stage, of the same name.
#
# DVC alone decides what is stale (by content, against dvc.lock); Snakemake orders the
# stages, runs them in parallel and hands them to a cluster. A rule's output is a mark
# that says "up to date". The marks are made anew from DVC's status whenever Snakemake
# starts, so `snakemake -n` and `dvc status` cannot disagree.

import atexit
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

sys.path.insert(0, str(workflow.basedir))
from workflow.engine import (
    engine_locks,
    machine,
    prune,
    snakemake_options,
    snakemake_rules,
    warm_stages,
)
from workflow.engine.dvc_repository import open_repo
from workflow.params import load
from workflow.runtime import gpus
from workflow.runtime.errors import UserError

min_version("9.27")


workdir: workflow.basedir


# Used only with `--software-deployment-method apptainer`.
container: "docker://python:3.11"


until_exit = ExitStack()
atexit.register(until_exit.close)

try:
    if workflow.is_main_process:
        snakemake_options.check(Path(workflow.basedir), workflow.overwrite_workdir)
    PARAMS = load()
    # Without `--jobs` there is no cluster, and `gpu` says which jobs may not run at once.
    local = workflow.resource_settings.nodes is None
    at_once = workflow.global_resources.get("gpu")
    with open_repo() as repo:
        RULES = snakemake_rules.load_rules(
            repo,
            gpus=local or snakemake_rules.cluster_offers_gpus(PARAMS.hardware.device),
            processes={
                name: variant.processes for name, variant in PARAMS.variants.items()
            },
            alone=(
                at_once.value
                if at_once
                and local
                and (PARAMS.hardware.device == "cpu" or not gpus.visible())
                else None
            ),
        )
        if workflow.is_main_process:  # a job on a cluster reads this file again
            until_exit.enter_context(engine_locks.snakemake_running())
            if local and not snakemake_options.only_plans():
                machine.check(PARAMS, lambda: nullcontext(repo))
            fresh = snakemake_rules.mark_fresh_stages(repo)
except UserError as error:
    raise WorkflowError(str(error)) from None


configfile: "params.yaml"


# Snakemake's reader of YAML takes 1e-3 for text; ours and DVC's take it for a number.
config.update(PARAMS.model_dump(mode="json"))


onstart:
    until_exit.enter_context(engine_locks.only_engine())
    engine_locks.wait_for_jobs()
    prune.prune_and_report()
    if local and len(RULES) - len(fresh) > 1:
        until_exit.enter_context(warm_stages.running(to_log=True))


for dvc_stage in RULES:

    rule:
        name:
            dvc_stage.name
        default_target: dvc_stage.name == "report"
        input:
            ancient(dvc_stage.upstream_marks),
        output:
            touch(dvc_stage.mark),
            # DVC writes these; `update`, or Snakemake would delete them first.
            [
                update(
                    report(
                        file.path,
                        caption=file.caption,
                        category=file.category,
                        labels=file.labels,
                    )
                )
                for file in dvc_stage.report_files
            ],
        log:
            dvc_stage.log,
        resources:
            **dvc_stage.resources,
        params:
            command=dvc_stage.command,
        shell:
            "{params.command}"
