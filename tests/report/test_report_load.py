"""The page says when a benchmark was taken on a busy machine, or ran at another speed than the trainings."""

from types import SimpleNamespace

from workflow.comparison.records import LoadRecord
from workflow.report.sections import cost


def facts(*, others: float | None, benchmark: float, training: float):
    """Two variants, of which the second has these; of the first, the machine was idle and its speeds are the same."""
    quiet, busy = (
        SimpleNamespace(
            name=name, label=name.upper(), trained=[SimpleNamespace(tokens_seen=tokens * 10, seconds=10.0)]
        )
        for name, tokens in (("a", 100.0), ("b", training))
    )
    loads = {
        "a": LoadRecord(cores=4, cores_of_others=0.2),
        "b": others and LoadRecord(cores=4, cores_of_others=others),
    }
    speeds = {"a": 110.0, "b": benchmark}
    return SimpleNamespace(
        variants=[quiet, busy],
        benchmarks={
            name: SimpleNamespace(load=loads[name], value_of=lambda metric, name=name: speeds[name])
            for name in speeds
        },
    )


def test_a_busy_machine_is_told_with_the_variants_it_was_busy_for():
    sentence = cost.load_sentence(facts(others=1.6, benchmark=100.0, training=100.0))
    assert "other processes kept cores busy, on average 1.6 of 4 for B." in sentence


def test_a_quiet_machine_and_an_older_record_say_nothing():
    assert cost.load_sentence(facts(others=0.3, benchmark=100.0, training=100.0)) == ""
    assert cost.load_sentence(facts(others=None, benchmark=100.0, training=100.0)) == ""


def test_the_speed_of_the_trainings_stands_beside_the_benchmarks():
    slow = facts(others=None, benchmark=60.0, training=180.0)
    assert cost.speed_sentence(slow).endswith("reached 110 and 100 for A and 60 and 180 for B.")
    assert cost.speed_warning(slow).startswith("The two differ by more than a factor of 1.5 for B: ")
    assert cost.speed_warning(facts(others=None, benchmark=130.0, training=180.0)) == ""
