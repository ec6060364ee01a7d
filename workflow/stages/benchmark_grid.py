"""Stage benchmark_grid: measure one variant's training at one model shape over a grid of batches and lengths."""

from workflow import params
from workflow.cost import grid
from workflow.runtime import inputs
from workflow.runtime.files import write_json
from workflow.runtime.paths import MODEL, grid_file
from workflow.runtime.stage import run_stage, say
from workflow.runtime.versions import installed


def benchmark_grid(variant: str, shape: str) -> None:
    """Measure memory and speed at every point of `benchmark.grid`, each in a process of its own."""
    settings = params.load()
    params.check_variant(settings, variant)
    jobs = list(grid.jobs(settings, variant, shape, model_folder=MODEL if shape == "own" else None))
    points = []
    for point in grid.run(jobs, time_limit=settings.benchmark.grid.time_limit):
        points.append({"setting": "grid", **point})
        say(f"  {len(points)} of {len(jobs)}, {grid.describe(point)}")
    write_json(
        grid_file(variant, shape),
        {
            "variant": variant,
            "shape": shape,
            "versions": installed(),
            "inputs": inputs.recorded(),
            "points": points,
        },
    )


if __name__ == "__main__":
    run_stage(
        "benchmark_grid",
        benchmark_grid,
        arguments={"variant": str, "shape": str},
        gpus_needed=params.gpus_needed,
    )
