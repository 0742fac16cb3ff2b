"""What the twin says of each recorded window, from the record and a profile of the engine alone."""

from __future__ import annotations

import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fidelity_windows import FILES, GROUPS, Group, served_rate

from twinserve.planning.prediction import prediction_intervals
from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.sim.fit import REGIMES, FittedLatency
from twinserve.sim.intervals import scaled
from twinserve.sim.latency import StepFeatures
from twinserve.sim.recorded_steps import steps_of
from twinserve.sim.replica import simulate
from twinserve.traces.runs.compare import value_of
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.vllm_records import requests_of
from twinserve.worlds.run import run_sim
from twinserve.worlds.workload import Workload

METRICS = {
    "tpot_s.mean": "TPOT mean",
    "tpot_s.p99": "TPOT p99",
    "ttft_s.mean": "TTFT mean",
    "ttft_s.p99": "TTFT p99",
    "e2e_s.mean": "end to end mean",
    "output_tok_s": "output tokens/s",
}
"""What is held against one another, by its place in a summary."""

KINDS = ("decodes, 1 to 15", "decodes, 16 to 127", "decodes, 128 and more", "prompts alone", "prompts and decodes")
BIAS_OF = "tpot_s.mean"
"""The metric whose error the equivalent bias explains."""

BIASED = 1.02
"""A factor on all step times, to see what it does."""


def kind_of(features: StepFeatures) -> str:
    """The name of a step's kind."""
    if features.prompt_tokens:
        return KINDS[4] if features.decode_tokens else KINDS[3]
    return KINDS[0] if features.seqs < 16 else KINDS[1] if features.seqs < 128 else KINDS[2]


@contextmanager
def unpacked(path: Path) -> Iterator[RunRecord]:
    """The record in a compressed window."""
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(path) as archive:
            archive.extractall(scratch, filter="data")
        (folder,) = Path(scratch).iterdir()
        yield load_record(folder)


def group_of(record: RunRecord) -> Group:
    """The group of a recorded window."""
    name = record.run["facts"]["trace"]["window"]["group"]
    return next(group for group in GROUPS if group.name == name)


def workload_of(record: RunRecord) -> Workload:
    """What a recorded window served: conversations and bursts are made again, the rest is in the record.

    Raises:
        AssertionError: what is made again is not what was served.
    """
    facts = record.run["facts"]["trace"]
    window, group = facts["window"], group_of(record)
    if group.workload not in FILES:
        requests = group.requests(window["load"] * window["requests_per_s_at_saturation"])
    else:
        requests = requests_of(record)
    served = sorted((row["id"], row["max_tokens"]) for row in record.requests)
    made = sorted((request.id, request.max_tokens) for request in requests)
    assert served == made, f"{record.path}: other requests"
    return Workload(requests, facts, 0, 0)


@dataclass(frozen=True)
class Window:
    """A recorded window and what is predicted of it; plain values.

    Attributes:
        real, sim: METRICS of the run and of its simulation, preemptions and hits.
        bias: the factor on all step times, less 1, that would explain the error of the mean TPOT.
        kinds: by kind of step, measured and modelled seconds on the device, given what was decided.
        limits: of METRICS, within which nine of ten are to lie.
    """

    name: str
    load: float
    group: str
    replayed: tuple[int, int]
    real: dict[str, float]
    sim: dict[str, float]
    bias: float
    kinds: dict[str, tuple[float, float]]
    limits: dict[str, tuple[float, float]]

    def error(self, metric: str) -> float:
        """Relative."""
        return self.sim[metric] / self.real[metric] - 1.0


def numbers(job: tuple[Path, FittedLatency]) -> Window:
    """Everything that is said of a recorded window, by the model of a profile."""
    path, model = job
    with unpacked(path) as record:
        run = record.run
        settings = Settings.recorded(run["settings"], record.path)
        latency = FittedLatency(model.data | {"kernels": run["facts"]["kernels"]})
        workload, result = workload_of(record), replay(record)
        kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for features, device_ns in steps_of(record):
            sums = kinds[kind_of(features)]
            sums[0] += device_ns / 1e9
            sums[1] += latency.step_cost(features).device_ns / 1e9
        real, sim = _chosen(run["summary"]), _simulated(workload, settings, latency)
        limits = prediction_intervals(workload, settings, latency)
        name = path.name.removesuffix(".tar.xz")
        group = group_of(record).name
        return Window(
            name,
            float(name.removeprefix(f"{group}-").removesuffix("-again")),
            group,
            (result.equal, result.recorded),
            real,
            sim,
            _bias(workload, settings, latency, real[BIAS_OF], sim[BIAS_OF]),
            {kind: (round(taken, 6), round(said, 6)) for kind, (taken, said) in sorted(kinds.items())},
            {metric: limits[metric] for metric in METRICS},
        )


def _chosen(summary: dict[str, Any]) -> dict[str, float]:
    names = [*METRICS, "preemptions", "cached_tokens", "steps"]
    return {name: float(value_of(summary, name) or 0.0) for name in names}


def _simulated(workload: Workload, settings: Settings, latency: FittedLatency) -> dict[str, float]:
    facts = {"name": "profile", "identity": latency.identity}
    return _chosen(run_sim(workload, settings, latency, latency_facts=facts))


def _bias(workload: Workload, settings: Settings, latency: FittedLatency, real: float, sim: float) -> float:
    """By how much the model's step times are too long: the factor whose inverse would give the real mean TPOT.

    Found by the secant through the mean TPOT at two factors, and once more from there.
    """
    tried = [(1.0, sim)]
    factor = 1.0 / BIASED if sim > real else BIASED
    for _ in range(3):
        slower = scaled(latency, dict.fromkeys(REGIMES, factor), factor)
        tried.append((factor, _simulated(workload, settings, slower)[BIAS_OF]))
        (one, low), (other, high) = sorted(tried, key=lambda pair: abs(pair[1] - real))[:2]
        if low == high or abs(low / real - 1.0) < 1e-3:
            break
        factor = min(1.5, max(0.6, one + (real - low) * (other - one) / (high - low)))
    best = min(tried, key=lambda pair: abs(pair[1] - real))[0]
    return round(1.0 / best - 1.0, 4)


def saturation(group: Group, model: FittedLatency) -> float:
    """Requests a second that end under overload, as `fidelity.py record` measures it."""
    settings = group.build_settings()
    ended: list[Sequence] = []
    requests = group.overload()
    simulate(
        requests,
        settings.build_core(),
        model.at(settings.max_num_seqs, settings.max_num_batched_tokens),
        params=SamplingParams(ignore_eos=True),
        progress=ended.append,
    )
    return served_rate(ended, requests, group.overload_s)
