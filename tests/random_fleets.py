"""Fleets of tests, drawn by hypothesis: requests, settings, latencies, deaths and when those are noticed, prompts on
replicas of their own, tiers, and rules that scale; and doors and clients before them."""

from __future__ import annotations

from hypothesis import strategies as st
from latencies import Constant, Uneven

from twinserve.settings.build_core import Settings
from twinserve.sim.clients import Clients
from twinserve.sim.disaggregation import BOTH, DECODE, PREFILL, Disaggregation
from twinserve.sim.fleet import Outage, check_outages
from twinserve.sim.links import Link
from twinserve.sim.routers import LeastOutstanding
from twinserve.sim.scaling import METRICS, Scaling
from twinserve.sim.tiers import Tier, TierPlan
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


CLIENTS = st.builds(
    Clients,
    st.none() | st.integers(1, 6),
    st.none() | st.integers(10, 200),
    st.none() | st.integers(20, 900).map(lambda ms: ms * MS),
)
LINKS = st.builds(Link, st.sampled_from([1e5, 1e6, 1e9]), st.integers(0, 30).map(lambda ms: ms * MS))


@st.composite
def splits(draw, num_replicas: int) -> Disaggregation | None:
    """Any that has replicas for both, or none."""
    roles = draw(st.lists(st.sampled_from([BOTH, PREFILL, DECODE]), min_size=num_replicas, max_size=num_replicas))
    if (PREFILL in roles) != (DECODE in roles) or PREFILL not in roles:
        return None
    layers = draw(st.none() | st.integers(1, 8))
    return Disaggregation(tuple(roles), (1000.0,) * num_replicas, draw(LINKS), LeastOutstanding(), layers)


@st.composite
def tiers(draw, num_replicas: int) -> TierPlan | None:
    """Up to three, each with room for a block at least."""
    sizes = draw(st.lists(st.integers(1, 60), max_size=3))
    if not sizes:
        return None
    every = [Tier(f"tier {n}", 16_000.0 * size, draw(LINKS), draw(st.booleans())) for n, size in enumerate(sizes)]
    return TierPlan(tuple(every), (16_000.0,) * num_replicas)


@st.composite
def rules(draw, num_replicas: int) -> Scaling | None:
    """A rule for so many replicas at most, or none."""
    if draw(st.booleans()):
        return None
    times = (draw(st.integers(least, 500)) * MS for least in (20, 0, 0))
    metric, target = draw(st.sampled_from(sorted(METRICS))), draw(st.sampled_from([0.3, 1.0, 3.0]))
    return Scaling(metric, target, draw(st.integers(1, num_replicas)), *times, draw(st.sampled_from([0.0, 0.1])))


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
    split = draw(splits(num_replicas))
    how = {"split": split, "tiers": draw(tiers(num_replicas)) if core.enable_prefix_caching else None}
    how["scaling"] = draw(rules(num_replicas)) if split is None else None
    if how["scaling"] is None:
        how |= {"outages": draw(outages_of(num_replicas)), "failover_ns": draw(st.integers(0, 2000)) * MS}
    return requests, core, latencies, how
