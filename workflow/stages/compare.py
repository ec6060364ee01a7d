"""Stage compare: take every difference with its uncertainty and its verdict, and check the claims."""

from workflow import params
from workflow.comparison import compare as comparison
from workflow.comparison import export
from workflow.comparison.model import ALL
from workflow.runtime.files import whole_file, write_json, write_text
from workflow.runtime.paths import COMPARE
from workflow.runtime.stage import run_stage, say


def compare() -> None:
    """Compare the runs that params.yaml names, from the files of the stages before."""
    compared, items = comparison.compare(params.load())
    for variant, keys in compared.trained_otherwise.items():
        say(
            f"  {variant} learned from other rows than {compared.baseline}, or in another order: it changes {', '.join(keys)}"
        )
    for contrast in compared.contrasts:
        if f"{contrast.task}/{contrast.metric}" == compared.primary and contrast.subset == ALL:
            say(f"  {contrast.sentence}")
    for claim in compared.claims:
        say(f"  ({claim.claim}) {claim.text}, {claim.variant}/{claim.form}: {claim.holds}")
    with whole_file(COMPARE / "items.parquet") as path:
        # Git keeps those of a published study: others compute its differences again from them.
        items.to_parquet(path, index=False, compression="zstd", compression_level=15)
    write_json(COMPARE / "comparison.json", compared.as_dict())
    for name, table in export.tables(compared).items():
        write_text(COMPARE / f"{name}.csv", table.to_csv(index=False))
    write_json(COMPARE / "metrics.json", export.headline(compared))


if __name__ == "__main__":
    run_stage("compare", compare)
