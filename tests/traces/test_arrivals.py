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
