"""What libraries compute anew at every call, and what no test changes, is computed once in a process and its forks."""

import functools
from pathlib import Path


def compute_once() -> None:
    """Keep lm-evaluation-harness' index of its own tasks, and its description of this machine.

    The first is read from thousands of files, the second from a dozen programs.
    """
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex
    from torch.utils import collect_env

    build, folder = TaskIndex.build, Path(lm_eval.tasks.__file__).parent
    own = functools.cache(lambda: build([folder]))
    TaskIndex.build = staticmethod(
        lambda paths: (own() if folder in paths else {}) | build([path for path in paths if path != folder])
    )
    collect_env.get_pretty_env_info = functools.cache(collect_env.get_pretty_env_info)


def compute_now() -> None:
    """Do the same, and compute it, so that forks have it."""
    import lm_eval.tasks
    from torch.utils import collect_env

    compute_once()
    lm_eval.tasks.TaskManager()
    collect_env.get_pretty_env_info()
