"""Stage measured: list the variants whose costs are measured, so that there is a list even where there are none."""

from workflow import params
from workflow.runtime.files import write_json
from workflow.runtime.paths import MEASURED
from workflow.runtime.stage import run_stage, say


def measured() -> None:
    """Write the names of the variants."""
    variants = params.load().benchmark.variants
    for file in MEASURED:
        write_json(file, {"variants": variants})
    say(f"  {', '.join(variants) or 'none'}")


if __name__ == "__main__":
    run_stage("measured", measured)
