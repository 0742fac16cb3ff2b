"""BlockManager: who holds which block, and in which order free blocks are used again."""

import pytest

from twinserve.policies import BlockManager, PrefixCache, SamplingParams, Sequence
from twinserve.policies.block_manager import NoFreeBlocksError


def sequence(num_tokens: int, first: int = 0) -> Sequence:
    return Sequence(list(range(first, first + num_tokens)), SamplingParams())


def test_blocks_are_handed_out_in_order_and_blank_ones_come_back_first_tail_foremost():
    manager = BlockManager(8, 4)
    first, second = sequence(12), sequence(4, 100)
    manager.allocate(first)
    manager.allocate(second)
    assert (first.block_table, second.block_table) == ([0, 1, 2], [3])
    manager.deallocate(first)
    assert list(manager.free_block_ids) == [2, 1, 0, 4, 5, 6, 7]
    manager.check_integrity()


def test_cached_blocks_are_evicted_after_blank_ones_and_a_chains_tail_before_its_head():
    manager, cache = BlockManager(6, 4), PrefixCache()
    seq = sequence(10)
    manager.allocate_with_cache(seq, cache)
    manager.deallocate(seq)
    assert list(manager.free_block_ids) == [2, 3, 4, 5, 1, 0]
    manager.allocate(sequence(20, 100))
    assert cache.lookup(seq.token_ids, 4) == ([0], 4), "the tail went, its head stayed"
    manager.check_integrity()


def test_a_failed_allocation_changes_nothing():
    manager, cache = BlockManager(3, 4), PrefixCache()
    holder = sequence(8)
    manager.allocate_with_cache(holder, cache)
    late = Sequence(holder.token_ids + list(range(50, 62)))
    late.num_cached_tokens = 7
    with pytest.raises(NoFreeBlocksError, match="needs 3 blocks, 1 are free"):
        manager.allocate_with_cache(late, cache)
    assert (late.block_table, late.num_cached_tokens) == ([], 7)
    assert [manager.blocks[i].ref_count for i in range(3)] == [1, 1, 0]
    manager.check_integrity()


def test_can_append_asks_for_a_block_exactly_at_the_boundary():
    manager = BlockManager(2, 4)
    seq = sequence(3)
    manager.allocate(seq)
    manager.allocate(sequence(4, 100))
    assert manager.can_append(seq), "the fourth token fits the first block"
    seq.append_token(9)
    assert not manager.can_append(seq), "the fifth needs a block, and none is free"


def test_a_shared_block_is_free_only_when_its_last_holder_gives_it_up():
    manager, cache = BlockManager(8, 4), PrefixCache()
    first = sequence(9)
    manager.allocate_with_cache(first, cache)
    second = Sequence(first.token_ids + [99])
    manager.allocate_with_cache(second, cache)
    assert second.num_cached_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]
    manager.deallocate(first)
    assert manager.blocks[second.block_table[0]].ref_count == 1
    manager.check_integrity()
    manager.deallocate(second)
    assert len(manager.free_block_ids) == 8
    manager.check_integrity()


def test_a_prompt_that_is_cached_whole_leaves_one_block_to_compute():
    manager, cache = BlockManager(8, 4), PrefixCache()
    manager.allocate_with_cache(sequence(8), cache)
    again = sequence(8)
    manager.allocate_with_cache(again, cache)
    assert again.num_cached_tokens == 4
    assert cache.lookup(again.token_ids, 4)[1] == 8, "lookup itself reports all that is stored"


def test_a_reused_block_loses_what_it_held():
    manager, cache = BlockManager(2, 4), PrefixCache()
    old = sequence(8)
    manager.allocate_with_cache(old, cache)
    manager.deallocate(old)
    manager.allocate(sequence(8, 100))
    assert cache.lookup(old.token_ids, 4) == ([], 0)
    assert len(cache) == 0
    manager.check_integrity()


def test_a_manager_serves_one_cache():
    manager = BlockManager(4, 4)
    manager.allocate_with_cache(sequence(4), PrefixCache())
    with pytest.raises(ValueError, match="another PrefixCache"):
        manager.allocate_with_cache(sequence(4), PrefixCache())


def test_a_sequence_cannot_be_given_blocks_twice():
    manager = BlockManager(4, 4)
    seq = sequence(4)
    manager.allocate(seq)
    with pytest.raises(ValueError, match="holds blocks already"):
        manager.allocate(seq)


def test_managers_of_different_block_sizes_live_side_by_side():
    small, large = BlockManager(8, 4), BlockManager(8, 16)
    first, second = sequence(16), sequence(16)
    small.allocate(first)
    large.allocate(second)
    assert (first.num_blocks, second.num_blocks, Sequence.block_size) == (4, 1, 256)


def test_the_cache_is_reset_only_when_nothing_is_held():
    manager, cache = BlockManager(4, 4), PrefixCache()
    seq = sequence(8)
    manager.allocate_with_cache(seq, cache)
    assert not manager.reset_prefix_cache()
    manager.deallocate(seq)
    assert manager.reset_prefix_cache()
    assert (len(cache), len(manager.free_block_ids)) == (0, 4)
    manager.check_integrity()


def test_a_pool_without_end_grows_and_never_evicts():
    manager, cache = BlockManager(None, 4), PrefixCache()
    for first in range(0, 400, 40):
        seq = sequence(40, first)
        manager.allocate_with_cache(seq, cache)
        manager.deallocate(seq)
    assert len(manager.blocks) == len(cache) == 100
    assert cache.lookup(list(range(40)), 4)[1] == 40
    manager.check_integrity()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_blocks_or_tokens_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="expected an integer >= 1"):
        BlockManager(num_blocks, block_size)


def test_integrity_check_notices_a_wrong_reference_count():
    manager = BlockManager(4, 4)
    manager.allocate(sequence(4))
    manager.blocks[0].ref_count = 2
    with pytest.raises(AssertionError, match="block 0: ref_count 2, in 1 block tables"):
        manager.check_integrity()
