"""Rows that two splits share, exactly or almost: what a run could know of the test split from its training."""

from dataclasses import dataclass
from itertools import combinations

from workflow.data.instructions import Instruction, normal
from workflow.runtime.errors import CheckError, UserError

SHINGLE = 5  # characters: a prompt of some words has a few dozen, and another word takes away about eight
# Of the hashes that find the pairs to look at. The similarity of each is then computed exactly, so these decide
# on the time, and on the small chance that a pair is missed, alone.
PERMUTATIONS, SEED = 128, 55
EXAMPLES = 3


@dataclass(frozen=True)
class Pair:
    """A test row, and a training or validation row whose prompt is almost the same."""

    test: Instruction
    other: Instruction
    similarity: float


def check_apart(splits: dict[str, list[Instruction]]) -> None:
    """Raise a CheckError if two splits share an instruction, but for case, spacing and punctuation."""
    groups = {name: {row.group for row in rows} for name, rows in splits.items()}
    for one, other in combinations(groups, 2):
        shared = sorted(groups[one] & groups[other])
        if shared:
            raise CheckError(
                f"the {one} and {other} splits share an instruction ({len(shared)} in all), which must be in one "
                f'alone: "{_shortened(shared[0])}"'
            )


def near_duplicates(splits: dict[str, list[Instruction]], *, threshold: float) -> list[Pair]:
    """Each pair of a test row and a training or validation row with almost the same prompt, the most alike first.

    A prompt is all that the user says, context included, without case, spacing and punctuation. Two are almost
    the same if the Jaccard similarity of their character 5-grams (those that both have / those that either has)
    is at least `threshold`. MinHash (Broder, 1997) with locality-sensitive hashing finds the pairs to look at.
    """
    from datasketch import MinHash, MinHashLSH

    others = [*splits["train"], *splits["validation"]]
    rows = [*others, *splits["test"]]
    parts = [shingles(prompt(row)) for row in rows]
    encoded = ([part.encode() for part in found] for found in parts)
    hashed = MinHash.bulk(encoded, num_perm=PERMUTATIONS, seed=SEED)
    # A pair that is missed is an error here, and one that is looked at in vain only costs time.
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.05, 0.95))
    for place in range(len(others)):
        index.insert(place, hashed[place])
    pairs = [
        Pair(rows[place], rows[other], jaccard(parts[place], parts[other]))
        for place in range(len(others), len(rows))
        for other in index.query(hashed[place])
    ]
    near = [pair for pair in pairs if pair.similarity >= threshold]
    return sorted(near, key=lambda pair: (-pair.similarity, pair.test.id, pair.other.id))


def prompt(row: Instruction) -> str:
    """All that the user says, in the form in which prompts are compared."""
    return normal(" ".join([*row.said, row.context]))


def shingles(text: str) -> set[str]:
    """The text's character 5-grams; a shorter text is the one that it has."""
    return {text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1))}


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def without(splits: dict[str, list[Instruction]], near: list[Pair]) -> dict[str, list[Instruction]]:
    """The splits without the training and validation rows of these pairs.

    Raises:
        UserError: nothing is left to train or to validate on.
    """
    found = {pair.other.id for pair in near}
    kept = {"test": splits["test"]}
    for name, purpose in (("train", "train"), ("validation", "validate")):
        kept[name] = [row for row in splits[name] if row.id not in found]
        if not kept[name]:
            raise UserError(
                f"sample.near_duplicates is drop, which leaves nothing to {purpose} on: every {name} row is a "
                "near-duplicate of a test row."
            )
    return kept


def described(near: list[Pair]) -> list[str]:
    """The most alike of these pairs, a line each, and each test row once."""
    best = list({pair.test.id: pair for pair in reversed(near)}.values())[::-1]
    return [
        f'{pair.similarity:.2f}: "{_shortened(pair.test.instruction)}" and "{_shortened(pair.other.instruction)}"'
        for pair in best[:EXAMPLES]
    ]


def _shortened(text: str, length: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
