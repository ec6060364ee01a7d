"""Find rows that two splits share, exactly or almost: what a run could know about the test split from training."""

from dataclasses import dataclass
from itertools import combinations

from workflow.data.rows import Instruction, normal
from workflow.runtime.errors import CheckError, UserError

SHINGLE = (
    5  # characters: a prompt of a few words has dozens of them, and replacing a word removes about eight
)
# MinHash finds the pairs to look at, and the similarity of each is then computed exactly. These two numbers therefore
# affect only the time, and the small chance of missing a pair.
PERMUTATIONS, SEED = 128, 55
EXAMPLES = 3


@dataclass(frozen=True)
class Pair:
    """A test row, and a training or validation row whose prompt is almost identical.

    `similarity` is the Jaccard similarity of the prompts, 0 to 1.
    """

    test: Instruction
    other: Instruction
    similarity: float


def check_apart(splits: dict[str, list[Instruction]]) -> None:
    """Raise a CheckError if two splits share an instruction, apart from case, spacing and punctuation."""
    groups = {name: {row.group for row in rows} for name, rows in splits.items()}
    for first, second in combinations(groups, 2):
        shared = sorted(groups[first] & groups[second])
        if shared:
            raise CheckError(
                f"the {first} and {second} splits share an instruction ({len(shared)} in all), which must be in one "
                f'alone: "{_shortened(shared[0])}"'
            )


def near_duplicates(splits: dict[str, list[Instruction]], *, threshold: float) -> list[Pair]:
    """Find each pair of a test row and a training or validation row with almost the same prompt, most similar first.

    A prompt is everything the user says, context included, without case, spacing and punctuation. Two prompts are
    almost the same if the Jaccard similarity of their character 5-grams (size of the intersection over size of the
    union) is at least `threshold`. MinHash (Broder, 1997) with locality-sensitive hashing finds the candidates.
    """
    from datasketch import MinHash, MinHashLSH

    others = [*splits["train"], *splits["validation"]]
    rows = [*others, *splits["test"]]
    grams = [shingles(prompt(row)) for row in rows]
    encoded = ([gram.encode() for gram in row_grams] for row_grams in grams)
    hashed = MinHash.bulk(encoded, num_perm=PERMUTATIONS, seed=SEED)
    # The weights favor recall: a missed pair is an error, and a false candidate only costs time.
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.05, 0.95))
    for place in range(len(others)):
        index.insert(place, hashed[place])
    pairs = [
        Pair(rows[place], rows[other], jaccard(grams[place], grams[other]))
        for place in range(len(others), len(rows))
        for other in index.query(hashed[place])
    ]
    near = [pair for pair in pairs if pair.similarity >= threshold]
    return sorted(near, key=lambda pair: (-pair.similarity, pair.test.id, pair.other.id))


def prompt(row: Instruction) -> str:
    """Return everything the user says, in the form in which prompts are compared."""
    return normal(" ".join([*row.questions, row.context]))


def shingles(text: str) -> set[str]:
    """Return the character 5-grams of a text; a shorter text is its only one."""
    return {text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1))}


def jaccard(first: set[str], second: set[str]) -> float:
    """Return the size of the intersection over the size of the union."""
    return len(first & second) / len(first | second)


def without(splits: dict[str, list[Instruction]], near: list[Pair]) -> dict[str, list[Instruction]]:
    """Return the splits without the training and validation rows of these pairs.

    Raises:
        UserError: nothing is left to train or validate on.
    """
    duplicates = {pair.other.id for pair in near}
    remaining = {"test": splits["test"]}
    for name, purpose in (("train", "train"), ("validation", "validate")):
        remaining[name] = [row for row in splits[name] if row.id not in duplicates]
        if not remaining[name]:
            raise UserError(
                f"sample.near_duplicates is drop, which leaves nothing to {purpose} on: every {name} row is a "
                "near-duplicate of a test row."
            )
    return remaining


def examples(near: list[Pair]) -> list[str]:
    """Describe the most similar of these pairs, one line each, with each test row at most once."""
    best = list({pair.test.id: pair for pair in reversed(near)}.values())[::-1]
    return [
        f'{pair.similarity:.2f}: "{_shortened(pair.test.instruction)}" and "{_shortened(pair.other.instruction)}"'
        for pair in best[:EXAMPLES]
    ]


def _shortened(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
