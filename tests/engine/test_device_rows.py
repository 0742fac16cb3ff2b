"""What the device keeps of each sequence, by the host's edits alone: a kernel that writes them is stood in for."""

from __future__ import annotations

import importlib
import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from twinserve.policies import SamplingParams, Sequence
from twinserve.policies.batch import Row


@pytest.fixture
def device_rows(monkeypatch):
    """The module, on a machine without triton."""
    stand_in = ModuleType("step_rows")

    def apply_edits(state: torch.Tensor, edits: torch.Tensor) -> None:
        state[edits[0].long()] = edits[1]

    stand_in.apply_edits = apply_edits
    monkeypatch.setitem(sys.modules, "twinserve.engine.kernels.step_rows", stand_in)
    monkeypatch.delitem(sys.modules, "twinserve.engine.graphs.device_rows", raising=False)
    yield importlib.import_module("twinserve.engine.graphs.device_rows")
    sys.modules.pop("twinserve.engine.graphs.device_rows", None)


class Batch:
    """What of a batch the rows look at."""

    def __init__(self, left=(), preempted=(), grown=()):
        self.left, self.preempted, self.grown = left, preempted, grown


def sequence(blocks: list[int], **params) -> Sequence:
    seq = Sequence([5, 6, 7], SamplingParams(**params))
    seq.block_table = blocks
    return seq


def make(device_rows, num_blocks: int = 8):
    return device_rows.DeviceRows(3, 4, 50, num_blocks, torch.device("cpu"), random.Random(0))


def enter(rows, *seqs: Sequence, start: int = 0, num_tokens: int = 3, is_prompt: bool = True):
    given = [Row(seq, start, num_tokens, True, is_prompt) for seq in seqs]
    changes = rows.changes(Batch(), given)
    rows.apply(changes)
    return given


def test_a_new_sequence_gets_a_row_with_its_blocks_and_how_it_samples(device_rows):
    rows, seq = make(device_rows), sequence([3, 7], temperature=0.5, seed=9, top_p=0.75, min_p=0.125)
    enter(rows, seq, other := sequence([2], top_k=1 << 40))
    [row] = rows.of([seq])
    assert rows.tables[row, :2].tolist() == [3, 7]
    assert rows.temperatures[row].item() == 0.5
    low, high = rows.seeds[row].numpy().view(np.uint32).tolist()
    assert low | high << 32 == device_rows.mixed(9)
    assert rows.filters[row, 0].item() == 0
    assert rows.filters[row, 1:].view(torch.float32).tolist() == [0.75, 0.125]
    assert rows.filters[rows.of([other])[0]].tolist() == [2**31 - 1, 0x3F800000, 0]
    assert rows.special == set()


def test_a_row_that_goes_on_has_its_next_token_and_what_came_before(device_rows):
    rows, seq = make(device_rows), sequence([1])
    enter(rows, seq, start=2, num_tokens=1, is_prompt=False)
    [row] = rows.of([seq])
    assert (rows.tokens[row].item(), rows.computed[row].item()) == (7, 2)
    with pytest.raises(RuntimeError, match="neither known nor sampled"):
        enter(rows, sequence([2]), start=3, num_tokens=1, is_prompt=False)


def test_grown_blocks_go_behind_those_that_were_there(device_rows):
    rows, seq = make(device_rows), sequence([1])
    enter(rows, seq)
    seq.block_table = [1, 4, 5]
    rows.apply(rows.changes(Batch(grown=[(seq, [4, 5])]), []))
    assert rows.tables[rows.of([seq])[0]].tolist() == [1, 4, 5, 0]
    assert rows.changes(Batch(), []) is None


def test_rows_of_those_that_left_or_were_preempted_are_given_anew(device_rows):
    rows, seqs = make(device_rows), [sequence([n], logprobs=2) for n in range(3)]
    enter(rows, *seqs)
    freed = rows.of(seqs[:2])
    assert rows.special == set(seqs)
    rows.changes(Batch(left=[seqs[0]], preempted=[seqs[1]]), [])
    others = [sequence([5]), sequence([6])]
    enter(rows, *others)
    assert sorted(rows.of(others)) == sorted(freed) and rows.special == {seqs[2]}
    rows.clear()
    assert rows.special == set() and len(rows._free) == 3


@pytest.mark.parametrize("block", [8, 9])
def test_a_block_beyond_the_pool_is_refused_the_first_one_too(device_rows, block):
    rows = make(device_rows, num_blocks=8)
    with pytest.raises(ValueError, match=f"holds block {block}, but this runner has 8 blocks"):
        enter(rows, sequence([1, block]))
    seq = sequence([7])
    enter(rows, seq)
    seq.block_table = [7, block]
    with pytest.raises(ValueError, match=f"holds block {block}"):
        rows.changes(Batch(grown=[(seq, [block])]), [])


def test_tokens_before_the_next_one_are_written_once(device_rows):
    rows, seq = make(device_rows), sequence([1], repetition_penalty=1.5)
    [row] = enter(rows, seq)
    index = rows.of([seq])[0]
    tokens = rows.unseen(row)
    assert tokens == [5, 6, 7] and rows.unseen(row) is None
    rows.seen[index, 40] = True
    rows.see({index: tokens})
    assert rows.seen[index].nonzero()[:, 0].tolist() == [5, 6, 7]
