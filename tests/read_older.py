"""Reads saved models with whichever libraries are on the path; tests/whole/test_older_versions.py runs it with older ones.

    python tests/read_older.py < JSON    {"models": [[base, adapter or null], ...], "text": ...}

Prints as JSON, of each: the versions, the tokens, the loss, and what was warned of.
"""

import json
import logging
import sys
import warnings


def read(base: str, adapter: str | None, text: str) -> dict:
    """The loss of a text under a model, in nats per token, with the tokenizer that lies beside the weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter or base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return {
        "prompt": prompt,
        "ids": ids[0].tolist(),
        "loss": loss,
        "length": tokenizer.model_max_length,
        "special": special,
        "ends": model.generation_config.eos_token_id,
        "theta": getattr(model.config, "rope_theta", None),
        "tied": model.config.tie_word_embeddings,
    }


def main() -> None:
    said = []
    warnings.showwarning = lambda message, *_: said.append(str(message))
    import peft
    import transformers

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    asked = json.load(sys.stdin)
    answers = [read(base, adapter, asked["text"]) for base, adapter in asked["models"]]
    configs = []
    for folder in asked.get("configs", []):
        config = transformers.AutoConfig.from_pretrained(folder)
        configs.append({key: value for key, value in config.to_dict().items() if "ro" in key})
    versions = [transformers.__version__, peft.__version__]
    print(json.dumps({"versions": versions, "models": answers, "configs": configs, "said": said}))


if __name__ == "__main__":
    main()
