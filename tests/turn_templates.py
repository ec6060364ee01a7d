"""Chat templates that end a turn with a token of their own."""

import json

from transformers import AutoTokenizer

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{%- for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
QWEN = """{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA_3_2 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n" }}
"""
LLAMA_3 = (
    LLAMA_3_2
    + """{%- for m in messages %}
{{- '<|header|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant\\n\\n' }}{% endif %}"""
)
TURN_ENDS = {
    "Gemma": (GEMMA, "<start_of_turn>", "<end_of_turn>"),
    "Qwen": (QWEN, "<|im_start|>", "<|im_end|>"),
    "Llama 3": (LLAMA_3, "<|header|>", "<|eot_id|>"),
}


def end_turns_as(name: str, folder, stops=("</s>", "end")) -> int:
    """Give a tiny model the template of this form, two tokens for it, and the stops of its generation config."""
    template, begin, end = TURN_ENDS[name]
    for file in folder.glob("tokenizer*.json"):
        text = file.read_text().replace('"<unused_0>"', f'"{end}"').replace('"<unused_1>"', f'"{begin}"')
        file.write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [end, begin]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    number = tokenizer.convert_tokens_to_ids(end)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["eos_token_id"] = [{"</s>": tokenizer.eos_token_id, "end": number}[stop] for stop in stops]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return number
