"""The command `python -m workflow.plan`, in the process of the test."""

from workflow.cost import plan


def run_plan(capsys, monkeypatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    plan.main()
    return capsys.readouterr().out
