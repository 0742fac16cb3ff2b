"""Paged KV blocks: who holds them, which are free, and in which order free ones are used again."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from twinserve.policies.prefix_cache import PrefixCache
from twinserve.policies.sequence import Sequence, token_bytes


class NoFreeBlocksError(RuntimeError):
    """More blocks were asked for than are free; nothing was changed."""


class Block:
    """One block of the KV pool and the number of block tables that hold it."""

    __slots__ = ("block_id", "ref_count")

    def __init__(self, block_id: int):
        self.block_id = block_id
        self.ref_count = 0

    def reset(self) -> None:
        """Make the block blank for its next use."""
        self.ref_count = 0

    def __repr__(self) -> str:
        return f"Block({self.block_id}, ref_count={self.ref_count})"


class FreeBlocks:
    """The free blocks in the order in which they are used next: blank ones first, then cached ones, oldest first.

    A stack of blank blocks (nothing can be hit in them) and a queue of cached ones. Iteration goes in order of use.
    """

    __slots__ = ("_blank", "_cached")

    def __init__(self, block_ids: Seq[int] = ()):
        self._blank = list(reversed(block_ids))
        self._cached: OrderedDict[int, None] = OrderedDict()

    def pop_blank(self, count: int) -> list[int]:
        """Take the first `count` blocks, or as many of them as are blank."""
        blank = self._blank
        count = min(count, len(blank))
        taken = blank[len(blank) - count :]
        del blank[len(blank) - count :]
        taken.reverse()
        return taken

    def pop_cached(self) -> int:
        """Take the oldest cached block, once no blank one is left."""
        return self._cached.popitem(last=False)[0]

    def take(self, block_id: int) -> None:
        """Take a cached block from wherever it is, for a hit."""
        del self._cached[block_id]

    def push_blank(self, block_ids: list[int]) -> None:
        """Put blank blocks in front, the first of them foremost."""
        self._blank.extend(reversed(block_ids))

    def push_cached(self, block_id: int) -> None:
        """Put a cached block behind all others."""
        self._cached[block_id] = None

    def add_last_blank(self, block_id: int) -> None:
        """Put a new block behind the blank ones."""
        self._blank.insert(0, block_id)

    def forget_cached(self) -> None:
        """Make every cached block blank, oldest first behind the blank ones."""
        self._blank = list(reversed(self._cached)) + self._blank
        self._cached.clear()

    @property
    def num_blank(self) -> int:
        return len(self._blank)

    def is_cached(self, block_id: int) -> bool:
        return block_id in self._cached

    def __len__(self) -> int:
        return len(self._blank) + len(self._cached)

    def __iter__(self) -> Iterator[int]:
        yield from reversed(self._blank)
        yield from self._cached


class BlockManager:
    """Gives KV blocks to sequences and takes them back; every call costs what it changes, never the pool's size.

    Blocks are handed out from the front of `free_block_ids`. A sequence's blocks are given up from its last to its
    first: blocks that the prefix cache knows go behind all free ones (so the least recently used is evicted first, a
    chain's tail before its head), the others in front.

    Args:
        num_blocks: blocks in the pool; None is a pool without end, in which nothing is ever evicted.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int | None, block_size: int):
        if num_blocks is not None and num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}, expected an integer >= 1")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, expected an integer >= 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.blocks = [Block(i) for i in range(num_blocks or 0)]
        self.free_block_ids = FreeBlocks(range(num_blocks or 0))
        self.used_block_ids: set[int] = set()
        self.prefix_cache: PrefixCache | None = None
        self._holders: dict[Sequence, None] = {}

    @property
    def num_free_blocks(self) -> float:
        """Free blocks, cached ones included; infinite in a pool without end."""
        return math.inf if self.num_blocks is None else len(self.free_block_ids)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def bind(self, prefix_cache: PrefixCache) -> None:
        """Serve `prefix_cache` from now on; one manager serves one cache."""
        if self.prefix_cache is not None and self.prefix_cache is not prefix_cache:
            raise ValueError("this BlockManager serves another PrefixCache already")
        self.prefix_cache = prefix_cache

    # --- the guide's calls: a sequence's whole known length at once ---

    def can_allocate(self, seq: Sequence) -> bool:
        """Are there free blocks for all tokens that `seq` knows?"""
        return self.blocks_for(seq.num_tokens) <= self.num_free_blocks

    def allocate(self, seq: Sequence) -> None:
        """Give `seq` blocks for all tokens it knows.

        Raises:
            NoFreeBlocksError: too few are free; nothing was changed.
        """
        self.admit(seq, [], seq.num_tokens)

    def allocate_with_cache(self, seq: Sequence, prefix_cache: PrefixCache) -> None:
        """Give `seq` blocks for all tokens it knows, shared ones where `prefix_cache` holds its prefix.

        `seq.num_cached_tokens` becomes the number of tokens found; at least the last known token is left to compute.
        The full blocks of `seq` are in the cache from now on.
        """
        self.bind(prefix_cache)
        hits = self.find_hits(seq)
        self.admit(seq, hits, seq.num_tokens - len(hits) * self.block_size)
        self.register(seq, seq.num_tokens)

    def can_append(self, seq: Sequence) -> bool:
        """Is there room for one token more than `seq` knows now?"""
        return self.blocks_for(seq.num_tokens + 1) - len(seq.block_table) <= self.num_free_blocks

    def deallocate(self, seq: Sequence) -> None:
        """Take back every block of `seq`, its last one first."""
        blocks, used, push_cached = self.blocks, self.used_block_ids, self.free_block_ids.push_cached
        cached = () if self.prefix_cache is None else self.prefix_cache.block_ids
        blank = []
        for block_id in reversed(seq.block_table):
            block = blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                used.remove(block_id)
                if block_id in cached:
                    push_cached(block_id)
                else:
                    blank.append(block_id)
        self.free_block_ids.push_blank(blank)
        seq.block_table = []
        seq.num_registered_blocks = 0
        self._holders.pop(seq, None)

    # --- the scheduler's calls: as many tokens as a step computes ---

    def num_missing(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks that `seq` lacks for `num_tokens` tokens beyond those it has computed."""
        return -(-(seq.num_computed_tokens + num_tokens) // self.block_size) - len(seq.block_table)

    def extend(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Grow the table of `seq` by the blocks of `num_tokens` more computed tokens; the ids of the new blocks.

        Raises:
            NoFreeBlocksError: too few are free; nothing was changed.
        """
        missing = self.num_missing(seq, num_tokens)
        if missing <= 0:
            return []
        if missing > self.num_free_blocks:
            raise NoFreeBlocksError(f"{seq} needs {missing} blocks, {self.num_free_blocks} are free")
        new_ids = self._take_free_blocks(missing)
        seq.block_table += new_ids
        return new_ids

    def extend_each(self, seqs: list[Sequence]) -> list[tuple[Sequence, list[int]]]:
        """Grow the table of each of `seqs`, in order, by one block; each with its new block.

        Raises:
            NoFreeBlocksError: too few are free; nothing was changed.
        """
        if len(seqs) > self.num_free_blocks:
            raise NoFreeBlocksError(f"{len(seqs)} blocks are needed, {self.num_free_blocks} are free")
        grown = []
        for seq, block_id in zip(seqs, self._take_free_blocks(len(seqs)), strict=True):
            seq.block_table.append(block_id)
            grown.append((seq, [block_id]))
        return grown

    def find_hits(self, seq: Sequence) -> list[int]:
        """The cached blocks of the longest prefix of `seq`, one known token at least being left to compute."""
        cache, count = self.prefix_cache, (seq.num_tokens - 1) // self.block_size
        if cache is None or count == 0:
            return []
        self._identify(seq, count)
        return cache.match(seq.block_hashes[:count], seq.block_contents[:count], cache.root(seq.salt)[1])

    def hash_at(self, seq: Sequence, index: int) -> int | None:
        """The hash of a block of `seq`; None if there is none that can be hit, as a token is left to compute."""
        is_hit = self.prefix_cache is not None and index < (seq.num_tokens - 1) // self.block_size
        return seq.block_hashes[index] if is_hit else None

    def prefix_keys(self, seq: Sequence, ends: range) -> list[int]:
        """The hashes of the blocks that end with so many tokens of a sequence without token ids.

        The key of a prefix tells it from every other, so that no content has to be compared.
        """
        assert self.prefix_cache is not None and seq.prefix_key is not None, f"{seq} has no prefix keys"
        mask = self.prefix_cache.root(seq.salt)[0] if seq.salt else 0
        return [seq.prefix_key(end) ^ mask for end in ends]

    def may_hit(self, block_hash: int | None) -> bool:
        """Does the cache hold a block with this hash?"""
        return self.prefix_cache is not None and block_hash in self.prefix_cache.hash_to_block_id

    def blocks_to_take(self, hits: list[int], num_tokens: int) -> int:
        """Free blocks that a sequence of `num_tokens` tokens takes up when `hits` are its first blocks.

        A hit block that nobody holds is free until then, so it counts.
        """
        free_hits = sum(1 for block_id in hits if self.blocks[block_id].ref_count == 0)
        return self.blocks_for(num_tokens) - len(hits) + free_hits

    def admit(self, seq: Sequence, hits: list[int], num_tokens: int) -> None:
        """Give `seq` the cached blocks `hits` and new ones for `num_tokens` tokens behind them.

        Raises:
            ValueError: `seq` holds blocks already.
            NoFreeBlocksError: too few are free; nothing was changed.
        """
        if seq.block_table:
            raise ValueError(f"{seq} holds blocks already")
        num_hit_tokens = len(hits) * self.block_size
        needed = self.blocks_to_take(hits, num_hit_tokens + num_tokens)
        if needed > self.num_free_blocks:
            raise NoFreeBlocksError(f"{seq} needs {needed} blocks, {self.num_free_blocks} are free")
        for block_id in hits:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                self.free_block_ids.take(block_id)
                self.used_block_ids.add(block_id)
            block.ref_count += 1
        new_blocks = self.blocks_for(num_hit_tokens + num_tokens) - len(hits)
        seq.block_size = self.block_size
        seq.block_table = list(hits) + self._take_free_blocks(new_blocks)
        seq.num_cached_tokens = num_hit_tokens
        seq.num_registered_blocks = len(hits)
        self._holders[seq] = None

    def register(self, seq: Sequence, num_tokens: int) -> None:
        """Let the cache know the full blocks within the first `num_tokens` tokens of `seq`."""
        cache, first, end = self.prefix_cache, seq.num_registered_blocks, num_tokens // self.block_size
        if cache is None or first >= end:
            return
        self._identify(seq, end)
        table, hashes, contents = seq.block_table, seq.block_hashes, seq.block_contents
        parent = cache.prefix_of(table[first - 1]) if first else cache.root(seq.salt)[1]
        for index in range(first, end):
            parent = cache.register(table[index], hashes[index], contents[index], parent)
        seq.num_registered_blocks = end

    def register_each(self, blocks: list[tuple[Sequence, int, bytes | None]]) -> None:
        """Let the cache know a block of each of some sequences, in order.

        Args:
            blocks: the sequence, the number of its tokens with which the block ends, and the block's own tokens, packed
                (see `token_bytes`); None for these if the sequence has to be asked for them.
        """
        cache = self.prefix_cache
        if cache is None:
            return
        size = self.block_size
        for seq, end, content in blocks:
            index, hashes, table = end // size - 1, seq.block_hashes, seq.block_table
            is_next = index == seq.num_registered_blocks == len(hashes) > 0
            if is_next and content is not None:
                hashes.append(cache.register_next(table[index], content, table[index - 1]))
            elif is_next and seq.prefix_key is not None and not seq.salt:
                hashes.append(seq.prefix_key(end))
                cache.register(table[index], hashes[index], None, cache.prefix_of(table[index - 1]))
            else:
                self.register(seq, end)
                continue
            seq.block_contents.append(content)
            seq.num_registered_blocks = index + 1

    def unregister(self, seq: Sequence, num_tokens: int) -> None:
        """Let the cache forget the blocks of `seq` that are not full with its first `num_tokens` tokens."""
        for index in range(num_tokens // self.block_size, seq.num_registered_blocks):
            assert self.prefix_cache is not None
            self.prefix_cache.remove(seq.block_table[index])
            seq.num_registered_blocks = num_tokens // self.block_size

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; refused (False) while a sequence holds blocks."""
        if self.used_block_ids:
            return False
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
            self.free_block_ids.forget_cached()
        return True

    def _take_free_blocks(self, count: int) -> list[int]:
        """Take so many free blocks, of which there are enough, from the front."""
        if self.num_blocks is None:
            for block_id in range(len(self.blocks), len(self.blocks) + count - self.free_block_ids.num_blank):
                self.blocks.append(Block(block_id))
                self.free_block_ids.add_last_blank(block_id)
        taken = self.free_block_ids.pop_blank(count)
        while len(taken) < count:
            block_id = self.free_block_ids.pop_cached()
            if self.prefix_cache is not None:
                self.prefix_cache.remove(block_id)
            taken.append(block_id)
        blocks = self.blocks
        for block_id in taken:
            blocks[block_id].ref_count = 1
        self.used_block_ids.update(taken)
        return taken

    def _identify(self, seq: Sequence, num_blocks: int) -> None:
        """Hash the first `num_blocks` blocks of `seq`, each once in the sequence's life."""
        hashes, contents, size, cache = seq.block_hashes, seq.block_contents, self.block_size, self.prefix_cache
        first = len(hashes)
        if first >= num_blocks:
            return
        assert cache is not None
        if seq.prefix_key is not None:
            hashes += self.prefix_keys(seq, range((first + 1) * size, num_blocks * size + 1, size))
            contents += [None] * (num_blocks - first)
            return
        packed = token_bytes(seq.token_ids[first * size : num_blocks * size])
        previous = hashes[-1] if hashes else cache.root(seq.salt)[0]
        for begin in range(0, len(packed), 4 * size):
            content = packed[begin : begin + 4 * size]
            previous = cache.block_hash(content, previous)
            contents.append(content)
            hashes.append(previous)

    def check_integrity(self) -> None:
        """Raise AssertionError, with the values, if an invariant of the pool does not hold. Costs the pool's size."""
        free = list(self.free_block_ids)
        assert len(free) == len(set(free)), f"a block is free twice: {free}"
        assert not self.used_block_ids & set(free), f"free and used: {self.used_block_ids & set(free)}"
        assert len(free) + len(self.used_block_ids) == len(self.blocks), (
            f"{len(free)} free + {len(self.used_block_ids)} used != {len(self.blocks)} blocks"
        )
        holders = [0] * len(self.blocks)
        for seq in self._holders:
            assert len(set(seq.block_table)) == len(seq.block_table), f"{seq} holds a block twice: {seq.block_table}"
            for block_id in seq.block_table:
                holders[block_id] += 1
        for block in self.blocks:
            held = holders[block.block_id]
            assert block.ref_count == held, f"{block} is in {held} block tables"
            assert (held > 0) == (block.block_id in self.used_block_ids), f"{block} held {held} times, used wrongly"
        cache = self.prefix_cache
        if cache is None:
            return
        for block_id in free:
            cached = block_id in cache
            assert cached == self.free_block_ids.is_cached(block_id), f"free block {block_id}: cached is {cached}"
        for seq in self._holders:
            parent = cache.root(seq.salt)[1]
            for index in range(seq.num_registered_blocks):
                entry = cache.get(seq.block_table[index])
                assert entry is not None, f"{seq}: block {index} is registered, but not in the cache"
                assert entry.hash == seq.block_hashes[index], f"{seq}: block {index} has another hash in the cache"
                content = None
                if seq.prefix_key is None:
                    content = token_bytes(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])
                assert entry.content == content, f"{seq}: block {index} holds other tokens"
                assert entry.parent == parent, f"{seq}: block {index} follows prefix {entry.parent}, not {parent}"
                parent = entry.prefix
