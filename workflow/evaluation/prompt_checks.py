"""Checks that our own tasks score exactly the texts that runs are trained on."""

from lm_eval.models.huggingface import HFLM

from workflow import params
from workflow.data import chat
from workflow.data.model_files import context_length
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.paths import MODEL


def check_scored(results: dict, language_model: HFLM) -> int:
    """Check that our own tasks score rows as they are trained on; return the number of prompts that the context cuts.

    Raises:
        CheckError: a prompt is not the text that stage sample rendered, does not begin with as many BOS tokens as the
            chat template writes, or is tokenized differently from its text; a response has no token that is scored,
            or another number of them than stage sample counted.
    """
    bos_tokens = int(chat.begins_with_bos(language_model.tokenizer))
    cut = 0
    for sample in (sample for samples in results["samples"].values() for sample in samples):
        row = f"row {sample['doc']['id']} of the test split"
        for prompt, continuation in sample["arguments"]:
            cut += _check_request(
                prompt, continuation, sample["doc"], row, language_model, bos_tokens=bos_tokens
            )
        if "nats_per_token" in sample:
            _check_response(sample, row, language_model)
    return cut


def _check_request(
    prompt: str, continuation: str | dict, doc: dict, row: str, language_model: HFLM, *, bos_tokens: int
) -> bool:
    """Check one request to the model; return whether the context cuts its prompt.

    Args:
        continuation: the text that is scored or, for an answer to generate, its settings.
        row: what messages call the row.
        bos_tokens: with which the chat template begins a conversation.
    """
    tokenizer, longest = language_model.tokenizer, language_model.max_length
    if isinstance(continuation, str):
        text = prompt + continuation
        prompt_ids, scored_ids = language_model._encode_pair(prompt, continuation)
        room = longest + 1 - len(scored_ids)  # the last token is predicted, and is not part of the input
        if not scored_ids or room < 1:
            raise CheckError(
                f"of the response of {row} {len(scored_ids)} tokens are scored, and the model's context has {longest}"
            )
    else:
        text, prompt_ids = prompt, language_model.tok_encode(prompt)
        room = longest - continuation["max_gen_toks"]
    if (bos := chat.leading(prompt_ids, tokenizer.bos_token_id)) != bos_tokens:
        raise CheckError(
            f"the prompt of {row} is scored with {bos} BOS tokens, and rows are trained with {bos_tokens}, as the "
            "chat template has them"
        )
    if prompt != doc["chat_prompt"]:  # as from a template that prints today's date
        raise CheckError(
            f"the prompt of {row} is scored as another text than stage sample rendered: "
            + chat.parting(prompt, doc["chat_prompt"])
        )
    if language_model.tok_encode(text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise CheckError(f"{row} is scored as other tokens than its text has, which rows are trained on")
    return len(prompt_ids) > room


def _check_response(sample: dict, row: str, language_model: HFLM) -> None:
    """Raise a CheckError unless as many tokens of a response are scored as stage sample counted."""
    # The harness counts whitespace at the end of a prompt as part of the response.
    prompt, response = sample["arguments"][0]
    scored = len(language_model.tok_encode(prompt + response)) - len(language_model.tok_encode(prompt))
    counted = sample["doc"]["response_tokens"]
    if scored != counted or scored < 1:
        raise CheckError(
            f"{scored} tokens of the response of {row} are scored, and the sample stage counted {counted}"
        )


def check_answers_fit(evaluation: params.Evaluation) -> None:
    """Raise a UserError if an answer of the maximal length leaves no room for a prompt."""
    longest = context_length(MODEL)
    if "holdout_generation" in evaluation.tasks and longest and evaluation.answer_tokens >= longest:
        raise UserError(
            f"evaluation.answer_tokens is {evaluation.answer_tokens}, and the model's context holds {longest} tokens, "
            "the prompt's among them."
        )
