"""A learning rate that is tried trains itself alone, and a choice that does not change trains no run."""

import json

import pytest
from engine_fixture import (
    ENGINES,
    OTHER,
    VARIANT,
    Repository,
    add_unmeasured_variant,
    assert_clean,
    assert_nothing_to_do,
    push_and_clone,
)

CHOOSING = ["candidates", "rates", "report"]
TRAINED_WITH_THE_RATE = [f"divergence@{VARIANT}-{VARIANT}-1", f"evaluate@{VARIANT}-1", f"train@{VARIANT}-1"]
# Its reference is the baseline's run, so it follows another training of that.
AGAINST_THE_BASELINE = f"divergence@{OTHER}-{VARIANT}-1"
OF_OTHER = [AGAINST_THE_BASELINE, f"evaluate@{OTHER}-1", f"evaluate_base@{OTHER}", f"train@{OTHER}-1"]


def trying(**rates: float):
    """Rates that are tried for the baseline."""

    def change(params: dict) -> None:
        params["tuning"] = {
            "candidates": {name: {"variant": VARIANT, "learning_rate": rate} for name, rate in rates.items()},
            "seeds": [11],
        }

    return change


@pytest.fixture(scope="module")
def tried(finished, tmp_path_factory) -> Repository:
    """Two variants, and two rates that Snakemake tried for the baseline; copied, never changed."""
    repository = finished.copy(tmp_path_factory.mktemp("tried"))
    repository.edit_params(add_unmeasured_variant)
    repository.edit_params(trying(low=1e-4, high=1e-3))
    ran = repository.bring_up_to_date("snakemake")
    assert ran == sorted([*CHOOSING, "compare", "sample", "try_model", "tune@high", "tune@low", *OF_OTHER])
    assert_clean(repository)
    return repository


@pytest.fixture
def repository(tried, tmp_path) -> Repository:
    return tried.copy(tmp_path / "copy")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_candidate_trains_itself_alone_and_another_choice_the_runs_of_its_variant_alone(repository, engine):
    repository.edit_params(trying(low=1e-4, high=1e-3, higher=3e-3))
    assert repository.bring_up_to_date(engine) == [*CHOOSING, "tune@higher"]
    assert_clean(repository)
    repository.edit_params(trying(low=3e-4, high=1e-3, higher=3e-3))
    (repository.control / f"rate {VARIANT}").write_text("another")
    assert repository.bring_up_to_date(engine) == sorted(
        [*CHOOSING, "compare", "tune@low", *TRAINED_WITH_THE_RATE, AGAINST_THE_BASELINE]
    )
    assert_nothing_to_do(repository, engine)


def set_schedule(**changes):
    def change(params: dict) -> None:
        params["training"]["schedule"] |= changes

    return change


@pytest.mark.parametrize(
    ("edit", "tried_again"),
    [
        pytest.param(set_schedule(learning_rate=VARIANT), [], id="the rate of the runs"),
        pytest.param(set_schedule(warmup_fraction=0.5), ["tune@high", "tune@low"], id="any other"),
    ],
)
def test_a_shared_setting_tries_every_candidate_again_unless_it_is_the_rate_of_the_runs(
    repository, edit, tried_again
):
    repository.edit_params(edit)
    stale = set(json.loads(repository.dvc("status", "--json")))
    assert {f"train@{VARIANT}-1", f"train@{OTHER}-1"} < stale
    assert sorted(stage for stage in stale if stage.startswith("tune@")) == tried_again


def test_a_candidate_that_is_no_more_is_pruned(repository):
    repository.edit_params(trying(low=1e-4, high=1e-3, higher=3e-3))
    assert repository.bring_up_to_date("dvc") == [*CHOOSING, "tune@higher"]
    repository.edit_params(trying(low=1e-4, high=1e-3))
    assert "tune@higher is no longer in dvc.yaml" in repository.prune()
    assert not (repository.root / "results/tune/higher/result.json").exists()
    assert repository.bring_up_to_date("dvc") == ["report"]  # all else comes from the cache
    assert_clean(repository)


def test_a_clone_takes_candidates_and_choice_from_the_remote(repository, tmp_path):
    clone = push_and_clone(repository, tmp_path)
    clone.dvc("pull", "--quiet")
    assert_nothing_to_do(clone, "snakemake")


def test_a_rate_that_was_changed_by_hand_stops_the_training_that_reads_it(repository):
    file = repository.root / "results/rates/variants" / f"{VARIANT}.json"
    file.unlink()
    file.write_text("by hand")
    said = repository.dvc("repro", "--single-item", "--force", f"train@{VARIANT}-1", fails=True)
    assert f"{VARIANT}.json is damaged or was changed" in said
