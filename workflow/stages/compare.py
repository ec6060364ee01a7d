"""Stage compare: take every variant's differences to the baseline, with their uncertainty."""

from workflow import comparison, params
from workflow.console import run_stage, say
from workflow.files import write_json, write_text
from workflow.paths import COMPARE


def compare() -> None:
    """Compare the runs that params.yaml names, from the files of the stages before."""
    asked = params.load()
    compared = comparison.compare(asked)
    for quality in compared.quality:
        for other, difference in (
            ("the untouched base", quality.to_base),
            (compared.baseline, quality.to_baseline),
        ):
            if difference:
                say(f"  {quality.variant} - {other}: {difference.value:+.4f} {quality.unit} "
                    f"({difference.low:+.4f} to {difference.high:+.4f})")  # fmt: skip
    write_json(COMPARE / "comparison.json", compared.as_dict())
    write_text(COMPARE / "summary.csv", comparison.summary(compared).to_csv(index=False))
    write_json(COMPARE / "metrics.json", comparison.headline(compared))


if __name__ == "__main__":
    run_stage("compare", compare)
