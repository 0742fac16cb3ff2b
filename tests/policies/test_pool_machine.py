"""BlockManager with PrefixCache against the slow model's pool, call by call."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from side_by_side import WeakHash
from slow_model import Request, Rules, SlowModel

from twinserve.policies import BlockManager, PrefixCache, SamplingParams, Sequence
from twinserve.policies.block_manager import ENDLESS, NoFreeBlocksError


class PoolMachine(RuleBasedStateMachine):
    """Sequences take whole tables, grow by a token and give all back; the cache is looked at and forgotten."""

    seen: Counter[str]

    @initialize(
        num_blocks=st.sampled_from([4, 1, 2, 3, 5, 8, 12, None]),
        block_size=st.sampled_from([2, 1, 3, 4, 16, 256]),
        weak=st.sampled_from([1, 2, 5, None]),
    )
    def begin(self, num_blocks, block_size, weak):
        self.size = block_size
        self.hash = WeakHash(weak or 1)
        self.manager = BlockManager(num_blocks, block_size)
        self.cache = PrefixCache() if weak is None else PrefixCache(hash=self.hash)
        self.model = SlowModel(Rules(num_blocks=num_blocks, block_size=block_size))
        self.pairs: list[tuple[Sequence, Request]] = []

    @rule(seed=st.integers(0, 2**32 - 1), calls=st.integers(1, 60))
    def storm(self, seed, calls):
        self.random_calls(random.Random(seed), calls)

    def random_calls(self, rng: random.Random, calls: int) -> None:
        for _ in range(calls):
            if rng.random() < 0.5:
                own = rng.choices([1, 2, 3], k=rng.randint(0, 3))
                self._allocate_both(rng.randrange(3), rng.randint(0, 3), rng.randint(0, 2), own, rng.random() < 0.8)
            elif self.pairs and rng.random() < 0.9:
                self._deallocate_both(rng.randrange(len(self.pairs)))
            else:
                self.reset()
            self.agree()

    @rule(
        which=st.integers(0, 2),
        blocks=st.integers(0, 3),
        more=st.integers(0, 2),
        own=st.lists(st.integers(1, 3), max_size=5),
        cached=st.booleans(),
    )
    def allocate(self, which, blocks, more, own, cached):
        self._allocate_both(which, blocks, more, own, cached)

    def _allocate_both(self, which: int, blocks: int, more: int, own: list[int], cached: bool) -> None:
        """A whole table at once, with or without looking into the cache; one that does not fit changes nothing."""
        length = max(1, blocks * self.size + more)
        tokens = [10 * which + index % 7 for index in range(length)] + own
        seq = Sequence(tokens, SamplingParams())
        request = Request(0, list(tokens), len(tokens), 1, known=len(tokens))
        model = self.model
        hits = model.hits(request) if cached else []
        num_new = model.blocks_for(len(tokens)) - len(hits)
        assert self.manager.can_allocate(seq) == (model.blocks_for(len(tokens)) <= model.num_free())
        if num_new + sum(block in model.free for block in hits) > model.num_free():
            self.seen["too few blocks"] += 1
            with pytest.raises(NoFreeBlocksError):
                self._allocate(seq, cached)
            assert (seq.block_table, seq.num_cached_tokens) == ([], 0)
            return
        self.seen["hit of a live block"] += any(block not in model.free for block in hits)
        self.seen["hit of a free block"] += any(block in model.free for block in hits)
        self._allocate(seq, cached)
        model.free = [block for block in model.free if block not in hits]
        request.table = hits + [model._take_block() for _ in range(num_new)]
        request.registered = len(hits)
        model.running.append(request)
        if cached:
            model._register(request, request.known)
            assert seq.num_cached_tokens == len(hits) * self.size
        self.pairs.append((seq, request))

    def _allocate(self, seq: Sequence, cached: bool) -> None:
        if cached:
            self.manager.allocate_with_cache(seq, self.cache)
        else:
            self.manager.allocate(seq)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), token=st.integers(1, 3))
    def can_append(self, data, token):
        """A table has room for a token more, or a block is needed and may not be there."""
        seq, request = data.draw(st.sampled_from(self.pairs))
        needed = self.model.blocks_for(request.known + 1) - len(request.table)
        assert self.manager.can_append(seq) == (needed <= self.model.num_free())

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def deallocate(self, data):
        self._deallocate_both(data.draw(st.integers(0, len(self.pairs) - 1)))

    def _deallocate_both(self, index: int) -> None:
        seq, request = self.pairs.pop(index)
        self.manager.deallocate(seq)
        self.model.running.remove(request)
        self.model._give_up_blocks(request)

    @rule()
    def reset(self):
        done = self.model.reset()
        assert self.manager.reset_prefix_cache() == done
        self.seen["reset"] += done
        self.seen["reset refused"] += not done
        if done:
            assert not self.manager.used_block_ids and len(self.cache) == 0

    @rule(which=st.integers(0, 2), length=st.integers(0, 12))
    def lookup(self, which, length):
        tokens = [10 * which + index % 7 for index in range(length)]
        request = Request(-1, tokens, length, 1, known=length + 1)
        hits = self.model.hits(request)
        assert self.cache.lookup(tokens, self.size) == (hits, len(hits) * self.size)

    @invariant()
    def agree(self):
        if not hasattr(self, "pairs"):
            return
        model, manager = self.model, self.manager
        for seq, request in self.pairs:
            assert seq.block_table == request.table
        assert list(manager.free_block_ids) == model.free
        assert set(manager.used_block_ids) == model.used()
        assert manager.num_free_blocks == min(model.num_free(), ENDLESS)
        assert {block for block in range(model.num_blocks_made) if block in self.cache} == set(model.holds)
        holders = Counter(block for _, request in self.pairs for block in request.table)
        assert [block.ref_count for block in manager.blocks] == [holders[i] for i in range(model.num_blocks_made)]
        manager.check_integrity()
        self.seen["one prefix on several blocks"] += any(len(blocks) > 1 for blocks in model.holders_of.values())

    def teardown(self):
        if hasattr(self, "pairs"):
            self.seen["eviction of a cached block"] += self.model.evictions
            self.seen["collision"] += self.hash.num_collisions


RARE = {
    "too few blocks",
    "hit of a live block",
    "hit of a free block",
    "reset",
    "reset refused",
    "one prefix on several blocks",
    "eviction of a cached block",
    "collision",
}


def test_storms_of_calls_of_the_pool_have_the_effect_they_have_on_the_slow_model():
    """The same calls on every machine; among them everything rare happens."""
    seen: Counter[str] = Counter()
    machine = type("PoolMachine", (PoolMachine,), {"seen": seen})
    for seed in range(min(4 * settings().max_examples, 10_000)):
        rng = random.Random(seed)
        one = machine()
        one.begin(
            rng.choice([1, 2, 3, 4, 5, 8, 12, None]), rng.choice([1, 2, 2, 3, 4, 16]), rng.choice([1, 2, 5, None])
        )
        one.random_calls(rng, 60)
        one.teardown()
    missing = RARE - {what for what, count in seen.items() if count}
    assert not missing, f"never happened: {sorted(missing)}"


def test_every_call_of_the_pool_has_the_effect_it_has_on_the_slow_model():
    machine = type("PoolMachine", (PoolMachine,), {"seen": Counter()})
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=30))
