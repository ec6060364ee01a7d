"""Rows laid end to end are the same rows: each attends to itself alone, and no token predicts another row's."""

import itertools
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from workflow.training.speed.fused import IGNORED
from workflow.training.speed.packing import (
    BY_ROW,
    Pack,
    PackingCollator,
    PackSize,
    attention_arguments,
    pack,
    sizes_needed,
)

FIRST = {"input_ids": [10, 11, 12], "labels": [IGNORED, 11, 12]}
SECOND = {"input_ids": [20, 21], "labels": [20, 21]}
LENGTHS = (17, 1, 30, 8)


def learned(packed: Pack) -> list[tuple[int, int]]:
    """Each token that predicts something, with what it predicts."""
    pairs = zip(packed.input_ids[0].tolist(), packed.targets[0].tolist(), strict=True)
    return [(token, target) for token, target in pairs if target != IGNORED]


def test_rows_lie_end_to_end_and_each_counts_its_positions_from_nought():
    packed = pack([FIRST, SECOND])
    assert packed.input_ids.tolist() == [[10, 11, 12, 20, 21]] and packed.length == 5
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert packed.targets.tolist() == [[11, 12, IGNORED, 21, IGNORED]]
    assert packed.boundaries.tolist() == [0, 3, 5] and packed.boundaries.dtype == torch.int32


def test_no_token_predicts_the_first_of_the_next_row():
    """Though it is a label of its own row: SECOND learns all of its tokens."""
    assert learned(pack([FIRST, SECOND])) == [(10, 11), (11, 12), (20, 21)]
    assert learned(pack([SECOND, FIRST])) == [(20, 21), (10, 11), (11, 12)]


def test_what_is_left_free_is_a_row_of_padding_that_teaches_nothing():
    packed = pack([FIRST, SECOND], size=PackSize(8, 5), pad=7)
    assert packed.learned.tolist() == [0, 1, 3, 7, 7]
    assert packed.input_ids.tolist() == [[10, 11, 12, 20, 21, 7, 7, 7]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert packed.boundaries.tolist() == [0, 3, 5, 8]
    assert learned(packed) == learned(pack([FIRST, SECOND]))


@pytest.mark.parametrize(
    ("length", "boundaries"), [(None, [0, 3, 5, 5, 5]), (5, [0, 3, 5, 5, 5]), (6, [0, 3, 5, 6, 6])]
)
def test_slots_that_no_row_needs_are_empty_rows(length, boundaries):
    packed = pack([FIRST, SECOND], size=None if length is None else PackSize(length, 3), slots=4)
    assert packed.boundaries.tolist() == boundaries
    assert learned(packed) == learned(pack([FIRST, SECOND]))


@pytest.mark.parametrize(
    ("size", "reason"), [(PackSize(4, 9), "5 tokens, . of them"), (PackSize(9, 1), "3 of them")]
)
def test_rows_that_do_not_fit_are_refused(size, reason):
    with pytest.raises(ValueError, match=reason):
        pack([FIRST, SECOND], size=size)


def test_a_batch_has_the_first_size_that_holds_its_rows():
    sizes = [PackSize(3, 2), PackSize(6, 3), PackSize(9, 9)]
    collate = PackingCollator(sizes=sizes, slots=4)  # one more than the most rows: the last pads
    for rows, length in (([FIRST], 3), ([FIRST, SECOND], 6), ([FIRST, FIRST, SECOND], 9)):
        batch = collate(rows)
        assert batch.input_ids.shape == batch.targets.shape == (1, length)
        assert batch.tokens.item() == sum(len(row["input_ids"]) for row in rows)
        size = next(size for size in sizes if size.tokens == length)
        assert batch.learned.shape == (size.learned,)
        targets = batch.targets[0]
        assert set(batch.learned.tolist()) - {length - 1} == set(
            targets.ne(IGNORED).nonzero().flatten().tolist()
        )
        assert targets[length - 1] == IGNORED
    rows = [FIRST] * 4  # no size holds them
    assert collate(rows).input_ids.shape == PackingCollator()(rows).input_ids.shape == (1, 12)
    with pytest.raises(ValueError, match="4 rows do not fit into 3 slots"):
        PackingCollator(sizes=sizes, slots=3)(rows)


@pytest.mark.parametrize("seed", range(20))
def test_sizes_hold_every_pass_and_leave_little_free(seed):
    random = np.random.default_rng(seed)
    highest = int(random.choice([70, 600, 5_000, 100_000]))
    tokens = random.integers(1, highest, int(random.integers(1, 300))).tolist()
    passes = [PackSize(count, int(random.integers(0, count))) for count in tokens]
    sizes = sizes_needed(passes)
    assert sizes == sorted(set(sizes)) and all(size.tokens % 64 == 0 for size in sizes)
    chosen = [next(size for size in sizes if size.holds(own)) for own in passes]
    assert all(
        size.tokens == min(s.tokens for s in sizes if s.tokens >= own.tokens)
        for size, own in zip(chosen, passes, strict=True)
    )
    assert set(chosen) == set(sizes)
    rounded = [-(-count // 64) * 64 for count in tokens]
    assert sum(size.tokens for size in chosen) - sum(rounded) <= sum(rounded) / 20


def test_no_fewer_sizes_would_leave_so_little_free():
    """Against every choice of lengths."""
    random = np.random.default_rng(1)
    lengths = (64 * random.integers(1, 40, 12)).tolist()
    sizes = sizes_needed([PackSize(length, 1) for length in lengths])

    def free(ends):
        return sum(min(end for end in ends if end >= length) - length for length in lengths)

    others = itertools.combinations(sorted(set(lengths) - {max(lengths)}), len(sizes) - 2)
    assert (
        min(free([*ends, max(lengths)]) for ends in others)
        > sum(lengths) / 20
        >= free([s.tokens for s in sizes])
    )


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa")


def random_rows(seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    rows = [{"input_ids": random.integers(3, 259, length).tolist()} for length in LENGTHS]
    return [row | {"labels": [IGNORED] * (i % 2) + row["input_ids"][i % 2 :]} for i, row in enumerate(rows)]


@pytest.fixture(scope="module", params=[None, BY_ROW], ids=["masked", "by row"])
def packing_model(request, model):
    """The same weights, whose attention is that of packs."""
    if request.param is None:
        return model
    other = deepcopy(model)
    other.set_attn_implementation(request.param)
    return other


def run_packed(model, packed: Pack):
    attention = BY_ROW if model.config._attn_implementation == BY_ROW else None
    return model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        output_hidden_states=True,
        **attention_arguments(packed, attention=attention),
    )


FORMS = [{}, {"size": PackSize(64, 60)}, {"slots": 7}, {"size": PackSize(64, 60), "slots": 5}]


@pytest.mark.parametrize("form", FORMS)
def test_packed_rows_have_the_states_that_each_has_alone(model, packing_model, form):
    rows = random_rows()
    packed = run_packed(packing_model, pack(rows, **form)).hidden_states
    start = 0
    for row in rows:
        alone = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        end = start + len(row["input_ids"])
        for found, wanted in zip(packed, alone, strict=True):
            assert torch.allclose(found[0, start:end], wanted[0], atol=1e-5)
        start = end


@pytest.mark.parametrize("form", FORMS)
def test_packed_rows_teach_what_each_teaches_alone(model, packing_model, form):
    rows = random_rows()
    packed = pack(rows, **form)
    logits = run_packed(packing_model, packed).logits[0]
    loss = functional.cross_entropy(logits, packed.targets[0], ignore_index=IGNORED, reduction="sum")
    alone = sum(
        functional.cross_entropy(
            model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
            torch.tensor(row["labels"][1:], dtype=torch.long),
            ignore_index=IGNORED,
            reduction="sum",
        )
        for row in rows
    )
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    wanted = torch.autograd.grad(alone, list(model.parameters()))
    for found, grad in zip(torch.autograd.grad(loss, list(packing_model.parameters())), wanted, strict=True):
        assert (found - grad).norm() <= 1e-5 * grad.norm()


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_the_tokens_of_a_row_change_no_other_rows_logits(packing_model, changed):
    rows = random_rows()
    before, starts = run_packed(packing_model, pack(rows)).logits[0], np.cumsum([0, *LENGTHS])
    rows[changed] = random_rows(seed=1)[changed]
    after = run_packed(packing_model, pack(rows)).logits[0]
    for index, (start, end) in enumerate(pairwise(starts)):
        same = (after[start:end] - before[start:end]).abs().max() < 1e-6
        assert same == (index != changed)


def test_padding_changes_no_rows_logits(packing_model):
    tokens = sum(LENGTHS)
    logits = [
        run_packed(packing_model, pack(random_rows(), size=PackSize(tokens + 9, tokens), pad=pad)).logits[0]
        for pad in (0, 5)
    ]
    assert (logits[0][:tokens] - logits[1][:tokens]).abs().max() < 1e-6
    assert (logits[0][tokens:] - logits[1][tokens:]).abs().max() > 1e-3
