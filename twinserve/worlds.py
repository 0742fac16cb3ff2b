"""One workload in either world: in the simulator, or on the real engine."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from twinserve.policies import SamplingParams, Sequence
from twinserve.sim.latency import LatencyModel
from twinserve.traces.record import RunRecorder
from twinserve.traces.settings import Settings
from twinserve.workload import Workload

if TYPE_CHECKING:
    from twinserve.engine.llm import LLM

Progress = Callable[[Sequence], None]


@contextmanager
def recording(
    out: Path | None, world: Literal["sim", "real"], settings: Settings, facts: dict[str, Any], device: str | None = None
) -> Iterator[RunRecorder]:
    """A recorder that writes `out`, or nothing that stays where `out` is None."""
    scratch = Path(tempfile.mkdtemp()) if out is None else None
    folder = scratch / "run" if scratch is not None else out
    assert folder is not None
    try:
        with RunRecorder(folder, world=world, settings=settings.model_dump(), facts=facts, device=device) as recorder:
            yield recorder
    finally:
        if scratch is not None:
            shutil.rmtree(scratch)


def run_sim(
    workload: Workload,
    settings: Settings,
    latency: LatencyModel,
    *,
    latency_facts: dict[str, Any],
    out: Path | None = None,
    params: SamplingParams | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Replay a workload in the simulator; its summary.

    Args:
        latency_facts: says in the record which latency model it was.
        out: the run record to write; None keeps none.
    """
    from twinserve.sim.replica import simulate

    params = params or SamplingParams(ignore_eos=True)
    facts = {"trace": workload.facts, "latency": latency_facts, "sampling": asdict(params)}
    device = f"simulated: {latency_facts['name']}"
    with recording(out, "sim", settings, facts, device) as recorder:
        begun = time.perf_counter()
        simulate(
            workload.requests,
            settings.build_core(listener=recorder),
            latency,
            params=params,
            announce=lambda request: recorder.expect(request, params),
            progress=progress,
        )
        return recorder.close(_extra(workload, time.perf_counter() - begun))


def run_real(
    workload: Workload,
    llm: LLM,
    *,
    out: Path | None = None,
    params: SamplingParams | None = None,
    time_scale: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Replay a workload on the engine, in real time; its summary.

    Args:
        llm: its `settings` are those of the run.
        time_scale: arrivals come so many times later than in the trace.
    """
    params = params or SamplingParams(temperature=0.0, ignore_eos=True)
    facts = {"trace": workload.facts, "time_scale": time_scale, "sampling": asdict(params), **llm.facts()}
    with recording(out, "real", llm.settings, facts, llm.device_name) as recorder:
        begun = time.perf_counter()
        llm.run_trace(workload.requests, params=params, recorder=recorder, time_scale=time_scale, progress=progress)
        return recorder.close(_extra(workload, time.perf_counter() - begun))


def _extra(workload: Workload, wall_s: float) -> dict[str, Any]:
    return {"shortened": workload.shortened, "dropped": workload.dropped, "wall_s": round(wall_s, 3)}
