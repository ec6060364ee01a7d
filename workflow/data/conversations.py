"""Read conversations: which message is learned, which come before it, and which keys of a message are used.

Nothing that a message says is dropped silently: a key that holds a value and is not used here stops the run.
"""

from workflow.data.texts import check_text, says_something
from workflow.runtime.errors import UserError

# Compared without case. ShareGPT has human and gpt, OpenAssistant prompter.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
}
KEYS = ("role", "from", "content", "value", "weight")
# Keys for the origin, time and rating of a message, which no template writes.
RECORDS = {
    "id", "_id", "uuid", "message_id", "msg_id", "parent", "parent_id", "parent_message_id", "conversation_id",
    "tree_id", "thread_id", "turn", "turn_id", "turn_identifier", "index", "idx", "position", "timestamp",
    "time", "date", "datetime", "created", "created_at", "created_date", "create_time", "updated_at",
    "update_time", "model", "model_name", "lang", "language", "locale", "country", "state", "header",
    "hashed_ip", "ip", "user_id", "author_id", "redacted", "toxic", "toxicity", "moderation",
    "openai_moderation", "detoxify_moderation", "review_count", "review_result", "emojis", "score", "rating",
    "rank", "quality", "feedback", "upvotes", "votes", "source", "dataset", "hash", "md5", "sha256", "tokens",
    "token_count", "num_tokens", "n_tokens", "usage", "logprobs", "finish_reason", "stop_reason", "end_turn",
    "status", "deleted", "synthetic", "cache_control",
}  # fmt: skip
# Columns beside the messages that other tools put into the prompt.
OF_THE_PROMPT = (
    "tools", "functions", "function_call", "tool_choice", "documents", "system", "system_prompt",
    "chat_template_kwargs", "reasoning_content", "thinking", "image", "images", "audio", "audios", "video", "videos",
)  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")


def check_row(row: dict, named: set[str], where: str) -> None:
    """Refuse a row with a further column that other tools write into the prompt.

    Args:
        row: its cells by column.
        named: the columns that `dataset.columns` names.

    Raises:
        UserError: there is such a column, and it is not empty.
    """
    for key in OF_THE_PROMPT:
        if key not in named and _holds(row.get(key)):
            raise UserError(
                f"{where} has {key} beside its messages, which would be lost: write it into the first message "
                f"(of the system), or take {key} out of the data."
            )


def last_turn(messages: object, where: str) -> dict:
    """Return a conversation as a row: its last question and answer, and the messages before them.

    The last answer is the last one whose `weight` is not 0. Messages after it are dropped.

    Args:
        messages: a list of {role, content} or, as ShareGPT has them, {from, value}.

    Returns:
        `instruction`, `context` (None), `response`, `earlier` (messages of `role` and `content`) and `not_learned`
        (the places in `earlier` of answers with the weight 0).

    Raises:
        UserError: this is not such a conversation, or a message has a key that is not used, which the error names.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} has no list of messages.")
    turns, learned = [], []
    for number, message in enumerate(messages, start=1):
        place = f"message {number} of {where}"
        turns.append(_turn(message, place))
        learned.append(_weight(message, place) and turns[-1]["role"] == "assistant")
    roles = [turn["role"] for turn in turns]
    if roles[-1] != "assistant":
        raise UserError(
            f"{where} ends with a message of the {roles[-1]}, and must end with one of the assistant."
        )
    if not any(learned):
        raise UserError(f"{where} has no answer to learn: each has the weight 0. Leave the row out.")
    last = max(place for place, is_learned in enumerate(learned) if is_learned)
    if roles[:last][-1:] != ["user"]:
        raise UserError(f"{where} has no message of the user right before the assistant's last.")
    if "system" in roles[1:]:
        raise UserError(
            f"message {roles.index('system', 1) + 1} of {where} is of the system, which only the first may be."
        )
    *earlier, question, answer = turns[: last + 1]
    return {
        "instruction": question["content"],
        "context": None,
        "response": answer["content"],
        "earlier": earlier,
        "not_learned": [
            place for place, turn in enumerate(earlier) if turn["role"] == "assistant" and not learned[place]
        ],
    }


def _turn(message: object, where: str) -> dict[str, str]:
    """Return a message as `role` and `content`."""
    if not isinstance(message, dict):
        raise UserError(f"{where} is not an object with a role and a content.")
    for key, value in message.items():
        if key not in KEYS and key not in RECORDS and _holds(value):
            raise UserError(
                f"{where} has {key}, which is not read and would be lost: write what it holds into the content, as "
                f"the model's template would, or take {key} out of the data."
            )
    name = _either(message, "role", "from", where)
    role = ROLES.get(name.strip().casefold()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where} has the role {name}; allowed is one of {', '.join(ROLES)}.")
    content = _text(_either(message, "content", "value", where), where)
    if content is not None:
        check_text(content, f"{where} has a text")
    if role == "system" and not (content or "").strip():
        return {"role": role, "content": ""}  # replaces the system message that a template may have
    if content is None or not says_something(content):
        raise UserError(f"{where} has no text; every message needs some.")
    return {"role": role, "content": content.strip()}


def _either(message: dict, key: str, other: str, where: str) -> object:
    """Return a value that may have either of two keys."""
    value, same = message.get(key), message.get(other)
    if value is not None and same is not None and value != same:
        raise UserError(f"{where} has both {key} and {other}, which differ.")
    return same if value is None else value


def _text(content: object, where: str) -> str | None:
    """Return the text of a message: its content, or the concatenated parts, as templates write them."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where} has a content that is neither text nor a list of parts.")
    return "".join(_part(part, f"part {number} of {where}") for number, part in enumerate(content, start=1))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UserError(f"{where} is neither text nor an object with a type and a text.")
    kind = part.get("type", "text")
    text = part.get("text")
    if kind not in TEXT_PARTS or not isinstance(text, str):
        raise UserError(f"{where} is of type {kind}; parts of type text alone, with a text, are read.")
    for key, value in part.items():
        if key not in ("type", "text") and key not in RECORDS and _holds(value):
            raise UserError(
                f"{where} has {key}, which is not read and would be lost; take it out of the data."
            )
    return text


def _weight(message: dict, where: str) -> bool:
    """Whether a message is learned according to its weight, which is 1 by default."""
    weight = message.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise UserError(f"{where} has the weight {weight}; allowed is 0 (not learned) or 1.")
    return bool(weight)


def _holds(value: object) -> bool:
    """Whether a value holds anything: parquet and JSON text have many forms of an empty value."""
    match value:
        case None:
            return False
        case str():
            return value.strip() not in ("", "[]", "{}", "null")
        case list():
            return any(_holds(part) for part in value)
        case dict():
            return any(_holds(part) for part in value.values())
    return True
