"""A simulated fleet with a record of each replica's run."""

from __future__ import annotations

from typing import Any

from twinserve.orders.loading import Nothing
from twinserve.policies import Core, SamplingParams, Sequence
from twinserve.sim.disaggregation import BOTH, Disaggregation
from twinserve.sim.fleet import FleetListener
from twinserve.sim.speculation import Acceptance, acceptance_of
from twinserve.traces.request import Request
from twinserve.traces.runs.fleet_record import FleetRecorder
from twinserve.worlds.run import ReplicaSpec, sim_facts


class RecordedFleet(FleetListener):
    """Has each replica's run recorded."""

    def __init__(
        self,
        recorder: FleetRecorder,
        replicas: list[ReplicaSpec],
        facts: dict[str, Any],
        params: SamplingParams,
        split: Disaggregation | None,
        *,
        has_tiers: bool,
    ):
        self._recorder, self._replicas, self._facts, self._params = recorder, replicas, facts, params
        self._roles = [BOTH] * len(replicas) if split is None else split.roles
        self._has_tiers = has_tiers

    def begun(self, replica: int, life: int) -> Core:
        spec = self._replicas[replica]
        listener = self._recorder.begin(
            replica,
            life,
            settings=spec.settings.model_dump(),
            facts=sim_facts(self._facts, spec.latency_facts),
            device=f"simulated: {spec.latency_facts['name']}",
        )
        moves_kv = self._has_tiers or self._roles[replica] != BOTH
        return spec.settings.build_core(listener=listener, source=Nothing() if moves_kv else None)

    def acceptance(self, replica: int) -> Acceptance | None:
        return acceptance_of(self._replicas[replica].settings.speculative_config)

    def sent(self, request: Request, replica: int) -> None:
        self._recorder.expect(request, self._params, replica)

    def prompt_sent(self, request: Request, replica: int) -> None:
        self._recorder.expect_prompt(request, self._params, replica)

    def handed_over(self, request: Request, source: int | None, target: int) -> None:
        self._recorder.expect_rest(request, self._params, source, target)

    def died(self, replica: int, lost: list[Sequence]) -> None:
        self._recorder.died(replica, lost)
