"""A point of a sweep: one simulation with all that decides its result, and an identity made of that."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache, lru_cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, model_validator

import twinserve
from twinserve.planning.fleets import FleetOptions
from twinserve.planning.judged import Judge, Rules
from twinserve.planning.prediction import have_intervals, varied_replicas
from twinserve.planning.prices import kind_of
from twinserve.settings.build_core import Settings
from twinserve.settings.config import validated
from twinserve.settings.errors import InputError
from twinserve.sim.devices import device_of
from twinserve.sim.fit import FittedLatency
from twinserve.sim.intervals import NUM_DRAWS, draws
from twinserve.sim.roofline import RooflineLatency
from twinserve.sim.routers import SEEDED
from twinserve.traces.readers import Trace
from twinserve.worlds.run import ReplicaSpec
from twinserve.worlds.vllm_like import OWN, like_of
from twinserve.worlds.workload import (
    ClientOptions,
    PointOptions,
    RateOptions,
    TraceOptions,
    Workload,
    arrival_rate,
    arrivals_span_s,
    read_requests,
    workload_at,
)

Result = dict[str, Any]
Sought = Literal["rate", "replicas", "decode_replicas"]


class Point(PointOptions):
    """One simulation; with `draw`, what is not known of the latency is as that draw has it."""

    trace: str
    draw: int | None = None
    settings: Settings = Settings()
    trace_options: TraceOptions = TraceOptions()
    fleet: FleetOptions = FleetOptions()
    clients: ClientOptions = ClientOptions()

    @model_validator(mode="after")
    def _consistent(self) -> Point:
        self.check(self.trace_options)
        self.rules()
        return self

    @classmethod
    def of(cls, values: dict[str, Any]) -> Point:
        """A point from its fields; settings, trace options and those of a fleet stand beside them.

        Raises:
            InputError: a name is unknown, `trace` is missing, or a value cannot be used.
        """
        parts: dict[str, type[BaseModel]] = {}
        parts |= {"settings": Settings, "trace_options": TraceOptions, "fleet": FleetOptions, "clients": ClientOptions}
        known = {"trace", *PointOptions.model_fields, *(name for part in parts.values() for name in part.model_fields)}
        for name in values:
            if name not in known:
                own = ", ".join(PointOptions.model_fields)
                raise InputError(
                    f"expected trace, {own}, a setting, a trace option, or one of a fleet or of clients",
                    field=name,
                    value=values[name],
                )
        if "trace" not in values:
            raise InputError("is missing, expected a file or folder, in a plan or on the command line", field="trace")
        of_part = {
            part: {name: values[name] for name in model.model_fields if name in values} for part, model in parts.items()
        }
        for name in ("like", "latency"):
            if not isinstance(value := values.get(name), str | None):
                raise InputError("expected: Input should be a valid string", field=name, value=value)
        like = like_of(values.get("like"), values.get("latency"))
        nested = {
            "settings": Settings.load(of_part["settings"], defaults=like.settings if like else None),
            "trace_options": validated(TraceOptions, {}, of_part["trace_options"], None),
            "fleet": FleetOptions.load(of_part["fleet"]),
            "clients": validated(ClientOptions, {}, of_part["clients"], None),
        }
        own_values = {name: values[name] for name in ("trace", *PointOptions.model_fields) if name in values}
        return validated(cls, nested, own_values, None)

    def with_sought(self, sought: Sought, value: float | int) -> Point:
        """The point with another rate or with other replicas."""
        if sought == "rate":
            return self.model_copy(update={"rate": value})
        return self.with_fleet({sought: value})

    def with_fleet(self, options: dict[str, Any]) -> Point:
        """The point with these options of its fleet.

        Raises:
            InputError: the others do not go with them.
        """
        fleet = {name: getattr(self.fleet, name) for name in self.fleet.model_fields_set} | options
        return self.model_copy(update={"fleet": FleetOptions.load(fleet)})

    def flat(self) -> dict[str, Any]:
        """Every field that is not None, settings and options under their own names."""
        own = {name: getattr(self, name) for name in ("trace", *PointOptions.model_fields, "draw")}
        fields = own | self.settings.model_dump() | self.trace_options.model_dump() | self.clients.model_dump()
        fields |= self.fleet.model_dump(mode="json", exclude_unset=True)
        return {name: value for name, value in fields.items() if value is not None}

    def rules(self) -> Rules:
        """What is measured of its requests beside what its summary has.

        Raises:
            InputError: the limits or the measures cannot be read.
        """
        return Rules.parse(self.limits, self.measured, self.warm_up_s, self.drain_s)

    def is_random(self) -> bool:
        """Whether another seed gives another simulation."""
        return self.arrivals == "poisson" or self.fleet.router in SEEDED or self.trace_options.is_random

    def replicas(self) -> list[ReplicaSpec]:
        """The replicas that serve it, each with its settings and its latency.

        Raises:
            InputError: a setting or a latency cannot be used, or the model does not fit the device.
        """
        replicas = self.fleet.build_replicas(self.settings.model_dump(), latency=self.latency, like=OWN)[0]
        return replicas if self.draw is None else varied_replicas(replicas, draws()[self.draw])

    def draws(self) -> list[Point]:
        """The point with each draw of what is not known: of the latency, and where it is random, of the workload.

        No point where it is not known how far off the latency may be.
        """
        if not have_intervals(self.replicas()):
            return []
        seeds = [self.seed + number * self.is_random() for number in range(NUM_DRAWS)]
        return [self.model_copy(update={"draw": number, "seed": seed}) for number, seed in enumerate(seeds)]

    def gpus(self) -> dict[str, int]:
        """How many devices of each kind serve it, by name in small letters without spaces; "" where it is not known."""
        counts: Counter[str] = Counter()
        for spec in self.replicas():
            model = spec.latency
            if isinstance(model, RooflineLatency):
                counts[kind_of(model.device.name)] += model.split.num_devices
            else:
                device = device_of(str(model.data["about"].get("device"))) if isinstance(model, FittedLatency) else None
                many = model.num_devices if isinstance(model, FittedLatency) else 1
                counts["" if device is None else kind_of(device.name)] += many
        return dict(counts)

    def own_rate(self) -> float | None:
        """Requests a second as they arrive in the trace; None where all arrive at once."""
        return arrival_rate(self._workload_at(RateOptions()).requests)

    def workload(self) -> Workload:
        """The requests to replay.

        Raises:
            InputError: the trace or a trace option cannot be used, or `rate` is given and all requests arrive at once.
        """
        return self._workload_at(self)

    def _workload_at(self, rates: RateOptions) -> Workload:
        trace, options = trace_at(self.trace, self.trace_options.columns), self.trace_options.with_seed(self.seed)
        return workload_at(trace, Path(self.trace), options, rates)


@lru_cache(maxsize=2)
def trace_at(path: str, columns: str | None) -> Trace:
    """The trace of that path, kept while other points replay it; `columns` as `TraceOptions` has them."""
    return read_requests(Path(path), columns=columns)


@cache
def code_identity() -> str:
    """16 hex digits that only this code has: all of twinserve that a simulation runs, and simpy."""
    digest = hashlib.sha256(version("simpy").encode())
    root = Path(twinserve.__file__).parent
    modules = [
        root / "planning" / name for name in ("attainment.py", "fleets.py", "judged.py", "point.py", "prediction.py")
    ]
    for package in ("policies", "settings", "sim", "traces", "worlds"):
        modules += sorted((root / package).glob("**/*.py"))
    for path in modules:
        digest.update(f"\0{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Job(NamedTuple):
    """A point to compute, wherever that is.

    Attributes:
        inputs: all that decides the result: the fields of the point, the trace's sha256 in place of its name, the
            replicas with the identities of their latencies, and the identity of the code.
    """

    point: Point
    inputs: dict[str, Any]

    @classmethod
    def of(cls, point: Point) -> Job:
        """The job that computes a point.

        Raises:
            InputError: its trace or its latency cannot be used.
        """
        replicas = [
            {"count": len(list(alike)), "latency": identity, "num_gpu_blocks": blocks}
            for (identity, blocks), alike in groupby(
                (spec.latency_facts["identity"], spec.settings.num_gpu_blocks) for spec in point.replicas()
            )
        ]
        identities = {
            "trace": trace_at(point.trace, point.trace_options.columns).sha256,
            "replicas": replicas,
            "code": code_identity(),
        }
        fields = {name: value for name, value in point.flat().items() if name != "latency"}
        return cls(point, fields | identities)

    @property
    def key(self) -> str:
        """32 hex digits that only these inputs have."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:32]


def compute(job: Job) -> Result:
    """Simulate a point: its inputs, its workload, and the run's summary, which holds nothing of this machine.

    Raises:
        InputError: the trace, the latency or the code is no longer, or on this machine not, what was planned.
    """
    point = job.point
    found = Job.of(point).inputs
    for name in ("trace", "replicas", "code"):
        if found[name] != job.inputs[name]:
            raise InputError(f"expected {job.inputs[name]}, as planned", field=f"the {name}", value=found[name])
    specs, workload = point.replicas(), point.workload()
    judge = Judge(point.rules())
    summary = point.fleet.serve(workload, specs, seed=point.seed, progress=judge.ended, clients=point.clients.clients)
    del summary["wall_s"]
    judge.add_to(summary)
    result = {
        "inputs": job.inputs,
        "latency": ", ".join(dict.fromkeys(spec.latency_facts["name"] for spec in specs)),
        "span_s": arrivals_span_s(workload.requests),
        "transforms": workload.facts["transforms"],
        "summary": summary,
    }
    beyond = [spec.latency for spec in specs if isinstance(spec.latency, FittedLatency) and spec.latency.num_outside]
    if beyond:
        result["beyond_fit"] = max(latency.worst_excess for latency in beyond)
    return result
