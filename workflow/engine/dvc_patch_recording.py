"""Patches of DVC's private functions that decide what DVC records of a stage and which cache entries it trusts.

Written against DVC 3.67; another version may need other patches. In `python -m workflow.pipeline dvc`

- `stage.run.cmd_run` and `Stage.save_deps` record nothing if params or dependencies were edited while the command ran.
  A stage checks its own inputs (workflow/runtime/inputs.py), but that ends with the stage, and DVC only hashes them after it;
- `StageCache._load_cache` and `Tree.load` (of dvc-data) remove an entry of the run cache or a list of a folder's files
  whose content does not match the digest in its name, so that its stage runs again. DVC never checks.

`dvc_patch_state` holds the patches of how DVC writes its state.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.stage import Stage
from dvc.stage import cache as run_cache
from dvc.stage import run as runner
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_data.hashfile.tree import Tree
from dvc_objects.errors import ObjectFormatError

from workflow.engine.dvc_patch_state import replaced
from workflow.runtime.inputs import differences, quote
from workflow.runtime.stage import FAILED, say

# Of each dependency of a stage, by path: its digest, or the params by key.
State = dict[str, Any]


@contextmanager
def applied() -> Iterator[None]:
    """Patch what DVC records and trusts while the block runs."""
    states: dict[str, State] = {}
    with ExitStack() as stack:
        for owner, name, replacement in (
            (runner, "cmd_run", _note_state(runner.cmd_run, states)),
            (Stage, "save_deps", _compare_state(Stage.save_deps, states)),
            (run_cache.StageCache, "_load_cache", _check_entry(run_cache.StageCache._load_cache)),
            (Tree, "load", classmethod(_check_listing(Tree.load.__func__))),
        ):
            stack.enter_context(replaced(owner, name, replacement))
        yield


def _note_state(cmd_run: Callable, states: dict[str, State]) -> Callable:
    """Return a function that notes a stage's dependencies before it runs the stage's command."""

    def note_and_run(stage: Stage, dry: bool = False, **options: Any) -> None:
        if not dry:
            states[stage.addressing] = {
                dep.def_path: dep.get_hash().value for dep in stage.deps if dep.exists
            }
        try:
            cmd_run(stage, dry=dry, **options)
        except BaseException:
            states.pop(stage.addressing, None)
            raise

    return note_and_run


def _compare_state(save_deps: Callable, states: dict[str, State]) -> Callable:
    """Return a method that fails if a dependency is not what it was before the command."""

    def save_and_compare(stage: Stage, **options: Any) -> None:
        save_deps(stage, **options)
        before = states.pop(stage.addressing, None)
        if before is None:
            return
        changes = [
            change
            for dep in stage.deps
            for change in _changes(dep.def_path, before.get(dep.def_path), dep.hash_info.value)
        ]
        if changes:
            raise DvcException(
                f"{stage.addressing}: {FAILED}: what it reads was edited while it ran, so nothing is recorded and the next run "
                f"makes it again: {'; '.join(changes)}."
            )

    return save_and_compare


def _changes(path: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):  # params
        for key in before | after:
            for name, old, new in differences(before.get(key), after.get(key), key):
                yield f"{name} in {path} from {quote(old)} to {quote(new)}"
    elif before != after:
        yield path


def _check_entry(load_cache: Callable) -> Callable:
    """Return a method that loads an entry of the run cache, and removes it if it is damaged."""

    def load_and_check(cache: run_cache.StageCache, key: str, value: str) -> dict | None:
        try:
            entry = load_cache(cache, key, value)
            if entry is None or run_cache._get_cache_hash(entry) == value:
                return entry
        except Exception:  # whatever a reader of YAML or of entries raises on damaged text
            pass
        path = Path(cache._get_cache_path(key, value))
        path.unlink(missing_ok=True)
        say(f"removed {path}: this entry of DVC's run cache was damaged, so its stage runs again")
        return None

    return load_and_check


def _check_listing(load: Callable) -> Callable:
    """Return a method that loads the list of a folder's files from the cache, and removes it if it is damaged."""

    def load_and_check(cls: type[Tree], odb: Any, hash_info: Any, **options: Any) -> Tree:
        try:
            tree = load(cls, odb, hash_info, **options)
            md5 = hashlib.md5(tree.as_bytes(), usedforsecurity=False).hexdigest() + ".dir"
            if md5 == hash_info.value:
                return tree
        except (ObjectFormatError, LookupError, TypeError, ValueError):  # what reading damaged text raises
            pass
        path = Path(odb.oid_to_path(hash_info.value))
        if isinstance(odb, LocalHashFileDB):
            path.unlink(missing_ok=True)
            say(f"removed {path}: this list of files in DVC's cache was damaged")
        raise ObjectFormatError(f"{path} is damaged")

    return load_and_check
