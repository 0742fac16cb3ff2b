"""The router of docs/fleets.md, as it stands there, in the simulator."""

from __future__ import annotations

import re
from pathlib import Path

from latencies import Constant

from twinserve.policies import Sequence
from twinserve.settings.build_core import Settings
from twinserve.sim.fleet import FleetListener, simulate_fleet
from twinserve.sim.routers import RandomChoice
from twinserve.traces.request import Part, Request

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fleets.md"


class Sent(FleetListener):
    """Notes where requests go."""

    def __init__(self, count: int):
        settings = Settings(max_num_seqs=4)
        super().__init__([settings.build_core] * count)
        self.to: list[int] = []

    def sent(self, request: Request, replica: int) -> None:
        self.to.append(replica)


def served(router: object, count: int = 6) -> tuple[list[int], int]:
    """Where the requests of a long burst go, and the nanoseconds of all from arrival to the first token.

    Every seventh has a long answer, of which a router sees that it is not over.
    """
    requests = [
        Request(number, number * 18_000_000, (Part(number, 0, 10),), 200 if number % 7 == 0 else 5)
        for number in range(420)
    ]
    listener, waits = Sent(count), []

    def ended(seq: Sequence) -> None:
        assert seq.first_token_ns is not None
        waits.append(seq.first_token_ns - seq.arrival_ns)

    simulate_fleet(requests, [Constant()] * count, router, listener, progress=ended)
    assert len(listener.to) == len(waits) == len(requests)
    return listener.to, sum(waits)


def test_with_the_router_of_the_page_requests_wait_less_than_by_chance():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert code is not None and code[1].count("\n") < 30
    names: dict = {}
    exec(code[1], names)
    for seed in range(3):
        own, chance = served(names["PowerOfTwo"](seed)), served(RandomChoice(seed))
        assert set(own[0]) == set(range(6))
        assert own[1] < 0.5 * chance[1], f"seed {seed}: {own[1]} ns of waiting, by chance {chance[1]}"
        assert served(names["PowerOfTwo"](seed)) == own


def test_it_works_where_one_replica_is_left():
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1], names)  # type: ignore[index]
    assert set(served(names["PowerOfTwo"](), 1)[0]) == {0}
