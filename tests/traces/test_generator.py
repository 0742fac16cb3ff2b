"""Synthetic requests follow what was asked for, and are the same for the same seed."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import fmean, pstdev

import pytest

from twinserve.settings.errors import InputError
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.generator import EmpiricalLengths, LengthSpec, generate, parse_lengths
from twinserve.traces.readers import read_trace, write_trace
from twinserve.traces.request import Part, Request, answer_text

BASE = {
    "seed": 0,
    "num_requests": 2000,
    "rate": 10.0,
    "prompt_tokens": LengthSpec(100),
    "output_tokens": LengthSpec(20),
}
SESSIONS = {"num_requests": 300, "turns": 3, "think_time_s": 2.0, "num_system_prompts": 4, "system_prompt_tokens": 50}


def make(**values):
    return generate(**(BASE | values))


def gaps_s(requests):
    times = [request.arrival_ns / 1e9 for request in requests]
    return [after - before for before, after in zip(times, times[1:], strict=False)]


# --- lengths ---


def test_a_fixed_length_is_always_that_length():
    spec = LengthSpec.parse("fixed:128")
    assert {spec.draw(random.Random(seed)) for seed in range(10)} == {128}


def test_lognormal_lengths_have_the_mean_and_spread_asked_for():
    spec, rng = LengthSpec.parse("lognormal:200:0.5"), random.Random(0)
    lengths = [spec.draw(rng) for _ in range(20_000)]
    assert fmean(lengths) == pytest.approx(200, rel=0.02)
    assert pstdev(lengths) / fmean(lengths) == pytest.approx(0.5, rel=0.05)


def test_lengths_stay_within_their_limits():
    spec, rng = LengthSpec.parse("lognormal:200:2.0:100:300"), random.Random(0)
    lengths = [spec.draw(rng) for _ in range(1000)]
    assert (min(lengths), max(lengths)) == (100, 300)


@pytest.mark.parametrize(
    "text",
    [
        *("", "fixed", "fixed:x", "fixed:1.5", "fixed:0", "fixed:-3", "fixed:1:2", "normal:3:1", "lognormal:200"),
        *("lognormal:200:-1", "lognormal:nan:1", "lognormal:200:inf", "lognormal:200:1:5", "lognormal:200:1:300:400"),
    ],
)
def test_a_length_that_says_nothing_usable_is_refused(text):
    with pytest.raises(InputError, match="^prompt_tokens is .*, expected"):
        LengthSpec.parse(text, "prompt_tokens")


@pytest.fixture
def measured(tmp_path):
    """A trace whose output lengths are its prompt lengths and 1000 more."""
    requests = [Request(n, n, (Part(n, 0, length),), length + 1000) for n, length in enumerate([5, 5, 5, 90])]
    write_trace(tmp_path / "measured:1.jsonl", requests, {})
    return f"empirical:{tmp_path / 'measured:1.jsonl'}"


def test_empirical_lengths_are_those_of_a_trace_each_as_often_as_there(measured):
    prompts, outputs = parse_lengths(measured, "prompt_tokens"), parse_lengths(measured, "output_tokens")
    rng = random.Random(0)
    drawn = [prompts.draw(rng) for _ in range(10_000)]
    assert set(drawn) == {5, 90}
    assert drawn.count(90) == pytest.approx(2500, rel=0.05)
    assert outputs == EmpiricalLengths((1005, 1005, 1005, 1090), prompts.sha256)


def test_lengths_of_one_trace_stay_together(measured):
    lengths = {name: parse_lengths(measured, name) for name in ("prompt_tokens", "output_tokens")}
    requests = make(**lengths)
    assert {(request.prompt_tokens, request.max_tokens) for request in requests} == {(5, 1005), (90, 1090)}


def test_lengths_of_two_traces_are_drawn_apart(measured):
    lengths = {name: parse_lengths(measured, name) for name in ("prompt_tokens", "output_tokens")}
    lengths["output_tokens"] = EmpiricalLengths(lengths["output_tokens"].values, "another")
    requests = make(**lengths)
    assert len({(request.prompt_tokens, request.max_tokens) for request in requests}) == 4


def test_a_synthetic_length_is_parsed_as_ever():
    assert parse_lengths("fixed:7", "prompt_tokens") == LengthSpec(7)


@pytest.mark.parametrize("text", ["empirical", "empirical:", "empirical:nowhere/at.all"])
def test_lengths_of_no_trace_are_refused(text):
    with pytest.raises(InputError, match="empirical:FILE|nowhere/at.all: cannot be read"):
        parse_lengths(text, "prompt_tokens")


# --- arrivals ---


def test_requests_are_numbered_in_the_order_of_their_arrival_from_zero():
    requests = make(**SESSIONS)
    times = [request.arrival_ns for request in requests]
    assert [request.id for request in requests] == list(range(300))
    assert times == sorted(times)
    assert times[0] == 0


@pytest.mark.parametrize("arrivals", [{}, {"arrivals": "gamma", "cv": 2.0}, {"arrivals": "burst", "burst_size": 8}])
def test_requests_arrive_at_the_rate_asked_for(arrivals):
    assert 1 / fmean(gaps_s(make(num_requests=20_000, **arrivals))) == pytest.approx(10.0, rel=0.05)


def test_poisson_gaps_vary_like_exponential_ones():
    gaps = gaps_s(make(num_requests=20_000))
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(1.0, rel=0.05)


def test_gamma_gaps_vary_as_asked_for():
    gaps = gaps_s(make(num_requests=20_000, arrivals="gamma", cv=2.0))
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(2.0, rel=0.05)


def test_a_burst_arrives_at_one_instant():
    requests = make(num_requests=40, arrivals="burst", burst_size=8)
    assert [sum(r.arrival_ns == time for r in requests) for time in sorted({r.arrival_ns for r in requests})] == [8] * 5


@pytest.mark.parametrize("peak", [1.5, 4.0])
def test_half_of_a_modulated_process_comes_at_its_peak(peak):
    """In both states lie half of the arrivals, so windows far shorter than a state tell two rates apart; and the index
    of dispersion of counts, 1 of a Poisson process, is far above it."""
    requests = make(num_requests=60_000, arrivals="mmpp", peak=peak, period_s=60.0)
    span_s = requests[-1].arrival_ns / 1e9
    assert 60_000 / span_s == pytest.approx(10.0, rel=0.05)
    counts = Counter(request.arrival_ns // 10**9 for request in requests)
    seconds = [counts[second] for second in range(int(span_s))]
    assert pstdev(seconds) ** 2 / fmean(seconds) > 1.3
    quiet = 10 / (2 * (1 - 1 / (2 * peak)))
    middle = (10 * peak + quiet) / 2
    assert sum(n for n in seconds if n > middle) / sum(seconds) == pytest.approx(0.5, abs=0.1)


def test_a_diurnal_rate_is_a_sine_from_its_least_on():
    requests = make(num_requests=40_000, arrivals="diurnal", peak=1.8, period_s=400.0)
    assert 40_000 / (requests[-1].arrival_ns / 1e9) == pytest.approx(10.0, rel=0.05)
    quarters = Counter(int(request.arrival_ns / 1e9 % 400 // 100) for request in requests)
    total = sum(quarters.values())
    # The integral of 1 - 0.8 cos over a quarter of a period, as a share of the whole.
    low, high = (1 - 0.8 * 2 / math.pi) / 4, (1 + 0.8 * 2 / math.pi) / 4
    for quarter, share in enumerate((low, high, high, low)):
        assert quarters[quarter] / total == pytest.approx(share, abs=0.01)
    with pytest.raises(InputError, match="^peak is 3.0, expected a number above 1, and at most 2"):
        make(arrivals="diurnal", peak=3.0)


@pytest.mark.parametrize("turns", [1, 3])
def test_users_of_a_closed_loop_have_one_request_each_and_wait_for_its_answer(turns, tmp_path):
    requests = make(num_requests=200, users=5, turns=turns, think_time_s=1.0)
    assert sum(request.after is None for request in requests) == 5
    followed = [request.after for request in requests if request.after is not None]
    assert len(set(followed)) == len(followed), "nobody sends two at once"
    by_id = {request.id: request for request in requests}
    for request in requests:
        if request.after is not None:
            before = by_id[request.after]
            assert before.id < request.id and request.arrival_ns == before.arrival_ns + request.think_ns
            is_turn = any(part.text == answer_text(before.id) for part in request.parts)
            assert is_turn == (request.session is not None and request.session == before.session)
    write_trace(tmp_path / "loop.jsonl", requests, {})
    assert list(read_trace(tmp_path / "loop.jsonl").requests) == list(requests)
    inside, most = 0, 0
    arrivals = Arrivals(requests)
    served: list[tuple[int, int]] = []
    while not arrivals.is_empty:
        due = arrivals.next_ns
        if due is None or (served and served[0][0] <= due):
            at_ns, number = served.pop(0)
            arrivals.answered(number, 20, at_ns)
            inside -= 1
        else:
            inside += 1
            most = max(most, inside)
            served = sorted([*served, (due + 3 * 10**9, arrivals.pop().id)])
    assert most == 5


def test_conversations_have_priorities_by_their_shares():
    requests = make(num_requests=9000, turns=3, priority_shares=[0.2, 0.5, 0.3])
    shares = Counter(request.priority for request in requests)
    assert {priority: count / 9000 for priority, count in shares.items()} == pytest.approx(
        {0: 0.2, 1: 0.5, 2: 0.3}, abs=0.03
    )
    assert all(len({r.priority for r in requests if r.session == session}) == 1 for session in range(20))


def test_turns_are_counted_in_the_rate():
    requests = make(num_requests=30_000, turns=3, think_time_s=1.0)
    assert 30_000 / (requests[-1].arrival_ns / 1e9) == pytest.approx(10.0, rel=0.05)


# --- prompts ---


def test_prompts_of_single_requests_share_nothing():
    texts = [part.text for request in make() for part in request.parts]
    assert len(set(texts)) == len(texts) == 2000


def test_each_conversation_begins_with_one_of_the_system_prompts():
    requests = make(**SESSIONS)
    assert {request.parts[0] for request in requests} == {Part(text, 0, 50) for text in range(4)}
    assert len({(request.session, request.parts[0]) for request in requests}) == 100


def test_a_later_turn_holds_the_turn_before_it_and_its_answer():
    requests = make(**SESSIONS)
    for request in (request for request in requests if request.after is not None):
        before = requests[request.after]
        assert request.parts[:-1] == (*before.parts, Part(answer_text(before.id), 0, before.max_tokens))
        assert request.session == before.session


def test_a_later_turn_arrives_a_think_time_after_the_answer():
    requests = make(**SESSIONS)
    thinking = [request.think_ns for request in requests if request.after is not None]
    assert fmean(thinking) / 1e9 == pytest.approx(2.0, rel=0.1)
    assert all(r.arrival_ns == requests[r.after].arrival_ns + r.think_ns for r in requests if r.after is not None)
    assert {request.think_ns for request in requests if request.after is None} == {0}


def test_without_thinking_a_turn_still_comes_after_the_one_before():
    requests = make(**(SESSIONS | {"think_time_s": 0.0}))
    assert all(request.after < request.id for request in requests if request.after is not None)


def test_the_last_conversation_is_cut_to_the_number_of_requests():
    assert len(make(num_requests=100, turns=7)) == 100


def test_a_generated_trace_can_be_written_and_read(tmp_path):
    requests = make(**SESSIONS)
    write_trace(tmp_path / "trace", requests, {})
    assert read_trace(tmp_path / "trace").requests == requests


# --- seeds ---


def test_the_same_seed_gives_the_same_requests():
    assert make(**SESSIONS) == make(**SESSIONS)


def test_another_seed_gives_other_requests():
    assert make(**SESSIONS) != make(**(SESSIONS | {"seed": 1}))


def test_another_rate_leaves_the_prompts_as_they_are():
    lengths = {"prompt_tokens": LengthSpec(100, 1.0), "output_tokens": LengthSpec(20, 1.0)}
    slow, fast = (make(rate=rate, **lengths) for rate in (1.0, 50.0))
    assert [(request.parts, request.max_tokens) for request in slow] == [(r.parts, r.max_tokens) for r in fast]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_requests", 0),
        ("rate", 0.0),
        ("rate", float("nan")),
        ("arrivals", "uniform"),
        ("cv", 0.0),
        ("burst_size", 0),
        ("peak", 1.0),
        ("period_s", 0.0),
        ("users", -1),
        ("priority_shares", [0.0, 0.0]),
        ("priority_shares", [1.0, -1.0]),
        ("num_system_prompts", -1),
        ("system_prompt_tokens", -1),
        ("turns", 0),
        ("think_time_s", -1.0),
    ],
)
def test_an_argument_out_of_range_is_named(field, value):
    with pytest.raises(InputError, match=f"^{field} is .*, expected"):
        make(**{field: value})


def test_system_prompts_without_a_length_are_refused():
    with pytest.raises(InputError, match="^system_prompt_tokens is 0, expected an integer from 1 to"):
        make(num_system_prompts=2)
