"""The demo: one trace in both worlds, decided identically, and the difference in time measured."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import twinserve
from twinserve.commands.progress import Bar, say
from twinserve.commands.tables import comparison_table
from twinserve.engine.options import EngineOptions
from twinserve.settings.build_core import Settings
from twinserve.sim.fit import StepSample
from twinserve.traces.runs.compare import beyond, compare
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import fit_steps, load_llm, measure_steps, run_real, run_sim
from twinserve.worlds.workload import load_workload

if TYPE_CHECKING:
    from twinserve.engine.llm import LLM

DATA = Path(twinserve.__file__).parent / "data"
STAT = Path("/proc/stat")
LIMITS = {"tpot_s.mean": 0.25}
"""How far the simulation may be from the real run."""
SHAPES = 32
"""Shapes of steps that are measured on each side of the run."""
ATTEMPTS = 2
MOST_SPREAD = 1.15
"""The machine was busy where a step's slowest repeat takes longer than so many times its fastest: alone that is 1.04,
beside two busy processes on two cores 1.3."""
MOST_CHANGE = 1.25
"""Or where steps take longer than so many times as long on one side of the run as on the other, or during the run at
some times as at others."""
MOST_CORES = 0.1
"""Or where other processes kept more than so many cores busy."""


def run_demo(out: Path) -> bool:
    """Profile the model, serve the bundled trace, replay and simulate it, write the page; did it hold?

    It holds if every decision of the real run was made again from its facts, and the simulated mean time per output
    token is within 25% of the real one, or the steps' own times say that something else used the machine.

    Args:
        out: receives latency.json, real/, sim/ and report.html; those of an earlier demo are removed.
    """
    from twinserve.reports.page import write_report

    _clear(out)
    sim, real, busy = _both_worlds(out)
    result = replay(real)
    say(f"replayed from its facts: {result.equal} of {result.recorded} decisions made again")
    if result.difference is not None:
        print(f"first difference: {result.difference}", file=sys.stderr)
    comparisons = compare(sim, real)
    comparison_table(comparisons)
    write_report([sim, real], out / "report.html")
    print(f"page: {out / 'report.html'}\nrecord of the real run: {out / 'real'}")
    too_far = beyond(comparisons, LIMITS)
    for row in too_far:
        print(row.beyond(LIMITS[row.metric]), file=sys.stderr)
    if busy:
        print(f"the machine was busy, which is no fault of the simulation: {'; '.join(busy)}", file=sys.stderr)
    return result.is_exact and (not too_far or bool(busy))


def _both_worlds(out: Path) -> tuple[RunRecord, RunRecord, list[str]]:
    """The records of the simulated and of the real run, and what says that something else used the machine."""
    settings = Settings.load({}, DATA / "demo.toml")
    workload = load_workload(DATA / "demo.jsonl", {})
    profiled = load_llm(EngineOptions(), Settings(), progress=say)
    from twinserve.engine.llm import LLM  # after what says in one line that there is no torch

    # A shared machine drifts, so its steps are measured on both sides of the run that they are to predict.
    before, busy = _measured(profiled, settings, "before")
    llm = LLM(profiled.runner.model, tokenizer=profiled.tokenizer, name=profiled.name, settings=settings)
    say(f"serving {len(workload.requests)} requests in real time")
    begun = _clocks()
    with Bar("real", len(workload.requests)) as bar:
        run_real(workload, llm, out=out / "real", progress=bar.ended)
    busy += _disturbed("during", others_cores(begun, _clocks()))
    llm.close()
    after, busy_after = _measured(profiled, settings, "after")
    served = load_record(out / "real")
    busy += _unsteady(served) + busy_after + _changed(before, after)
    latency = fit_steps(profiled, before + after)
    latency.save(out / "latency.json")
    profiled.close()
    say("simulating them")
    facts = {"name": "SmolLM2-135M on this machine, measured for this demo", "identity": latency.identity}
    run_sim(workload, llm.settings, latency, latency_facts=facts, out=out / "sim")
    return load_record(out / "sim"), served, busy


def _measured(llm: LLM, settings: Settings, when: str) -> tuple[list[StepSample], list[str]]:
    """Step times of the shapes that the demo's settings can make, and what says that the machine was busy.

    Where something else used the machine, all is measured again, up to ATTEMPTS times, and the attempt that was
    disturbed least counts. Both signs are needed: the spread is a median, so it misses what comes during a part of the
    shapes, and what other machines of one host do is in no count of this one's processes.
    """
    attempts: list[tuple[float, list[StepSample], list[str]]] = []
    while len(attempts) < ATTEMPTS:
        say(f"measuring the model's steps on this machine, {when} the run" + (", again" if attempts else ""))
        begun = _clocks()
        samples = measure_steps(
            llm,
            shapes=SHAPES,
            max_seqs=settings.max_num_seqs,
            max_context=256,
            max_prompt=settings.max_num_batched_tokens,
            repeats=4,
            progress=lambda total: Bar("profile", total),
        )
        cores, spread = others_cores(begun, _clocks()), spread_of(samples)
        busy = _disturbed(when, cores, spread)
        if not busy:
            return samples, []
        attempts.append((max(cores / MOST_CORES, spread / MOST_SPREAD), samples, busy))
    _, samples, busy = min(attempts, key=lambda attempt: attempt[0])
    return samples, busy


def _disturbed(when: str, cores: float, spread: float = 1.0) -> list[str]:
    """What says that something else used the machine, by the cores of others and the spread of a step's repeats."""
    busy = []
    if spread > MOST_SPREAD:
        words = f"{when} the run a step's slowest repeat took {spread:.1f} times as long as its fastest"
        busy.append(f"{words}, expected at most {MOST_SPREAD}")
    if cores > MOST_CORES:
        busy.append(f"{when} the run other processes kept {cores:.1f} cores busy, expected at most {MOST_CORES}")
    return busy


def _changed(before: list[StepSample], after: list[StepSample]) -> list[str]:
    """What says that the machine was not as fast before the run as after it."""
    change = change_of(before, after)
    if 1 / MOST_CHANGE <= change <= MOST_CHANGE:
        return []
    return [
        f"after the run steps took {change:.2f} times as long as before it, expected at most {MOST_CHANGE} either way"
    ]


def _unsteady(run: RunRecord) -> list[str]:
    """What says that the machine was not as fast at some times of the run as at others."""
    change = change_within(run)
    if change <= MOST_CHANGE:
        return []
    return [
        f"during the run steps of as many rows took {change:.2f} times as long at times, expected at most {MOST_CHANGE}"
    ]


Clocks = tuple[float, float, float]
"""Seconds: on the wall, that this process computed, and that all of them did on all cores of the machine."""


def _clocks() -> Clocks:
    """The clocks now; all processes compute as much as this one where the system does not say."""
    own = sum(os.times()[:4])
    try:
        fields = STAT.read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return time.monotonic(), own, own
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
    return time.monotonic(), own, (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others_cores(before: Clocks, after: Clocks) -> float:
    """How many cores other processes, or the machine's other tenants, kept busy between two readings."""
    wall_s, own_s, all_s = (later - earlier for earlier, later in zip(before, after, strict=True))
    return max(0.0, all_s - own_s) / wall_s


def spread_of(samples: list[StepSample]) -> float:
    """How many times as long as its fastest repeat a step's slowest took, the median over the steps' shapes."""
    return median(max(times) / min(times) for times in _by_shape(samples))


def change_of(before: list[StepSample], after: list[StepSample]) -> float:
    """How many times as long as before steps took after, the median over their shapes, which are the same."""
    pairs = zip(_by_shape(before), _by_shape(after), strict=True)
    return median(median(later) / median(earlier) for earlier, later in pairs)


def change_within(run: RunRecord) -> float:
    """How many times as long as the quickest tenth of a run's decode steps the slowest tenth took, among those of as
    many rows; the median over the steps. Of as many as come up less than ten times nothing is said."""
    by_rows: defaultdict[int, list[int]] = defaultdict(list)
    for row in run.steps:
        if row["tokens"] and not row["prompt_tokens"]:
            by_rows[row["decode_tokens"]].append(row["end_ns"] - row["start_ns"])
    changes: list[float] = []
    for times in by_rows.values():
        if len(times) >= 10:
            tenths = quantiles(times, n=10)
            changes += [tenths[-1] / tenths[0]] * len(times)
    return median(changes) if changes else 1.0


def _by_shape(samples: list[StepSample]) -> list[list[int]]:
    """The times of each shape's repeats, which lie together and differ in their contexts alone."""
    return [
        [(sample.host_ns or 0) + (sample.device_ns or 0) for sample in repeats]
        for _, repeats in groupby(samples, key=_shape_of)
    ]


def _shape_of(sample: StepSample) -> tuple[Any, ...]:
    return sample.features.prompts, sample.features.seqs, sample.features.decode_tokens


def _clear(out: Path) -> None:
    """Make room for the results; nothing but an earlier demo's is removed."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("real", "sim"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("latency.json", "report.html"):
        (out / name).unlink(missing_ok=True)
