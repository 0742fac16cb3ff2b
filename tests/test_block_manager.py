"""Cycle 3: sequences, and the blocks that hold their KV."""

from __future__ import annotations

import pytest

from twinserve.engine.block_manager import Block, BlockManager
from twinserve.engine.sequence import SamplingParams, Sequence, SequenceStatus
from twinserve.policies import PrefixCache
from twinserve.policies.block_manager import NoFreeBlocksError


def test_sequence_basic():
    """Sequence 클래스 기본 동작 테스트"""
    seq = Sequence([1, 2, 3, 4, 5], SamplingParams())
    assert seq.num_tokens == 5
    assert seq.num_prompt_tokens == 5
    assert seq.num_completion_tokens == 0

    seq.append_token(6)
    assert seq.num_tokens == 6
    assert seq.num_completion_tokens == 1

    # Up to here the guide's own test; from here on what its section says beside.
    assert seq.token_ids == [1, 2, 3, 4, 5, 6]
    assert seq.num_prompt_tokens == 5
    assert seq.status is SequenceStatus.WAITING
    assert seq.block_table == [] and seq.num_cached_tokens == 0
    assert [status.name for status in SequenceStatus] == ["WAITING", "RUNNING", "FINISHED"]
    assert (SamplingParams().temperature, SamplingParams().max_tokens) == (1.0, 64)
    assert Sequence([1], SamplingParams(0.5, 3)).sampling_params == SamplingParams(temperature=0.5, max_tokens=3)
    assert Sequence([1]).sampling_params == SamplingParams()
    assert Sequence([1]).seq_id != Sequence([1]).seq_id

    assert Sequence.block_size == 256
    assert [Sequence([7] * length).num_blocks for length in (1, 255, 256, 257, 512, 513)] == [1, 1, 1, 2, 2, 3]
    seq.block_size = 3
    assert seq.num_blocks == 2
    seq.append_token(7)
    assert seq.num_blocks == 3


def test_block_manager_allocate():
    """BlockManager 할당/해제 테스트"""
    bm = BlockManager(num_blocks=10, block_size=4)
    seq = Sequence([1, 2, 3, 4, 5], SamplingParams())  # 5 tokens = 2 blocks

    assert bm.can_allocate(seq)
    bm.allocate(seq)
    assert len(seq.block_table) == 2
    assert len(bm.free_block_ids) == 8

    bm.deallocate(seq)
    assert len(bm.free_block_ids) == 10

    # Up to here the guide's own test; from here on what its section says beside.
    assert seq.block_table == []
    check_who_holds_what()
    check_a_block_made_blank()
    check_the_limits_of_a_pool()
    check_a_block_shared_by_two()


def check_who_holds_what() -> None:
    """A block is free, or used by those who count in its `ref_count`."""
    bm = BlockManager(num_blocks=4, block_size=4)
    assert [block.block_id for block in bm.blocks] == [0, 1, 2, 3]
    assert bm.block_size == 4
    one, two = Sequence([1] * 8), Sequence([2] * 5)
    bm.allocate(one)
    bm.allocate(two)
    assert sorted(one.block_table + two.block_table) == [0, 1, 2, 3]
    assert bm.used_block_ids == {0, 1, 2, 3}
    assert [block.ref_count for block in bm.blocks] == [1, 1, 1, 1]

    taken = set(two.block_table)
    bm.deallocate(one)
    assert bm.used_block_ids == taken
    assert [block.ref_count for block in bm.blocks] == [int(block.block_id in taken) for block in bm.blocks]
    assert sorted(bm.free_block_ids) == sorted({0, 1, 2, 3} - taken)
    bm.check_integrity()


def check_a_block_made_blank() -> None:
    """A new block and one that was reset are held by nobody."""
    block = Block(3)
    assert (block.block_id, block.ref_count) == (3, 0)
    block.ref_count = 2
    block.reset()
    assert (block.block_id, block.ref_count) == (3, 0)


def check_the_limits_of_a_pool() -> None:
    """What fits is given to the last block; what does not is refused, and nothing has changed."""
    bm = BlockManager(num_blocks=2, block_size=4)
    assert bm.can_allocate(Sequence([1] * 8))
    assert not bm.can_allocate(Sequence([1] * 9))
    with pytest.raises(NoFreeBlocksError, match="needs 3 blocks, 2 are free"):
        bm.allocate(Sequence([1] * 9))
    assert len(bm.free_block_ids) == 2

    seq = Sequence([1] * 4)
    bm.allocate(seq)
    assert bm.can_append(seq), "another block is free"
    other = Sequence([2])
    bm.allocate(other)
    assert not bm.can_append(seq), "its block is full and no other is free"
    assert bm.can_append(other), "its block has room"
    bm.deallocate(other)
    assert bm.can_append(seq)
    bm.check_integrity()


def check_a_block_shared_by_two() -> None:
    """A block goes back when the last one who holds it gives it up."""
    bm, cache = BlockManager(num_blocks=4, block_size=4), PrefixCache()
    one, two = Sequence([1, 2, 3, 4, 5]), Sequence([1, 2, 3, 4, 6])
    bm.allocate_with_cache(one, cache)
    bm.allocate_with_cache(two, cache)
    shared = bm.blocks[one.block_table[0]]
    assert shared.ref_count == 2
    bm.deallocate(one)
    assert shared.ref_count == 1
    assert shared.block_id in bm.used_block_ids and len(bm.free_block_ids) == 2
    bm.deallocate(two)
    assert shared.ref_count == 0 and len(bm.free_block_ids) == 4
