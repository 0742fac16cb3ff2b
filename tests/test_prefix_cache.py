"""Cycle 5: prompts that begin alike share the blocks of what they have in common."""

from __future__ import annotations

from guide_models import Subject, subject, words

from twinserve.engine.continuous_batching import run_continuous_batching
from twinserve.engine.inference import generate_naive
from twinserve.engine.model_runner import ModelRunner
from twinserve.policies import BlockManager, PrefixCache, SamplingParams, Scheduler, Sequence

SYSTEM = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def ref_counts(manager: BlockManager, seq: Sequence) -> list[int]:
    """How many hold each block of `seq`."""
    return [manager.blocks[block_id].ref_count for block_id in seq.block_table]


def test_prefix_cache_hit():
    """A prompt that comes again shares the blocks of the first one; what they hold is not computed again."""
    manager, cache = BlockManager(num_blocks=16, block_size=4), PrefixCache()
    first, again = Sequence(SYSTEM), Sequence(SYSTEM)
    assert cache.lookup(SYSTEM, 4) == ([], 0)
    manager.allocate_with_cache(first, cache)
    assert first.num_cached_tokens == 0 and len(first.block_table) == 3

    assert cache.lookup(SYSTEM, 4) == (first.block_table[:2], 8), "both full blocks"
    manager.allocate_with_cache(again, cache)
    assert again.num_cached_tokens == 8
    assert again.block_table[:2] == first.block_table[:2], "the same blocks"
    assert again.block_table[2] != first.block_table[2], "the one that is not full is its own"
    assert ref_counts(manager, again) == ref_counts(manager, first) == [2, 2, 1]
    assert len(manager.free_block_ids) == 16 - 4
    manager.check_integrity()

    manager.deallocate(first)
    assert ref_counts(manager, again) == [1, 1, 1]
    shared = again.block_table[:2]
    manager.deallocate(again)
    assert len(manager.free_block_ids) == 16
    later = Sequence(SYSTEM[:8])
    manager.allocate_with_cache(later, cache)
    assert later.num_cached_tokens == 4, "free blocks are still known; the last token is left to compute"
    assert later.block_table[0] == shared[0]
    manager.check_integrity()
    check_the_engine(subject("tiny"), [SYSTEM, SYSTEM], cached=[0, 8])


def test_partial_cache_hit():
    """Of prompts with one system message, the whole blocks within it are shared and no others."""
    manager, cache = BlockManager(num_blocks=16, block_size=4), PrefixCache()
    one, two = Sequence([*SYSTEM, 20, 21, 22]), Sequence([*SYSTEM, 30, 31, 32])
    manager.allocate_with_cache(one, cache)
    assert cache.lookup(two.token_ids, 4) == (one.block_table[:2], 8)
    manager.allocate_with_cache(two, cache)
    assert two.num_cached_tokens == 8, "ten tokens are alike, and two blocks are eight"
    assert two.block_table[:2] == one.block_table[:2]
    assert not set(two.block_table[2:]) & set(one.block_table[2:])
    assert ref_counts(manager, one) == ref_counts(manager, two) == [2, 2, 1, 1]
    assert len(manager.free_block_ids) == 16 - 6

    other = Sequence([1, 2, 3, 4, *SYSTEM[4:], 20, 21, 22])
    assert cache.lookup(other.token_ids, 4) == ([], 0), "blocks of equal tokens behind another prefix are others"
    manager.allocate_with_cache(other, cache)
    assert other.num_cached_tokens == 0 and not set(other.block_table) & set(one.block_table)
    manager.check_integrity()
    check_the_chain()
    check_the_engine(
        subject("tiny"), [[*SYSTEM, 20, 21, 22], [*SYSTEM, 30, 31, 32], [1, *SYSTEM[1:]]], cached=[0, 8, 0]
    )


def check_the_chain() -> None:
    """A block's hash is of its own tokens and of all that is before it."""
    cache = PrefixCache()
    first = cache.store([1, 2], 7)
    second = cache.store([3, 4], 8, first)
    assert first == PrefixCache.compute_hash([1, 2]) != PrefixCache.compute_hash([2, 1])
    assert second == PrefixCache.compute_hash([3, 4], first)
    hashes = [PrefixCache.compute_hash([3, 4], prefix) for prefix in (-1, first, second)]
    assert len(set(hashes)) == 3
    assert cache.hash_to_block_id == {first: 7, second: 8}
    assert cache.lookup([1, 2, 3, 4, 5], 2) == ([7, 8], 4)
    assert cache.lookup([1, 2, 9, 9], 2) == ([7], 2)
    assert cache.lookup([3, 4], 2) == ([], 0)


def check_the_engine(of: Subject, prompts: list[list[int]], cached: list[int]) -> None:
    """Prompts one after the other: what is cached is not computed, and every text is what it is without a cache."""
    runner = ModelRunner(of.model, of.tokenizer, "cpu", num_blocks=32, block_size=4)
    scheduler = Scheduler(BlockManager(32, 4), prefix_cache=PrefixCache())
    computed: list[int] = []

    class Counting:
        def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int]:
            computed.extend(seq.num_scheduled_tokens for seq in seqs if is_prefill)
            return runner.run(seqs, is_prefill)

    params = SamplingParams(temperature=0.0, max_tokens=6)
    try:
        for prompt in (words(*prompt) for prompt in prompts):
            results = run_continuous_batching(scheduler, Counting(), [prompt], of.tokenizer, sampling_params=params)
            assert list(results.values()) == [generate_naive(of.model, of.tokenizer, prompt, 6, temperature=0.0)]
    finally:
        runner.close()
    assert computed == [len(prompt) - hit for prompt, hit in zip(prompts, cached, strict=True)]
