"""What `python -m workflow.pipeline dvc` adds to DVC, whose own code it wraps for as long as one command runs.

A stage's own guard (workflow/runtime/inputs.py) ends with the stage; DVC takes params and dependencies down after it. So they are
looked at before the command too, and nothing is recorded where the two looks differ. An entry of the run cache has
the digest of its content for a name, and so has the list of a folder's files in the cache; DVC looks at neither. A damaged
one is removed, and its stage runs.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvc.exceptions import DvcException
from dvc.stage import Stage
from dvc.stage import cache as run_cache
from dvc.stage import run as runner
from dvc_data.hashfile.db.local import LocalHashFileDB
from dvc_data.hashfile.tree import Tree
from dvc_objects.errors import ObjectFormatError

from workflow.runtime.inputs import differences, shown
from workflow.runtime.stage import FAILED, say

Look = dict[str, Any]  # by dependency, what DVC knows it by: a digest, or params by key


@contextmanager
def guarded() -> Iterator[None]:
    """Within the block DVC records of a stage only what was there before its command and after it."""
    looks: dict[str, Look] = {}
    replaced = [
        (runner, "cmd_run", _looking(runner.cmd_run, looks)),
        (Stage, "save_deps", _comparing(Stage.save_deps, looks)),
        (run_cache.StageCache, "_load_cache", _checking(run_cache.StageCache._load_cache)),
        (Tree, "load", classmethod(_checking_list(Tree.load.__func__))),
    ]
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _looking(cmd_run: Callable, looks: dict[str, Look]) -> Callable:
    def look_and_run(stage: Stage, dry: bool = False, **options: Any) -> None:
        if not dry:
            looks[stage.addressing] = {dep.def_path: dep.get_hash().value for dep in stage.deps if dep.exists}
        try:
            cmd_run(stage, dry=dry, **options)
        except BaseException:
            looks.pop(stage.addressing, None)
            raise

    return look_and_run


def _comparing(save_deps: Callable, looks: dict[str, Look]) -> Callable:
    def save_and_compare(stage: Stage, **options: Any) -> None:
        save_deps(stage, **options)
        before = looks.pop(stage.addressing, None)
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
                yield f"{name} in {path} from {shown(old)} to {shown(new)}"
    elif before != after:
        yield path


def _checking(load_cache: Callable) -> Callable:
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


def _checking_list(load: Callable) -> Callable:
    def load_and_check(cls: type[Tree], odb: Any, hash_info: Any, **options: Any) -> Tree:
        try:
            tree = load(cls, odb, hash_info, **options)
            md5 = hashlib.md5(tree.as_bytes(), usedforsecurity=False).hexdigest() + ".dir"
            if md5 == hash_info.value:
                return tree
        except (ObjectFormatError, LookupError, TypeError, ValueError):  # what reading damaged text raises
            pass
        place = Path(odb.oid_to_path(hash_info.value))
        if isinstance(odb, LocalHashFileDB):
            place.unlink(missing_ok=True)
            say(f"removed {place}: this list of files in DVC's cache was damaged")
        raise ObjectFormatError(f"{place} is damaged")

    return load_and_check
