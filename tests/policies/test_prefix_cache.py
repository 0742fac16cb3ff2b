"""PrefixCache: hits by content, chained over the prefix."""

import pytest
import xxhash

from twinserve.policies import BlockManager, PrefixCache, Sequence


def test_compute_hash_is_xxh64_of_prefix_bytes_and_four_bytes_a_token():
    tokens = [1, 70_000, 3]
    plain = b"".join(token.to_bytes(4, "little") for token in tokens)
    assert PrefixCache.compute_hash(tokens) == xxhash.xxh64_intdigest(plain)
    prefix = (1 << 63) + 5
    assert PrefixCache.compute_hash(tokens, prefix) == xxhash.xxh64_intdigest(prefix.to_bytes(8, "little") + plain)


def test_store_and_lookup_find_the_longest_stored_prefix():
    cache = PrefixCache()
    first = cache.store([1, 2], 7)
    cache.store([3, 4], 8, first)
    assert first == PrefixCache.compute_hash([1, 2])
    assert cache.hash_to_block_id[first] == 7
    assert cache.lookup([1, 2, 3, 4, 5], 2) == ([7, 8], 4)
    assert cache.lookup([1, 2, 9, 9], 2) == ([7], 2)
    assert cache.lookup([3, 4], 2) == ([], 0), "the same tokens behind another prefix are another block"


def test_of_equal_blocks_the_one_stored_first_serves_and_the_next_takes_over():
    cache = PrefixCache()
    for block_id in (5, 3, 9):
        cache.store([1, 2], block_id)
    assert cache.lookup([1, 2], 2)[0] == [5]
    cache.remove([5])
    assert cache.lookup([1, 2], 2)[0] == [3]
    cache.remove([9])
    cache.remove([3])
    assert cache.lookup([1, 2], 2)[0] == []
    assert not cache.hash_to_block_id


def test_a_child_found_behind_an_equal_block_is_still_found_when_its_own_parent_goes():
    cache = PrefixCache()
    parent = cache.store([1, 2], 0)
    cache.store([1, 2], 1)
    cache.store([3, 4], 2, parent)
    cache.remove([0])
    assert cache.lookup([1, 2, 3, 4], 2)[0] == [1, 2]


@pytest.mark.parametrize("weak", [lambda data, seed: 0, lambda data, seed: len(data), lambda data, seed: data[-4] & 1])
def test_colliding_hashes_cost_a_miss_and_never_give_a_wrong_block(weak):
    cache = PrefixCache(hash=weak)
    manager = BlockManager(64, 2)
    held: dict[int, tuple[int, ...]] = {}
    hits = 0
    for tokens in (
        [1, 2, 3, 4, 5],
        [9, 9, 3, 4, 5],
        [1, 2, 3, 4, 5],
        [3, 4, 1, 2, 5],
        [9, 9, 3, 4, 6],
        [1, 2, 9, 9, 5],
    ):
        seq = Sequence(tokens)
        manager.allocate_with_cache(seq, cache)
        for index, block_id in enumerate(seq.block_table):
            prefix = tuple(tokens[: (index + 1) * 2])
            if index * 2 < seq.num_cached_tokens:
                assert held[block_id] == prefix
                hits += 1
            held[block_id] = prefix
        manager.check_integrity()
    assert hits == 5


def test_salts_and_seeds_keep_caches_apart():
    plain, salted, seeded = PrefixCache(), PrefixCache(salt="tenant"), PrefixCache(seed=7)
    hashes = {cache.store([1, 2], 0) for cache in (plain, salted, seeded)}
    assert len(hashes) == 3
    assert salted.lookup([1, 2], 2) == ([0], 2)


def test_a_requests_salt_comes_behind_the_caches():
    salts = [("", "a"), ("a", ""), ("b", "a"), ("a", "a"), ("a", "bc"), ("ab", "c")]
    assert len({PrefixCache(salt=salt).root(own)[0] for salt, own in salts}) == len(salts)


def test_hashes_of_128_bits_chain_too():
    cache = PrefixCache(hash="xxh3_128")
    first = cache.store([1, 2], 0)
    cache.store([3, 4], 1, first)
    assert first >> 64
    assert cache.lookup([1, 2, 3, 4], 2)[0] == [0, 1]


def test_an_unknown_hash_is_named():
    with pytest.raises(ValueError, match="'md5', expected one of xxh64, xxh3_128"):
        PrefixCache(hash="md5")
