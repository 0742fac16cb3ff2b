"""A study for whoever buys GPUs: what keeps which objective on the Azure and Mooncake traces, and what it costs.

    python benchmarks/studies.py [--traces FOLDER] [--work FOLDER] [--jobs N] [--page | --check]

Runs the plans of docs/studies, writes benchmarks/results/studies.json, and from that docs/studies/azure-and-mooncake.md
and the pictures beside it. FOLDER of the public traces defaults to $TWINSERVE_TRACES; --work keeps finished points, so
that the next run goes on from there. --page writes page and pictures from the JSON alone; with --check nothing is
written, and the exit status is 1 where one of them is another.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pages import write_or_check
from result_files import RESULTS, write_json
from study_page import written
from study_plan import AZURE, MOONCAKE, OBJECTIVES, STUDIES, SYSTEM_PROMPT, TOLERANCE, Result, study_arguments

from twinserve.commands.progress import say
from twinserve.planning.capacity import find_capacities
from twinserve.planning.capacity import rows_of as capacity_rows
from twinserve.planning.objectives import interval
from twinserve.planning.parallel import Workers
from twinserve.planning.point import Point
from twinserve.planning.sweep import Store, load_plan, opened, run_points
from twinserve.planning.sweep import rows_of as sweep_rows
from twinserve.traces.statistics import shared_tokens

MEASURED = RESULTS / "studies.json"
METRICS = ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "tpot_s.p99", "e2e_s.p99", "output_tok_s", "total_tok_s")


def main() -> int:
    arguments, traces = study_arguments(__doc__)
    if traces is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.work or Path(scratch) / "points"
            with opened(folder) as store, Workers(arguments.jobs) as workers:
                results = computed(traces, store, workers)
        write_json(MEASURED, results)
    files = written(json.loads(MEASURED.read_text(encoding="utf-8")))
    return write_or_check(files, check=arguments.check)


def computed(traces: Path, store: Store, workers: Workers) -> Result:
    """All parts of the study."""
    results: Result = {"command": "python benchmarks/studies.py"}
    begun = time.monotonic()

    def said(name: str, part: Any) -> None:
        results[name] = part
        say(f"{name}: after {time.monotonic() - begun:.0f} s")

    for name in ("interactive", "strict"):
        said(f"azure-{name}", capacities("azure", traces / AZURE, "rate", name, store, workers))
    said("azure-rates", swept("azure-rates", traces / AZURE, store, workers))
    said("azure-fleet", capacities("azure-fleet", traces / AZURE, "replicas", "interactive", store, workers))
    said("mooncake", capacities("mooncake", traces / MOONCAKE, "replicas", "long", store, workers))
    said("mooncake-split", swept("mooncake-split", traces / MOONCAKE, store, workers))
    said("mooncake-affine", swept("mooncake-affine", traces / MOONCAKE, store, workers))
    said("mooncake-prompts", prompts(traces / MOONCAKE))
    return results


def prompts(trace: Path) -> Result:
    """What the requests of the window and of the whole trace share with earlier ones."""
    window = load_plan(STUDIES / "mooncake.toml", {"trace": str(trace)}).points[0].workload().requests
    found = {}
    for name, requests in (("window", window), ("trace", Point.of({"trace": str(trace)}).workload().requests)):
        shared = shared_tokens(requests)
        total = sum(request.prompt_tokens for request in requests)
        found[name] = {
            "requests": len(requests),
            "mean_prompt": total / len(requests),
            "longest_prompt": max(request.prompt_tokens for request in requests),
            "over_64k": sum(request.prompt_tokens > 65_536 for request in requests),
            "reusable": sum(shared) / total,
            "system_prompt_alone": sum(tokens <= SYSTEM_PROMPT for tokens in shared) / len(requests),
        }
    return found


def capacities(plan: str, trace: Path, sought: Any, objective: str, store: Store, workers: Workers) -> list[Result]:
    """The capacity of every case of a plan."""
    chosen = load_plan(STUDIES / f"{plan}.toml", {"trace": str(trace), "objective": OBJECTIVES[objective]})
    found = find_capacities(chosen, sought, store, workers, tolerance=TOLERANCE)
    rows = []
    for row in capacity_rows(chosen, found):
        kept = ("varied", "objective", "value", "failed", "missed", "by_seed", "mean", "interval", "num_runs", "cost")
        rows.append({name: row[name] for name in kept if name in row} | averaged(row["results"]))
    return rows


def swept(plan: str, trace: Path, store: Store, workers: Workers) -> list[Result]:
    """Every case of a plan."""
    chosen = load_plan(STUDIES / f"{plan}.toml", {"trace": str(trace)})
    rows = sweep_rows(chosen, run_points(chosen.points, store, workers))
    cases = []
    for case in chosen.cases:
        of_case = [rows.pop(0) for _ in case.points]
        missed = list(dict.fromkeys(what for row in of_case for what in row["missed"]))
        cost = {name: mean(row["cost"][name] for row in of_case) for name in ("output", "total")}
        cases.append({"varied": case.varied, "missed": missed, "cost": cost} | averaged(of_case))
    return cases


def averaged(runs: list[Result]) -> Result:
    """Means over seeds of what the page shows, with intervals."""
    if not runs:
        return {}
    summaries = [run["summary"] for run in runs]
    values = {}
    for metric in METRICS:
        name, _, statistic = metric.partition(".")
        found = [summary[name][statistic] if statistic else summary[name] for summary in summaries]
        values[metric] = {"mean": mean(found), "interval": interval(found)}
    return {
        "latency": runs[0]["latency"],
        "metrics": values,
        "requests": mean(summary["requests"] for summary in summaries),
        "hit_ratio": mean(summary["cached_tokens"] / summary["prompt_tokens"] for summary in summaries),
        "preemptions": mean(summary["preemptions"] for summary in summaries),
        "span_s": mean(run["span_s"] for run in runs),
    }


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


if __name__ == "__main__":
    sys.exit(main())
