"""The demo: one trace in both worlds, decided identically, and the difference in time measured."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from twinserve.progress import Bar, say
from twinserve.sim.fit import StepSample
from twinserve.tables import comparison_table
from twinserve.traces.compare import beyond, compare
from twinserve.traces.record import RunRecord, load_record
from twinserve.traces.replay import replay
from twinserve.traces.settings import Settings
from twinserve.workload import load_workload
from twinserve.worlds import fit_steps, load_llm, measure_steps, run_real, run_sim

if TYPE_CHECKING:
    from twinserve.engine.llm import LLM

DATA = Path(__file__).parent / "data"
LIMITS = {"tpot_s.mean": 0.25}
"""How far the simulation may be from the real run."""


def run_demo(out: Path) -> bool:
    """Profile the model, serve the bundled trace, replay and simulate it, write the page; did it hold?

    It holds if every decision of the real run was made again from its facts, and the simulated mean time per output
    token is within 25% of the real one.

    Args:
        out: receives latency.json, real/, sim/ and report.html; those of an earlier demo are removed.
    """
    from twinserve.reports.page import write_report

    _clear(out)
    sim, real = _both_worlds(out)
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
        error = "undefined" if row.error is None else f"{row.error:+.1%}"
        print(f"{row.metric}: the error is {error}, expected within {LIMITS[row.metric]:.0%}", file=sys.stderr)
    return result.is_exact and not too_far


def _both_worlds(out: Path) -> tuple[RunRecord, RunRecord]:
    """The records of the simulated and of the real run."""
    from twinserve.engine.llm import LLM

    settings = Settings.load({}, DATA / "demo.toml")
    workload = load_workload(DATA / "demo.jsonl", {})
    profiled = load_llm("smollm2-135m", Settings(), device="cpu", dtype="float32", seed=0)
    # A shared machine drifts, so its steps are measured on both sides of the run that they are to predict.
    samples = _measured(profiled, settings, "before")
    llm = LLM(profiled.runner.model, tokenizer=profiled.tokenizer, name=profiled.name, settings=settings)
    say(f"serving {len(workload.requests)} requests in real time")
    with Bar("real", len(workload.requests)) as bar:
        run_real(workload, llm, out=out / "real", progress=bar.ended)
    llm.close()
    samples += _measured(profiled, settings, "after")
    latency = fit_steps(profiled, samples)
    latency.save(out / "latency.json")
    profiled.close()
    say("simulating them")
    facts = {"name": "SmolLM2-135M on this machine, measured for this demo", "identity": latency.identity}
    run_sim(workload, llm.settings, latency, latency_facts=facts, out=out / "sim")
    return load_record(out / "sim"), load_record(out / "real")


def _measured(llm: LLM, settings: Settings, when: str) -> list[StepSample]:
    """Step times of the shapes that the demo's settings can make."""
    say(f"measuring the model's steps on this machine, {when} the run")
    return measure_steps(
        llm,
        max_seqs=settings.max_num_seqs,
        max_context=256,
        max_prompt=settings.max_num_batched_tokens,
        repeats=4,
        progress=lambda total: Bar("profile", total),
    )


def _clear(out: Path) -> None:
    """Make room for the results; nothing but an earlier demo's is removed."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("real", "sim", "real.partial", "sim.partial"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("latency.json", "report.html"):
        (out / name).unlink(missing_ok=True)
