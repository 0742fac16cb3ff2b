"""One workload in either world: in the simulator, or on the real engine."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import twinserve
from twinserve.policies import Batch, CoreListener, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.settings.garbage import rare_collections
from twinserve.sim.clients import NOBODY, Clients
from twinserve.sim.latency import LatencyModel, RecordedLatency, StepFeatures
from twinserve.sim.roofline import MEMORY_SHARE, RooflineLatency
from twinserve.sim.speculation import acceptance_of
from twinserve.traces.runs.record import RunRecord, RunRecorder
from twinserve.worlds.workload import Workload

if TYPE_CHECKING:
    from twinserve.engine.llm import LLM
    from twinserve.engine.options import EngineOptions
    from twinserve.sim.disaggregation import Disaggregation
    from twinserve.sim.fit import FittedLatency, StepSample
    from twinserve.sim.fleet import Outage, Restart
    from twinserve.sim.intervals import Intervals
    from twinserve.sim.profiles import Profile
    from twinserve.sim.routers import Router
    from twinserve.sim.scaling import Lease, Scaling
    from twinserve.sim.slowness import Slowdown
    from twinserve.sim.tiers import TierPlan

Progress = Callable[[Sequence], None]
Derived = Callable[[dict[str, Any]], dict[str, Any]]

ROOFLINE = "roofline:"
_OF_ENGINE = ("shape", "dtype", "kv_cache_dtype", "quantization", "tensor_parallel_size")
"""What of a run's facts a latency model says that is fitted on it."""


def shipped_latencies() -> dict[str, Path]:
    """The latency files that ship, by name."""
    folder = Path(twinserve.__file__).parent / "sim" / "data"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def choose_latency(source: str | None, record: Path | None = None) -> tuple[LatencyModel, dict[str, Any]]:
    """A latency model and what says in a record which one it was.

    Args:
        source: the name of a latency that ships, a latency file, or "roofline:MODEL@DEVICE".
        record: a run record whose own step times are used.

    Raises:
        InputError: both are given or neither is, or one cannot be used.
    """
    if record is not None:
        if source is not None:
            raise InputError("expected only one of latency and latency_from", field="latency", value=source)
        from twinserve.traces.runs.vllm_records import load_run

        rows = load_run(record).steps
        if not rows:
            raise InputError("has no steps, expected the record of a run or of a replica", path=record)
        return RecordedLatency(rows), {"name": f"step times of {record.name}", "identity": "recorded"}
    if source is None:
        names = ", ".join(shipped_latencies())
        raise InputError(
            "is missing, expected --latency roofline:MODEL@DEVICE such as roofline:llama-3-8b@h100, a file that "
            f"twinserve profile wrote, or one that ships: {names}",
            field="latency",
        )
    if source.startswith(ROOFLINE):
        roofline = RooflineLatency.parse(source.removeprefix(ROOFLINE))
        return roofline, {"name": roofline.name, "identity": roofline.identity, "about": roofline.about}
    shipped = shipped_latencies().get(source)
    if shipped is None and not os.path.isfile(source):
        names = ", ".join(shipped_latencies())
        raise InputError(
            f"expected a file, roofline:MODEL@DEVICE, or one that ships: {names}", field="latency", value=source
        )
    from twinserve.sim.fit import FittedLatency

    model = FittedLatency.load(shipped or Path(source))
    about = model.data["about"]
    name = f"{about['model']} on {about['device']}, {'shipped' if shipped else 'measured'}"
    return model, {"name": name, "identity": model.identity, "about": about}


def with_drafting(latency: LatencyModel, settings: Settings) -> LatencyModel:
    """A latency model with what drafts cost, as the settings say it; recorded times have it in them, and so has what
    was fitted to steps of an engine that drafts.

    Raises:
        InputError: `draft_latency` names none, or what was measured with drafts is to cost them again.
    """
    config = settings.speculative_config
    if config is None or isinstance(latency, RecordedLatency):
        return latency
    from twinserve.sim.drafting import DraftedLatency, LookupDrafting, ModelDrafting
    from twinserve.sim.fit import FittedLatency

    if isinstance(latency, FittedLatency) and latency.data["about"].get("speculative_config") is not None:
        for name in ("lookup_ns", "draft_latency"):
            if (value := getattr(config, name)) is not None:
                problem = "expected none, as the latency was measured with drafts"
                raise InputError(problem, field=f"speculative_config.{name}", value=value)
        return latency

    if config.lookup_ns is not None:
        return DraftedLatency(latency, LookupDrafting(*config.lookup_ns))
    if config.draft_latency is not None:
        return DraftedLatency(latency, ModelDrafting(choose_latency(config.draft_latency)[0]))
    return latency


def with_pool(settings: Settings, latency: LatencyModel) -> tuple[Settings, str | None]:
    """The settings with a pool as large as the device's memory allows, where that is known and none is given.

    Returns:
        The settings, and what was assumed of the pool, in words; None where it is given.

    Raises:
        InputError: the model does not fit the device.
    """
    if settings.num_gpu_blocks is not None:
        return settings, None
    if not isinstance(latency, RooflineLatency):
        return settings, "a pool without end: num_gpu_blocks is not given"
    try:
        count = latency.num_blocks(settings.block_size, settings.max_num_seqs)
    except ValueError as error:
        raise InputError(str(error), field="latency", value=latency.name) from error
    words = (
        f"num_gpu_blocks {count}: what {MEMORY_SHARE:.0%} of the memory of {latency.device.name} holds beside weights"
    )
    return Settings.load(settings.model_dump() | {"num_gpu_blocks": count}), words


def with_stages(settings: Settings, latency: LatencyModel) -> Settings:
    """The settings with the stages of the pipeline that a latency model is of.

    Raises:
        InputError: the settings say another number, or do not go with a pipeline.
    """
    stages = latency.split.pipeline if isinstance(latency, RooflineLatency) else 1
    if settings.pipeline_parallel_size not in (1, stages):
        raise InputError(
            f"expected {stages}, as the latency has",
            field="pipeline_parallel_size",
            value=settings.pipeline_parallel_size,
        )
    return settings if stages == 1 else Settings.load(settings.model_dump() | {"pipeline_parallel_size": stages})


def about_runs(records: list[RunRecord]) -> dict[str, Any]:
    """What a latency model says of the runs that it is fitted on, and of the engine and the device that made them."""
    facts = records[0].run["facts"]
    about = {
        "model": facts.get("model", "the model"),
        "device": records[0].told("device"),
        "block_size": records[0].told("settings", "block_size"),
        "runs": [{"name": record.path.name, "trace": record.told("facts", "trace", "sha256")} for record in records],
    }
    if (drafting := records[0].run["settings"].get("speculative_config")) is not None:
        about["speculative_config"] = drafting
    return about | {name: facts[name] for name in _OF_ENGINE if name in facts}


def fit_runs(runs: list[Path], traces: Path | None, profile: Path | None = None) -> FittedLatency:
    """A latency model from the steps of recorded runs of one engine on one device, and of a profile of it.

    Raises:
        InputError: a record or the profile cannot be read, does not show what its steps cost, or is of another engine.
    """
    from twinserve.sim.profiles import Profile
    from twinserve.sim.recorded_steps import fit_records
    from twinserve.traces.runs.vllm_records import load_run

    records = [load_run(run, traces) for run in runs]
    about = about_runs(records)
    if profile is None:
        return fit_records(records, about)
    measured = Profile.load(profile)
    for name in ("model", "device"):
        if measured.about.get(name) != about[name]:
            raise InputError(
                f"expected {about[name]!r}, as in the runs", path=profile, field=name, value=measured.about.get(name)
            )
    return fit_records(records, about | {"profile": {"name": profile.name, "identity": measured.identity}}, measured)


def fit_acceptance(runs: list[Path], out: Path) -> None:
    """Write the law of acceptance of speculative runs' drafts.

    Raises:
        InputError: a record cannot be read, none has drafts, or the file cannot be written.
    """
    from twinserve.sim.speculation import fit_law, save_law
    from twinserve.traces.runs.record import load_record

    try:
        law = fit_law(*(load_record(run).steps for run in runs))
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error), path=runs[0]) from error
    save_law(law, out)


def require_engine(device: str) -> None:
    """Refuse to begin where the engine is not installed, or its device is not there.

    Raises:
        InputError: it is not.
    """
    try:
        from twinserve.engine.device_queue import usable_device
    except ImportError as error:
        raise InputError("the engine needs torch and transformers: pip install 'twinserve[engine]'") from error
    usable_device(device)


def load_llm(options: EngineOptions, settings: Settings, *, progress: Callable[[str], None]) -> LLM:
    """The model that a name, a folder or a hub id stands for, ready to serve.

    Args:
        progress: called with a line as each part of the work begins, and with what was chosen.

    Raises:
        InputError: the engine is not installed, or the device, the model or the settings cannot be used.
    """
    settings.check_rules()
    require_engine(options.device)
    from twinserve.engine.hub import resolve_model
    from twinserve.engine.llm import LLM

    source = options.model if options.load_format == "dummy" else resolve_model(options.model, progress=progress)
    given = options.model_dump(exclude={"model"}, exclude_unset=True)
    llm = LLM(source, name=options.model, settings=settings, **given)
    progress(f"attention: {llm.attention.name} ({llm.attention.reason})")
    return llm


def measure_steps(
    llm: LLM,
    *,
    shapes: int,
    max_seqs: int,
    max_context: int,
    max_prompt: int,
    repeats: int,
    seed: int = 0,
    progress: Callable[[int], Any],
    workload: Workload | None = None,
    latency: LatencyModel | None = None,
) -> list[StepSample]:
    """Measure the engine's steps over so many shapes; those of one shape lie together.

    The shapes are those of a design; with a workload, the second half are those of steps that simulating it makes.

    Args:
        seed: of the choice of shapes.
        progress: called with the number of steps to come; what it returns is a context manager with `advance`.
        latency: what the workload is simulated with; None is what was measured over the design.
    """
    from twinserve.engine.profile import MOST_WARMING, SHORTEST, StepShape, covering, design, measure, spare_tokens
    from twinserve.sim.fit import StepSample
    from twinserve.sim.replica import simulate

    settings = llm.settings
    limit = (settings.max_model_len or max_context) - spare_tokens(repeats)
    room = {
        "block_size": settings.block_size,
        "num_blocks": settings.num_gpu_blocks or 0,
        "max_rows": settings.max_num_seqs,
        "repeats": repeats,
        "seed": seed,
    }

    def measured(chosen: list[StepShape]) -> list[StepSample]:
        with progress(len(chosen) * repeats) as bar:
            steps = measure(llm, chosen, repeats=repeats, seed=seed, progress=bar.advance)
        return [
            StepSample(
                StepFeatures.of(step.batch, step.arrived),
                step.bookkeeping_ns + step.launch_ns,
                step.device_ns,
                launch_ns=step.launch_ns,
                bookkeeping_ns=step.bookkeeping_ns,
            )
            for step in steps
        ]

    count = shapes if workload is None else shapes // 2
    most = settings.most_drafts
    if (longest := limit - 2 * most) < SHORTEST:
        least = spare_tokens(repeats) + 2 * most + SHORTEST
        problem = (
            f"expected at least {least}, as contexts grow while the {repeats + MOST_WARMING} steps of a shape are run"
        )
        raise InputError(problem, field="max_model_len", value=settings.max_model_len)
    sizes = {"max_seqs": max_seqs, "max_context": min(max_context, longest), "max_prompt": max_prompt}
    sizes |= {"max_tokens": settings.max_num_batched_tokens, "most_drafts": most}
    samples = measured(design(count, **sizes, **room))
    if workload is not None:
        made: set[StepShape] = set()
        # As it is measured: where steps are graphs, one step ahead.
        ahead = Settings.load(settings.model_dump() | {"pipeline_depth": int(llm.attention.graphs)})
        core = ahead.build_core(listener=_Decided(lambda batch: made.add(StepShape.of(batch, ahead.block_size))))
        acceptance = acceptance_of(ahead.speculative_config)
        simulate(workload.requests, core, latency or fit_steps(llm, samples), step_by_step=True, acceptance=acceptance)
        samples += measured(covering(made, shapes - count, max_context=limit, **room))
    return samples


class _Decided(CoreListener):
    """Tells of each decision."""

    def __init__(self, decided: Callable[[Batch], None]):
        self._decided = decided

    def decided(self, batch: Batch) -> None:
        if batch:
            self._decided(batch)


def profile_of(llm: LLM, samples: list[StepSample]) -> Profile:
    """Measured steps, and what they were measured of."""
    from twinserve.engine.options import RUNNER_SETTINGS
    from twinserve.sim.kernels import Kernels
    from twinserve.sim.profiles import Profile

    settings = llm.settings.model_dump(include=set(RUNNER_SETTINGS))
    about = llm.facts() | settings | {"device": llm.device_name}
    if llm.settings.speculative_config is not None:
        about["speculative_config"] = llm.settings.speculative_config.model_dump()
    del about["seed"], about["tokens"], about["eos_token_id"]
    kernels = Kernels.load(about.pop("kernels", {}))
    seen = [replace(sample, features=sample.features.attended(kernels.single)) for sample in samples]
    return Profile(about, kernels, seen)


def fit_profile(profile: Profile) -> FittedLatency:
    """A latency model from measured steps alone."""
    from twinserve.sim.fit import fit
    from twinserve.sim.intervals import uncertainty_of, with_uncertainty

    def refit(kept: list[StepSample]) -> FittedLatency:
        return fit(kept, profile.about, kernels=profile.kernels, holds_out=False)

    model = fit(profile.samples, profile.about, kernels=profile.kernels)
    return with_uncertainty(model, uncertainty_of(model, refit, [], profile.samples))


def fit_steps(llm: LLM, samples: list[StepSample]) -> FittedLatency:
    """A latency model of the engine from its measured steps."""
    return fit_profile(profile_of(llm, samples))


@contextmanager
def recording(
    out: Path | None,
    world: Literal["sim", "real"],
    settings: Settings,
    facts: dict[str, Any],
    device: str | None = None,
    watch: Callable[[Batch], None] | None = None,
) -> Iterator[RunRecorder]:
    """A recorder that writes `out`, or nothing where `out` is None; `watch` hears of steps that end."""
    make = RunRecorder if watch is None else partial(_WatchedRecorder, watch)
    with make(out, world=world, settings=settings.model_dump(), facts=facts, device=device) as recorder:
        yield recorder


class _WatchedRecorder(RunRecorder):
    """A recorder beside which somebody else hears of the steps that end."""

    def __init__(self, watch: Callable[[Batch], None], out: Path | None, **options: Any):
        super().__init__(out, **options)
        self._watch = watch

    def committed(self, batch: Batch) -> None:
        super().committed(batch)
        self._watch(batch)


def sim_facts(facts: dict[str, Any], latency_facts: dict[str, Any]) -> dict[str, Any]:
    """What the record of a simulated replica says beside its settings."""
    return {"trace": facts["trace"], "latency": latency_facts, "sampling": facts["sampling"]}


@rare_collections
def run_sim(
    workload: Workload,
    settings: Settings,
    latency: LatencyModel,
    *,
    latency_facts: dict[str, Any],
    out: Path | None = None,
    params: SamplingParams | None = None,
    progress: Progress | None = None,
    step_by_step: bool = False,
    intervals: Intervals | None = None,
    clients: Clients = NOBODY,
    derived: Derived | None = None,
) -> dict[str, Any]:
    """Replay a workload in the simulator; its summary.

    Seconds on the wall clock are in the summary and not in the record: equal runs have equal records.

    Args:
        latency_facts: says in the record which latency model it was.
        out: the run record to write; None keeps none.
        intervals: the limits of its metrics, for the summary.
        clients: who is turned away, and who gives up; the summary counts them apart, as `rejected` and `timed_out`.
        derived: makes of the summary what joins it.
    """
    from twinserve.sim.replica import simulate

    params, acceptance = params or SamplingParams(ignore_eos=True), acceptance_of(settings.speculative_config)
    facts = sim_facts({"trace": workload.facts, "sampling": asdict(params)}, latency_facts) | _client_facts(clients)
    device = f"simulated: {latency_facts['name']}"
    with recording(out, "sim", settings, facts, device) as recorder:
        begun = time.perf_counter()
        turned_away, gave_up = simulate(
            workload.requests,
            settings.build_core(listener=recorder),
            with_drafting(latency, settings),
            params=params,
            announce=lambda request: recorder.expect(request, params),
            progress=progress,
            step_by_step=step_by_step,
            acceptance=acceptance,
            clients=clients,
        )
        wall_s = round(time.perf_counter() - begun, 3)
        counts = _counts(workload, intervals) | _client_counts(clients, turned_away, gave_up)
        return recorder.close(counts, derived) | {"wall_s": wall_s}


@dataclass(frozen=True)
class ReplicaSpec:
    """A replica of a fleet: its settings, its latency model, and what says in a record which model that was."""

    settings: Settings
    latency: LatencyModel
    latency_facts: dict[str, Any]

    @property
    def latency_words(self) -> str:
        """The name of its latency, and whether that was fitted to measured steps."""
        if isinstance(self.latency, RecordedLatency):
            return str(self.latency_facts["name"])
        return f"{self.latency_facts['name']}, {'not ' * isinstance(self.latency, RooflineLatency)}fitted"


def metered(replicas: Seq[ReplicaSpec]) -> tuple[list[ReplicaSpec], Derived]:
    """The replicas with meters of their energy, and what says of a summary what they drew.

    Raises:
        InputError: it is not known what a step computes, or what the device draws.
    """
    from twinserve.sim.fit import FittedLatency, floor_of
    from twinserve.sim.power import Metered, MeteredLatency, Work, energy_of

    meters: dict[int, Metered] = {}
    counts = Counter(id(spec.latency) for spec in replicas)
    for spec in replicas:
        model = spec.latency
        known = floor_of(model.data["about"]) if isinstance(model, FittedLatency) else model
        power = known.device.power if isinstance(known, RooflineLatency) else None
        if not isinstance(known, RooflineLatency) or power is None:
            raise InputError(
                "expected a latency of a model whose shape is known, on a device with limit_w or measured_power",
                field="energy",
                value=spec.latency_facts["name"],
            )
        if id(model) not in meters:
            count = counts[id(model)] * known.split.num_devices
            meters[id(model)] = Metered(MeteredLatency(model, Work(known)), count, known.device.name, power)
    told = [replace(spec, latency=meters[id(spec.latency)].latency) for spec in replicas]
    return told, lambda summary: {"energy": energy_of(meters.values(), summary)}


def fleet_facts(replicas: Seq[ReplicaSpec], router_facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What the record of a fleet says: the settings that all replicas have, router and replicas, and the device."""
    every = [spec.settings.model_dump() for spec in replicas]
    common = {name: value for name, value in every[0].items() if all(other[name] == value for other in every)}
    own = [
        {"settings": settings, "latency": spec.latency_facts} for settings, spec in zip(every, replicas, strict=True)
    ]
    return common, {"router": router_facts, "replicas": own}, f"simulated: {len(replicas)} replicas"


@rare_collections
def run_fleet(
    workload: Workload,
    replicas: list[ReplicaSpec],
    router: Router,
    *,
    router_facts: dict[str, Any],
    outages: Iterable[Outage] = (),
    failover_ns: int = 0,
    restarts: Iterable[Restart] = (),
    slowdowns: Iterable[Slowdown] = (),
    split: Disaggregation | None = None,
    decode_router_facts: dict[str, Any] | None = None,
    tiers: TierPlan | None = None,
    scaling: Scaling | None = None,
    out: Path | None = None,
    params: SamplingParams | None = None,
    progress: Progress | None = None,
    step_by_step: bool = False,
    intervals: Intervals | None = None,
    clients: Clients = NOBODY,
    derived: Derived | None = None,
) -> dict[str, Any]:
    """Replay a workload on a simulated fleet; its summary. See `run_sim`.

    Args:
        router_facts: says in the record which router it was.
        outages: when replicas are down.
        failover_ns: nanoseconds from a death until the router knows of it.
        restarts: which replicas are drained and restarted, and when.
        slowdowns: when replicas are slow.
        split: who computes prompts and who goes on with them; None: all do both.
        decode_router_facts: says in the record which router chooses those who go on.
        tiers: behind the prefix caches of those who compute prompts.
        scaling: how many replicas are up; None: all.
        out: the fleet record to write; None keeps none.
    """
    from twinserve.sim.fleet import simulate_fleet
    from twinserve.traces.runs.fleet_record import FleetRecorder
    from twinserve.worlds.recorded_fleet import RecordedFleet

    params = params or SamplingParams(ignore_eos=True)
    outages, restarts, slowdowns = list(outages), list(restarts), list(slowdowns)
    facts = {"trace": workload.facts, "sampling": asdict(params)}
    common, fleet, device = fleet_facts(replicas, router_facts)
    fleet |= {"outages": [asdict(outage) for outage in outages], "failover_ns": failover_ns}
    fleet |= {"restarts": [asdict(one) for one in restarts]} if restarts else {}
    fleet |= {"slowdowns": [asdict(one) for one in slowdowns]} if slowdowns else {}
    fleet |= {"split": split.facts | {"router": decode_router_facts}} if split is not None else {}
    fleet |= {"tiers": tiers.facts} if tiers is not None else {}
    fleet |= {"scaling": scaling.facts} if scaling is not None else {}
    facts |= _client_facts(clients)
    with FleetRecorder(out, settings=common, facts=facts | {"fleet": fleet}, device=device) as recorder:
        begun = time.perf_counter()
        found = simulate_fleet(
            workload.requests,
            [
                slowed(with_drafting(spec.latency, spec.settings), index, slowdowns)
                for index, spec in enumerate(replicas)
            ],
            router,
            RecordedFleet(recorder, replicas, facts, params, split, has_tiers=tiers is not None),
            params=params,
            outages=outages,
            failover_ns=failover_ns,
            restarts=restarts,
            progress=progress,
            step_by_step=step_by_step,
            clients=clients,
            split=split,
            tiers=tiers,
            scaling=scaling,
        )
        wall_s = round(time.perf_counter() - begun, 3)
        counts = _counts(workload, intervals) | _client_counts(clients, found.rejected, found.timed_out)
        if split is not None:
            counts |= {"transfers": found.transfers, "transfer_bytes": found.transfer_bytes}
        if tiers is not None:
            counts["tiers"] = found.tiers
        if found.leases is not None:
            counts |= _lease_counts(found.leases, recorder.last_finish_ns) | {"most_replicas": len(replicas)}
        return recorder.close(counts, derived) | {"wall_s": wall_s}


def _lease_counts(leases: list[Lease], end_ns: int) -> dict[str, Any]:
    """When each replica was there, and for how many seconds all were paid for, up to the end of the last request."""
    taken = [min(end_ns, lease.to_ns or end_ns) - lease.from_ns for lease in leases]
    return {"leases": [asdict(lease) for lease in leases], "replica_s": sum(max(0, ns) for ns in taken) / 1e9}


def slowed(latency: LatencyModel, index: int, slowdowns: Iterable[Slowdown]) -> LatencyModel:
    """The latency of a replica that may be slow at times."""
    from twinserve.sim.slowness import SlowLatency

    own = [one for one in slowdowns if one.replica == index]
    return SlowLatency(latency, own) if own else latency


def run_real(
    workload: Workload,
    llm: LLM,
    *,
    out: Path | None = None,
    params: SamplingParams | None = None,
    time_scale: float = 1.0,
    progress: Progress | None = None,
    watch: Callable[[Batch], None] | None = None,
) -> dict[str, Any]:
    """Replay a workload on the engine, in real time; its summary.

    Args:
        llm: its `settings` are those of the run.
        time_scale: arrivals come so many times later than in the trace.
        progress: called with each sequence that ends.
        watch: called with each step that ends.
    """
    params = params or SamplingParams(temperature=0.0, ignore_eos=True)
    facts = {"trace": workload.facts, "time_scale": time_scale, "sampling": asdict(params), **llm.facts()}
    if llm.runner.device.type == "cuda":
        llm.warm_up()
    with recording(out, "real", llm.settings, facts, llm.device_name, watch) as recorder:
        begun = time.perf_counter()
        llm.run_trace(workload.requests, params=params, recorder=recorder, time_scale=time_scale, progress=progress)
        wall_s = round(time.perf_counter() - begun, 3)
        return recorder.close(_counts(workload) | {"wall_s": wall_s})


def _counts(workload: Workload, intervals: Intervals | None = None) -> dict[str, Any]:
    counts: dict[str, Any] = {"capped": workload.capped, "dropped": workload.dropped}
    return counts if intervals is None else counts | {"intervals": intervals}


def _client_facts(clients: Clients) -> dict[str, Any]:
    """What a record says of clients that do more than wait."""
    return {} if clients == NOBODY else {"clients": asdict(clients)}


def _client_counts(clients: Clients, turned_away: int, gave_up: int) -> dict[str, int]:
    """Requests that were turned away, and given up, where that may be."""
    return {} if clients == NOBODY else {"rejected": turned_away, "timed_out": gave_up}
