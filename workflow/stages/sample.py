"""Stage sample: draw the rows as the seed recipe does, and split them by instruction."""

from functools import partial

from workflow import params
from workflow.data import instructions, model_files, near_duplicates
from workflow.runtime.files import read_jsonl, write_json, write_jsonl
from workflow.runtime.paths import INSTRUCTIONS, MODEL, SAMPLE, split_file
from workflow.runtime.stage import run_stage, say


def sample() -> None:
    """Draw the rows, split them, and write each split with what the evaluation tasks need."""
    asked = params.load().sample
    rows = instructions.from_rows(read_jsonl(INSTRUCTIONS))
    drawn = instructions.sample(rows, size=asked.rows, seed=asked.seed)
    split = partial(
        instructions.split,
        drawn,
        validation=asked.validation_rows,
        test=asked.test_rows,
        seed=asked.split_seed,
    )
    whole = split(held_out_categories=[])
    splits = split(held_out_categories=asked.held_out_categories)
    left_out = {name: len(whole[name]) - len(splits[name]) for name in ("train", "validation")}
    near_duplicates.check_apart(splits)
    near = near_duplicates.near_duplicates(splits, threshold=asked.near_duplicate_threshold)
    if asked.near_duplicates == "drop":
        splits = near_duplicates.without(splits, near)
    tokenizer = model_files.load_tokenizer(MODEL)
    instructions.check_special_tokens(drawn, tokenizer)
    for row in [*splits["train"], *splits["validation"]]:
        instructions.render(row, tokenizer)  # a row that the chat template does not fit stops the run here
    scored = instructions.scored_rows(
        splits["test"],
        tokenizer,
        choice_seed=asked.choice_seed,
        held_out_categories=asked.held_out_categories,
    )
    context = model_files.context_length(MODEL)
    longer = instructions.check_fits(scored, tokenizer, context=context) if context else 0
    for name in ("train", "validation"):
        write_jsonl(split_file(name), instructions.as_rows(splits[name]))
    write_jsonl(split_file("test"), scored)
    for name, members in splits.items():
        say(f"  {name}: {len(members)} rows, {len({row.group for row in members})} different instructions")
    held_out = sum(row["held_out"] for row in scored)
    if asked.held_out_categories:
        say(
            f"  held out: {', '.join(asked.held_out_categories)}: {held_out} test rows; left out of training are "
            f"{left_out['train']} rows, and of validation {left_out['validation']}"
        )
    near_rows = len({pair.test.id for pair in near})
    dropped = len({pair.other.id for pair in near}) if asked.near_duplicates == "drop" else 0
    say(
        f"  {near_rows} test rows have a near-duplicate among the training and validation rows"
        + (f", of which {dropped} are dropped" if dropped else "")
    )
    for line in near_duplicates.described(near):
        say(f"    {line}")
    if longer:
        say(
            f"  {longer} test rows are longer than the model's context of {context} tokens: their prompts are cut"
        )
    mixed = sum(not row["same_category"] for row in scored)
    say(f"  {mixed} test rows have a response of another category to choose from")
    write_json(
        SAMPLE / "counts.json",
        {
            **{f"{name}_rows": len(members) for name, members in splits.items()},
            "held_out_rows": held_out,
            "left_out_rows": sum(left_out.values()),
            "near_duplicate_test_rows": 0 if dropped else near_rows,
            "near_duplicates_dropped": dropped,
            "choices_from_other_categories": mixed,
            "longer_than_context": longer,
        },
    )


if __name__ == "__main__":
    run_stage("sample", sample)
