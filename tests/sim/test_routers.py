"""Routers choose as they say, from what a replica counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest

from twinserve.sim.routers import (
    KvEvents,
    LeastKvUse,
    LeastOutstanding,
    LeastRemaining,
    PowerOfTwo,
    PrefixAffine,
    RandomChoice,
    RoundRobin,
    SessionSticky,
)
from twinserve.traces.request import Part, PrefixKeys, Request


@dataclass
class Counts:
    """What a router reads of a replica."""

    index: int
    outstanding_tokens: int = 0
    outstanding_requests: int = 0
    remaining_tokens: int = 0
    kv_use: float = 0.0
    cached_prefixes: frozenset[int] = frozenset()

    def num_hit_tokens(self, request: Request, held: frozenset[int]) -> int:
        return sum(held)


def up(*tokens: int) -> list[Counts]:
    return [Counts(index, count) for index, count in enumerate(tokens)]


def request(number: int, *texts: int, salt: str = "") -> Request:
    """A prompt of 512 tokens of each text, and 100 of its own."""
    parts = [Part(text, 0, 512) for text in texts] + [Part(1000 + number, 0, 100)]
    return Request(number, 0, tuple(parts), 10, salt=salt)


def test_round_robin_gives_each_as_many():
    router, replicas = RoundRobin(), up(9, 0, 5)
    assert [router.choose(request(number), replicas) for number in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_round_robin_passes_over_who_is_down_and_goes_on_behind_it():
    router, replicas = RoundRobin(), up(0, 0, 0, 0)
    assert router.choose(request(0), replicas) == 0
    without = [replicas[0], replicas[2], replicas[3]]
    assert [without[router.choose(request(1), without)].index for _ in range(4)] == [2, 3, 0, 2]
    assert replicas[router.choose(request(2), replicas)].index == 3


def test_random_is_even_and_its_seed_decides():
    replicas = up(0, 0, 0, 0)

    def choices(seed: int) -> list[int]:
        router = RandomChoice(seed)
        return [router.choose(request(number), replicas) for number in range(4000)]

    assert choices(1) == choices(1) != choices(2)
    assert all(850 < count < 1150 for count in Counter(choices(1)).values())


def test_least_outstanding_takes_the_least_and_of_equal_ones_the_first():
    router = LeastOutstanding()
    assert router.choose(request(0), up(30, 10, 20)) == 1
    assert router.choose(request(0), up(30, 10, 10)) == 1


def test_an_oracle_takes_the_one_with_the_least_left_whatever_a_router_would_know():
    replicas = [Counts(0, 10, 1, 900), Counts(1, 800, 9, 90)]
    assert LeastRemaining().choose(request(0), replicas) == 1
    assert LeastOutstanding().choose(request(0), replicas) == 0


def test_kv_use_is_known_as_it_was_when_metrics_were_read_last():
    router = LeastKvUse(period_s=0.05)
    full, free = Counts(0, 5, kv_use=0.9), Counts(1, 50, kv_use=0.1)
    at = [replace(request(number), arrival_ns=ms * 10**6) for number, ms in enumerate((10, 59, 60, 109))]
    assert router.choose(at[0], [full, free]) == 1
    full.kv_use, free.kv_use = 0.0, 0.8
    assert router.choose(at[1], [full, free]) == 1, "it does not know yet"
    assert router.choose(at[2], [full, free]) == 0
    full.kv_use = 0.9
    assert router.choose(at[3], [full, free]) == 0, "the period begins anew when they are read"
    assert LeastKvUse().choose(at[0], [Counts(0, 9), Counts(1, 3)]) == 1, "of equal ones who has less to do"
    router = LeastKvUse(period_s=0.05)
    assert router.choose(at[0], [Counts(0, 5, kv_use=0.5)]) == 0
    assert router.choose(at[1], [Counts(0, 5, kv_use=0.5), Counts(1, 50, kv_use=0.9)]) == 1, "who came since is empty"
    with pytest.raises(ValueError, match="period_s is -1, expected seconds >= 0"):
        LeastKvUse(-1)


def test_of_two_that_are_drawn_the_one_with_less_to_do_is_taken():
    router, replicas = PowerOfTwo(3), up(9, 1, 5)
    places = [router.choose(request(number), replicas) for number in range(60)]
    assert set(places) == {1, 2}, "the one with most to do loses to either of the others"
    assert places.count(1) > places.count(2)
    assert places == [PowerOfTwo(3).choose(request(0), replicas)] + places[1:]
    assert PowerOfTwo().choose(request(0), replicas[:1]) == 0


def test_a_session_stays_where_it_is_until_that_is_down():
    router, replicas = SessionSticky(), up(5, 1, 3)
    first, alone = replace(request(0), session=7), request(1)
    assert router.choose(first, replicas) == 1
    replicas[1].outstanding_tokens = 100
    assert router.choose(first, replicas) == 1 and router.choose(alone, replicas) == 2
    without = [replicas[0], replicas[2]]
    assert router.choose(first, without) == 1
    assert router.choose(first, replicas) == 2, "it stays where it was sent"


def test_a_prefix_of_a_single_block_is_seen():
    router, replicas = PrefixAffine(), up(0, 5)
    first, second = (Request(number, 0, (Part(7, 0, 16), Part(number, 0, 5)), 10) for number in (1, 2))
    assert router.choose(first, replicas) == 0
    replicas[0].outstanding_tokens = 100
    assert router.choose(second, replicas) == 0


def test_of_a_long_prompt_every_32nd_block_is_remembered():
    router, replicas = PrefixAffine(), up(0, 5)
    shared = Part(7, 0, 1600)
    assert router.choose(Request(1, 0, (shared, Part(1, 0, 16)), 10), replicas) == 0
    assert len(router._sent) == 32 + 2, "16, 32, ..., 512, and 1,024 and 1,536"
    replicas[0].outstanding_tokens = 100
    assert router.choose(Request(2, 0, (Part(7, 0, 1540), Part(2, 0, 500)), 10), replicas) == 0
    before = len(router._sent)
    assert router.choose(Request(3, 0, (Part(8, 0, 1024),), 10), replicas) == 1
    assert len(router._sent) == before + 32 + 1, "where it ends with a 32nd block, that one too"


def test_equal_prefixes_go_to_one_replica():
    router, replicas = PrefixAffine(), up(0, 5, 0)
    assert router.choose(request(0, 7, 8), replicas) == 0
    replicas[0].outstanding_tokens = 1000
    assert router.choose(request(1, 7, 8), replicas) == 0, "the whole prefix is known"
    assert router.choose(request(2, 7, 9), replicas) == 0, "a part of it is"
    assert router.choose(request(3, 6), replicas) == 2, "nothing is: the least loaded"
    assert router.choose(request(4, 9, 7), replicas) == 2, "a prefix begins at the beginning"


def test_the_longest_known_prefix_decides():
    router, replicas = PrefixAffine(), up(0, 1)
    assert router.choose(request(0, 7), replicas) == 0
    replicas[0].outstanding_tokens = 40_000
    assert router.choose(request(1, 7, 8), replicas) == 1, "spilled"
    replicas[0].outstanding_tokens = 0
    assert router.choose(request(2, 7, 8, 9), replicas) == 1


def test_a_prefix_of_another_salt_is_another():
    router, replicas = PrefixAffine(), up(0, 0)
    router.choose(request(0, 7), replicas)
    replicas[0].outstanding_tokens = 10
    assert router.choose(request(1, 7, salt="other"), replicas) == 1


@pytest.mark.parametrize(("lead", "place"), [(1000, 0), (1001, 1)])
def test_the_guard_lets_a_loaded_replicas_requests_spill(lead, place):
    router, replicas = PrefixAffine(max_lead_tokens=1000), up(0, 0)
    router.choose(request(0, 7), replicas)
    replicas[0].outstanding_tokens, replicas[1].outstanding_tokens = 500 + lead, 500
    assert router.choose(request(1, 7), replicas) == place
    replicas[0].outstanding_tokens = 0
    assert router.choose(request(2, 7), replicas) == place, "the prefix is now where its last request went"


def test_a_prefix_whose_replica_is_down_goes_to_the_least_loaded():
    router, replicas = PrefixAffine(), up(0, 9, 5)
    router.choose(request(0, 7), replicas)
    assert router.choose(request(1, 7), replicas[1:]) == 1


def test_only_so_many_prefixes_are_remembered_the_latest_used():
    router, replicas = PrefixAffine(most_prefixes=2, block_tokens=512), up(0, 1)
    for number, text in enumerate((7, 8, 7, 9)):
        router.choose(request(number, text), replicas)
    replicas[0].outstanding_tokens = 2
    assert router.choose(request(5, 7), replicas) == 0, "used again"
    assert router.choose(request(6, 8), replicas) == 1, "forgotten"


@pytest.mark.parametrize(
    "values",
    [{"max_lead_tokens": -1}, {"block_tokens": 0}, {"most_prefixes": 0}],
    ids=lambda values: next(iter(values)),
)
def test_what_cannot_be_is_refused(values):
    [(name, value)] = values.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        PrefixAffine(**values)


def test_prefix_affine_follows_the_longest_prefix_that_it_knows():
    router, replicas = PrefixAffine(max_lead_tokens=10_000), up(0, 0, 0)
    assert router.choose(request(0, 1), replicas) == 0
    replicas[0].outstanding_tokens = 9_000
    router._sent[request_key(1, 2)] = 1
    assert router.choose(request(1, 1, 2), replicas) == 1, "the longer prefix went there"


def test_prefix_affine_takes_no_shorter_prefix_for_one_whose_replica_is_down():
    router, replicas = PrefixAffine(max_lead_tokens=10_000), up(0, 0, 5)
    router._sent[request_key(1)] = 2
    router._sent[request_key(1, 2)] = 1
    up_now = [replicas[0], replicas[2]]
    assert up_now[router.choose(request(0, 1, 2), up_now)].index == 0, "the least loaded one, as its page says"


def request_key(*texts: int) -> tuple[str, int]:
    """What the router remembers a prefix of whole texts by."""
    prompt = request(0, *texts)
    return "", PrefixKeys(prompt.parts, -1)(512 * len(texts))


def test_kv_events_weigh_what_a_cache_holds_against_what_is_outstanding():
    at = [replace(request(number), arrival_ns=number * 10**8) for number in range(3)]
    router, replicas = KvEvents(delay_s=0.1), [Counts(0, 900, cached_prefixes=frozenset({512})), Counts(1, 500)]
    assert router.choose(at[0], replicas) == 1, "nothing is known yet"
    assert router.choose(at[1], replicas) == 0, "900 - 512 are fewer than 500"
    assert router.choose(at[2], [replicas[0], Counts(1, 300)]) == 1
    assert router.choose(at[2], [Counts(1, 300)]) == 0, "the other is down"


def test_what_a_cache_stored_or_gave_up_is_known_after_the_delay():
    def choices(delay_s: float) -> list[int]:
        router, chosen = KvEvents(delay_s), []
        for number, held in enumerate((frozenset({512}), frozenset({512}), frozenset(), frozenset(), frozenset())):
            replicas = [Counts(0, 100, cached_prefixes=held), Counts(1, 0)]
            chosen.append(router.choose(replace(request(number), arrival_ns=number * 10**8), replicas))
        return chosen

    assert choices(0) == [0, 0, 1, 1, 1]
    assert choices(0.1) == [1, 0, 0, 1, 1]
    assert choices(0.15) == [1, 1, 0, 0, 1], "what was so at the latest arrival that is as long ago"
    with pytest.raises(ValueError, match="delay_s is -1, expected seconds >= 0"):
        KvEvents(-1)
