"""PrefixCache: which KV block holds which prefix, found by a hash chained over the prefix and checked by content."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import xxhash

from twinserve.policies.sequence import token_bytes

HASHES: dict[str, tuple[Callable[[bytes, int], int], int]] = {
    "xxh64": (xxhash.xxh64_intdigest, 8),
    "xxh3_128": (xxhash.xxh3_128_intdigest, 16),
}
"""By name: the hash of (bytes, seed), and its length in bytes."""


class CachedBlock(NamedTuple):
    """What the cache knows of a block it holds.

    `prefix` numbers the block's whole content, prefix included: two cached blocks have the same number exactly when
    the same tokens fill them after the same prefix. `parent` is the number of the prefix before the block.
    """

    hash: int
    content: bytes | None
    parent: int
    prefix: int


class PrefixCache:
    """Full KV blocks by the hash of their tokens, chained over the prefix.

    A hit compares the tokens and the prefix as well as the hash, so that a collision costs a miss and never gives one
    request the KV of another. Several blocks may hold equal content; the one stored first serves hits, the others take
    over when it goes.

    Args:
        hash: "xxh64", "xxh3_128", or a function of (bytes, seed) that returns a non-negative integer of 16 bytes.
        seed: seeds the hash, so that hashes cannot be predicted from outside.
        salt: begins every chain; caches with different salts share nothing. A sequence's own salt comes behind it.
    """

    ROOT = 0

    def __init__(self, *, hash: str | Callable[[bytes, int], int] = "xxh64", seed: int = 0, salt: str = ""):
        if isinstance(hash, str) and hash not in HASHES:
            raise ValueError(f"hash is {hash!r}, expected one of {', '.join(HASHES)}")
        self._digest, self._hash_bytes = HASHES[hash] if isinstance(hash, str) else (hash, 16)
        self.seed = seed
        self._salt = salt
        self._roots: dict[str, tuple[int, int]] = {}
        self.root_hash = self._digest(salt.encode(), seed) if salt else -1
        self.hash_to_block_id: dict[int, int] = {}
        self._cached: dict[int, tuple[int, bytes | None, int, int]] = {}  # the fields of a CachedBlock
        self._equal_hash: dict[int, list[int]] = {}  # the blocks with a hash beside the one that serves it
        self._last_prefix = self.ROOT

    @staticmethod
    def compute_hash(token_ids: list[int], prefix_hash: int = -1) -> int:
        """xxh64 of a block's tokens: the prefix's hash as 8 little-endian bytes unless -1, then 4 bytes a token."""
        prefix = b"" if prefix_hash == -1 else prefix_hash.to_bytes(8, "little")
        return xxhash.xxh64_intdigest(prefix + token_bytes(token_ids))

    def hash_chain(self, packed: bytes, block_bytes: int, prefix_hash: int) -> tuple[list[int], list[bytes | None]]:
        """The hashes of the blocks that tokens (see `token_bytes`) fill behind a prefix, and their contents."""
        hashes: list[int] = []
        contents: list[bytes | None] = []
        digest, length, seed = self._digest, self._hash_bytes, self.seed
        prefix = b"" if prefix_hash == -1 else prefix_hash.to_bytes(length, "little")
        for begin in range(0, len(packed), block_bytes):
            content = packed[begin : begin + block_bytes]
            block_hash = digest(prefix + content, seed)
            prefix = block_hash.to_bytes(length, "little")
            hashes.append(block_hash)
            contents.append(content)
        return hashes, contents

    def root(self, salt: str) -> tuple[int, int]:
        """The hash and the prefix number that the chains of sequences with this salt begin with."""
        if not salt:
            return self.root_hash, self.ROOT
        if salt not in self._roots:
            self._last_prefix += 1
            text = f"{len(self._salt)}:{self._salt}{salt}"
            self._roots[salt] = self._digest(text.encode(), self.seed), self._last_prefix
        return self._roots[salt]

    def lookup(self, token_ids: list[int], block_size: int) -> tuple[list[int], int]:
        """The blocks that hold the longest stored prefix of whole blocks, and how many tokens that is."""
        whole = token_ids[: len(token_ids) // block_size * block_size]
        hashes, contents = self.hash_chain(token_bytes(whole), 4 * block_size, self.root_hash)
        block_ids = self.match(hashes, contents, self.ROOT)
        return block_ids, len(block_ids) * block_size

    def store(self, token_ids: list[int], block_id: int, prefix_hash: int = -1) -> int:
        """Store a full block of tokens behind the stored prefix with `prefix_hash` (-1: none, else a KeyError if no
        block has it); its hash."""
        is_first = prefix_hash in (-1, self.root_hash)
        parent = self.ROOT if is_first else self.prefix_of(self.hash_to_block_id[prefix_hash])
        packed = token_bytes(token_ids)
        hashes, contents = self.hash_chain(packed, len(packed), self.root_hash if is_first else prefix_hash)
        self.register([block_id], hashes, contents, parent)
        return hashes[0]

    def match(self, hashes: list[int], contents: list[bytes | None], parent: int) -> list[int]:
        """The blocks that hold the longest stored chain of these blocks behind the prefix numbered `parent`."""
        block_ids: list[int] = []
        by_hash, cached = self.hash_to_block_id.get, self._cached
        for block_hash, content in zip(hashes, islice(contents, len(hashes)), strict=True):
            block_id = by_hash(block_hash)
            if block_id is None:
                break
            entry = cached[block_id]
            if entry[1] != content or entry[2] != parent:
                block_id = self._find(block_hash, content, parent)
                if block_id is None:
                    break
                entry = cached[block_id]
            block_ids.append(block_id)
            parent = entry[3]
        return block_ids

    def _find(self, block_hash: int, content: bytes | None, parent: int) -> int | None:
        """The block stored first among those with this hash, content and prefix before it; None if there is none."""
        for block_id in (self.hash_to_block_id[block_hash], *self._equal_hash.get(block_hash, ())):
            if self._cached[block_id][1:3] == (content, parent):
                return block_id
        return None

    def register(self, block_ids: list[int], hashes: list[int], contents: list[bytes | None], parent: int) -> None:
        """Note that blocks hold, or will once their step has run, a chain of contents behind the prefix `parent`."""
        cached, by_hash = self._cached, self.hash_to_block_id
        for block_id, block_hash, content in zip(block_ids, hashes, contents, strict=True):
            if block_id in cached:
                raise ValueError(f"block {block_id} is stored already, as {cached[block_id]}")
            equal_id = None
            if by_hash.setdefault(block_hash, block_id) != block_id:
                equal_id = self._find(block_hash, content, parent)
                self._equal_hash.setdefault(block_hash, []).append(block_id)
            if equal_id is None:
                self._last_prefix = prefix = self._last_prefix + 1
            else:
                prefix = cached[equal_id][3]
            cached[block_id] = block_hash, content, parent, prefix
            parent = prefix

    def register_next(self, block_id: int, before_id: int, block_hash: int | None, content: bytes | None) -> int:
        """Note that `block_id` holds `content` behind what `before_id` holds; the block's hash, made if it is None.

        It is what `register` does; the walk over one block would cost a tenth of a step at 256 running.
        """
        cached, by_hash = self._cached, self.hash_to_block_id
        prefix_hash, _, _, parent = cached[before_id]
        if block_hash is None:
            block_hash = self._digest(prefix_hash.to_bytes(self._hash_bytes, "little") + (content or b""), self.seed)
        if block_hash in by_hash or block_id in cached:
            self.register([block_id], [block_hash], [content], parent)
        else:
            by_hash[block_hash] = block_id
            self._last_prefix = prefix = self._last_prefix + 1
            cached[block_id] = block_hash, content, parent, prefix
        return block_hash

    def remove(self, block_ids: list[int]) -> None:
        """Forget what blocks held; another block of equal hash takes one's place in `hash_to_block_id`."""
        by_hash, cached, equal_hash = self.hash_to_block_id, self._cached, self._equal_hash
        for block_id in block_ids:
            block_hash = cached.pop(block_id)[0]
            if block_hash not in equal_hash:
                del by_hash[block_hash]
                continue
            others = equal_hash[block_hash]
            if by_hash[block_hash] == block_id:
                by_hash[block_hash] = others.pop(0)
            else:
                others.remove(block_id)
            if not others:
                del equal_hash[block_hash]

    def clear(self) -> None:
        """Forget every block."""
        for kept in (self.hash_to_block_id, self._cached, self._equal_hash, self._roots):
            kept.clear()

    def prefix_of(self, block_id: int) -> int:
        """The number of the prefix that ends with `block_id`."""
        return self._cached[block_id][3]

    def get(self, block_id: int) -> CachedBlock | None:
        """What is known of a block; None if it is not stored."""
        return CachedBlock(*self._cached[block_id]) if block_id in self._cached else None

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._cached

    def __len__(self) -> int:
        return len(self._cached)
