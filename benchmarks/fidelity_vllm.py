"""How far the simulator is from a real vLLM: its recorded runs, predicted from two of them.

    python benchmarks/fidelity_vllm.py [--records FOLDER] [--traces FOLDER] [--docs FOLDER] [--out FILE]

Fits a latency model from one profile and one window, decides every recorded run again, simulates every window with
the blocks and limits of its run.json, and writes docs/fidelity-vllm.md and benchmarks/results/fidelity-vllm.json.
FOLDER holds vllm-0.24.0-h100 and defaults to $TWINSERVE_RECORDS.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from environment import ROOT
from fidelity_page import page
from fidelity_runs import BLOCK_S, FITTED_ON, LATENCIES, PHASES, REPEATS, RUNS, SETTINGS, Result
from pages import percent
from result_files import RESULTS, write_json

from twinserve import policies
from twinserve.commands.progress import say
from twinserve.policies import Batch, CoreListener
from twinserve.settings.build_core import Settings
from twinserve.sim.fit import DRIFT_NS, FittedLatency, regime_of
from twinserve.sim.latency import LatencyModel, ScaledLatency, StepCost, StepFeatures
from twinserve.sim.recorded_steps import Timeline, fit_records, host_levels, step_spans
from twinserve.sim.replica import simulate
from twinserve.traces.runs.metrics import summarize
from twinserve.traces.runs.record import RunRecord
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.vllm_records import load_run, requests_of

STEPS = (1.04, 1.08, 1.16, 1.3)
BISECTIONS = 4


class Ended(Exception):
    """The simulated run has reached the end of the recorded one."""


class Outcome(CoreListener):
    """What the metrics need of a simulated run, up to `until_ns`.

    Args:
        arrivals: when each request arrived, by its number.
    """

    def __init__(self, until_ns: float, arrivals: list[int]):
        self.rows: list[dict[str, Any]] = []
        self._until_ns, self._arrivals = until_ns, arrivals

    def decided(self, batch: Batch) -> None:
        if batch.decided_ns > self._until_ns:
            raise Ended

    def finished(self, seq: policies.Sequence) -> None:
        self.rows.append(
            {
                "id": seq.seq_id,
                "arrival_ns": self._arrivals[seq.seq_id],
                "first_scheduled_ns": seq.first_scheduled_ns,
                "first_token_ns": seq.first_token_ns,
                "finish_ns": seq.finish_ns,
                "prompt_tokens": seq.num_prompt_tokens,
                "output_tokens": seq.num_completion_tokens,
                "max_tokens": seq.max_tokens,
                "cached_tokens": 0,
                "preemptions": seq.num_preemptions,
                "finish_reason": seq.finish_reason,
            }
        )


class RecordedDecisions:
    """Has every decision made when it was made in the run, so that only the policies are left to differ."""

    def __init__(self, steps: list[dict[str, Any]]):
        self._times = [row["decided_ns"] for row in steps]

    def step_cost(self, features: StepFeatures) -> StepCost:
        times, number = self._times, features.decision
        return StepCost(times[number + 1] - times[number] if number + 1 < len(times) else 0, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=os.environ.get("TWINSERVE_RECORDS"))
    parser.add_argument("--traces", type=Path, default=os.environ.get("TWINSERVE_TRACES"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity-vllm.json")
    arguments = parser.parse_args()
    if arguments.records is None:
        print("fidelity_vllm.py: --records is not given and TWINSERVE_RECORDS is not set", file=sys.stderr)
        return 2
    folder = Path(arguments.records) / RUNS
    traces = None if arguments.traces is None else Path(arguments.traces)
    runs = {path.name: load_run(path, traces) for path in sorted(folder.iterdir()) if path.is_dir()}
    results = measure(runs)
    write_json(arguments.out, results)
    (arguments.docs / "fidelity-vllm.md").write_text(page(results))
    return 0 if all(run["replay"]["exact"] for run in results["runs"].values()) else 1


def measure(runs: dict[str, RunRecord]) -> Result:
    """Everything that the page shows."""
    model = fit_records([runs[name] for name in FITTED_ON], {"runs": list(FITTED_ON)})
    results: Result = {
        "command": "python benchmarks/fidelity_vllm.py",
        "fitted_on": list(FITTED_ON),
        "identity": model.identity,
        "residuals": model.data["residuals"],
        "range": model.data["range"],
        "host_error": host_error(runs[FITTED_ON[-1]], model),
        "runs": {},
    }
    with ProcessPoolExecutor() as pool:
        for name, result in zip(runs, pool.map(partial(compare_run, model=model), runs.values()), strict=True):
            results["runs"][name] = result
            equal, recorded = (result["replay"][kind] for kind in ("equal", "recorded"))
            say(f"{name}: {equal} of {recorded} decisions, " + result.get("words", "a profile"))
    results["ranking"] = ranking(results["runs"])
    return results


def compare_run(record: RunRecord, model: FittedLatency) -> Result:
    """One run: its decisions, and of a window what was measured, what is predicted, and what explains the difference.

    What is predicted is the mean over PHASES simulations that begin at different places of the host's drift.
    """
    source, replayed = record.run["facts"]["source"], replay(record)
    result: Result = {
        "process": source["process"],
        "machine": source["machine"],
        "replay": {"equal": replayed.equal, "recorded": replayed.recorded, "exact": replayed.is_exact},
    }
    if source["kind"] == "profile":
        return result
    own = model.with_captured_tokens(record.run["facts"]["captured_tokens"])
    levels = host_levels(record, own)
    own_host = own.with_drift(levels)
    phases = own.phases(PHASES)
    mean_host = own.with_drift([level * mean(levels) / mean(own.drift) for level in own.drift])
    real = metrics(record, record.requests)
    sims = [simulated(record, phase) for phase in phases]
    cache: dict[float, Result] = {1.0: mean_of(sims)}
    result |= {
        "is_overload": any(row["finish_reason"] == "abort" for row in record.requests),
        "real": real,
        "sim": cache[1.0],
        "least": {"e2e_s": min(sim["e2e_s"]["mean"] for sim in sims), "preemptions": min(map(preempted, sims))},
        "most": {"e2e_s": max(sim["e2e_s"]["mean"] for sim in sims), "preemptions": max(map(preempted, sims))},
        "outside": {"steps": phases[0].num_outside, "excess": phases[0].worst_excess},
        "host_level": mean(levels),
        "host_spread": stdev(means(levels, 1)),
        "own_host": simulated(record, own_host),
        "mean_host_even": simulated(record, own.with_drift([mean(levels)])),
        "mean_host": mean_of([simulated(record, phase) for phase in mean_host.phases(PHASES)]),
        "recorded_decisions": simulated(record, RecordedDecisions(record.steps), seen_ns(record)),
        "step_times": step_times(record, own_host),
    }
    judged = ("finished",) if result["is_overload"] else ("e2e_s.mean", "tpot_s.p50")
    result["bias"] = {metric: equivalent_bias(record, phases, cache, partial_value(metric), real) for metric in judged}
    shown = ", ".join(f"{name} {percent(value)}" for name, value in result["bias"].items())
    return result | {"words": f"equivalent bias {shown}; its host at {result['host_level']:.2f}"}


def host_error(record: RunRecord, model: FittedLatency) -> Result:
    """How well one window tells the mean speed of the host in another of the same process, and what that is worth.

    The standard error of the window's mean level, relative to it, from the spread of the means over BLOCK_S; of the
    difference of two such windows, which is larger by the root of 2; and by how much that changes the steps' time, one
    step at a time and given what was scheduled. It takes nothing but the window.
    """
    levels = host_levels(record, model)
    blocks = means(levels, BLOCK_S)
    one = stdev(blocks) / len(blocks) ** 0.5 / mean(blocks)
    two = 2**0.5 * one
    slower, as_it_was = (
        step_times(record, model.with_drift([level * factor for level in levels]))["all"] for factor in (1 + two, 1.0)
    )
    return {"blocks": len(blocks), "one_window": one, "two_windows": two, "step_time": slower - as_it_was}


def means(levels: list[float], seconds: int) -> list[float]:
    """Of the host's levels in each whole `seconds` of a run."""
    size = seconds * 10**9 // DRIFT_NS
    return [mean(levels[first : first + size]) for first in range(0, len(levels) - size + 1, size)]


def preempted(values: Result) -> int:
    return values["preemptions"]


def mean_of(results: list[Result]) -> Result:
    """The mean of each number."""
    first = results[0]
    return {
        name: mean_of([result[name] for result in results])
        if isinstance(first[name], dict)
        else mean(result[name] for result in results)
        for name in first
    }


def seen_ns(record: RunRecord) -> list[int]:
    """When the first decision was made that saw each request."""
    times: list[int] = []
    for row in record.steps:
        times += [row["decided_ns"]] * (row["seen"] - len(times))
    last = max(times[-1], record.run["summary"]["wall_s"] * 10**9)
    return times + [int(last)] * (len(record.requests) - len(times))


def simulated(record: RunRecord, latency: LatencyModel, arrivals: list[int] | None = None) -> Result:
    """The metrics of the run as it is simulated; `arrivals` replaces those of the record."""
    is_cut = any(row["finish_reason"] == "abort" for row in record.requests)
    wall_ns = record.run["summary"]["wall_s"] * 1e9
    outcome = Outcome(wall_ns if is_cut else 10 * wall_ns, [row["arrival_ns"] for row in record.requests])
    requests = requests_of(record)
    if arrivals is not None:
        requests = [request._replace(arrival_ns=ns) for request, ns in zip(requests, arrivals, strict=True)]
    with suppress(Ended):
        simulate(requests, Settings.recorded(record.run["settings"], record.path).build_core(listener=outcome), latency)
    return metrics(record, [row for row in outcome.rows if not is_cut or row["finish_ns"] <= wall_ns])


def metrics(record: RunRecord, rows: list[dict[str, Any]]) -> Result:
    """Latencies, throughput, mean running (time from first scheduling to finish, over the run) and preemptions."""
    summary = summarize(rows, [])
    finished = [row for row in rows if row["finish_reason"] == "length"]
    begun = min(row["arrival_ns"] for row in record.requests)
    end = max(row["finish_ns"] for row in finished)
    busy = sum(row["finish_ns"] - row["first_scheduled_ns"] for row in finished)
    late = [row for row in finished if row["finish_ns"] > begun + 0.4 * (end - begun)]
    return {name: summary[name] for name in (*LATENCIES, "finished", "output_tok_s", "preemptions")} | {
        "running": busy / (end - begun),
        "duration_s": (end - begun) / 1e9,
        "completed_per_s": len(late) / (0.6 * (end - begun) / 1e9),
    }


def partial_value(metric: str) -> Callable[[Result], float]:
    """Reads a metric by its dotted name, such that it rises with the step times."""
    name, _, statistic = metric.partition(".")
    return (lambda values: values[name][statistic]) if statistic else (lambda values: -values[name])


def equivalent_bias(
    record: RunRecord,
    phases: Sequence[LatencyModel],
    cache: dict[float, Result],
    value_of: Callable[[Result], float],
    real: Result,
) -> float | None:
    """By how much all step times are too long, judged by one metric; None beyond the last of STEPS.

    The factor on all step times with which the mean of the simulations gives the measured value is found by bisection;
    the bias is its inverse less one.
    """

    def value(factor: float) -> float:
        if factor not in cache:
            cache[factor] = mean_of([simulated(record, ScaledLatency(phase, factor)) for phase in phases])
        return value_of(cache[factor])

    wanted, low, high = value_of(real), 1.0, 1.0
    for step in STEPS:
        if value(1.0) > wanted:
            low, high = 1.0 / step, low
            is_between = value(low) <= wanted
        else:
            low, high = high, step
            is_between = value(high) >= wanted
        if is_between:
            break
    else:
        return None
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        if value(middle) < wanted:
            low = middle
        else:
            high = middle
    return 1.0 / (low * high) ** 0.5 - 1.0


def step_times(record: RunRecord, latency: FittedLatency) -> dict[str, float]:
    """By how much the model's steps are too long, one step at a time, given what was scheduled; by regime and in all.

    A step is counted from when the host was free before it to when it is free again.
    """
    captured_tokens = record.run["facts"]["captured_tokens"]
    totals: dict[str, list[int]] = {}
    timeline = Timeline(record)
    for features, free, following in step_spans(record):
        late = timeline.step(latency.step_cost(features), free, following)
        for name in ("all", regime_of(features, captured_tokens)):
            entry = totals.setdefault(name, [0, 0])
            entry[0] += late
            entry[1] += following - free
    return {name: late / measured for name, (late, measured) in totals.items()}


def ranking(runs: dict[str, Result]) -> Result:
    """The order of the settings by each metric, measured and predicted, best first, and whether they agree."""
    measures: dict[str, tuple[Callable[[Result], float], int, bool]] = {
        "TTFT p99, ms": (lambda values: values["ttft_s"]["p99"] * 1e3, 0, False),
        "TPOT median, ms": (lambda values: values["tpot_s"]["p50"] * 1e3, 0, False),
        "completed requests/s": (lambda values: values["finished"] / values["duration_s"], 0, True),
        "completed requests/s, overloaded": (lambda values: values["completed_per_s"], 1, True),
    }
    repeats = [runs[name] for name in REPEATS if name in runs]
    orders: Result = {}
    for measure, (value_of, which, more_is_better) in measures.items():
        named = {setting: name for setting, names in SETTINGS.items() if (name := names[which] or "") in runs}
        found: Result = {
            world: sorted(
                ([setting, value_of(runs[name][world])] for setting, name in named.items()),
                key=lambda entry: -entry[1] if more_is_better else entry[1],
            )
            for world in ("real", "sim")
        }
        if which == 0:
            measured = [value_of(repeat["real"]) for repeat in repeats]
        else:
            measured = [1.0 + (repeat["bias"]["e2e_s.mean"] or 0.0) for repeat in repeats]
        spread = max(measured) / min(measured) - 1.0
        orders[measure] = found | {"spread": spread, "verdict": verdict(found["real"], found["sim"], spread)}
    return orders


def verdict(real: list[list], sim: list[list], spread: float) -> str:
    """Is the order the same, and if not, is it for settings that lie further apart than the repeats of one window?"""
    place = {setting: number for number, (setting, _) in enumerate(sim)}
    swapped = [
        max(better[1], worse[1]) / min(better[1], worse[1]) - 1.0
        for number, better in enumerate(real)
        for worse in real[number + 1 :]
        if place[better[0]] > place[worse[0]]
    ]
    if not swapped:
        return "the same order"
    if max(swapped) <= spread:
        return f"the same order but for settings {max(swapped):.1%} apart, where repeats are {spread:.0%} apart"
    return "another order"


if __name__ == "__main__":
    sys.exit(main())
