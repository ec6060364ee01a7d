"""A chat template is tried before anything is trained with it, and what it does wrong is one sentence."""

import re
import shutil
from datetime import date

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from turn_templates import LLAMA_3_2, TURN_ENDS, end_turns_as

from workflow.data import chat
from workflow.runtime.errors import UserError

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}"
END = "{% endif %}{% endfor %}"
ANSWER = "{% if add_generation_prompt %}A: {% endif %}"


def render(tiny_model, template: str, prompt=(USER,), response: str = "Hello"):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    return chat.render(list(prompt), response, tokenizer)


def test_prompt_and_what_stands_before_the_response(tiny_model):
    plain = ASK + "A: {{ m['content'] + eos_token }}" + END + ANSWER
    assert render(tiny_model, plain) == ("Q: Hi\nA: ", "")
    assert render(tiny_model, plain.replace(" {{ m['content'] + eos", " {{ m['content'] + '\n' + eos")) == (
        "Q: Hi\nA: ",
        "",
    )
    without = ASK + "A: {{ m['content'] + eos_token }}\n" + END
    assert render(tiny_model, without) == ("Q: Hi\n", "A: ")
    thinks = plain.replace("A: {{ m", "A: <think>\n\n</think>{{ m")
    assert render(tiny_model, thinks, response="think") == ("Q: Hi\nA: ", "<think>\n\n</think>")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (ASK + END, "leaves out the response, or a part of it"),
        (ASK + "A: {{ eos_token }}" + END + ANSWER, "leaves out the response, or a part of it"),
        (ASK + "A: {{ m['content'][:3] + eos_token }}" + END + ANSWER, "leaves out the response"),
        (ASK + "A: {{ m['content'] }}" + END + ANSWER, "does not close the response with the end token </s>"),
        (
            ASK + "{{ eos_token }}A: {{ m['content'] }}" + END,
            "does not close the response with the end token </s>",
        ),
        (ASK + "B: {{ m['content'] + eos_token }}" + END + ANSWER, "writes the prompt in another way"),
        (ASK + "{{ raise_exception('No, thanks.') }}" + END, "stops with: No, thanks."),
        ("{% for m in messages %}", "stops with: .*endfor"),
        ("{{ messages[0]['text'] + 'x' }}", "stops with: .*has no attribute 'text'"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "stops with: access to attribute '__class__' .* unsafe",
        ),
    ],
)
def test_a_template_that_cannot_be_learned_from_is_refused(tiny_model, template, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        render(tiny_model, template)
    assert "\n" not in str(error.value) and str(error.value).count(".") >= 1


def test_a_response_that_holds_the_end_token_is_refused(tiny_model):
    plain = ASK + "A: {{ m['content'] + eos_token }}" + END + ANSWER
    with pytest.raises(
        UserError, match="the response holds the end token </s>, so a run would learn to stop in its"
    ):
        render(tiny_model, plain, response="One</s>two")


def test_whether_a_conversation_begins_with_a_bos_token(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert chat.begins_with_bos(tokenizer)
    tokenizer.chat_template = ASK + END + ANSWER
    assert not chat.begins_with_bos(tokenizer)
    tokenizer.bos_token = None
    assert not chat.begins_with_bos(tokenizer)
    assert [chat.leading(ids, 0) for ids in ([5, 0], [0, 5, 0], [0, 0], [])] == [0, 1, 2, 0]


def test_a_template_without_a_system_role_says_so(tiny_model):
    template = (chat.CHAT_TEMPLATES / "llama2_inst.jinja").read_text().rstrip("\n")
    assert render(tiny_model, template)[0] == "<s>[INST] Hi [/INST] "
    with pytest.raises(UserError, match="stops with: llama2_inst has no system role"):
        render(tiny_model, template, prompt=[SYSTEM, USER])


def written(choice: str, folder, day: str = "2024-07-26", end_token: str | None = None) -> dict[str, str]:
    return chat.write_template(choice, folder, date=day, end_token=end_token)


def test_a_template_is_written_only_if_it_works(tiny_model, tmp_path, monkeypatch):
    templates = tmp_path / "workflow" / "data" / "chat_templates"
    templates.mkdir(parents=True)
    monkeypatch.setattr(chat, "CHAT_TEMPLATES", templates)
    shutil.copytree(tiny_model, tmp_path / "model")
    before = AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    (templates / "mine.jinja").write_text(ASK + "A: {{ m['content'] }}" + END + ANSWER)
    with pytest.raises(
        UserError,
        match=r"model.chat_template is mine \(.*mine.jinja\), and the chat template does not close .*your_own",
    ):
        written("mine", tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == before
    good = ASK + "A: {{ m['content'] + eos_token }}" + END + ANSWER
    (templates / "mine.jinja").write_text(good + "\n")
    record = {"chat_template": "workflow/data/chat_templates/mine.jinja", "end_token": "</s>"}
    assert written("mine", tmp_path / "model") == record
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == good
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert written("model", tmp_path / "model") == {**record, "chat_template": "the model's own"}
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == files


# Templates of the forms that models on the hub have; `<E>` is the token that closes a turn.
TURNS = "{% for m in messages %}<R>{{ m['role'] }}\n{{ m['content'] | trim }}<E>\n{% endfor %}{% if add_generation_prompt %}<R>assistant\n{% endif %}"
LLAMA_3_1 = """{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n" }}
"""
MISTRAL = """{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "The current date is " + today + "." %}
{{- bos_token + default_system_message + "\\n" }}
"""
GRANITE = """{%- macro system() %}
{{- "Today's Date: " + strftime_now('%B %d, %Y') + ".\\n" }}
{%- endmacro %}
{%- if messages[0]['role'] != 'system' %}{{ system() }}{% endif %}
"""
LOOKS = "\n  {% set dated = strftime_now is defined %}  It is {{ strftime_now('%-d/%m/%y') }}.\n"
DATED = {
    "Llama 3.2": (LLAMA_3_2, "Today Date: 01 Jan 2031\n"),
    "Llama 3.1": (LLAMA_3_1, "Today Date: 01 Jan 2031\n"),
    "Mistral": (MISTRAL, "The current date is 2031-01-01.\n"),
    "Granite": (GRANITE, "Today's Date: January 01, 2031.\n"),
    "with space around": (LOOKS, "\n  It is 1/01/31.\n"),
}


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_that_of_params_on_every_day_and_for_every_library(
    tiny_model, tmp_path, monkeypatch, name
):
    template, line = DATED[name]
    template += TURNS.replace("<E>", "</s>")
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(template)
    written("model", tmp_path / "model", day="2031-01-01")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert line in chat.render([USER], "Hello", tokenizer)[0]
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", None)  # no clock to be read
    told_another = tokenizer.apply_chat_template([USER], tokenize=False, date_string="6 May 1999")
    assert told_another == tokenizer.apply_chat_template([USER], tokenize=False) and line in told_another
    monkeypatch.undo()
    # But for the date, the text is that of the model's own template, to the space.
    tokenizer.chat_template = template
    today = tokenizer.apply_chat_template([USER], tokenize=False)
    tokenizer.chat_template = chat.with_fixed_date(template, date.today().isoformat())
    if name != "Llama 3.1":  # its own date is a constant
        assert tokenizer.apply_chat_template([USER], tokenize=False) == today


def test_a_template_without_a_date_is_as_it_was(tiny_model):
    for template in (TURNS, AutoTokenizer.from_pretrained(tiny_model).chat_template, "{% for"):
        assert chat.with_fixed_date(template, "2031-01-01") == template


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_at_random_is_refused(tiny_model, tmp_path, draw):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(draw + TURNS.replace("<E>", "</s>"))
    with pytest.raises(UserError, match="and the chat template draws at random"):
        written("model", tmp_path / "model")


def test_a_date_whose_format_is_put_together_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{{ strftime_now('%d' ~ ' %b') }}" + TURNS)
    with pytest.raises(UserError, match="stops with: it puts the format of its date together from parts"):
        written("model", tmp_path / "model")


@pytest.mark.parametrize("name", TURN_ENDS)
@pytest.mark.parametrize("stops", [("</s>", "end"), ("</s>",), ()])
def test_a_turn_may_end_with_another_token_than_a_text(tiny_model, tmp_path, name, stops):
    folder, end = tmp_path / "model", TURN_ENDS[name][2]
    shutil.copytree(tiny_model, folder)
    number = end_turns_as(name, folder, stops)
    if "end" not in stops:  # nothing but the template names it
        with pytest.raises(
            UserError, match=f"</s>, .* closes it with {re.escape(end)}, which model.end_token may name"
        ):
            written("model", folder)
    record = written("model", folder, end_token=None if "end" in stops else end)
    assert record == {"chat_template": "the model's own", "end_token": end}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (end, number)
    assert set(GenerationConfig.from_pretrained(folder).eos_token_id) == {1, number}
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # a model that always says that it is done
        model.get_input_embeddings().weight[:, 0] = model.lm_head.weight[number, 0] = 1000
    asked = tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=9, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert answer.tolist() == [number]


def test_an_end_token_that_is_none_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    end_turns_as("Gemma", tmp_path / "model")
    with pytest.raises(
        UserError, match="with the end token <start_of_turn>, so a run would not learn to stop"
    ):
        written("model", tmp_path / "model", end_token="<start_of_turn>")
    for word in ("Apples", "a", "<end_of_turn>\n", ""):
        with pytest.raises(
            UserError, match="model.end_token is .*, which is no special token of the model's"
        ):
            written("model", tmp_path / "model", end_token=word)
