"""PrefixCache: which KV block holds which prefix, found by a hash chained over the prefix and checked by content."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import xxhash

from twinserve.policies.sequence import token_bytes

HASHES: dict[str, tuple[Callable[[bytes, int], int], int]]
HASHES = {"xxh64": (xxhash.xxh64_intdigest, 8), "xxh3_128": (xxhash.xxh3_128_intdigest, 16)}
"""By name: the hash of (bytes, seed), and its length in bytes."""


class CachedBlock:
    """What the cache knows of a block; `hash` is None while it does not hold it. `prefix` numbers its content with all
    before it, so that equal ones have equal numbers; `parent` is the number of the prefix before it."""

    __slots__ = ("content", "hash", "parent", "prefix")

    def __init__(self) -> None:
        self.hash: int | None = None
        self.content: bytes | None = None
        self.parent = self.prefix = PrefixCache.ROOT


class PrefixCache:
    """Full KV blocks by the hash of their tokens, chained over the prefix.

    A hit compares tokens and prefix as well as the hash, so that a collision costs a miss and never gives one request
    the KV of another. Of blocks with equal content the one stored first serves hits. `hash` is "xxh64", "xxh3_128", or
    a function of (bytes, seed) that returns a non-negative integer of 16 bytes; the seed makes hashes unpredictable.
    `salt` begins every chain, before a sequence's own: caches with different ones share nothing. With
    `hash_lookahead_tokens`, a block's content is that of so many tokens behind it too, and it is hit only before them.
    """

    ROOT: Final = 0

    def __init__(
        self,
        *,
        hash: str | Callable[[bytes, int], int] = "xxh64",
        seed: int = 0,
        salt: str = "",
        hash_lookahead_tokens: int = 0,
    ):
        if isinstance(hash, str) and hash not in HASHES:
            raise ValueError(f"hash is {hash!r}, expected one of {', '.join(HASHES)}")
        self._digest, self._hash_bytes = HASHES[hash] if isinstance(hash, str) else (hash, 16)
        self.seed, self._salt, self.hash_lookahead_tokens = seed, salt, hash_lookahead_tokens
        self.root_hash = self._digest(salt.encode(), seed) if salt else -1
        self._last_prefix = self.ROOT
        self.clear()

    def clear(self) -> None:
        """Forget every block."""
        self.hash_to_block_id: dict[int, int] = {}
        self._roots = {"": (self.root_hash, self.ROOT)}
        self._known: list[CachedBlock] = []  # by block id
        self._equal_hash: dict[int, list[int]] = {}  # the blocks with a hash beside the one that serves it

    @staticmethod
    def compute_hash(token_ids: list[int], prefix_hash: int = -1) -> int:
        """xxh64 of a block's tokens: the prefix's hash as 8 little-endian bytes unless -1, then 4 bytes a token."""
        prefix = b"" if prefix_hash == -1 else prefix_hash.to_bytes(8, "little")
        return xxhash.xxh64_intdigest(prefix + token_bytes(token_ids))

    def extend_chain(
        self, hashes: list[int], contents: list[bytes | None], packed: bytes, block_bytes: int, root_hash: int
    ) -> None:
        """Add the blocks that tokens (see `token_bytes`) fill behind a chain, which begins with `root_hash`."""
        digest, length, seed, ahead = self._digest, self._hash_bytes, self.seed, 4 * self.hash_lookahead_tokens
        before = hashes[-1] if hashes else root_hash
        for number in range((len(packed) - ahead) // block_bytes):
            content = packed[number * block_bytes : (number + 1) * block_bytes + ahead]
            before = digest(content if before == -1 else before.to_bytes(length, "little") + content, seed)
            hashes.append(before)
            contents.append(content)

    def root(self, salt: str) -> tuple[int, int]:
        """The hash and the prefix number that the chains of sequences with this salt begin with."""
        if salt not in self._roots:
            self._last_prefix += 1
            text = f"{len(self._salt)}:{self._salt}{salt}"
            self._roots[salt] = self._digest(text.encode(), self.seed), self._last_prefix
        return self._roots[salt]

    def lookup(self, token_ids: list[int], block_size: int) -> tuple[list[int], int]:
        """The blocks that hold the longest stored prefix of whole blocks, and how many tokens that is."""
        hashes, contents = list[int](), list[bytes | None]()
        self.extend_chain(hashes, contents, token_bytes(token_ids), 4 * block_size, self.root_hash)
        block_ids = self.match(hashes, contents, self.ROOT)
        return block_ids, len(block_ids) * block_size

    def store(self, token_ids: list[int], block_id: int, prefix_hash: int = -1) -> int:
        """Store a full block behind the prefix with `prefix_hash` (-1: none; KeyError: no block has it); its hash."""
        is_first = prefix_hash in (-1, self.root_hash)
        parent = self.ROOT if is_first else self._known[self.hash_to_block_id[prefix_hash]].prefix
        hashes, contents = list[int](), list[bytes | None]()
        block_bytes = 4 * (len(token_ids) - self.hash_lookahead_tokens)
        root_hash = self.root_hash if is_first else prefix_hash
        self.extend_chain(hashes, contents, token_bytes(token_ids), block_bytes, root_hash)
        self.register_chain([block_id], hashes, contents, 0, 1, parent)
        return hashes[0]

    def match(self, hashes: list[Any], contents: list[bytes | None], parent: int) -> list[int]:
        """The blocks that hold the longest stored chain of these blocks behind the prefix numbered `parent`."""
        block_ids: list[int] = []
        by_hash, known = self.hash_to_block_id, self._known
        for index, block_hash in enumerate(hashes):
            block_id, content = by_hash.get(block_hash), contents[index]
            if block_id is None:
                break
            if known[block_id].content != content or known[block_id].parent != parent:
                block_id = self._find(block_hash, content, parent)
                if block_id is None:
                    break
            block_ids.append(block_id)
            parent = known[block_id].prefix
        return block_ids

    def _find(self, block_hash: int, content: bytes | None, parent: int) -> int | None:
        """The block stored first among those with this hash, content and prefix before it; None if there is none."""
        for block_id in (self.hash_to_block_id[block_hash], *self._equal_hash.get(block_hash, ())):
            if self._known[block_id].content == content and self._known[block_id].parent == parent:
                return block_id
        return None

    def register_chain(
        self, table: list[Any], hashes: list[Any], contents: list[bytes | None], first: int, end: int, root: int
    ) -> None:  # lists of Any, as compiled code puts their ints into dicts as they are
        """Note that the blocks of a table from `first` to before `end` hold, or will once their step has run, the next
        of a chain of contents: behind the block before `first`, or behind the prefix `root` where that is the first."""
        known, by_hash = self._known, self.hash_to_block_id
        parent = known[table[first - 1]].prefix if first else root
        for index in range(first, end):
            number, block_hash, content = table[index], hashes[index], contents[index]
            block_id: int = number
            while block_id >= len(known):
                known.append(CachedBlock())
            block = known[block_id]
            if block.hash is not None:
                raise ValueError(f"block {block_id} is stored already, with hash {block.hash}")
            self._last_prefix += 1
            block.hash, block.content, block.parent, block.prefix = block_hash, content, parent, self._last_prefix
            if by_hash.setdefault(block_hash, number) != block_id:
                equal_id = self._find(block_hash, content, parent)
                if equal_id is not None:
                    block.prefix = known[equal_id].prefix
                self._equal_hash.setdefault(block_hash, []).append(block_id)
            parent = block.prefix

    def remove(self, block_ids: list[int]) -> None:
        """Forget what blocks held; another block of equal hash takes the place of each in `hash_to_block_id`."""
        known, by_hash, equal = self._known, self.hash_to_block_id, self._equal_hash
        for block_id in block_ids:
            block = known[block_id]
            block_hash: Any = block.hash
            block.hash = block.content = None
            others = equal.get(block_hash) if equal else None
            if others is None:
                del by_hash[block_hash]
            elif by_hash[block_hash] == block_id:
                by_hash[block_hash] = others.pop(0)
            else:
                others.remove(block_id)
            if others is not None and not others:
                del equal[block_hash]

    def get(self, block_id: int) -> CachedBlock | None:
        """What is known of a block; None if it is not stored."""
        return self._known[block_id] if block_id in self else None

    def __contains__(self, block_id: int) -> bool:
        return block_id < len(self._known) and self._known[block_id].hash is not None

    def __len__(self) -> int:
        return len(self.hash_to_block_id) + sum(map(len, self._equal_hash.values()))
