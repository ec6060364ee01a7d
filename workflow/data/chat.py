"""Chat templates: choose one for a model, and render conversations with it.

A template is written in jinja, which transformers renders in a sandbox: it turns messages into text and can do nothing
else. It is stored in a form whose text depends on the messages alone. The date that it prints is a constant, even for
those who load the saved model with another library.
"""

import ast
import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, TemplateSyntaxError

from workflow.data.model_files import json_object, load_tokenizer, special_ids
from workflow.params import CHAT_TEMPLATES
from workflow.runtime.errors import UserError
from workflow.runtime.files import write_json

SECONDS = 20  # after which a template is considered to run forever
FALLBACK = "instruction"  # for a model without a template of its own
OWN = "the model's own"
PROBE = [{"role": "user", "content": "What grows on trees?"}]
RESPONSE = "Apples and pears."
# The text before a template that uses the date. Jinja drops the newline at its end, so the template still begins a line.
FIXED_DATE = re.compile(r"\A\{#- The date is fixed\. -#\}[^\n]*\{%- set chat_date = \"[0-9-]+\" %\}\n")
DATE_FORMAT = re.compile(r"%[-_0^#]?[A-Za-z]")
LLAMA_FORMAT = "%d %b %Y"  # of `date_string`, which llama.cpp sets to today's date


def write_template(choice: str, folder: Path, *, date: str, end_token: str | None) -> dict[str, str]:
    """Choose chat template and end token for the tokenizer in `folder`, try them, and store both.

    Args:
        choice: `model` for the model's own, or the name of a file in workflow/data/chat_templates.
        date: YYYY-MM-DD, which the template prints in place of today's date.
        end_token: closes an answer. None for the tokenizer's own or, if the template does not write that one, for the
            token of generation_config.json that it writes.

    Returns:
        `chat_template`, the name of the choice, and `end_token`.

    Raises:
        UserError: a run could not learn from what the template makes of a question and its answer.
    """
    tokenizer = load_tokenizer(folder)
    before = (tokenizer.chat_template, tokenizer.eos_token)
    template = _default_of(tokenizer.chat_template)
    if choice == "model" and template:
        name = OWN
    else:
        path = CHAT_TEMPLATES / f"{FALLBACK if choice == 'model' else choice}.jinja"
        template = path.read_text(encoding="utf-8").rstrip("\n")
        name = str(path.relative_to(CHAT_TEMPLATES.parents[2]))
    try:
        tokenizer.chat_template = with_fixed_date(template, date)
        with _time_limit():
            tokenizer.eos_token = _end_token(tokenizer, folder, end_token)
            render(PROBE, RESPONSE, tokenizer)
    except UserError as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"model.chat_template is {choice} ({name}), and {reason}; "
            "docs/your_own.md says what a template must do, and how to name another."
        ) from None
    if (tokenizer.chat_template, tokenizer.eos_token) != before:
        tokenizer.save_pretrained(folder)
        _forget_end_token(folder / "special_tokens_map.json", tokenizer.eos_token)
    _stop_at(tokenizer.eos_token_id, folder)
    return {"chat_template": name, "end_token": tokenizer.eos_token}


def _default_of(template: str | dict[str, str] | None) -> str | None:
    """Return the template for plain conversations of a tokenizer that may have several, as for tools or documents."""
    return template.get("default") if isinstance(template, dict) else template


def with_fixed_date(template: str, date: str) -> str:
    """Return a template that prints this date in place of today's; one that prints no date is not changed.

    transformers, vLLM and llama.cpp pass `strftime_now` to templates, and llama.cpp passes `date_string` to those of
    Llama 3. Both are redefined before the template, so that every library renders the same text on every day.

    Args:
        date: YYYY-MM-DD.

    Raises:
        UserError: the template draws at random.
    """
    template = FIXED_DATE.sub("", template)
    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(template) if kind != "whitespace"]
    except TemplateSyntaxError:
        return template  # rendering it says what is wrong
    names = {text for kind, text in tokens if kind == "name"}
    words = [text for _, text in tokens]
    if "lipsum" in names or ("|", "random") in pairwise(words):
        raise UserError(
            "the chat template draws at random (jinja's random or lipsum), so no two runs would learn one prompt."
        )
    day = datetime.fromisoformat(date)
    lines = []
    if "strftime_now" in names:
        formats = dict.fromkeys(
            ast.literal_eval(text) for kind, text in tokens if kind == "string" and DATE_FORMAT.search(text)
        )
        cases = "".join(
            f"{{%- if format == {_quoted(each)} -%}}{{{{- {_quoted(day.strftime(each))} -}}}}{{%- else -%}}"
            for each in formats
        )
        lines.append(
            f"{{%- macro strftime_now(format) -%}}{cases}"
            "{{- raise_exception('it puts the format of its date together from parts') -}}"
            + "{%- endif -%}" * len(formats)
            + "{%- endmacro -%}"
        )
    if any(words[place : place + 3] == ["set", "date_string", "="] for place in range(len(words))):
        own = re.search(r"""date_string\s*=\s*strftime_now\((['"])(.*?)\1\)""", template)
        value = day.strftime(own[2] if own else LLAMA_FORMAT)
        lines.append(f"{{%- set date_string = {_quoted(value)} -%}}")
    if not lines:
        return template
    return f'{{#- The date is fixed. -#}}{"".join(lines)}{{%- set chat_date = "{date}" %}}\n{template}'


def _quoted(text: str) -> str:
    """Return a text as a jinja literal."""
    return json.dumps(text, ensure_ascii=False)


def _end_token(tokenizer, folder: Path, choice: str | None) -> str:
    """Return the token that closes an answer: the one in params, or the first of the model's that the template writes.

    Raises:
        UserError: it is not a special token of this tokenizer, or there is none.
    """
    if choice is not None:
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] not in special_ids(tokenizer):
            raise UserError(
                f"model.end_token is {choice}, which is no special token of the model's tokenizer."
            )
        return choice
    stops = _stops(folder / "generation_config.json") or _stops(folder / "config.json")
    vocabulary = set(tokenizer.get_vocab().values())
    named = tokenizer.convert_ids_to_tokens([number for number in stops if number in vocabulary])
    tokens = list(dict.fromkeys([*([tokenizer.eos_token] if tokenizer.eos_token else []), *named]))
    if not tokens:
        raise UserError(
            "the model's tokenizer has no end token (eos_token in tokenizer_config.json), nor has generation_config.json "
            "(eos_token_id), so no run could learn to stop; name one as model.end_token."
        )
    if not tokenizer.eos_token:
        tokenizer.eos_token = tokens[0]
    written = _after_response(tokenizer)
    return next((token for token in tokens if token in written), tokens[0])


def _after_response(tokenizer) -> str:
    """Return what the template writes after a response."""
    return whole(PROBE, RESPONSE, tokenizer).rpartition(RESPONSE)[2]


def _stops(file: Path) -> list[int]:
    """Return the end tokens that a file of the model names."""
    ids = json_object(file).get("eos_token_id") if file.exists() else None
    return [number for number in (ids if isinstance(ids, list) else [ids]) if isinstance(number, int)]


def _stop_at(end: int, folder: Path) -> None:
    """Add this token to those at which generation stops, in generation_config.json."""
    file = folder / "generation_config.json"
    config = json_object(folder / "config.json")
    content = (
        json_object(file)
        if file.exists()
        else {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    )
    stops = _stops(file) or _stops(folder / "config.json")
    if end not in stops:
        write_json(file, content | {"eos_token_id": [end, *stops]})


def _forget_end_token(file: Path, end_token: str) -> None:
    """Write the end token to the file where older versions of transformers look for it, if there is one."""
    if file.exists() and (content := json_object(file)).get("eos_token") not in (None, end_token):
        write_json(file, content | {"eos_token": end_token})


@contextmanager
def _time_limit() -> Iterator[None]:
    """Stop the block with a TimeoutError after SECONDS, since the sandbox allows endless loops."""

    def end(number, frame):
        raise TimeoutError(f"it is not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def render(prompt: list[dict], response: str, tokenizer) -> tuple[str, str]:
    """Return the prompt as text, and the text that the template writes between it and the response (usually none).

    Runs are trained on both: TRL renders the prompt followed by the response, and learns what follows the prompt.

    Args:
        prompt: messages with `role` and `content`, the last one from the user.

    Raises:
        UserError: the template refuses the messages, changes the prompt once a response follows it, omits the
            response or a part of it, or does not close it with the tokenizer's end token.
    """
    before = _applied(prompt, tokenizer, add_generation_prompt=True)
    after = whole(prompt, response, tokenizer)
    if not after.startswith(before):
        raise UserError(
            "the chat template writes the prompt in another way once the response follows it, "
            "so a run would not be scored on what it learns."
        )
    completion = after[len(before) :]
    body, end, _ = completion.rpartition(tokenizer.eos_token or "\0")
    if tokenizer.eos_token and tokenizer.eos_token in response:
        raise UserError(
            f"the response holds the end token {tokenizer.eos_token}, so a run would learn to stop in its middle."
        )
    if response not in completion:
        raise UserError("the chat template leaves out the response, or a part of it.")
    if not end or response not in body:
        raise UserError(
            f"the chat template does not close the response with the end token {tokenizer.eos_token}, "
            "so a run would not learn to stop"
            + _other_end(completion.rpartition(response)[2], tokenizer)
            + "."
        )
    return before, body[: body.rfind(response)]


def whole(prompt: list[dict], response: str, tokenizer) -> str:
    """Return the text of a prompt with its response, which a run is trained on.

    Raises:
        UserError: the template refuses the messages.
    """
    return _applied([*prompt, {"role": "assistant", "content": response}], tokenizer)


def _applied(messages: list[dict], tokenizer, *, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:  # a template may raise anything, such as a ZeroDivisionError
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(f"the chat template stops with: {reason}.") from None


def _other_end(tail: str, tokenizer) -> str:
    """Name the special token that closes a response in place of the end token, to end a sentence."""
    ids = tokenizer(tail.strip(), add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in special_ids(tokenizer):
        return ""
    return f"; it closes it with {tokenizer.convert_ids_to_tokens(ids[0])}, which model.end_token may name"


def begins_with_bos(tokenizer) -> bool:
    """Whether the chat template begins a conversation with the tokenizer's BOS token."""
    text = tokenizer.apply_chat_template(PROBE, add_generation_prompt=True, tokenize=False)
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def leading(ids: list[int], token: int | None) -> int:
    """Count how often this token is repeated at the beginning of a row."""
    return next((place for place, other in enumerate(ids) if other != token), len(ids))


def parting(text: str, other: str) -> str:
    """Quote both texts where they begin to differ, to end a sentence."""
    place = next(
        (n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
    )
    start = max(0, place - 20)
    return f"{text[start : place + 20]!r} and {other[start : place + 20]!r} (from character {start + 1})"
