"""Laws that every fleet keeps, whoever dies and whenever that is noticed, wherever KV lies, however many there are, and
whoever is turned away or gives up.

TWINSERVE_FLEETS=1000 draws so many fleets.
"""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from random_fleets import CLIENTS, fleets

from twinserve.orders.loading import Nothing
from twinserve.sim.clients import REJECTED
from twinserve.sim.fleet import FleetListener, simulate_fleet
from twinserve.sim.routers import ROUTERS

EXAMPLES = int(os.environ.get("TWINSERVE_FLEETS", "30"))


class Counting(FleetListener):
    """Counts where requests go and what is lost."""

    def __init__(self, build_cores):
        super().__init__(build_cores)
        self.sent_to: Counter[int] = Counter()
        self.lost: Counter[int] = Counter()

        self.prompts: Counter[int] = Counter()
        self.rests: Counter[int] = Counter()

    def begun(self, replica, life):
        return self._build_cores[replica](source=Nothing())

    def sent(self, request, replica):
        self.sent_to[request.id] += 1

    def prompt_sent(self, request, replica):
        self.prompts[request.id] += 1

    def handed_over(self, request, source, target):
        self.rests[request.id] += 1

    def died(self, replica, lost):
        self.lost.update(seq.seq_id for seq in lost)


@settings(max_examples=EXAMPLES, deadline=None)
@given(fleets(), st.sampled_from(list(ROUTERS.values())), CLIENTS)
def test_requests_are_conserved_and_littles_law_holds(fleet, router, clients):
    """What is in the system over time adds up to the times that requests spend in it (Little, 1961)."""
    requests, core, latencies, how = fleet
    listener = Counting([core.build_core] * len(latencies))
    ended: dict[int, tuple[int, int]] = {}
    tokens: dict[int, int] = {}
    ends: list[int] = []
    reasons: Counter[str] = Counter()

    def progress(seq):
        assert seq.seq_id not in ended, "it ended before"
        reasons[seq.finish_reason] += 1
        if seq.finish_reason in ("refused", REJECTED):
            ended[seq.seq_id] = (0, 0)
            return
        ended[seq.seq_id] = (seq.arrival_ns, seq.finish_ns)
        if seq.finish_reason != "abort":
            tokens[seq.seq_id] = seq.num_completion_tokens
        ends.append(seq.finish_ns)

    found = simulate_fleet(requests, latencies, router(), listener, progress=progress, clients=clients, **how)
    assert sorted(ended) == [request.id for request in requests]
    assert (found.rejected, found.timed_out) == (reasons[REJECTED], reasons["abort"])
    assert all(tokens[number] == requests[number].max_tokens for number in tokens)
    for number in tokens:
        whole, prompts, rests = (of[number] for of in (listener.sent_to, listener.prompts, listener.rests))
        assert whole or (prompts and rests), "somebody computed its prompt, and somebody what follows"
        assert listener.lost[number] >= whole - 1, "sent anew only when lost"
        assert listener.lost[number] >= rests - 1, "handed over anew only when lost"
    spent_ns = sum(finish_ns - arrival_ns for arrival_ns, finish_ns in ended.values())
    changes = sorted([(arrival, 1) for arrival, end in ended.values() if end] + [(end, -1) for end in ends])
    inside = area = before_ns = 0
    for at_ns, change in changes:
        area += inside * (at_ns - before_ns)
        inside, before_ns = inside + change, at_ns
        assert inside >= 0 or change == -1
    assert inside == 0 and area == spent_ns
    assert found.transfers <= sum(listener.rests.values()) + sum(listener.prompts.values()), "by new ends alone"
    for one in found.tiers or ():
        assert one["loads"] <= one["hit_blocks"]
    for lease in found.leases or ():
        assert lease.up_ns is None or lease.from_ns <= lease.up_ns <= (lease.to_ns or lease.up_ns)
