"""The router of docs/fleets.md, as it stands there, in the simulator."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from latencies import Constant

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


def spread(router: object, count: int = 6) -> Counter[int]:
    """How many requests each replica gets of a long burst, in which every seventh is long."""
    requests = [
        Request(number, number * 1_000_000, (Part(number, 0, 10),), 200 if number % 7 == 0 else 5)
        for number in range(420)
    ]
    listener = Sent(count)
    simulate_fleet(requests, [Constant()] * count, router, listener)
    assert len(listener.to) == len(requests)
    tokens: Counter[int] = Counter()
    for request, replica in zip(requests, listener.to, strict=True):
        tokens[replica] += request.max_tokens
    return tokens


def test_the_router_of_the_page_spreads_tokens_better_than_chance():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert code is not None and code[1].count("\n") < 30
    names: dict = {}
    exec(code[1], names)
    own, chance = spread(names["PowerOfTwo"]()), spread(RandomChoice())
    assert set(own) == set(range(6))
    assert max(own.values()) - min(own.values()) < max(chance.values()) - min(chance.values())
    assert spread(names["PowerOfTwo"]()) == own


def test_it_works_where_one_replica_is_left():
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1], names)  # type: ignore[index]
    assert set(spread(names["PowerOfTwo"](), 1)) == {0}
