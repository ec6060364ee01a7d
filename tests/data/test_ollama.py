"""The chat template in Ollama's language renders what the model's own does."""

import pytest
from conftest import ROOT
from jinja2 import Environment
from transformers import AutoTokenizer
from turn_templates import GEMMA, LLAMA_3, QWEN

from workflow.data import ollama

SYSTEM_LESS = "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' else '' }}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
OWN = {
    path.stem: path.read_text() for path in sorted((ROOT / "workflow/data/chat_templates").glob("*.jinja"))
}
TEMPLATES = OWN | {"gemma": GEMMA, "llama_3": LLAMA_3, "qwen": QWEN, "system_less": SYSTEM_LESS}
TALK = [
    ("user", "What is 2 + 2?"),
    ("assistant", "4.\n\nReally."),
    ("user", "And 3 + 3?"),
    ("assistant", "6"),
    ("user", "Thanks"),
]


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def rendered_by_go(template: str, messages: list[dict]) -> str:
    """What Ollama does: the messages, and the system's text, given to the template. Its few actions are like Jinja's."""
    for go, jinja in {
        "{{ if .System }}": "{% if system %}",
        "{{ .System }}": "{{ system }}",
        "{{ $later := false }}": "{% set later = namespace(yes=false) %}",
        "{{ range .Messages }}": "{% for m in messages %}",
        '{{ if eq .Role "user" }}': "{% if m.role == 'user' %}",
        "{{ if $later }}": "{% if later.yes %}",
        "{{ .Content }}": "{{ m.content }}",
        '{{ else if eq .Role "assistant" }}': "{% elif m.role == 'assistant' %}",
        "{{ $later = true }}": "{% set later.yes = true %}",
        "{{ else }}": "{% else %}",
    }.items():
        template = template.replace(go, jinja)
    # An `end` closes the loop if it is the last but for the text after it.
    *blocks, loop, end = template.split("{{ end }}")
    jinja = "{% endif %}".join([*blocks, loop]) + "{% endfor %}" + end
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    environment = Environment(keep_trailing_newline=True)
    return environment.from_string(jinja).render(messages=messages, system=system)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_is_rendered_as_by_the_models_own_template(tokenizer, name, turns, system):
    tokenizer.chat_template = TEMPLATES[name]
    parts = ollama.template_parts(tokenizer, adds_bos=False)
    messages = [{"role": role, "content": content} for role, content in TALK[:turns]]
    if system and parts.system:
        messages.insert(0, {"role": "system", "content": system})
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered_by_go(parts.go_template, messages) == expected
    file = ollama.modelfile("model.gguf", parts)
    assert file == f'FROM ./model.gguf\nTEMPLATE """{parts.go_template}"""\n'


def test_a_beginning_that_the_server_adds_is_left_out(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}" + QWEN
    with_bos, without = (ollama.template_parts(tokenizer, adds_bos=adds).start for adds in (False, True))
    assert with_bos == tokenizer.bos_token + without


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}{% endfor %}",  # numbers the turns
        "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}",  # forgets the earlier ones
        "{% for m in messages %}{{ '{{' }}{{ m.content }}{% endfor %}",  # which Go would read
    ],
)
def test_a_template_that_is_not_made_of_turns_has_no_modelfile(tokenizer, template):
    tokenizer.chat_template = template
    assert ollama.template_parts(tokenizer, adds_bos=False) is None
