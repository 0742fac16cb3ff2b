"""Wrong versions of cycle 5: the prefix cache, and the blocks given through it."""

from __future__ import annotations

from plants import planted

CACHE = "twinserve.policies.prefix_cache:PrefixCache"
ALLOCATE = "twinserve.policies.block_manager:BlockManager.allocate_with_cache"
HIT, PARTIAL = "test_prefix_cache_hit", "test_partial_cache_hit"


@planted(f"{CACHE}.compute_hash", "ignores the prefix's hash", PARTIAL)
def _(right):
    return lambda token_ids, prefix_hash=-1: right(token_ids)


@planted(f"{CACHE}.compute_hash", "ignores the order of the tokens", PARTIAL)
def _(right):
    return lambda token_ids, prefix_hash=-1: right(sorted(token_ids), prefix_hash)


@planted(f"{CACHE}.lookup", "ignores the prefix", PARTIAL)
def _(right):
    def wrong(self, token_ids, block_size):
        from twinserve.policies.sequence import token_bytes

        by_content = {self.get(block_id).content: block_id for block_id in list(self.hash_to_block_id.values())[::-1]}
        block_ids = []
        for end in range(block_size, len(token_ids) + 1, block_size):
            block_id = by_content.get(token_bytes(token_ids[end - block_size : end]))
            if block_id is not None:
                block_ids.append(block_id)
        return block_ids, len(block_ids) * block_size

    return wrong


@planted(f"{CACHE}.lookup", "finds one block at most", HIT)
def _(right):
    return lambda self, token_ids, block_size: right(self, token_ids[:block_size], block_size)


@planted(f"{CACHE}.lookup", "counts blocks instead of tokens", HIT)
def _(right):
    def wrong(self, token_ids, block_size):
        block_ids, _ = right(self, token_ids, block_size)
        return block_ids, len(block_ids)

    return wrong


@planted(f"{CACHE}.store", "stores nothing", PARTIAL)
def _(right):
    return lambda self, token_ids, block_id, prefix_hash=-1: self.compute_hash(token_ids, prefix_hash)


@planted(f"{CACHE}.store", "ignores the prefix", PARTIAL)
def _(right):
    return lambda self, token_ids, block_id, prefix_hash=-1: right(self, token_ids, block_id)


@planted(ALLOCATE, "does not count who shares a block", HIT)
def _(right):
    def wrong(self, seq, prefix_cache):
        right(self, seq, prefix_cache)
        for block_id in seq.block_table[: seq.num_cached_tokens // self.block_size]:
            self.blocks[block_id].ref_count -= 1

    return wrong


@planted(ALLOCATE, "shares nothing", HIT)
def _(right):
    def wrong(self, seq, prefix_cache):
        self.bind(prefix_cache)
        self.allocate(seq)
        self.register(seq, seq.num_tokens)

    return wrong


@planted(ALLOCATE, "lets the cache know nothing", HIT)
def _(right):
    def wrong(self, seq, prefix_cache):
        self.bind(prefix_cache)
        hits = self.find_hits(seq)
        self.admit(seq, hits, seq.num_tokens - len(hits) * self.block_size)

    return wrong


@planted(ALLOCATE, "does not say how many tokens were cached", HIT)
def _(right):
    def wrong(self, seq, prefix_cache):
        right(self, seq, prefix_cache)
        seq.num_cached_tokens = 0

    return wrong


@planted(ALLOCATE, "counts the tokens in common beyond whole blocks", PARTIAL)
def _(right):
    def wrong(self, seq, prefix_cache):
        right(self, seq, prefix_cache)
        if seq.num_cached_tokens:
            seq.num_cached_tokens += 2

    return wrong
