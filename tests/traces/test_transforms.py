"""Each transform changes what it says, keeps the rest and the references, and writes down how much it changed."""

from __future__ import annotations

import pytest

from twinserve.settings.errors import InputError
from twinserve.traces import transforms
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Part, Request, answer_text

SECOND = 10**9


def single(number: int, at_s: float, length: int = 10, max_tokens: int = 5) -> Request:
    return Request(number, round(at_s * SECOND), (Part(number, 0, length),), max_tokens)


@pytest.fixture
def conversation() -> list[Request]:
    """Three turns at 1, 2 and 4 s, and a request of its own at 3 s."""
    first = (Part(0, 0, 10),)
    second = (*first, Part(answer_text(0), 0, 5), Part(1, 0, 3))
    third = (*second, Part(answer_text(1), 0, 6), Part(2, 0, 4))
    return [
        Request(0, 1 * SECOND, first, 5, session=0),
        Request(1, 2 * SECOND, second, 6, session=0, after=0),
        Request(2, 3 * SECOND, (Part(3, 0, 8),), 7),
        Request(3, 4 * SECOND, third, 8, session=0, after=1),
    ]


# --- window ---


def test_a_window_keeps_its_start_and_leaves_out_its_end(conversation):
    kept = transforms.window(conversation, 1, 3, [])
    assert [request.max_tokens for request in kept] == [6, 7]


def test_a_windows_start_becomes_time_zero():
    kept = transforms.window([single(0, 5), single(1, 7.5), single(2, 9)], 2, 4, [])
    assert [request.arrival_ns for request in kept] == [SECOND // 2]


def test_a_window_renumbers_requests_and_their_references(conversation):
    kept = transforms.window(conversation, 1, 4, [])
    assert [(request.id, request.after) for request in kept] == [(0, None), (1, None), (2, 0)]
    assert kept[2].parts[3] == Part(answer_text(0), 0, 6)


def test_an_answer_from_before_the_window_becomes_one_text_that_nothing_else_has(conversation):
    kept = transforms.window(conversation, 1, 4, [])
    lost = kept[0].parts[1]
    assert lost == kept[2].parts[1]
    assert lost.length == 5
    assert lost.text not in {part.text for request in conversation for part in request.parts}


def test_a_window_says_what_it_dropped_and_what_lost_its_past(conversation):
    log: transforms.TransformLog = []
    transforms.window(conversation, 1, 4, log)
    assert log == [
        {
            "transform": "window",
            "parameters": {"start_s": 1, "end_s": 4},
            "changed": {"requests_dropped": 1, "requests_cut_from_their_past": 1},
        }
    ]


def test_a_window_without_an_end_keeps_the_rest(conversation):
    assert len(transforms.window(conversation, 2, float("inf"), [])) == 2


def test_an_empty_window_is_refused(conversation):
    with pytest.raises(InputError, match="expected at least one request in it"):
        transforms.window(conversation, 100, 200, [])


# --- limit ---


def test_a_limit_keeps_the_first_requests(conversation):
    log: transforms.TransformLog = []
    assert transforms.limit(conversation, 3, log) == conversation[:3]
    assert log[0]["changed"] == {"requests_dropped": 1}


# --- times ---


def test_twice_the_rate_halves_the_times():
    scaled = transforms.scale_rate([single(number, number + 1) for number in range(4)], 2.0, [])
    assert [request.arrival_ns for request in scaled] == [SECOND // 2, SECOND, 3 * SECOND // 2, 2 * SECOND]


def test_all_at_zero_keeps_who_waits_for_whom(conversation):
    moved = transforms.all_at_zero(conversation, [])
    assert [(request.arrival_ns, request.after) for request in moved] == [(0, None), (0, 0), (0, None), (0, 1)]


def test_moved_arrivals_are_counted():
    log: transforms.TransformLog = []
    transforms.all_at_zero([single(0, 0), single(1, 1), single(2, 2)], log)
    assert log == [{"transform": "all_at_zero", "parameters": {}, "changed": {"arrivals_moved": 2}}]


@pytest.fixture
def coarse() -> list[Request]:
    return [single(number, 3 * (number // 10)) for number in range(40)]


def test_spread_times_stay_before_the_next_instant(coarse):
    spread = transforms.spread(coarse, 0, [])
    assert [request.arrival_ns // (3 * SECOND) for request in spread] == [number // 10 for number in range(40)]


def test_spread_times_follow_the_order_of_the_file(coarse):
    spread = transforms.spread(coarse, 0, [])
    assert [request.id for request in sorted(spread, key=lambda request: request.arrival_ns)] == list(range(40))


def test_the_last_group_is_spread_over_a_step_of_the_clock(coarse):
    spread = transforms.spread(coarse, 0, [])
    assert 0 <= max(request.arrival_ns for request in spread) - 9 * SECOND < 3 * SECOND


def test_a_time_in_which_nothing_came_stays_empty():
    times_s = [0, 0, 0, 3, 6, 66, 69.001, 72]
    requests = [Request(number, round(time * SECOND), (Part(number, 0, 5),), 1) for number, time in enumerate(times_s)]
    for seed in range(20):
        moved = transforms.spread(requests, seed, log := [])
        moved_s = [request.arrival_ns / SECOND for request in moved]
        assert all(old <= new < old + 3.001 for old, new in zip(times_s, moved_s, strict=True))
    assert log[0]["parameters"] == {"seed": 19, "step_s": 3.0}


def test_what_is_longer_than_a_step_and_a_half_is_several_steps():
    requests = [single(number, at_s) for number, at_s in enumerate([0, 3, 6, *[9] * 50, 14, *[17] * 50, 21.4])]
    times_s = [request.arrival_ns / SECOND for request in transforms.spread(requests, 0, [])]
    assert 11 < max(times_s[3:53]) < 12, "5 s are more than one step, and it is filled for one"
    assert 20 < max(times_s[54:104]) < 21.4, "4.4 s are one"


def test_a_single_instant_is_spread_over_a_second():
    moved = transforms.spread([single(number, 5) for number in range(100)], 0, log := [])
    assert 5.9 < moved[-1].arrival_ns / SECOND < 6 and log[0]["parameters"]["step_s"] == 1.0


def test_the_same_seed_spreads_alike(coarse):
    assert transforms.spread(coarse, 5, []) == transforms.spread(coarse, 5, [])


def test_another_seed_spreads_otherwise(coarse):
    assert transforms.spread(coarse, 5, []) != transforms.spread(coarse, 6, [])


def test_spreading_takes_the_artefact_out_of_mooncakes_gaps(public_traces):
    requests = read_trace(public_traces / "mooncake" / "conversation_trace.jsonl.gz").requests
    times = [request.arrival_ns for request in transforms.spread(requests, 0, [])]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    cv = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean
    assert 0.97 < cv < 1.05


# --- sessions ---


@pytest.fixture
def sessions() -> list[Request]:
    """Two hundred sessions of two requests that all begin at 0, and one request without a session."""
    opening = [Request(number, 0, (Part(number, 0, 10),), 5, session=number) for number in range(200)]
    later = [
        Request(200 + number, SECOND, (Part(number, 0, 20),), 5, session=number, after=number, think_ns=7)
        for number in range(200)
    ]
    return [*opening, *later, single(400, 2)]


def test_sessions_begin_at_the_rate_asked_for_and_stay_whole(sessions):
    started = transforms.start_sessions(sessions, 4.0, 0, [])
    times = [request.arrival_ns for request in started]
    assert (times, [request.id for request in started]) == (sorted(times), list(range(401)))
    begins = [request for request in started if request.after is None]
    assert begins[0].arrival_ns == 0
    assert 200 / (begins[-1].arrival_ns / SECOND) == pytest.approx(4.0, rel=0.15)
    for request in (request for request in started if request.after is not None):
        before = started[request.after]
        assert (request.session, request.arrival_ns) == (before.session, before.arrival_ns + SECOND)
        assert request.think_ns == 7


def test_the_same_seed_starts_sessions_alike(sessions):
    assert transforms.start_sessions(sessions, 4.0, 5, []) == transforms.start_sessions(sessions, 4.0, 5, [])
    assert transforms.start_sessions(sessions, 4.0, 5, []) != transforms.start_sessions(sessions, 4.0, 6, [])


def test_a_request_cut_from_its_past_has_nobody_to_think_of(sessions):
    kept = transforms.window(sessions, 1, 2, [])
    assert {(request.after, request.think_ns) for request in kept} == {(None, 0)}


# --- caps ---


def test_a_capped_prompt_keeps_its_first_tokens(conversation):
    capped = transforms.cap_prompt_tokens(conversation, 12, [])
    assert capped[3].parts == (Part(0, 0, 10), Part(answer_text(0), 0, 2))
    assert [request.prompt_tokens for request in capped] == [10, 12, 8, 12]


def test_a_prompt_as_long_as_the_cap_is_left_alone(conversation):
    assert transforms.cap_prompt_tokens(conversation, 28, []) == conversation


def test_a_capped_output_is_that_long_in_later_prompts_too(conversation):
    capped = transforms.cap_output_tokens(conversation, 5, [])
    assert [request.max_tokens for request in capped] == [5, 5, 5, 5]
    assert [part.length for part in capped[3].parts] == [10, 5, 3, 5, 4]


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("window", (-1.0, 5.0), "window_s"),
        ("window", (2.0, 2.0), "window_s"),
        ("window", (float("nan"), 2.0), "window_s"),
        ("limit", (0,), "limit"),
        ("scale_rate", (0.0,), "rate_scale"),
        ("scale_rate", (float("inf"),), "rate_scale"),
        ("start_sessions", (0.0, 0), "session_rate"),
        ("cap_prompt_tokens", (0,), "max_prompt_tokens"),
        ("cap_output_tokens", (0,), "max_output_tokens"),
    ],
)
def test_a_parameter_out_of_range_is_named(conversation, name, arguments, field):
    with pytest.raises(InputError, match=f"^{field} is .*, expected"):
        getattr(transforms, name)(conversation, *arguments, [])


# --- shuffle ---


def test_shuffled_requests_trade_their_arrival_times():
    requests = [single(number, number**2, length=10 + number, max_tokens=20 + number) for number in range(30)]
    log: transforms.TransformLog = []
    shuffled = transforms.shuffle(requests, 7, log)
    assert [request.arrival_ns for request in shuffled] == [request.arrival_ns for request in requests]
    assert [request.id for request in shuffled] == list(range(30))
    bodies = [(request.parts, request.max_tokens) for request in shuffled]
    assert sorted(bodies) == [(request.parts, request.max_tokens) for request in requests]
    moved = sum(body != (request.parts, request.max_tokens) for body, request in zip(bodies, requests, strict=True))
    assert moved > 20
    assert log == [{"transform": "shuffle", "parameters": {"seed": 7}, "changed": {"arrivals_moved": moved}}]
    assert transforms.shuffle(requests, 7, []) == shuffled != transforms.shuffle(requests, 8, [])


def test_turns_are_not_shuffled(conversation):
    with pytest.raises(InputError, match="shuffle_seed is 0, expected a trace without turns; 2 requests wait"):
        transforms.shuffle(conversation, 0, [])


# --- sessions, denser ---


@pytest.fixture
def thinking() -> list[Request]:
    """Two sessions of two turns, the second 10 s later; a turn comes 4 s after the answer."""
    requests = []
    for session, begin_s in enumerate((0, 10)):
        first = Request(2 * session, begin_s * SECOND, (Part(session, 0, 5),), 3, session)
        requests += [
            first,
            Request(first.id + 1, (begin_s + 4) * SECOND, first.parts, 3, session, first.id, 4 * SECOND),
        ]
    return requests


def test_denser_sessions_begin_sooner_and_last_as_long(thinking):
    moved = transforms.scale_rate(thinking, 4.0, log := [])
    assert [(request.arrival_ns / SECOND, request.session) for request in moved] == [(0, 0), (2.5, 1), (4, 0), (6.5, 1)]
    assert [request.after for request in moved] == [None, None, 0, 1]
    assert {request.think_ns for request in moved if request.after is not None} == {4 * SECOND}
    assert log[0]["changed"] == {"arrivals_moved": 2, "sessions_moved": 1}


def test_sessions_that_all_begin_at_once_cannot_be_denser(thinking):
    at_once = [request._replace(arrival_ns=request.arrival_ns % (10 * SECOND)) for request in thinking]
    with pytest.raises(
        InputError, match="rate_scale is 2.0, expected 1, as all sessions begin at one instant: session_rate"
    ):
        transforms.scale_rate(transforms.renumbered(sorted(at_once, key=lambda r: r.arrival_ns)), 2.0, [])


def test_turns_that_no_session_names_stay_with_what_they_wait_for(thinking):
    nameless = [request._replace(session=None) for request in thinking]
    moved = transforms.start_sessions(nameless, 0.001, 0, [])
    times = {request.id: request.arrival_ns for request in moved}
    waits = [request.arrival_ns - times[request.after] for request in moved if request.after is not None]
    assert waits == [4 * SECOND, 4 * SECOND]


@pytest.mark.parametrize(("name", "value"), [("scale_rate", 1e-300), ("start_sessions", 1e-300)])
def test_times_beyond_63_bits_are_refused(thinking, name, value):
    arguments = (value, []) if name == "scale_rate" else (value, 0, [])
    with pytest.raises(InputError, match="so (that|many).* times have at most 63 bits"):
        getattr(transforms, name)(thinking, *arguments)
