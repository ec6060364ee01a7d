"""Stage fetch_tasks: get every evaluation task's data and load it, before anything is trained."""

from workflow import params
from workflow.runtime.files import write_json, write_text
from workflow.runtime.paths import LOADED_TASKS, TASKS_READY
from workflow.runtime.stage import run_stage, say


def fetch_tasks() -> None:
    """Load every task that params.yaml names, so that one that cannot be loaded stops the run here."""
    evaluation = params.load().evaluation
    from workflow.evaluation import harness, task_data

    tasks = task_data.fetch(evaluation)
    for task in tasks:
        say(f"  {task['leaf']}: {task['items']} items from {task['dataset']}")
    write_json(LOADED_TASKS, {"harness": harness.NAME, "tasks": tasks})
    # Trainings wait for this file. It never changes, so editing the tasks does not retrain anything.
    write_text(TASKS_READY, "Every task can be loaded.\n")


if __name__ == "__main__":
    run_stage("fetch_tasks", fetch_tasks, network=True)
