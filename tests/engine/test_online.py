"""The engine's loop, and what lets requests in while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinserve.engine.online import Clock, Inbox, TraceFeeder
from twinserve.policies import SamplingParams
from twinserve.traces.arrivals import Arrivals
from twinserve.traces.request import Part, Request, TokenMaker


class Noting(TokenMaker):
    """Notes when it makes each prompt."""

    made: list[tuple[int, int]] = []

    def token_ids(self, request: Request, answers: Mapping[int, Any]) -> list[int]:
        self.made.append((request.id, clock()))
        return super().token_ids(request, answers)


clock = Clock()


def test_a_prompt_is_made_before_it_is_due_and_a_turn_once_its_answer_is_known():
    begin = clock()
    first, second = begin + 60_000_000, begin + 120_000_000
    requests = [
        Request(0, first, (Part(1, 0, 50),), 2, session=0),
        Request(1, second, (Part(2, 0, 50),), 2),
        Request(2, 0, (Part(1, 0, 50), Part(-1, 0, 2), Part(3, 0, 5)), 2, session=0, after=0),
    ]
    inbox, announced, maker = Inbox(), [], Noting(1000)
    maker.made.clear()
    feeder = TraceFeeder(Arrivals(requests), inbox, clock, maker, SamplingParams(), announced.append)
    feeder.start()
    (seq,) = inbox.take(wait=True)
    assert seq.seq_id == 0 and maker.made[0][1] < first <= clock(), "the first is made while it is waited for"
    seq.token_ids += [7, 8]
    seq.num_tokens += 2
    feeder.ended(seq)
    (turn,) = inbox.take(wait=True)
    assert turn.seq_id == 2 and turn.token_ids[50:52] == [7, 8]
    (last,) = inbox.take(wait=True)
    feeder.join(timeout=10)
    assert last.seq_id == 1 and inbox.take(wait=False) == [] and inbox.closed
    assert max(made for number, made in maker.made if number == 1) < second <= clock()
    assert [request.id for request in announced] == [0, 2, 1]
    feeder.check()
