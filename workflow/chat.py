"""Chat templates: which one a model gets, and what it makes of a conversation.

A template is jinja, which transformers renders in a sandbox: it turns messages into text and can do nothing else.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workflow.errors import UserError
from workflow.model_files import load_tokenizer
from workflow.params import CHAT_TEMPLATES

SECONDS = 20  # after which a template is taken to go on for ever
FALLBACK = "instruction"  # for a model without a template of its own
PROBE = [{"role": "user", "content": "What grows on trees?"}]


def write_template(choice: str, folder: Path) -> str:
    """Give the tokenizer in `folder` its chat template, try it, and return which one it now has.

    Args:
        choice: `model` for the model's own, or the name of a file of workflow/chat_templates.

    Raises:
        UserError: no run could learn from what the template makes of a question and its answer.
    """
    tokenizer = load_tokenizer(folder)
    if choice == "model" and tokenizer.chat_template:
        which = "the model's own"
    else:
        path = CHAT_TEMPLATES / f"{FALLBACK if choice == 'model' else choice}.jinja"
        tokenizer.chat_template = path.read_text(encoding="utf-8").rstrip("\n")
        which = str(path.relative_to(CHAT_TEMPLATES.parents[1]))
    try:
        with _time_limit():
            render(PROBE, "Apples and pears.", tokenizer)
    except UserError as error:
        why = str(error).rstrip(".")
        raise UserError(
            f"model.chat_template is {choice} ({which}), and {why}; "
            "docs/your_own.md says what a template must do, and how to name another."
        ) from None
    if which != "the model's own":
        tokenizer.save_pretrained(folder)
    return which


@contextmanager
def _time_limit() -> Iterator[None]:
    """End what runs inside the block by a TimeoutError: the sandbox lets a template repeat itself without end."""

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
    """The prompt as text, and the text that the template puts between it and the response (mostly none).

    Both are what a run is trained on: TRL renders the prompt with the response behind it, and learns what follows
    the prompt.

    Args:
        prompt: messages with `role` and `content`, the last of the user.

    Raises:
        UserError: the template refuses the messages, writes the prompt in another way once a response follows,
            leaves the response or a part of it out, or does not close it with the tokenizer's end token.
    """
    whole = [*prompt, {"role": "assistant", "content": response}]
    try:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        after = tokenizer.apply_chat_template(whole, tokenize=False)
    except Exception as error:  # a template may raise anything, as by a division by zero
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(f"the chat template stops with: {reason}.") from None
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
            "so a run would not learn to stop."
        )
    return before, body[: body.rfind(response)]


def begins_with_bos(tokenizer) -> bool:
    """Whether the chat template begins a conversation with the tokenizer's BOS token: it has it once, or not at all."""
    text = tokenizer.apply_chat_template(PROBE, add_generation_prompt=True, tokenize=False)
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def leading(ids: list[int], token: int | None) -> int:
    """How many times a row of tokens begins with this one."""
    return next((place for place, found in enumerate(ids) if found != token), len(ids))
