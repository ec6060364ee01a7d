"""A learning rate that is tried trains itself alone, and a choice that does not change trains no run."""

import pytest
from engine_fixture import (
    ENGINES,
    OTHER,
    VARIANT,
    add_variant,
    assert_clean,
    assert_nothing_to_do,
    push_and_clone,
)

CHOOSING = ["candidates", "rates", "report"]
AFTER_ANOTHER_CHOICE = [
    "compare",
    f"divergence@{VARIANT}-{VARIANT}-1",
    f"evaluate@{VARIANT}-1",
    "report",
    f"train@{VARIANT}-1",
]


def trying(**rates: float):
    """Rates that are tried for the baseline."""

    def change(params: dict) -> None:
        params["tuning"] = {
            "candidates": {name: {"variant": VARIANT, "learning_rate": rate} for name, rate in rates.items()},
            "seeds": [11],
        }

    return change


@pytest.mark.parametrize("engine", ENGINES)
def test_a_new_candidate_trains_itself_alone(repository, engine):
    repository.edit_params(trying(low=1e-4, high=1e-3))
    assert repository.bring_up_to_date(engine) == [*CHOOSING, "sample", "tune@high", "tune@low"]
    assert_clean(repository)
    repository.edit_params(trying(low=1e-4, high=1e-3, higher=3e-3))
    assert repository.bring_up_to_date(engine) == [*CHOOSING, "tune@higher"]
    assert_clean(repository)
    repository.edit_params(trying(low=3e-4, high=1e-3, higher=3e-3))
    assert repository.bring_up_to_date(engine) == [*CHOOSING, "tune@low"]
    assert_nothing_to_do(repository, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_changed_choice_trains_the_runs_of_its_variant_alone(repository, engine):
    def edit(params: dict) -> None:
        add_variant(params)
        trying(low=1e-4, high=1e-3)(params)

    repository.edit_params(edit)
    repository.bring_up_to_date(engine)
    (repository.control / f"rate {VARIANT}").write_text("another")
    repository.edit_params(trying(low=1e-4, high=1e-3, higher=3e-3))
    with_other = [*AFTER_ANOTHER_CHOICE, f"divergence@{OTHER}-{VARIANT}-1"]  # whose reference it is
    assert repository.bring_up_to_date(engine) == sorted([*with_other, "candidates", "rates", "tune@higher"])
    assert_clean(repository)


def test_the_shared_rate_of_the_runs_is_none_of_a_candidates(repository):
    repository.edit_params(trying(low=1e-4, high=1e-3))
    repository.bring_up_to_date("dvc")

    def by_name(params: dict) -> None:
        params["training"]["schedule"]["learning_rate"] = VARIANT

    repository.edit_params(by_name)
    assert repository.bring_up_to_date("dvc") == sorted([*AFTER_ANOTHER_CHOICE, "rates"])


def test_another_shared_setting_tries_every_candidate_again(repository):
    repository.edit_params(trying(low=1e-4, high=1e-3))
    repository.bring_up_to_date("dvc")

    def more_steps(params: dict) -> None:
        params["training"]["schedule"]["steps"] += 1

    repository.edit_params(more_steps)
    assert {"tune@high", "tune@low", "rates", f"train@{VARIANT}-1"} < set(repository.bring_up_to_date("dvc"))


def test_a_candidate_that_is_no_more_is_pruned(repository):
    repository.edit_params(trying(low=1e-4, high=1e-3, higher=3e-3))
    repository.bring_up_to_date("dvc")
    repository.edit_params(trying(low=1e-4, high=1e-3))
    assert "tune@higher is no longer in dvc.yaml" in repository.prune()
    assert not (repository.root / "results/tune/higher/result.json").exists()
    assert repository.bring_up_to_date("dvc") == CHOOSING
    assert_clean(repository)
    repository.edit_params(trying(low=1e-4, high=1e-3, higher=3e-3))
    assert repository.bring_up_to_date("dvc") == ["report"]  # all else comes from the cache


def test_a_clone_takes_candidates_and_choice_from_the_remote(repository, tmp_path):
    repository.edit_params(trying(low=1e-4, high=1e-3))
    repository.bring_up_to_date("dvc")
    clone = push_and_clone(repository, tmp_path)
    clone.dvc("pull", "--quiet")
    assert_nothing_to_do(clone, "snakemake")


def test_a_rate_that_was_changed_by_hand_stops_the_training_that_reads_it(repository):
    file = repository.root / "results/rates/variants" / f"{VARIANT}.json"
    file.unlink()
    file.write_text("by hand")
    said = repository.dvc("repro", "--single-item", "--force", f"train@{VARIANT}-1", fails=True)
    assert f"{VARIANT}.json is damaged or was changed" in said
