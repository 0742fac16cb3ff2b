"""Paged KV blocks: who holds them, which are free, and in which order free ones are used again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from mypy_extensions import i64, mypyc_attr

from twinserve.policies.prefix_cache import PrefixCache
from twinserve.policies.sequence import Sequence, token_bytes

ENDLESS: Final = 1 << 60  # a limit that is none; of few enough bits to be a machine's own integer


def bound(name: str, value: int | None) -> i64:
    """A limit; None is none. ValueError, with its name, if it is below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}, expected an integer >= 1")
    return ENDLESS if value is None else value


@mypyc_attr(native_class=False)
class NoFreeBlocksError(RuntimeError):
    """More blocks were asked for than are free; nothing was changed."""


class Block:
    """One block of the KV pool, the number of block tables that hold it, and its neighbours in a ring."""

    __slots__ = ("after", "before", "block_id", "ref_count")

    def __init__(self, block_id: Any):  # an object: it goes from list to list
        self.block_id, self.ref_count = block_id, 0
        self.before = self.after = self

    def enter(self, ring: Block) -> None:
        """Become the last block of the ring that begins behind `ring`."""
        self.before, self.after = ring.before, ring
        self.before.after = ring.before = self

    def reset(self) -> None:
        """Make the block blank for its next use."""
        self.ref_count = 0


class BlockManager:
    """Gives KV blocks to sequences and takes them back; every call costs what it changes, never the pool's size.
    There are `num_blocks` blocks of `block_size` tokens; None is a pool without end, in which nothing is ever evicted.
    A sequence's blocks are given up from its last to its first. Those that the prefix cache knows are used again once
    no blank one is left, the least recently used first, so a chain's tail goes before its head."""

    def __init__(self, num_blocks: int | None, block_size: int):
        bound("num_blocks", num_blocks)
        self.num_blocks, self.block_size = num_blocks, bound("block_size", block_size)
        self.blocks = [Block(i) for i in range(num_blocks or 0)]
        self._blank = list(range(num_blocks or 0))[::-1]  # free and without content; the last is used next
        self._cached = Block(-1)  # begins the ring of the others that are free, in the order of their use
        self.num_cached_blocks = i64(0)
        self.prefix_cache: PrefixCache | None = None
        self.evicts: Callable[[list[int]], None] | None = None  # is told of cached blocks before they are used again
        self._holders: dict[Sequence, None] = {}

    @property
    def num_free_blocks(self) -> int:
        """Free blocks, cached ones included; ENDLESS in a pool without end."""
        return ENDLESS if self.num_blocks is None else len(self._blank) + self.num_cached_blocks

    @property
    def cacheable_tokens(self) -> i64:
        """So many tokens behind its registered ones, a sequence has a block to register; ENDLESS without a cache."""
        return ENDLESS if self.prefix_cache is None else self.block_size

    @property
    def num_used_blocks(self) -> int:
        """Blocks that some sequence holds."""
        return len(self.blocks) - len(self._blank) - self.num_cached_blocks

    @property
    def used_block_ids(self) -> set[int]:
        """The blocks that some sequence holds; a new set, so it costs the pool's size."""
        return {block.block_id for block in self.blocks if block.ref_count}

    @property
    def free_block_ids(self) -> list[int]:
        """The free blocks, in the order in which they are used next; a new list, so it costs the pool's size."""
        block_ids, block = self._blank[::-1], self._cached.after
        while block is not self._cached:
            block_ids.append(block.block_id)
            block = block.after
        return block_ids

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def bind(self, prefix_cache: PrefixCache) -> None:
        """Serve `prefix_cache` from now on; one manager serves one cache."""
        if self.prefix_cache is not None and self.prefix_cache is not prefix_cache:
            raise ValueError("this BlockManager serves another PrefixCache already")
        self.prefix_cache = prefix_cache

    def can_allocate(self, seq: Sequence) -> bool:
        """Are there free blocks for all tokens that `seq` knows?"""
        return self.blocks_for(seq.num_tokens) <= self.num_free_blocks

    def allocate(self, seq: Sequence) -> None:
        """Give `seq` blocks for all tokens it knows, or raise NoFreeBlocksError."""
        self.admit(seq, [], seq.num_tokens)

    def allocate_with_cache(self, seq: Sequence, prefix_cache: PrefixCache) -> None:
        """Give `seq` blocks for all tokens it knows, shared ones where `prefix_cache` holds its prefix: in all
        `num_cached_tokens`, never the last known one. Its full blocks are in the cache from now on."""
        self.bind(prefix_cache)
        hits = self.find_hits(seq)
        self.admit(seq, hits, seq.num_tokens - len(hits) * self.block_size)
        self.register(seq, seq.num_tokens)

    def can_append(self, seq: Sequence) -> bool:
        """Is there room for one token more than `seq` knows now?"""
        return self.blocks_for(seq.num_tokens + 1) - len(seq.block_table) <= self.num_free_blocks

    def deallocate(self, seq: Sequence) -> None:
        """Take back every block of `seq`, its last one first."""
        num_cached = seq.num_registered_tokens // self.block_size
        blank = seq.block_table[num_cached:]
        for block_id in blank:
            self.blocks[block_id].reset()
        self._blank += blank
        # Only a block that the cache knows may be held by others too.
        for block_id in reversed(seq.block_table[:num_cached]):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if not block.ref_count:
                block.enter(self._cached)
                self.num_cached_blocks += 1
        seq.block_table, seq.num_block_tokens, seq.num_registered_tokens = [], 0, 0
        self._holders.pop(seq, None)

    def num_missing(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks that `seq` lacks for `num_tokens` tokens beyond those it has computed."""
        return -(-(seq.num_computed_tokens + num_tokens) // self.block_size) - len(seq.block_table)

    def grow(self, seq: Sequence, block_ids: list[int]) -> None:
        """Put taken blocks at the end of the table of `seq`."""
        seq.block_table += block_ids
        seq.num_block_tokens += len(block_ids) * self.block_size

    def find_hits(self, seq: Sequence) -> list[int]:
        """The cached blocks of the longest prefix of `seq`, one known token at least being left to compute."""
        cache, count = self.prefix_cache, (seq.num_tokens - 1) // self.block_size
        if cache is None or count == 0:
            return []
        self._identify(seq, count)
        return cache.match(seq.block_hashes[:count], seq.block_contents, cache.root(seq.salt)[1])

    def prefix_keys(self, seq: Sequence, ends: range) -> list[int]:
        """The hashes of the blocks that end with so many tokens of a sequence without token ids. Each tells its prefix
        (and as much behind it as the cache looks ahead) from every other, so that no content has to be compared."""
        assert self.prefix_cache is not None and seq.prefix_key is not None, f"{seq} has no prefix keys"
        if ahead := self.prefix_cache.hash_lookahead_tokens:
            ends = range(ends.start + ahead, ends.stop + ahead, ends.step)
        each = getattr(seq.prefix_key, "each", None)
        keys: list[int] = list(map(seq.prefix_key, ends)) if each is None else each(ends)
        mask = self.prefix_cache.root(seq.salt)[0]
        return [key ^ mask for key in keys] if seq.salt else keys

    def blocks_to_take(self, hits: list[int], num_tokens: int) -> int:
        """Free blocks that a sequence of `num_tokens` tokens takes up when `hits` are its first blocks; of these, those
        that nobody holds are free until then, so they count."""
        return self.blocks_for(num_tokens) - sum([self.blocks[block_id].ref_count > 0 for block_id in hits])

    def admit(self, seq: Sequence, hits: list[int], num_tokens: int) -> None:
        """Give `seq`, which holds none, the cached blocks `hits` and new ones for `num_tokens` tokens behind them."""
        if seq.block_table:
            raise ValueError(f"{seq} holds blocks already")
        num_hit_tokens = len(hits) * self.block_size
        needed = self.blocks_to_take(hits, num_hit_tokens + num_tokens)
        if needed > self.num_free_blocks:
            raise NoFreeBlocksError(f"{seq} needs {needed} blocks, {self.num_free_blocks} are free")
        for block_id in hits:
            block = self.blocks[block_id]
            if not block.ref_count:
                block.before.after, block.after.before = block.after, block.before  # out of the ring
                self.num_cached_blocks -= 1
            block.ref_count += 1
        seq.tokens_per_block = self.block_size
        self.grow(seq, hits + self.take(self.blocks_for(num_tokens)))
        seq.num_cached_tokens = seq.num_registered_tokens = num_hit_tokens
        self._holders[seq] = None

    def is_stored(self, block_hash: int | None) -> bool:
        """Does a block with this hash serve hits?"""
        return self.prefix_cache is not None and block_hash in self.prefix_cache.hash_to_block_id

    def register(self, seq: Sequence, num_tokens: int) -> None:
        """Let the cache know the full blocks within the first `num_tokens` tokens of `seq`."""
        cache, size = self.prefix_cache, self.block_size
        assert cache is not None, f"there is no cache to know {seq}"
        num_tokens = min(num_tokens, seq.num_tokens - cache.hash_lookahead_tokens)
        first, end = seq.num_registered_tokens // size, num_tokens // size
        if first >= end:
            return
        self._identify(seq, end)
        root = cache.ROOT if first else cache.root(seq.salt)[1]
        cache.register_chain(seq.block_table, seq.block_hashes, seq.block_contents, first, end, root)
        seq.num_registered_tokens = end * size

    def unregister(self, seq: Sequence, num_tokens: int) -> None:
        """Let the cache forget the blocks of `seq` that are not full with its first `num_tokens` tokens."""
        num_full, num_known = num_tokens // self.block_size, seq.num_registered_tokens // self.block_size
        if self.prefix_cache is not None and num_full < num_known:
            self.prefix_cache.remove(seq.block_table[num_full:num_known])
            seq.num_registered_tokens = num_full * self.block_size

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; refused (False) while a sequence holds blocks."""
        if self.num_used_blocks:
            return False
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
            self._blank = self.free_block_ids[::-1]
            self._cached, self.num_cached_blocks = Block(-1), 0
        return True

    def take(self, count: int) -> list[int]:
        """Take `count` free blocks from the front; none at all, but a NoFreeBlocksError, if too few are free."""
        if count > self.num_free_blocks:
            raise NoFreeBlocksError(f"{count} blocks are needed, {self.num_free_blocks} are free")
        taken = [self._blank.pop()] if count == 1 and self._blank else self._blank[: -count - 1 : -1]
        if count > 1:  # one alone, as a decode needs, costs no slices: 73 to 50 million instructions of (a), compiled
            del self._blank[len(self._blank) - len(taken) :]
        missing = count - len(taken)
        if self.num_blocks is None:
            taken += range(len(self.blocks), len(self.blocks) + missing)  # new ones, and nothing is evicted
            self.blocks += [Block(block_id) for block_id in taken[count - missing :]]
        elif missing:
            block = self._cached.after
            for _ in range(missing):
                taken.append(block.block_id)
                block = block.after
            self._cached.after, block.before = block, self._cached
            self.num_cached_blocks -= missing
            if self.evicts is not None:
                self.evicts(taken[count - missing :])
            assert self.prefix_cache is not None
            self.prefix_cache.remove(taken[count - missing :])
        for block_id in taken:
            self.blocks[block_id].ref_count = 1
        return taken

    def _identify(self, seq: Sequence, num_blocks: int) -> None:
        """Hash the first `num_blocks` blocks of `seq` at least, each once in the sequence's life."""
        if (first := len(seq.block_hashes)) >= num_blocks:
            return
        hashes, contents, size, cache = seq.block_hashes, seq.block_contents, self.block_size, self.prefix_cache
        assert cache is not None
        if seq.prefix_key is not None:
            # All that it will ever have, as many keys at once cost least.
            num_blocks = max(num_blocks, (seq.final_length - cache.hash_lookahead_tokens) // size)
            hashes += self.prefix_keys(seq, range((first + 1) * size, num_blocks * size + 1, size))
            contents += [None] * (num_blocks - first)
            return
        packed = token_bytes(seq.token_ids[first * size : num_blocks * size + cache.hash_lookahead_tokens])
        cache.extend_chain(hashes, contents, packed, 4 * size, cache.root(seq.salt)[0])

    def check_integrity(self) -> None:
        """Raise AssertionError, with the values, if an invariant of the pool does not hold. Costs the pool's size."""
        free, used, cache = self.free_block_ids, self.used_block_ids, self.prefix_cache
        assert sorted([*free, *used]) == list(range(len(self.blocks))), f"not a partition: free {free}, used {used}"
        holders = Counter(block_id for seq in self._holders for block_id in seq.block_table)
        for block_id, block in enumerate(self.blocks):
            held = block.ref_count, holders.get(block_id, 0)
            assert held[0] == held[1], f"block {block_id}: ref_count {held[0]}, in {held[1]} block tables"
        if cache is None:
            return
        blank = [block_id for block_id in free if block_id not in cache]
        assert free[: len(blank)] == blank, f"blank blocks {blank} are not the first of those that are free, {free}"
        for seq in self._holders:
            parent, size, ahead = cache.root(seq.salt)[1], self.block_size, cache.hash_lookahead_tokens
            for index in range(seq.num_registered_tokens // size):
                entry, content = cache.get(seq.block_table[index]), None
                if seq.prefix_key is None:
                    content = token_bytes(seq.token_ids[index * size : (index + 1) * size + ahead])
                expected = seq.block_hashes[index], content, parent
                found = None if entry is None else (entry.hash, entry.content, entry.parent)
                assert entry is not None and found == expected, f"{seq}: block {index} is {found}, not {expected}"
                parent = entry.prefix
