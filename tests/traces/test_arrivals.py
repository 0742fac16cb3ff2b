"""A request that waits for an answer arrives when that is there, its user has thought, and its own time has come."""

from __future__ import annotations

import pytest

from twinserve.traces.arrivals import Arrivals
from twinserve.traces.request import Part, Request

PROMPT = (Part(0, 0, 10),)


@pytest.mark.parametrize(
    ("own_ns", "think_ns", "answered_ns", "arrives_ns"),
    [(500, 0, 300, 500), (500, 0, 900, 900), (500, 200, 290, 500), (500, 200, 900, 1100), (500, 450, 100, 550)],
)
def test_a_later_turn_comes_when_all_it_waits_for_has_come(own_ns, think_ns, answered_ns, arrives_ns):
    arrivals = Arrivals([Request(0, 0, PROMPT, 5), Request(1, own_ns, PROMPT, 5, after=0, think_ns=think_ns)])
    assert arrivals.pop().id == 0
    assert arrivals.next_ns is None and not arrivals.is_empty
    arrivals.answered(0, 5, answered_ns)
    assert arrivals.next_ns == arrives_ns
    assert arrivals.pop().arrival_ns == arrives_ns
    assert arrivals.is_empty


def test_a_later_turn_comes_when_its_answer_has_come_and_not_with_the_traces_next_request():
    turn = Request(1, 10, PROMPT, 5, after=0, think_ns=30)
    arrivals = Arrivals([Request(0, 0, PROMPT, 5), turn, Request(2, 1000, PROMPT, 5)])
    assert (arrivals.pop().id, arrivals.next_ns) == (0, 1000)
    arrivals.answered(0, 5, 400)
    assert arrivals.next_ns == 430
    assert [(request.id, request.arrival_ns) for request in (arrivals.pop(), arrivals.pop())] == [(1, 430), (2, 1000)]


def test_a_trace_that_streams_comes_in_order_and_one_that_does_not_is_refused():
    rows = [Request(0, 0, PROMPT, 5), Request(1, 0, PROMPT, 5), Request(2, 7, PROMPT, 5)]
    arrivals = Arrivals(iter(rows))
    assert [arrivals.pop() for _ in rows] == rows and arrivals.is_empty
    for wrong in ([rows[2], rows[0]], [rows[1], rows[0]], [rows[0], rows[2]._replace(after=0)]):
        arrivals = Arrivals(iter(wrong))
        with pytest.raises(ValueError, match="expected requests in the order of arrival that wait for none"):
            arrivals.pop()


def test_a_list_may_be_in_any_order():
    rows = [Request(n, ns, PROMPT, 5) for n, ns in enumerate((5, 0, 5, 1))]
    arrivals = Arrivals(rows)
    assert [arrivals.pop().id for _ in rows] == [1, 3, 0, 2]
    arrivals = Arrivals([rows[2], rows[0]])
    assert [arrivals.pop().id for _ in range(2)] == [0, 2], "equal instants go by row"
