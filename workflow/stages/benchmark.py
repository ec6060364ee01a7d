"""Stage benchmark: measure one variant's memory and training throughput."""

from workflow import params
from workflow.cost import repeated
from workflow.runtime import inputs
from workflow.runtime.files import write_json
from workflow.runtime.paths import MODEL, benchmark_file, train_rows_file
from workflow.runtime.stage import run_stage, say
from workflow.runtime.versions import installed


def benchmark(variant: str) -> None:
    """Train some steps of one variant and measure what they cost, `benchmark.processes` times."""
    settings = params.load()
    params.check_variant(settings, variant)
    rows = train_rows_file(settings.experiment.seeds[0])
    job = repeated.Job(variant, settings.model_dump(mode="json"), str(MODEL), str(rows))
    count, results = settings.benchmark.processes, []
    for result in repeated.benchmark(job, count=count):
        results.append(result)
        if count > 1:
            say(f"  measured in process {len(results)} of {count}")
    combined = repeated.combined(results)
    for m in combined["measurements"]:
        say(f"  {m['metric']}: {m['value']:.4g} {m['unit']} ({m['definition']})")
    write_json(
        benchmark_file(variant),
        {
            "variant": variant,
            **combined,
            "versions": installed(),
            "inputs": inputs.recorded(),
        },
    )


if __name__ == "__main__":
    run_stage("benchmark", benchmark, arguments={"variant": str}, gpus_needed=params.gpus_needed)
