"""Stage benchmark: measure one variant's memory and training throughput."""

import tempfile
from pathlib import Path

from workflow import params
from workflow.data.rows import from_rows
from workflow.runtime import inputs
from workflow.runtime.files import read_jsonl, write_json
from workflow.runtime.paths import MODEL, benchmark_file, train_rows_file
from workflow.runtime.stage import run_stage, say
from workflow.runtime.versions import installed


def benchmark(variant: str) -> None:
    """Train some steps of one variant and measure what they cost."""
    settings = params.load()
    params.check_variant(settings, variant)
    from workflow.cost import benchmark as benchmarking

    with tempfile.TemporaryDirectory() as scratch:
        measured = benchmarking.benchmark(
            settings.run(variant, settings.benchmark.seed),
            model_folder=MODEL,
            train_rows=from_rows(read_jsonl(train_rows_file(settings.experiment.seeds[0]))),
            benchmark=settings.benchmark,
            scratch=Path(scratch),
        )
    for m in measured.measurements:
        say(f"  {m.metric}: {m.value:.4g} {m.unit} ({m.definition})")
    write_json(
        benchmark_file(variant),
        {
            "variant": variant,
            **measured.as_dict(),
            "versions": installed(),
            "inputs": inputs.recorded(),
        },
    )


if __name__ == "__main__":
    run_stage("benchmark", benchmark, arguments={"variant": str}, gpus_needed=params.gpus_needed)
