"""The test split as the evaluation tasks read it: rendered prompts, token counts and responses to choose from."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace

from workflow.data import chat
from workflow.data.rows import Instruction, as_row, from_scored_rows, plain, shuffle_key
from workflow.runtime.errors import UserError

DISTRACTORS = 3  # wrong responses beside the right one


def render(row: Instruction, tokenizer) -> tuple[str, str]:
    """Return the text of a row's prompt, and the text that the chat template writes between it and the response.

    Raises:
        UserError: the chat template does not fit the row, which the message names.
    """
    try:
        return chat.render(row.conversation()["prompt"], row.response, tokenizer)
    except UserError as error:
        raise UserError(f"row {row.id} of the dataset, counted from 0: {error}") from None


def scored_rows(
    rows: list[Instruction], tokenizer, *, choice_seed: int, held_out_categories: list[str]
) -> list[dict]:
    """Return the test rows as the evaluation tasks read them: a row's own fields and

        prompt            the user's last message
        chat_prompt       everything before the response, as the chat template writes it
        opening           the text between prompt and response, if the chat template writes any: it is learned, and
                          therefore scored with the response
        response_tokens   the tokens that lm-evaluation-harness scores: those of chat prompt, opening and response
                          together, minus those of the chat prompt alone
        response_bytes    the length of the response in UTF-8
        choices, choice, same_category   as `choose_from` returns them
        held_out          whether no row of this category was trained on

    Raises:
        UserError: a row has fewer than three other responses to choose from, or the chat template does not fit it.
    """
    scored = []
    for row in rows:
        prompt, opening = render(row, tokenizer)
        prompt_tokens, all_tokens = (
            _count_tokens(text, tokenizer) for text in (prompt, prompt + opening + row.response)
        )
        scored.append(
            {
                **as_row(row),
                "prompt": row.user_message(),
                "chat_prompt": prompt,
                **({"opening": opening} if opening else {}),
                "response_tokens": all_tokens - prompt_tokens,
                "response_bytes": len(row.response.encode()),
                **choose_from(row, rows, seed=choice_seed),
                "held_out": row.category in held_out_categories,
            }
        )
    return scored


def shortened(row: Instruction, tokenizer, *, tokens: int) -> Instruction:
    """Return a row whose response has at most so many tokens: its longest beginning that does."""
    text = row.response
    if _count_tokens(text, tokenizer) <= tokens:
        return row
    end = bisect_right(range(len(text)), tokens, key=lambda length: _count_tokens(text[:length], tokenizer))
    return replace(row, response=text[: end - 1])


def count_longer(rows: list[dict], tokenizer, *, context: int) -> int:
    """Count the scored rows that exceed a model's context. The harness cuts the beginning of their prompts.

    Args:
        rows: as `scored_rows` returns them.
        context: tokens.

    Raises:
        UserError: a response alone exceeds the context, so it cannot be scored.
    """
    longer = 0
    for row, instruction in zip(rows, from_scored_rows(rows), strict=True):
        for choice in row["choices"]:
            tokens = _count_tokens(row.get("opening", "") + choice, tokenizer)
            if tokens >= context:
                whose = "its response" if choice == row["response"] else "a response that it is offered"
                raise UserError(
                    f"row {row['id']} of the dataset, counted from 0, cannot be scored: {whose} has {tokens} tokens, "
                    f"and the model's context holds {context}; shorten it, or leave it out."
                )
        prompt, _ = render(instruction, tokenizer)
        longer += _count_tokens(prompt, tokenizer) + row["response_tokens"] > context
    return longer


def _count_tokens(text: str, tokenizer) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def choose_from(row: Instruction, rows: list[Instruction], *, seed: int) -> dict:
    """Put a row's response among three others, which answer other instructions of its category.

    Seed and texts alone determine the three and the order of the four, so another row changes a row's choices only
    if its own response is drawn. A category with too few responses is filled up from any category, and
    `same_category` is false. No two of the four are equal apart from case and spacing.

    Args:
        rows: where responses are drawn from. `row` may be among them, and None is a category like any other.

    Returns:
        `choices`, the four texts; `choice`, the index of the right one; `same_category`.

    Raises:
        UserError: there are fewer than three.
    """
    content = row.texts()
    others = [other for other in rows if other.group != row.group]

    def candidates() -> Iterator[Instruction]:
        for same in (True, False):  # those of other categories are many, and seldom needed
            yield from sorted(
                (other for other in others if (other.category == row.category) == same),
                key=lambda other: shuffle_key(seed, *content, other.response),
            )

    distractors: list[Instruction] = []
    seen = {plain(row.response)}
    for candidate in candidates():
        if len(distractors) == DISTRACTORS:
            break
        if plain(candidate.response) not in seen:
            seen.add(plain(candidate.response))
            distractors.append(candidate)
    if len(distractors) < DISTRACTORS:
        raise UserError(
            f"the test split has {len(distractors)} other responses to set beside that of row {row.id}, "
            f"and response_choice needs {DISTRACTORS}; raise sample.test_rows."
        )
    texts = [row.response, *(distractor.response for distractor in distractors)]
    choices = sorted(texts, key=lambda text: shuffle_key(seed, "order", *content, text))
    return {
        "choices": choices,
        "choice": choices.index(row.response),
        "same_category": all(distractor.category == row.category for distractor in distractors),
    }
