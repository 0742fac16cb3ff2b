"""Measured steps from run records: what each cost the host and the device, as far as a record shows it."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from twinserve.policies import Batch, CoreListener
from twinserve.settings.errors import InputError
from twinserve.sim.fit import DRIFT_NS, FittedLatency, StepSample, fit, regime_of
from twinserve.sim.intervals import Served, uncertainty_of, with_uncertainty
from twinserve.sim.kernels import Kernels
from twinserve.sim.latency import RecordedLatency, StepCost, StepFeatures, cost_of
from twinserve.sim.profiles import Profile
from twinserve.traces.runs.metrics import stayed_busy
from twinserve.traces.runs.record import RunRecord
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.spans import device_ns

SEEN_NS = 150_000
"""A result that is ready so much later than the next launch was waited for; another may have been there before."""

AFTER_LAUNCH_NS = 600_000
"""A step launched kernel by kernel that ends sooner after its launch may have been held up by the launch."""

LATE = 1.5
"""A step that took so many times longer than the model says was held up by something else than its work."""

ROUNDS = 5

LEVELS = tuple(1.03**power for power in range(-20, 31))
"""How fast or slow a host may have been."""

STEADINESS = 0.01
"""What a change of the host's level costs, beside a relative error of the steps' time; both are squared."""


def features_of(record: RunRecord) -> list[StepFeatures]:
    """The features of each recorded step; its rows follow from the facts, by deciding it again.

    Raises:
        InputError: the decisions are not made again.
    """
    rows = _Rows()
    result = replay(record, listener=rows)
    if not result.is_exact:
        raise InputError(f"its decisions are not made again: {result.difference}", path=record.path)
    before, features = 0, []
    for row, found in zip(record.steps, rows.features, strict=True):
        features.append(found._replace(arrived=row["seen"] - before))
        before = row["seen"]
    return features


class _Rows(CoreListener):
    """Notes the features of what is decided."""

    def __init__(self) -> None:
        self.features: list[StepFeatures] = []

    def decided(self, batch: Batch) -> None:
        self.features.append(StepFeatures.of(batch))


def kernels_of(record: RunRecord) -> Kernels:
    """How the engine of a run pads and cuts its steps, as its facts say it."""
    facts, settings = record.run["facts"], record.run["settings"]
    if "kernels" in facts:
        return Kernels.load(facts["kernels"])
    if facts.get("execution") != "graphs" or facts["attention"] != "triton":
        return Kernels()
    # Older records do not say it; this is what the engine did that wrote them.
    shape, most = facts["shape"], settings["max_num_seqs"]
    heads, group = shape["num_kv_heads"], shape["num_heads"] // shape["num_kv_heads"]
    cuts = ((1, 16, 64, 64), (-(-128 // heads), 8, 256, 128), (-(-1024 // heads), 1, 256, 128))
    tile = max(1, 128 // (1 << (group - 1).bit_length()))
    if (speculative := settings.get("speculative_config")) is not None:
        single = 1 + speculative["num_speculative_tokens"]
        most = min(most * single, settings["max_num_batched_tokens"])
        decodes = (*(size for size in (1, 2, 4, *range(8, 256, 8), *range(256, most, 32)) if size < most), most)
        return Kernels(decodes, decode_cuts=cuts, prompt_tile=max(1, tile // 2), single=single, waits=True)
    sizes = (16, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    largest = bisect_left(sizes, settings["max_num_batched_tokens"])
    return Kernels(
        decodes=tuple(sorted({*(size for size in (1, 2, 4) if size < most), *range(8, most, 8), most})),
        prompt_tokens=sizes[: largest + 1],
        decodes_beside=(0, *(size for size in (16, 64) if size < most), most),
        prompts=32,
        decode_cuts=cuts,
        prompt_tile=tile,
    )


def fit_records(records: list[RunRecord], about: dict[str, Any], profile: Profile | None = None) -> FittedLatency:
    """A latency model from the steps of runs of one engine on one device, and from those of a profile of it.

    A step is a step, whichever of them it is from: runs say what the steps cost that they are made of, and the profile
    what others do.

    Raises:
        InputError: a record is a simulation's, or does not show what its steps cost (see `_Run`), or not all are of one
            engine.
    """
    captured = {record.run["facts"].get("captured_tokens") for record in records}
    if len(captured) != 1:
        raise InputError("expected runs of one engine", field="captured_tokens", value=sorted(captured, key=str))
    captured_tokens = captured.pop()
    runs = [_Run(record, captured_tokens) for record in records]
    kernels = runs[0].kernels
    if any(run.kernels != kernels for run in runs):
        raise InputError("expected runs of one engine, with the same sizes of steps", field="kernels")
    if profile is not None and (profile.kernels != kernels or captured_tokens is not None):
        raise InputError("expected a profile of the engine of the runs, with the same sizes of steps", field="profile")
    profiled = [] if profile is None else profile.samples
    fitted = partial(
        fit, about=about, captured_tokens=captured_tokens, kernels=kernels,
        launches_vary=not any(run.is_log for run in runs),
    )  # fmt: skip
    model: FittedLatency | None = None
    samples: list[list[StepSample]] = []
    for rounds_left in reversed(range(ROUNDS)):
        tail = 0 if model is None else _captured_lead([ns for run in runs for ns in run.lead_bounds(model)])
        samples = [list(run.samples(model, tail)) for run in runs]
        try:
            model = fitted([*chain(*samples), *profiled], holds_out=not rounds_left)
        except ValueError as error:
            raise InputError(f"{error}; a fit needs runs with more of them") from error
    assert model is not None

    known = list(zip(runs, samples, strict=True))
    served = [Served(steps, _workload_of(run.record)) for run, steps in known if not _is_profile(run.record)]
    profiled = [*profiled, *(sample for run, steps in known if _is_profile(run.record) for sample in steps)]
    model = with_uncertainty(model, uncertainty_of(model, partial(fitted, holds_out=False), served, profiled))
    drifting = [run for run in runs if run.is_log and not _is_profile(run.record)]
    return model.with_drift([level for run in drifting for level in host_levels(run.record, model, run.features)])


def steps_of(record: RunRecord) -> list[tuple[StepFeatures, int]]:
    """The features of a run's steps, and their nanoseconds on the device, where both are known.

    Raises:
        InputError: see `fit_records`.
    """
    run = _Run(record, record.run["facts"].get("captured_tokens"))
    samples = run.samples(None, 0)
    return [(sample.features, sample.device_ns) for sample in samples if sample.device_ns is not None]


def _captured_lead(bounds: list[int]) -> int:
    """Nearly the greatest of the bounds; the very greatest are the errors of single steps."""
    return max(0, sorted(bounds)[len(bounds) * 95 // 100]) if bounds else 0


class _Run:
    """The steps of one run, and what can be known of each.

    A record of our own engine has a step's start and end on the device, so host and device are known. One step ahead,
    its bookkeeping goes from when the step before was launched, or the result that was then waited for, to the
    decision. Its launch is known from `launched_ns`; a record of the first schema lacks it, and shows it only where the
    device stood idle until then. Where the host waits for each step (`Kernels.waits`), its part is what lies between
    two steps, before the decision and behind it; what it does while drafts are being made holds nobody up.

    In the log of an engine that decides one step ahead, the host's work lies between a launch, or the result that it
    then waited for, and the next launch. A result is seen when it is waited for: where it was ready well after the next
    launch, the step's end is known, else it is a bound. A step launched kernel by kernel is computed while it is
    launched, so it starts when the launch has begun or the step before has ended; what a captured launch takes is
    preparation.

    Attributes:
        features: of each step.
        kernels: of the engine.
        is_log: it is the log of another engine; `is_ahead`: of one that decides one step ahead.
    """

    def __init__(self, record: RunRecord, captured_tokens: int | None):
        if record.run["world"] != "real":
            raise InputError("expected the record of a real run, whose steps were measured", path=record.path)
        self.record, self._captured_tokens = record, captured_tokens
        steps = record.steps
        if not steps or any("running" not in row for row in steps):
            raise InputError("expected steps with their decisions", path=record.path)
        self._steps = steps
        self.is_log = record.run["facts"].get("source") is not None
        self._depth = record.told("settings", "pipeline_depth")
        self.is_ahead = self.is_log and self._depth == 1
        if self.is_ahead and any(row["launched_ns"] is None for row in steps):
            raise InputError(
                "the ends of its launches were not recorded, so host and device cannot be told apart", path=record.path
            )
        if self.is_log and not self.is_ahead:
            raise InputError("its launches are not recorded, so host and device cannot be told apart", path=record.path)
        self.kernels = kernels_of(record)
        self.features = [found.attended(self.kernels.single) for found in features_of(record)]

    def samples(self, model: FittedLatency | None, captured_lead_ns: int) -> Iterable[StepSample]:
        """What is known of each step; `model`, if there is one, tells how long steps ran whose end was not seen."""
        if self.is_ahead:
            return self._ahead(model, captured_lead_ns)
        return list(self._own(model))

    def _own(self, model: FittedLatency | None) -> Iterable[StepSample]:
        """The steps of our own engine; of one that something else than its work has held up, the host alone."""
        recorded = RecordedLatency(self._steps)
        ends = [0, 0]
        before: dict[str, Any] | None = None
        for row, f in zip(self._steps, self.features, strict=True):
            decided, start, end = row["decided_ns"], row["start_ns"], row["end_ns"]
            waits = self.kernels.waits
            device: int | None = device_ns(start, end, None if before is None or waits else ends[-1])
            if model is not None and f.seqs and end - start > LATE * model.step_cost(f).device_ns:
                device = None
            if f.seqs and not self._depth:
                cost = cost_of(recorded, f)
                yield StepSample(f, cost.host_ns - cost.lead_ns, device)
            elif f.seqs:
                launched = start if waits else row.get("launched_ns")
                if launched is None and ends[-1] < decided:
                    launched = start
                launch = None if launched is None else launched - decided
                bookkeeping = None
                if before is not None and stayed_busy(before, row):
                    # Without the launch before: its step began when it was launched, or the one before that had ended.
                    seen = before.get("launched_ns")
                    free = before["start_ns"] if seen is None else max(seen, ends[-2])
                    if waits:
                        free, launch = ends[-1], start - max(decided, ends[-1])
                    bookkeeping = max(0, decided - free)
                host = None if launch is None else launch + (bookkeeping or 0)
                yield StepSample(f, host, device, None, launch, bookkeeping)
            before, ends = row, [ends[-1], end]

    def _ahead(self, model: FittedLatency | None, tail: int) -> Iterable[StepSample]:
        steps, features = self._steps, self.features
        captured = [
            row["launched_ns"] - row["schedule_end_ns"]
            for row, f in zip(steps, features, strict=True)
            if f.seqs and regime_of(f, self._captured_tokens) == "decode"
        ]
        preparation = max(0, sum(captured) // max(1, len(captured)) - tail)
        device_free = 0
        for number, (row, f) in enumerate(zip(steps, features, strict=True)):
            launched, ready = row["launched_ns"], row["output_ready_ns"]
            regime = regime_of(f, self._captured_tokens)
            launch = launched - row["schedule_end_ns"]
            lead = tail if regime == "decode" else max(0, launch - preparation)
            following = steps[number + 1]["launched_ns"] if number + 1 < len(steps) else ready
            is_seen = ready - following > SEEN_NS and (regime == "decode" or ready - launched > AFTER_LAUNCH_NS)
            start = max(launched - lead, device_free)
            device: int | None = ready - start
            modelled = None if model is None or not f.seqs else model.step_cost(f).device_ns
            if is_seen:
                device_free = ready
                if modelled is not None and ready - start > LATE * modelled:
                    device = None
            else:
                expected = launched if modelled is None else max(launched, start + modelled)
                if modelled is None or expected <= ready:
                    device = None
                device_free = min(ready, expected)
            if f.seqs:
                host = self._host_ns(number)
                yield StepSample(f, host, device, lead, launch, None if host is None else host - launch)

    def lead_bounds(self, model: FittedLatency) -> Iterable[int]:
        """How long before the end of its launch a captured decode step was on the device, at the least.

        Where its result was waited for and that of the step before was not, the step began when its launch let it, or a
        little later, when the step before had ended.
        """
        if not self.is_ahead:
            return
        was_seen = True
        for f, row, following in zip(self.features, self._steps, self._steps[1:], strict=False):
            is_seen = row["output_ready_ns"] - following["launched_ns"] > SEEN_NS
            if f.seqs and is_seen and not was_seen and regime_of(f, self._captured_tokens) == "decode":
                yield model.step_cost(f).device_ns - (row["output_ready_ns"] - row["launched_ns"])
            was_seen = is_seen

    def _host_ns(self, number: int) -> int | None:
        """From the launch before, or the result then waited for, to the launch; None if there was nothing to do."""
        if number < 2:
            return None
        row, before, result = (self._steps[number - back] for back in range(3))
        if not (before["running"] or before["waiting"]) or row["seen"] == 0:
            return None
        if before["running"] == len(row["left"]) and not before["waiting"]:
            return None
        free = before["launched_ns"]
        if result["output_ready_ns"] - free > SEEN_NS:
            free = result["output_ready_ns"]
        return row["launched_ns"] - free


def host_levels(record: RunRecord, model: FittedLatency, features: list[StepFeatures] | None = None) -> list[float]:
    """How slow a run's host was, as multiples of the model's host time, each for DRIFT_NS of the run.

    It needs no launch times: the level is that at which the model's steps, one step at a time and given what was
    scheduled, take as long as they took. Where the device alone decides how long that is, the level before goes on.

    Args:
        features: of the run's steps, where they are known already.
    """
    even = model.with_drift([])
    bins: dict[int, list[tuple[StepCost, int, int]]] = defaultdict(list)
    for step, free, following in step_spans(record, features):
        bins[step.decided_ns // DRIFT_NS].append((even.step_cost(step), free, following))
    levels: list[float] = []
    timeline, level = Timeline(record), 1.0
    for number in range(max(bins, default=-1) + 1):
        steps = bins[number]
        if steps:
            taken = sum(following - free for _, free, following in steps)
            misfits: dict[float, float] = {}
            for tried in LEVELS:
                trial = Timeline(record, timeline.ends)
                error = sum(trial.step(_at_level(cost, tried), free, following) for cost, free, following in steps)
                misfits[tried] = (error / taken) ** 2 + STEADINESS * math.log(tried / level) ** 2
            level = min(misfits, key=misfits.__getitem__)
            for cost, free, following in steps:
                timeline.step(_at_level(cost, level), free, following)
        levels.append(level)
    return levels


def step_spans(
    record: RunRecord, features: list[StepFeatures] | None = None
) -> Iterator[tuple[StepFeatures, int, int]]:
    """The steps that followed another without a rest: features, and when the host was free before and after.

    The host is free when it has launched a step and has the result that it then waits for. Our engine decides the next
    step at that instant; a vLLM step log has it as the time at which the result of the oldest step was ready.
    """
    steps, depth = record.steps, record.told("settings", "pipeline_depth")
    is_log = "output_ready_ns" in steps[0]
    features = features or features_of(record)
    freed = [row["output_ready_ns"] for row in steps] if is_log else [row["decided_ns"] for row in steps[depth + 1 :]]
    for number in range(depth + 1, min(len(steps), depth + len(freed))):
        before, row = steps[number - 1 : number + 1]
        if features[number].seqs and stayed_busy(before, row):
            yield features[number], freed[number - depth - 1], freed[number - depth]


class Timeline:
    """Where the model has the ends of the latest steps, set right by the record after each.

    Args:
        ends: of the latest two steps, in nanoseconds.
    """

    def __init__(self, record: RunRecord, ends: tuple[int, int] = (0, 0)):
        self._depth, self.ends = record.told("settings", "pipeline_depth"), ends

    def step(self, cost: StepCost, free_ns: int, following_ns: int) -> int:
        """By how much the model has the host free too late after a step, in nanoseconds."""
        launched, _, end = cost.times(free_ns, self.ends[1])
        late = max(launched, self.ends[1] if self._depth else end) - following_ns
        self.ends = self.ends[1] - late, end - late
        return late


def _at_level(cost: StepCost, level: float) -> StepCost:
    return StepCost(round(cost.host_ns * level), cost.device_ns, round(cost.lead_ns * level))


def _is_profile(record: RunRecord) -> bool:
    """Were its steps made to measure them, not to serve what arrives?"""
    return (record.run["facts"].get("source") or {}).get("kind") == "profile"


def _workload_of(record: RunRecord) -> str:
    """What was served, and by which settings."""
    facts = record.run["facts"]
    trace = {name: facts["trace"].get(name) for name in ("sha256", "transforms")}
    return json.dumps([trace, facts.get("time_scale"), record.run["settings"]], sort_keys=True)
