# Snakemake's front end of dvc.yaml: one rule per DVC stage, of the same name.
#
# DVC alone decides what is stale (by content, against dvc.lock); Snakemake orders the
# stages, runs them in parallel and hands them to a cluster. A rule's output is a mark
# that says "up to date". The marks are made anew from DVC's status whenever Snakemake
# starts, so `snakemake -n` and `dvc status` cannot disagree.

import sys
from contextlib import ExitStack
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version, validate

sys.path.insert(0, str(workflow.basedir))
from workflow.engine import pipeline, snakemake_options
from workflow.params import load
from workflow.runtime.errors import UserError

min_version("9.27")


workdir: workflow.basedir


# Used only with `--software-deployment-method apptainer`.
container: "docker://python:3.11"


held_to_the_end = ExitStack()  # of this process

try:
    if workflow.is_main_process:
        snakemake_options.check(Path(workflow.basedir), workflow.overwrite_workdir)
    PARAMS = load()
    # Without `--jobs` there is no cluster, and `gpu` says which jobs may not run at once.
    local = workflow.resource_settings.nodes is None
    with pipeline.open_repo() as repo:
        STAGES = pipeline.load_stages(
            repo,
            gpus=local or pipeline.cluster_offers_gpus(PARAMS.hardware.device),
            processes={
                name: asked.processes for name, asked in PARAMS.variants.items()
            },
        )
        if workflow.is_main_process:  # a job on a cluster reads this file again
            held_to_the_end.enter_context(pipeline.hold_workspace())
            pipeline.mark_fresh_stages(repo)
except UserError as error:
    raise WorkflowError(str(error)) from None


configfile: "params.yaml"


# Snakemake's reader of YAML takes 1e-3 for text; ours and DVC's take it for a number.
config.update(PARAMS.model_dump(mode="json"))
validate(config, "workflow/params/schemas/params.schema.json")


onstart:
    held_to_the_end.enter_context(pipeline.only_engine())
    pipeline.wait_for_jobs()
    pipeline.prune_and_tell()


for stage in STAGES:

    rule:
        name:
            stage.name
        default_target: stage.name == "report"
        input:
            ancient(stage.upstream_marks),
        output:
            touch(stage.mark),
            # DVC writes these; `update`, or Snakemake would delete them first.
            [
                update(
                    report(
                        shown.path,
                        caption=shown.caption,
                        category=shown.category,
                        labels=shown.labels,
                    )
                )
                for shown in stage.shown
            ],
        log:
            stage.log,
        resources:
            **stage.resources,
        params:
            command=stage.command,
        shell:
            "{params.command}"
