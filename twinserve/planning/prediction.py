"""How sure a prediction is: a run is simulated some times, each with another draw of what is not known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from twinserve.planning.fleets import FleetOptions
from twinserve.planning.parallel import Workers
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.clients import NOBODY, Clients
from twinserve.sim.fit import FittedLatency
from twinserve.sim.intervals import NUM_DRAWS, Draw, Intervals, draws, intervals, varied
from twinserve.sim.latency import LatencyModel
from twinserve.worlds.run import ReplicaSpec
from twinserve.worlds.workload import Workload


def have_intervals(replicas: Sequence[ReplicaSpec]) -> bool:
    """Whether it is known how far off the replicas' latencies may be: those that were fitted.

    A roofline is a limit and no prediction, and a run's own step times are what they are.
    """
    return all(isinstance(spec.latency, FittedLatency) for spec in replicas)


def varied_replicas(replicas: Sequence[ReplicaSpec], draw: Draw) -> list[ReplicaSpec]:
    """The replicas as a draw has them: those of one latency all alike.

    Raises:
        InputError: a latency is not a fitted one.
    """
    models: dict[int, FittedLatency] = {}
    for spec in replicas:
        if not isinstance(spec.latency, FittedLatency):
            raise InputError(
                "expected a fitted one, for intervals: it is not known how far off another may be",
                field="latency",
                value=spec.latency_facts["name"],
            )
        if id(spec.latency) not in models:
            models[id(spec.latency)] = varied(spec.latency, draw)
    return [replace(spec, latency=models[id(spec.latency)]) for spec in replicas]


def prediction_intervals(
    workload: Workload | Sequence[Workload],
    settings: Settings,
    latency: LatencyModel,
    *,
    seed: int = 0,
    workers: Workers | None = None,
) -> Intervals:
    """The limits within which a replica's metrics lie with probability `sim.intervals.COVERAGE`, by their dotted names.

    Args:
        workload: what is served; where it is random, NUM_DRAWS of its kind.
        seed: of the draws.
        workers: who simulates; None is this process alone.

    Raises:
        InputError: the latency is not a fitted one.
    """
    alone = ReplicaSpec(settings, latency, {"name": "the latency", "identity": ""})
    workloads = [workload] * NUM_DRAWS if isinstance(workload, Workload) else workload
    return replica_intervals(workloads, [alone], FleetOptions(), workers or Workers(), seed=seed)


def replica_intervals(
    workloads: Sequence[Workload],
    replicas: Sequence[ReplicaSpec],
    fleet: FleetOptions,
    workers: Workers,
    *,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
    clients: Clients = NOBODY,
) -> Intervals:
    """The same of one replica or of a fleet.

    Args:
        workloads: NUM_DRAWS of them.
        advance: called as each simulation has ended.
        clients: who is turned away, and who gives up.

    Raises:
        InputError: a latency is not a fitted one.
    """
    trials = [
        _Trial(workload, varied_replicas(replicas, draw), fleet, number, clients)
        for number, (workload, draw) in enumerate(zip(workloads, draws(seed), strict=True))
    ]
    summaries: list[dict[str, Any]] = [{} for _ in trials]
    for number, summary in workers.computed(_simulated, trials):
        if isinstance(summary, InputError):
            raise summary
        summaries[number] = summary
        if advance is not None:
            advance()
    return intervals(summaries)


class _Trial(NamedTuple):
    """A simulation with one draw."""

    workload: Workload
    replicas: list[ReplicaSpec]
    fleet: FleetOptions
    number: int
    clients: Clients


def _simulated(trial: _Trial) -> dict[str, Any]:
    return trial.fleet.serve(trial.workload, trial.replicas, seed=trial.number, clients=trial.clients)
