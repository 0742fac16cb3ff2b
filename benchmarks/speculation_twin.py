"""What the twin says of recorded runs with drafts: errors against each, and what it predicts without having seen it."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from twinserve.settings.build_core import Settings
from twinserve.sim.fit import FittedLatency
from twinserve.sim.speculation import AcceptanceLaw, save_law
from twinserve.traces.runs.compare import value_of
from twinserve.traces.runs.record import RunRecord
from twinserve.worlds.run import run_sim
from twinserve.worlds.workload import load_workload

METRICS = {
    "tpot_s.mean": "TPOT mean",
    "tpot_s.p99": "TPOT p99",
    "ttft_s.mean": "TTFT mean",
    "output_tok_s": "output tokens/s",
}
"""What is held against one another, by its place in a summary."""

SEEDS = 4
"""Draws of the acceptance of which a prediction is the mean: a run alone is one draw."""


def simulated(record: RunRecord, latency: FittedLatency, acceptance: Path | None) -> dict[str, Any]:
    """The summary of a simulation of a recorded run.

    Args:
        acceptance: a record or a law that says what comes of drafts; None for a run without any.
    """
    values = record.run["settings"]
    if (config := values["speculative_config"]) is not None:
        said = {"acceptance": str(acceptance), "synthetic_acceptance_rate": None}
        values = values | {"speculative_config": config | said}
    settings = Settings.load({name: value for name, value in values.items() if value is not None})
    model = latency.at(settings.max_num_seqs, settings.max_num_batched_tokens, settings.most_drafts)
    facts = {"name": "what was profiled", "identity": latency.identity}
    return run_sim(load_workload(record.path, {}), settings, model, latency_facts=facts)


def errors(record: RunRecord, *summaries: dict[str, Any]) -> dict[str, float]:
    """By how much a simulation is off, or the mean of several, by metric, relative to the run."""
    served, found = record.run["summary"], {}
    for metric in METRICS:
        real, sims = value_of(served, metric), [value_of(summary, metric) for summary in summaries]
        if real and all(sims):
            found[metric] = round(statistics.fmean(map(float, filter(None, sims))) / real - 1, 4)
    return found


def by_law(record: RunRecord, latency: FittedLatency, law: AcceptanceLaw) -> list[dict[str, Any]]:
    """The summaries of SEEDS simulations of a recorded run, each another draw of what is accepted."""
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for seed in range(SEEDS):
            path = Path(scratch) / f"{seed}.json"
            save_law(replace(law, seed=seed), path)
            found.append(simulated(record, latency, path))
        return found


def predicted_tok_s(record: RunRecord, latency: FittedLatency, rate: float) -> float:
    """Output tokens a second of a run of whose drafts nothing is known but with which probability each is accepted."""
    if record.run["settings"]["speculative_config"] is None:
        return round(float(simulated(record, latency, None)["output_tok_s"]), 1)
    found = by_law(record, latency, AcceptanceLaw((rate,)))
    return round(statistics.fmean(summary["output_tok_s"] for summary in found), 1)


def summed(runs: list[dict[str, Any]], way: str, metric: str) -> str:
    """The error of a metric in words: the median of some runs, and the range."""
    found = sorted(run["errors"][way][metric] for run in runs)
    return f"{statistics.median(found):+.1%} ({found[0]:+.1%} to {found[-1]:+.1%})"
