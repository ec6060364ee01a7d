"""The validation loss by transformers alone, on the tiny model's prompts."""

import numpy as np
import torch
from transformers import AutoTokenizer


def plain_loss(model, model_folder, rows) -> float:
    """Nats per token of the responses and their end tokens."""
    tokenizer, losses = AutoTokenizer.from_pretrained(model_folder), []
    for row in rows:
        prompt = f"<s>### Instruction:\n{row.user_message()}\n\n### Response:\n"
        text = f"{prompt}{row.response}</s>"
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        losses += [-logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]
    return float(np.mean(losses))
