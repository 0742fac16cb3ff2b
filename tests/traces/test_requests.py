"""Requests in columns are the requests that went in, whatever little or much is known of each."""

from __future__ import annotations

import pickle
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinserve.policies import SamplingParams
from twinserve.traces import transforms
from twinserve.traces.formats.reading import private_prompt, with_own_private_prompts
from twinserve.traces.request import Part, PrefixKeys, Request, TokenMaker, answer_text
from twinserve.traces.requests import FIRST_PRIVATE_TEXT, Requests
from twinserve.traces.statistics import shared_tokens, trace_statistics

SECOND = 10**9


@st.composite
def mixed(draw) -> list[Request]:
    """Plain requests, and among them those that say more or are numbered in another way."""
    first_id, offset = draw(st.sampled_from([0, 0, 7])), draw(st.sampled_from([0, 0, 5]))
    lengths = st.integers(1, 3000) | st.sampled_from([(1 << 32) - 1, 1 << 32, 1 << 40])
    changes = st.sampled_from([
        {}, {}, {}, {}, {"session": 3}, {"priority": -1}, {"salt": "a"}, {"tenant": "b"}, {"after": 0, "think_ns": 5},
        {"parts": (Part(1, 0, 600), Part(answer_text(0), 0, 1))}, {"parts": (Part(3, 0, 5),)},
        {"parts": (Part(FIRST_PRIVATE_TEXT, 0, 9),)}, {"parts": (Part(FIRST_PRIVATE_TEXT + 40, 2, 9),)},
    ])  # fmt: skip
    requests = []
    arrival_ns = 0
    for number in range(draw(st.integers(1, 12))):
        arrival_ns += draw(st.sampled_from([0, 1, SECOND, 90 * SECOND]))
        plain = Request(first_id + number, arrival_ns, private_prompt(offset + number, draw(lengths)), draw(lengths))
        requests.append(plain._replace(**draw(changes)))
    return requests


@settings(deadline=None, max_examples=200)
@given(mixed(), st.integers(-15, 15), st.integers(-15, 15))
def test_what_comes_out_is_what_went_in(listed, begin, end):
    requests = Requests(listed)
    assert requests == listed and listed == requests and list(requests) == listed
    assert [requests[number] for number in range(-len(listed), len(listed))] == listed * 2
    assert requests[begin:end] == listed[begin:end] and requests[::-1] == listed[::-1]
    assert pickle.loads(pickle.dumps(requests)) == listed
    assert requests != [*listed, listed[0]] and requests != [listed[0]._replace(max_tokens=17_000), *listed[1:]]
    for name in ("arrival_ns", "prompt_tokens", "max_tokens"):
        assert requests.column(name).tolist() == [getattr(request, name) for request in listed]
    for most in (1, 3000, 1 << 32):
        longer = [request for request in listed if max(request.prompt_tokens, request.max_tokens) > most]
        assert list(requests.longer_than(most)) == longer
    for request in listed:
        assert requests.has_plain(request.parts) == any(
            other.parts == request.parts and place not in requests.others for place, other in enumerate(listed)
        )


@settings(deadline=None, max_examples=100)
@given(mixed())
def test_statistics_know_no_difference(listed):
    listed = [request._replace(id=number, after=None, think_ns=0) for number, request in enumerate(listed)]
    arrivals = np.array([request.arrival_ns for request in listed])
    found = trace_statistics(listed)
    gaps = np.diff(arrivals)
    if arrivals[-1] > arrivals[0]:
        assert found["gap_cv"] == pytest.approx(gaps.std() / gaps.mean())
    for seconds in (1, 10, 60):
        width = seconds * SECOND
        windows = (arrivals.max() - arrivals.min()) // width + 1
        most = max(((begin <= arrivals) & (arrivals < begin + width)).sum() for begin in arrivals)
        expected = most / (len(arrivals) / windows) if windows > 1 else None
        assert found["peak_to_mean"][f"{seconds}s"] == pytest.approx(expected)
    assert found["prompt_tokens"]["total"] == sum(request.prompt_tokens for request in listed)
    # None of these is plain: a text below those that are private, all of them moved alike.
    moved = [
        r._replace(parts=tuple(part._replace(text=part.text % FIRST_PRIVATE_TEXT + 50) for part in r.parts))
        for r in listed
        if all(part.text >= 0 for part in r.parts)
    ]
    moved = [request._replace(id=number) for number, request in enumerate(moved)]
    private = [
        r._replace(parts=tuple(part._replace(text=part.text + FIRST_PRIVATE_TEXT) for part in r.parts)) for r in moved
    ]
    assert shared_tokens(moved) == shared_tokens(private)


def plain_requests(count: int) -> Requests:
    rng = random.Random(0)
    return Requests(
        Request(n, n * SECOND // 40, private_prompt(n, rng.randrange(1, 4000)), rng.randrange(1, 900))
        for n in range(count)
    )


def test_a_plain_request_takes_16_bytes_whatever_is_done_with_it():
    requests = plain_requests(20_000)
    log: transforms.TransformLog = []
    changed = [
        requests,
        requests[5:],
        transforms.window(requests, 10, 400, log),
        transforms.limit(requests, 10_000, log),
        transforms.scale_rate(requests, 3.0, log),
        transforms.all_at_zero(requests, log),
        transforms.spread(requests, 0, log),
        transforms.cap_prompt_tokens(requests, 100, log),
        transforms.cap_output_tokens(requests, 100, log),
        with_own_private_prompts(transforms.window(requests, 10, 400, log)),
    ]
    for one in changed:
        assert isinstance(one, Requests) and not one.others
        columns = (one._arrivals_ns, one._prompt_tokens, one._max_tokens)
        assert sum(map(sys.getsizeof, columns)) < 19 * len(one) + 1000  # arrays grow by an eighth at a time


ENDS = st.builds(lambda size, first, number: range(first, first + number * size, size), *[st.integers(1, 20)] * 3)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=5), st.lists(ENDS, max_size=6))
def test_keys_that_are_asked_for_together_are_those_of_single_calls_whatever_was_asked_before(lengths, asked):
    """The second list that begins alike and is longer, or shorter, comes from what is known of the first."""
    parts = [Part(text, 0, length) for text, length in lengths]
    keys = PrefixKeys(parts, -1)
    for ends in [two for one in asked for two in (one, one[: len(one) // 2], range(one.start, 99, one.step))]:
        assert keys.each(ends) == [PrefixKeys(parts, -1)(end) for end in ends]


def test_parts_of_answers_become_what_was_answered():
    parts = (Part(3, 0, 4), Part(answer_text(1), 0, 6), Part(answer_text(2), 2, 6), Part(answer_text(0), 5, 6))
    request = Request(7, 0, parts, 5)
    resolved = request.resolved({0: 5, 1: 4, 2: 99})
    assert resolved.parts == (Part(3, 0, 4), Part(answer_text(1), 0, 4), Part(answer_text(2), 2, 6))
    assert resolved.resolved({1: 4, 2: 99}) == resolved and Request(7, 0, parts[:1], 5).resolved({}).parts == parts[:1]
    maker = TokenMaker(1000, first_id=10)
    tokens = maker.token_ids(resolved, {1: [1, 2, 3, 4], 2: range(20, 30)})
    assert tokens[4:] == [1, 2, 3, 4, 22, 23, 24, 25, 26, 27] and min(tokens[:4]) >= 10
    assert tokens[:4] == maker.token_ids(Request(0, 0, (Part(3, 0, 4),), 1), {})


def test_token_ids_are_those_of_the_whole_prompt():
    request = Request(7, 0, (Part(3, 0, 4),), 5)
    assert request.to_sequence(SamplingParams(), [1, 2, 3, 4]).token_ids == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="request 7: 3 token ids for 4 prompt tokens"):
        request.to_sequence(SamplingParams(), [1, 2, 3])
