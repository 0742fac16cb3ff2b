"""Fleets of tests, drawn by hypothesis: requests, settings, latencies, deaths, and when those are noticed."""

from __future__ import annotations

from hypothesis import strategies as st
from latencies import Constant, Uneven

from twinserve.settings.build_core import Settings
from twinserve.sim.fleet import Outage, check_outages
from twinserve.traces.request import Part, Request

MS = 10**6


@st.composite
def outages_of(draw, num_replicas: int) -> list[Outage]:
    """Any that are possible: of each replica one after another, and somebody comes back."""
    outages = []
    for replica in range(num_replicas):
        times = sorted(draw(st.lists(st.integers(0, 3000), max_size=4, unique=True)))
        for from_ms, to_ms in zip(times[::2], times[1::2], strict=False):
            outages.append(Outage(replica, from_ms * MS, to_ms * MS))
    check_outages(outages, num_replicas)
    return outages


@st.composite
def fleets(draw):
    num_replicas = draw(st.integers(1, 4))
    requests, arrival_ms = [], 0
    for number in range(draw(st.integers(1, 25))):
        arrival_ms += draw(st.integers(0, 150))
        parts = (Part(draw(st.integers(0, 3)), 0, draw(st.integers(1, 80))), Part(1000 + number, 0, 4))
        after = draw(st.none() | st.integers(0, number - 1)) if number else None
        requests.append(
            Request(number, arrival_ms * MS, parts, draw(st.integers(1, 40)), after=after,
                    think_ns=draw(st.integers(0, 50)) * MS if after is not None else 0)
        )  # fmt: skip
    core = Settings.load(
        {"max_num_seqs": draw(st.integers(1, 6)), "max_num_batched_tokens": draw(st.integers(16, 64)),
         "num_gpu_blocks": draw(st.integers(12, 40)), "pipeline_depth": draw(st.integers(0, 1)),
         "enable_prefix_caching": draw(st.booleans())}
    )  # fmt: skip
    latencies = [draw(st.sampled_from([Uneven(), Uneven(3), Constant()])) for _ in range(num_replicas)]
    return requests, core, latencies, draw(outages_of(num_replicas)), draw(st.integers(0, 2000)) * MS
