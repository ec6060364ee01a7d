"""A model's own chat template in the syntax of Ollama, which does not read the Jinja template in a GGUF file.

Ollama compares that template's text with those of some models that it knows, and takes the nearest. If none is near,
a prompt goes to the model as it is, without turns, and the model answers worse without a message. So a Modelfile needs
a TEMPLATE, written in Go's template language.

The template is taken apart by rendering conversations: what comes before the first turn, between the turns and at the
end. Put together again, these parts must render every conversation as the model's own template does.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
RESERVED = ("{{", "}}", '"""')  # what Go or the Modelfile would read otherwise
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class TemplateParts:
    """The texts around the turns of a conversation.

    Attributes:
        start: before the first user's turn, where there is no system's.
        system: before and after the system's turn; None if the template has none.
        to_assistant, to_user: between a user's turn and the assistant's answer, and the reverse.
        end: after the last user's turn, where the answer begins.
    """

    start: str
    system: tuple[str, str] | None
    to_assistant: str
    to_user: str
    end: str

    def rendered(self, messages: Messages) -> str:
        """Return a conversation that ends with a user's turn, as Ollama renders it by `go_template`."""
        system = [message["content"] for message in messages if message["role"] == SYSTEM]
        turns = [message["content"] for message in messages if message["role"] != SYSTEM]
        text = self.system[0] + system[0] + self.system[1] if system and self.system else self.start
        for place, turn in enumerate(turns):
            text += ("" if not place else self.to_assistant if place % 2 else self.to_user) + turn
        return text + self.end

    @property
    def go_template(self) -> str:
        """The template in Go's language, on one line but for the line breaks of the texts."""
        start = self.start
        if self.system:
            start = f"{{{{ if .System }}}}{self.system[0]}{{{{ .System }}}}{self.system[1]}{{{{ else }}}}{start}{{{{ end }}}}"
        return (
            f"{start}{{{{ $later := false }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{{{{ if $later }}}}{self.to_user}{{{{ end }}}}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.to_assistant}{{{{ .Content }}}}{{{{ $later = true }}}}'
            f"{{{{ end }}}}{{{{ end }}}}{self.end}"
        )


def template_parts(tokenizer: PreTrainedTokenizerBase, *, adds_bos: bool) -> TemplateParts | None:
    """Take a chat template apart; None if its conversations are not made of such parts.

    Args:
        adds_bos: whether the program that serves the model puts a BOS token first by itself.
    """

    def render(messages: Messages) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(tokenizer.bos_token or "") if adds_bos else text

    try:
        start, to_assistant, to_user, end = _around(render, _conversation(3))
        parts = TemplateParts(start, _system(render), to_assistant, to_user, end)
        for turns in (1, 3, 5):
            for system in (False, True) if parts.system else (False,):
                messages = _conversation(turns, system=system)
                if parts.rendered(messages) != render(messages):
                    return None
    except (TemplateError, ValueError):
        return None
    texts = (parts.start, *(parts.system or ()), parts.to_assistant, parts.to_user, parts.end)
    return None if any(mark in text for mark in RESERVED for text in texts) else parts


def _conversation(turns: int, *, system: bool = False) -> Messages:
    """A conversation of so many turns, from a user's to a user's, whose contents occur in no template."""
    first = [{"role": SYSTEM, "content": "@system@"}] if system else []
    return first + [
        {"role": ASSISTANT if turn % 2 else USER, "content": f"@turn{turn}@"} for turn in range(turns)
    ]


def _system(render: Callable[[Messages], str]) -> tuple[str, str] | None:
    """The texts before and after a system's turn; None if the template refuses one."""
    try:
        before, after, _ = _around(render, _conversation(1, system=True))
    except (TemplateError, ValueError):
        return None
    return before, after


def _around(render: Callable[[Messages], str], messages: Messages) -> list[str]:
    """The texts before, between and after the contents of a conversation.

    Raises:
        ValueError: a content is not there once, or not in its place.
    """
    text = render(messages)
    contents = [message["content"] for message in messages]
    places = [text.index(content) for content in contents]
    if places != sorted(places) or any(text.count(content) != 1 for content in contents):
        raise ValueError("the contents are not there in order")
    ends = [place + len(content) for place, content in zip(places, contents, strict=True)]
    inner = [text[end:place] for end, place in zip(ends, places[1:], strict=False)]
    return [text[: places[0]], *inner, text[ends[-1] :]]


def modelfile(file_name: str, parts: TemplateParts) -> str:
    """Return the Modelfile of a GGUF file beside it."""
    return f'FROM ./{file_name}\nTEMPLATE """{parts.go_template}"""\n'
