"""Try every item of a task of lm-evaluation-harness before anything is trained.

The harness scores items that have no possible right answer: a label of -1, or one past the choices, is wrong for every
model, so all runs look alike. It does not check what it writes into a prompt either: a missing text becomes "None".
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from jinja2 import nodes
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import env

# From a split, the index of an item and the number of items to how a message names the item.
Where = Callable[[str, int, int], str]


def check_items(leaf: ConfigurableTask, *, items: int | None, mapped: set[str], where: Where) -> list[str]:
    """Try every item that is scored, and every item that may be a few-shot example.

    Args:
        items: how many are scored, from the first; None for all.
        mapped: the splits that come from local files.
        where: names an item in messages.

    Returns:
        Remarks about what is suspicious but may be intended.

    Raises:
        ValueError: an item cannot be scored; the message names the first one and counts the others.
    """
    split = leaf.config.test_split if leaf.has_test_docs() else leaf.config.validation_split
    docs = leaf.eval_docs
    with _exact_templates():
        answers = _check(leaf, docs, split, limit=items, mapped=split in mapped, where=where)
        if (leaf.get_config("num_fewshot") or 0) > 0 and leaf.fewshot_cfg.samples is None:
            config = leaf.config
            split = leaf.fewshot_cfg.split or config.training_split or config.validation_split or split
            examples = leaf.fewshot_docs()
            _check(leaf, examples, split, limit=None, mapped=split in mapped, where=where, example=True)
    return _odd(leaf, answers)


@contextmanager
def _exact_templates() -> Iterator[None]:
    """Make the harness' templates refuse a missing value, and parse each template only once."""
    finalize = env.finalize
    env.finalize, env.from_string = _printable, functools.cache(env.from_string)
    try:
        yield
    finally:
        env.finalize = finalize
        del env.from_string


def _printable(value: Any) -> Any:
    if value is None:
        raise ValueError("its text has a place where the row holds nothing (null)")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"its text has a place where the row holds {value}")
    return value


def _check(leaf, docs, split: str, *, limit, mapped: bool, where: Where, example: bool = False) -> list:
    """Return the right answer of each item, with its choices; see `check_items`."""
    if mapped:
        _check_columns(leaf)
    first, refused, answers = None, 0, []
    for place, doc in enumerate(islice(docs, limit)):
        try:
            problem, answer = _item(leaf, doc, mapped=mapped, example=example)
        except Exception as error:  # templates and functions of many authors
            reason = str(error).strip().splitlines() or [type(error).__name__]
            problem, answer = f"cannot be put into the task's form ({reason[0].rstrip('.')})", None
        if problem:
            refused += 1
            first = first or f"{where(split, place, len(docs))} {problem}"
        answers.append(answer)
    if first:
        raise ValueError(first + (f" (and {refused - 1} more rows)" if refused > 1 else ""))
    return answers


def _check_columns(leaf) -> None:
    """Refuse a column that the task names and the rows lack: the harness would use its name as the text."""
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        spec = getattr(leaf.config, key)
        if isinstance(spec, str) and spec.isidentifier() and spec not in leaf.features:
            raise ValueError(f"it reads a column {spec}, and there are {', '.join(leaf.features)}")


def _item(leaf, doc: dict, *, mapped: bool, example: bool) -> tuple[str | None, Any]:
    """Return what is wrong with an item (None if nothing is), and its right answer with its choices."""
    own = leaf.fewshot_cfg if example else None
    text = leaf.doc_to_text(doc, own and own.doc_to_text)
    target = leaf.doc_to_target(doc, own and own.doc_to_target)
    if not isinstance(text, str | int):
        return f"has a prompt that is {_json(text)}, and must have text", None
    if leaf.OUTPUT_TYPE != "multiple_choice":
        return _target_problem(leaf, target, mapped=mapped), None
    choices = leaf.doc_to_choice(doc, own and own.doc_to_choice)
    by_text = (
        leaf.multiple_input
    )  # as in winogrande: the choices are prompts, and the text says which is right
    gold, name = (text, leaf.config.doc_to_text) if by_text else (target, leaf.config.doc_to_target)
    name = f"the {name}" if isinstance(name, str) and name.isidentifier() else "the right answer"
    problem = _choices_problem(choices) or _gold_problem(leaf, gold, choices, name)
    if problem is None and by_text and not isinstance(target, str):
        problem = f"has {_json(target)} to be continued with, and must have text"
    if problem is None and not example:
        requests = len(choices) * (2 if "acc_mutual_info" in leaf._metric_fn_list else 1)
        leaf.process_results(doc, [(-1.0, False)] * requests)
    return problem, (gold, choices)


def _target_problem(leaf, target: Any, *, mapped: bool) -> str | None:
    if target is None:
        return "has no right answer (null)"
    scored = leaf.OUTPUT_TYPE.startswith("loglikelihood")
    if scored and not isinstance(target, str):
        return f"is to be continued with {_json(target)}, and must be with text"
    blank = not target.strip() if isinstance(target, str) else target == []
    if blank and (scored or mapped) and leaf.config.process_results is None:
        return "has a right answer without text"
    return None


def _choices_problem(choices: Any) -> str | None:
    if not isinstance(choices, list) or len(choices) < 2:
        return f"has the choices {_json(choices)}, and must have two or more"
    for choice in choices:
        if not isinstance(choice, str):
            return f"has the choice {_json(choice)}, which is not text"
        if not choice.strip():
            return "has a choice without text"
    return None


def _gold_problem(leaf, gold: Any, choices: list[str], name: str) -> str | None:
    """Say why no choice could ever be right; a task with scoring code of its own is not checked."""
    if leaf.config.process_results is not None:
        return None
    if isinstance(gold, list) != bool(leaf.multiple_target):
        return f"has {name} {_json(gold)}, and the first row has {'a list' if leaf.multiple_target else 'none'} there"
    if gold == []:
        return f"has {name} [], and must have one"
    for label in gold if isinstance(gold, list) else [gold]:
        if isinstance(label, str) and not leaf.multiple_target:
            if label not in choices:
                return f"has {name} {_json(label)}, which is text and none of the choices {_json(choices)}"
        elif not isinstance(label, int):
            return f"has {name} {_json(label)}, and must have the number of a choice, 0 to {len(choices) - 1}"
        elif not 0 <= label < len(choices):
            return f"has {name} {_json(label)}, and its choices are numbered 0 to {len(choices) - 1}"
    return None


def _odd(leaf, answers: list) -> list[str]:
    """Return remarks about what may be intended, but may also be a mistake in the file."""
    answers = [answer for answer in answers if answer]
    single = [(gold, choices) for gold, choices in answers if not isinstance(gold, list)]
    notes = []
    from_rows = not isinstance(leaf.config.doc_to_target, int) and leaf.config.process_results is None
    if from_rows and len(single) > 2 and len({gold for gold, _ in single}) == 1:
        notes.append(f"the right answer of all {len(single)} items is {_json(single[0][0])}")
    twice = sum(
        choices.count(gold if isinstance(gold, str) else choices[gold]) > 1 for gold, choices in single
    ) if from_rows else 0  # fmt: skip
    if twice:
        notes.append(f"{twice} of {len(answers)} items have the right choice twice")
    return notes


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def columns_used_as_numbers(template: str) -> set[str]:
    """Return the columns that a template calculates with: as an index, or compared with or added to a number."""
    columns: set[str] = set()

    def add(*expressions: nodes.Node) -> None:
        columns.update(each.name for each in expressions if isinstance(each, nodes.Name))

    tree = env.parse(template)
    for item in tree.find_all(nodes.Getitem):
        add(item.arg)
    for comparison in tree.find_all(nodes.Compare):
        sides = [comparison.expr, *(operand.expr for operand in comparison.ops)]
        if any(isinstance(side, nodes.Const) and isinstance(side.value, int) for side in sides):
            add(*sides)
    for sum_ in tree.find_all(nodes.BinExpr):
        if any(
            isinstance(side, nodes.Const) and isinstance(side.value, int) for side in (sum_.left, sum_.right)
        ):
            add(sum_.left, sum_.right)
    return columns
