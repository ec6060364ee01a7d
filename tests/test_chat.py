"""A chat template is tried before anything is trained with it, and what it does wrong is one sentence."""

import shutil

import pytest
from transformers import AutoTokenizer

from workflow import chat
from workflow.errors import UserError

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


def test_a_template_is_written_only_if_it_works(tiny_model, tmp_path, monkeypatch):
    templates = tmp_path / "workflow" / "chat_templates"
    templates.mkdir(parents=True)
    monkeypatch.setattr(chat, "CHAT_TEMPLATES", templates)
    shutil.copytree(tiny_model, tmp_path / "model")
    before = AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    (templates / "mine.jinja").write_text(ASK + "A: {{ m['content'] }}" + END + ANSWER)
    with pytest.raises(
        UserError,
        match=r"model.chat_template is mine \(.*mine.jinja\), and the chat template does not close .*your_own",
    ):
        chat.write_template("mine", tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == before
    good = ASK + "A: {{ m['content'] + eos_token }}" + END + ANSWER
    (templates / "mine.jinja").write_text(good + "\n")
    assert chat.write_template("mine", tmp_path / "model") == "workflow/chat_templates/mine.jinja"
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == good
    assert chat.write_template("model", tmp_path / "model") == "the model's own"
