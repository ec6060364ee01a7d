"""The work of others on a machine, told apart from that of the process that measures."""

from types import SimpleNamespace

import psutil
import pytest

from workflow.cost import load


class Machine:
    """Two cores of four, and counters that a test moves on."""

    def __init__(self):
        self.seconds, self.own, self.core = 0.0, 0.0, [0.0] * 4

    def process(self):
        return SimpleNamespace(
            cpu_affinity=lambda: [1, 3],
            cpu_times=lambda: SimpleNamespace(
                user=self.own, system=0.0, children_user=0.0, children_system=0.0
            ),
            children=lambda recursive: [],
        )

    def times(self, percpu: bool):
        assert percpu
        return [SimpleNamespace(user=busy, system=0.0, idle=9.0, steal=0.0) for busy in self.core]


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(psutil, "Process", machine.process)
    monkeypatch.setattr(psutil, "cpu_times", machine.times)
    monkeypatch.setattr(load.time, "monotonic", lambda: machine.seconds)
    return machine


def test_the_work_of_others_is_what_the_own_process_does_not_explain(machine):
    with load.measured() as measured:
        machine.seconds, machine.own, machine.core = 10.0, 12.0, [10.0, 9.0, 10.0, 8.0]
    assert (measured.cores, measured.seconds) == (2, 10.0)
    assert measured.cores_of_others == pytest.approx((9 + 8 - 12) / 10)


def test_counters_that_lag_behind_give_no_negative_load(machine):
    with load.measured() as measured:
        machine.seconds, machine.own, machine.core = 10.0, 12.0, [0.0, 6.0, 0.0, 5.9]
    assert measured.cores_of_others == 0


def test_a_real_machine_has_a_load_within_its_cores():
    with load.measured() as measured:
        sum(range(3_000_000))
    assert 0 <= measured.cores_of_others <= measured.cores <= psutil.cpu_count()
    assert measured.seconds > 0 and measured.load_average_after >= 0
