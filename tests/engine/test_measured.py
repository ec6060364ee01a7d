"""Memory and speed are measured of the variants that params name, which may be none."""

import pytest
from engine_fixture import (
    AFTER_ADDING_A_VARIANT,
    COLLECTING,
    ENGINES,
    OTHER,
    VARIANT,
    add_unmeasured_variant,
    assert_clean,
    assert_nothing_to_do,
)

OF_OTHER = [f"benchmark@{OTHER}", f"benchmark_grid@{OTHER}-own"]


def measure(*variants: str):
    """Params that measure these variants."""

    def change(params: dict) -> None:
        params["benchmark"]["variants"] = list(variants)

    return change


@pytest.mark.parametrize("engine", ENGINES)
def test_a_variant_that_is_not_to_be_measured_has_no_benchmark(repository, engine):
    repository.bring_up_to_date(engine)
    repository.edit_params(add_unmeasured_variant)
    unmeasured = sorted(set(AFTER_ADDING_A_VARIANT) - {*OF_OTHER, "measured"})
    assert repository.bring_up_to_date(engine) == unmeasured
    assert_nothing_to_do(repository, engine)
    repository.edit_params(measure(VARIANT, OTHER))
    assert repository.bring_up_to_date(engine) == sorted([*OF_OTHER, "compare", "measured", "report"])
    assert_clean(repository)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_nothing_is_measured_the_rest_runs_and_what_was_measured_comes_back(repository, engine):
    repository.edit_params(measure())
    repository.prune()
    assert repository.bring_up_to_date(engine) == ["compare", "measured", "report"]
    results = repository.root / "results"
    files = [path for path in results.glob("benchmark*/**/*") if path.is_file()]
    assert {path.relative_to(results).as_posix() for path in files} == {
        "benchmark/measured.json",
        "benchmark_grid/measured.json",
    }
    assert_nothing_to_do(repository, engine)
    repository.edit_params(measure(VARIANT))
    assert repository.bring_up_to_date(engine) == COLLECTING
    assert (results / "benchmark" / VARIANT / "result.json").exists()
    assert_clean(repository)
