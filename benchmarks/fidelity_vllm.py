"""How far the simulator is from a real vLLM: its recorded runs, predicted from two of them.

    python benchmarks/fidelity_vllm.py [--records FOLDER] [--traces FOLDER] [--docs FOLDER] [--out FILE]

Fits a latency model from one profile and one window, decides every recorded run again, simulates every window with
the blocks and limits of its run.json, and writes docs/fidelity-vllm.md and benchmarks/results/fidelity-vllm.json.
FOLDER holds vllm-0.24.0-h100 and defaults to $TWINSERVE_RECORDS.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from pages import prose, table

from twinserve import policies
from twinserve.policies import Batch, CoreListener
from twinserve.progress import say
from twinserve.sim.fit import DRIFT_NS, REGIMES, FittedLatency, regime_of
from twinserve.sim.latency import LatencyModel, ScaledLatency, StepCost, StepFeatures
from twinserve.sim.recorded_steps import Timeline, fit_records, host_levels, step_spans
from twinserve.sim.replica import simulate
from twinserve.traces.metrics import summarize
from twinserve.traces.record import RunRecord
from twinserve.traces.replay import replay
from twinserve.traces.settings import Settings
from twinserve.traces.vllm_records import load_run, requests_of

RUNS = "vllm-0.24.0-h100"
FITTED_ON = ("profile-launch", "azure-0.80-launch")
REPEATS = ("azure-0.80", "azure-0.80-again", "azure-0.80-launch", "azure-0.80-launch-again", "azure-0.80-third")
SETTINGS = {
    "default": ("azure-0.80", "azure-saturation"),
    "2048/128": ("azure-0.80-small-budget", "small-budget-saturation"),
    "not asynchronous": ("azure-0.80-no-async", "no-async-saturation"),
    "small pool": ("azure-0.80-small-pool", None),
}
LATENCIES = {"ttft_s": ("TTFT", "ms", 1e3), "tpot_s": ("TPOT", "ms", 1e3), "e2e_s": ("end to end", "s", 1.0)}
STATISTICS = ("mean", "p50", "p90", "p99")
STEPS = (1.04, 1.08, 1.16, 1.3)
BISECTIONS = 4
PHASES = 8
BLOCK_S = 10
"""A host's speed is taken to be unrelated to what it was so many seconds before."""
REPLACED = {
    "recorded_decisions": "recorded times",
    "own_host": "own host",
    "mean_host_even": "its mean, even",
    "mean_host": "its mean, the fit's drift",
    "sim": "predicted",
}
ROOT = Path(__file__).resolve().parents[1]

Result = dict[str, Any]


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
                "max_tokens": seq.sampling_params.max_tokens,
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
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fidelity-vllm.json")
    arguments = parser.parse_args()
    if arguments.records is None:
        print("fidelity_vllm.py: --records is not given and TWINSERVE_RECORDS is not set", file=sys.stderr)
        return 2
    folder = Path(arguments.records) / RUNS
    traces = None if arguments.traces is None else Path(arguments.traces)
    runs = {path.name: load_run(path, traces) for path in sorted(folder.iterdir()) if path.is_dir()}
    results = measure(runs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    (arguments.docs / "fidelity-vllm.md").write_text(page(results))
    return 0 if all(run["replay"]["exact"] for run in results["runs"].values()) else 1


# --- measuring ---


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
    shown = ", ".join(f"{name} {_percent(value)}" for name, value in result["bias"].items())
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
        requests = [replace(request, arrival_ns=ns) for request, ns in zip(requests, arrivals, strict=True)]
    with suppress(Ended):
        simulate(requests, Settings.load(record.run["settings"]).build_core(listener=outcome), latency)
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


# --- the page ---


def page(results: Result) -> str:
    """docs/fidelity-vllm.md."""
    runs = {name: run for name, run in results["runs"].items() if "real" in run}
    windows = {name: run for name, run in runs.items() if not run["is_overload"]}
    overloads = {name: run for name, run in runs.items() if run["is_overload"]}
    return "\n".join(
        [
            *_opening(results),
            *_decisions(results),
            *_spread(windows),
            *_windows(windows),
            *_bias(results, windows),
            *_overloads(overloads),
            *_ranking(results),
        ]
    )


def cell(values: Result, name: str, statistic: str) -> str:
    scale = LATENCIES[name][2]
    return f"{values[name][statistic] * scale:.{2 if scale == 1.0 else 1}f}"


def _opening(results: Result) -> list[str]:
    residuals = results["residuals"]
    kinds = [(part, kind) for part in ("host", "device") for kind in ("mean_abs", "total")]
    rows = [[regime, *(f"{residuals[regime][part][kind]:+.1%}" for part, kind in kinds)] for regime in residuals]
    first, second = results["fitted_on"]
    return [
        "# Against a real vLLM",
        "",
        *prose(
            """vLLM 0.24.0 served windows of the Azure conversation trace on an H100; every step it took was recorded:
            what
            it scheduled, when it decided, when it had launched, when it knew the result. This page holds twinserve
            against those records. `benchmarks/fidelity_vllm.py` writes it; the numbers are in
            `benchmarks/results/fidelity-vllm.json`.""",
            f"""The latency model is fitted on `{first}` and `{second}` alone (identity `{results["identity"]}`). Every
            other run is predicted with the blocks and limits of its own settings: arrivals and lengths go in, nothing
            else of the run. [latency.md](latency.md) says what is fitted, and how.""",
            """Errors of the fit on steps held out of it, relative, by kind of step: the mean of their sizes, and that
            of
            the sum.""",
        ),
        *table(["steps", "host, mean", "host, sum", "device, mean", "device, sum"], rows, numbers=True),
    ]


def _decisions(results: Result) -> list[str]:
    runs = results["runs"].items()
    steps = sum(run["replay"]["recorded"] for _, run in runs)
    equal = sum(run["replay"]["equal"] for _, run in runs)
    rows = [[f"`{name}`", f"{run['replay']['equal']:,} of {run['replay']['recorded']:,}"] for name, run in runs]
    return [
        "## Its decisions",
        "",
        *prose(
            f"""From the facts of a run alone (what was queued before a decision, which outputs were known, the output
            lengths), Core decides each step again: the scheduled requests in order, their tokens and computed tokens,
            preemptions, the counts of waiting, running and free blocks. {equal:,} of {steps:,} steps are equal."""
        ),
        *table(["run", "equal steps"], rows, numbers=True),
    ]


def _spread(windows: dict[str, Result]) -> list[str]:
    repeats = [windows[name]["real"] for name in REPEATS if name in windows]
    sims = windows[REPEATS[0]]["sim"]
    rows = []
    for name, (words, unit, _) in LATENCIES.items():
        for statistic in STATISTICS:
            values = [repeat[name][statistic] for repeat in repeats]
            inside = min(values) <= sims[name][statistic] <= max(values)
            low, high = ({name: {statistic: bound}} for bound in (min(values), max(values)))
            rows.append(
                [
                    f"{words} {statistic}, {unit}",
                    cell(low, name, statistic),
                    cell(high, name, statistic),
                    cell(sims, name, statistic),
                    "inside" if inside else "outside",
                ]
            )
    for name, words, digits in (("output_tok_s", "output tokens/s", 0), ("running", "running, mean", 1)):
        values = [repeat[name] for repeat in repeats]
        inside = min(values) <= sims[name] <= max(values)
        rows.append(
            [words, *(f"{value:,.{digits}f}" for value in (min(values), max(values), sims[name]))]
            + ["inside" if inside else "outside"]
        )
    return [
        "## One window, five times",
        "",
        *prose(
            """The same requests, the same settings, five times, on three machines in four processes. How far these
            differ is what a prediction can be held to: the model knows one of the processes."""
        ),
        *table(["metric", "least", "most", "simulated", ""], rows, numbers=True),
    ]


def _windows(windows: dict[str, Result]) -> list[str]:
    lines = [
        "## Every window",
        "",
        *prose(
            """Measured, then simulated, mean / p50 / p90 / p99. Running is the mean over the run of requests that have
            been scheduled and not finished."""
        ),
    ]
    rows = []
    for name, run in windows.items():
        for world, words in (("real", f"`{name}` ({run['machine']}, {run['process']})"), ("sim", "simulated")):
            values = run[world]
            rows.append(
                [
                    words,
                    f"{values['output_tok_s']:,.0f}",
                    *(" / ".join(cell(values, latency, s) for s in STATISTICS) for latency in LATENCIES),
                    f"{values['running']:.0f}",
                    f"{values['preemptions']:.0f}",
                ]
            )
    header = ["run (machine, process)", "tokens/s"]
    header += [f"{words}, {unit}" for words, unit, _ in LATENCIES.values()] + ["running", "preemptions"]
    return lines + table(header, rows, numbers=True)


def _percent(value: float | None) -> str:
    return "beyond" if value is None else f"{value:+.1%}"


def _bias(results: Result, windows: dict[str, Result]) -> list[str]:
    rows = [
        [
            f"`{name}`" + (" (fitted on)" if name in results["fitted_on"] else ""),
            run["process"],
            _percent(run["bias"]["e2e_s.mean"]),
            _percent(run["bias"]["tpot_s.p50"]),
            f"{run['host_level']:.2f} ± {run['host_spread']:.2f}",
            *(_percent(run[kind]["e2e_s"]["mean"] / run["real"]["e2e_s"]["mean"] - 1.0) for kind in REPLACED),
            " to ".join(_percent(run[end]["e2e_s"] / run["real"]["e2e_s"]["mean"] - 1.0) for end in ("least", "most")),
        ]
        for name, run in windows.items()
    ]
    header = ["run", "process", "bias by mean end to end", "bias by median TPOT", "its host", *REPLACED.values()]
    return [
        "## The equivalent bias",
        "",
        *prose(
            """Near its capacity an engine turns a few percent of step time into tens of percent of latency. The
            *equivalent bias* is the one factor on all step times that would explain the error, found by bisection: +3%
            says that the model's steps are 3% too long.""",
            """The other columns replace one ingredient after another by what was recorded, and give the error of the
            mean end-to-end latency that is left. *Recorded times*: every decision is made when it was made in the run.
            Nothing is left to go wrong but the policies and when a result is seen: the simulator hands tokens over at
            the next decision, vLLM a moment before. *Own host*: the fitted model, but the host as slow as this run's
            own was, a level each quarter of a second, found from when it was free; device, launches kernel by kernel
            or captured, pipeline and policies are simulated. *Its host* is the mean of these levels and the standard
            deviation of their means over a second; 1 is the mean of the fit. *Its mean, even*: always as slow as the
            run's own host was on average. *Its mean, the fit's drift*: that slow on average, but drifting as the
            fit's window did. *Predicted*: the model as it is. Where the fit's drift is simulated, the mean of"""
            f" {PHASES} "
            + """simulations that begin at different places of it; of those predicted also the least and the most.""",
        ),
        *table([*header, "least to most"], rows, numbers=True),
        *_remains(results, windows),
        *_steps(results),
    ]


def _remains(results: Result, windows: dict[str, Result]) -> list[str]:
    """What is missed and why, as far as the numbers say it."""
    process = windows[results["fitted_on"][-1]]["process"]
    same = {name: run["bias"]["e2e_s.mean"] for name, run in windows.items() if run["process"] == process}
    biases = ", ".join(f"`{name}` {_percent(bias)}" for name, bias in same.items())
    errors = {
        kind: [abs(run[kind]["e2e_s"]["mean"] / run["real"]["e2e_s"]["mean"] - 1.0) for run in windows.values()]
        for kind in ("own_host", "mean_host", "sim")
    }
    slowest, fastest = (ends(windows, key=lambda name: windows[name]["host_level"]) for ends in (max, min))
    error = results["host_error"]
    return prose(
        f"""What remains is how fast the machine's host was. With each run's own, no window is further off than
        {max(errors["own_host"]):.1%}, half of them less than {median(errors["own_host"]):.1%}; with its mean alone
        half are less than {median(errors["mean_host"]):.1%} off; without, {max(errors["sim"]):.0%} and
        {median(errors["sim"]):.0%}. The host was slowest in `{slowest}` ({windows[slowest]["host_level"]:.2f} of the
        fit's) and fastest in `{fastest}` ({windows[fastest]["host_level"]:.2f}).""",
        f"""In the process that the fit is from the bias is: {biases}. How near that can come is in the fitted window
        itself. The means of its host over {BLOCK_S} s, {error["blocks"]} of them, differ so much that the mean of the
        whole has a standard error of {error["one_window"]:.0%}, and the difference between two such windows of the
        same process one of {error["two_windows"]:.0%}; that is {error["step_time"]:.1%} of the steps' time. The biases
        above are smaller: nothing in the fitted window can tell them from what a host does from one minute to the
        next. How much a host drifts differs as well, and where the pool is nearly full the uneven host
        waits longer: see *its mean, even* beside *its mean, the fit's drift*.""",
    )


def _steps(results: Result) -> list[str]:
    rows = [
        [
            f"`{name}`",
            *(_percent(run["step_times"][kind]) if kind in run["step_times"] else "" for kind in ("all", *REGIMES)),
            str(run["real"]["preemptions"]),
            *(f"{run[kind]['preemptions']:.0f}" for kind in REPLACED if kind != "sim"),
            f"{run['sim']['preemptions']:.0f}",
            f"{run['least']['preemptions']} to {run['most']['preemptions']}",
        ]
        for name, run in results["runs"].items()
        if "real" in run
    ]
    header = ["run", "all steps", *REGIMES, "preemptions", *REPLACED.values(), "least to most"]
    return [
        "## Step by step, and preemptions",
        "",
        *prose(
            """From the record alone, one step at a time, with the run's own host: how much too long the model's steps
            are, given what was really scheduled, in all and by kind (decode; with prompt tokens, captured; launched
            kernel by kernel). The level of the host makes all kinds longer by the same factor; in truth a slow host
            lengthens launches kernel by kernel most.""",
            """Preemptions follow from a pool that is full by a few blocks: 1% of step time makes 20 more or less in
            the small pool. So they are predicted only as well as the host is. At the recorded times each window has
            its own number again, with the arrivals as planned: neither the moment at which the loop sees an arrival
            nor the rule for free blocks is what differs. Of an overload, what was measured counts the requests that
            the end of the run cut off as well; what is simulated does not.""",
        ),
        *table(header, rows, numbers=True),
    ]


def _overloads(overloads: dict[str, Result]) -> list[str]:
    rows = []
    for name, run in overloads.items():
        real, own, sim = run["real"], run["own_host"], run["sim"]
        rows.append(
            [
                f"`{name}`",
                f"{real['finished']} / {own['finished']} / {sim['finished']:.0f}",
                " / ".join(f"{values['completed_per_s']:.1f}" for values in (real, own, sim)),
                " / ".join(cell(values, "tpot_s", "p50") for values in (real, own, sim)),
                _percent(run["bias"]["finished"]),
                f"{run['host_level']:.2f}",
                f"{run['outside']['steps']:,}, {run['outside']['excess']:.1f}x",
            ]
        )
    header = ["run", "finished", "completed/s", "TPOT p50, ms", "bias by finished", "its host"]
    return [
        "## Overload",
        "",
        *prose(
            """Far more is offered than can be served, and the run is cut off. Measured / simulated with the run's own
            host / predicted. The last column says how many steps are larger than any that the model was fitted on, and
            by how much."""
        ),
        *table([*header, "beyond the range"], rows, numbers=True),
    ]


def _ranking(results: Result) -> list[str]:
    rows = []
    for measure, worlds in results["ranking"].items():
        for world, words in (("real", "measured"), ("sim", "simulated")):
            entries = ", ".join(f"{setting} ({value:.1f})" for setting, value in worlds[world])
            rows.append([measure if world == "real" else "", words, entries])
        rows.append(["", "", worlds["verdict"]])
    return [
        "## The ranking of settings",
        "",
        *prose(
            """Fitted on the default settings alone, which of the recorded settings does best? Best first. The windows
            are those at 0.80 of each setting's saturation (so rates differ), and the overloads. They were recorded on
            different machines, and where two settings lie closer than the repeats of one window, their order is the
            machines'. No overload was repeated: what one serves goes with the step time, so there the repeats'
            equivalent biases say how far apart they may be."""
        ),
        *table(["metric", "", "order"], rows, numbers=True),
    ]


if __name__ == "__main__":
    sys.exit(main())
