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
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from twinserve.policies import Batch, CoreListener, Sequence
from twinserve.progress import say
from twinserve.sim.fit import FittedLatency, regime_of
from twinserve.sim.latency import LatencyModel, ScaledLatency, StepCost, StepFeatures
from twinserve.sim.recorded_steps import features_of, fit_records
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

    def finished(self, seq: Sequence) -> None:
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
        "runs": {},
    }
    for name, record in runs.items():
        replayed = replay(record)
        result: Result = {
            "process": record.run["facts"]["source"]["process"],
            "machine": record.run["facts"]["source"]["machine"],
            "replay": {"equal": replayed.equal, "recorded": replayed.recorded, "exact": replayed.is_exact},
        }
        results["runs"][name] = result
        if record.run["facts"]["source"]["kind"] != "profile":
            result |= compare_run(record, model)
        say(f"{name}: {replayed.equal} of {replayed.recorded} decisions, " + result.get("words", "a profile"))
    results["ranking"] = ranking(results["runs"])
    return results


def compare_run(record: RunRecord, model: FittedLatency) -> Result:
    """One window: what was measured, what is predicted, and what explains the difference."""
    own = model.with_captured_tokens(record.run["facts"]["captured_tokens"])
    steady = FittedLatency({name: value for name, value in own.data.items() if name != "drift"})
    real = metrics(record, record.requests)
    sim = simulated(record, own)
    result = {
        "is_overload": any(row["finish_reason"] == "abort" for row in record.requests),
        "real": real,
        "sim": sim,
        "outside": {"steps": own.num_outside, "excess": own.worst_excess},
        "steady_host": simulated(record, steady),
        "recorded_decisions": simulated(record, RecordedDecisions(record.steps), seen_ns(record)),
        "step_times": step_times(record, steady),
    }
    cache: dict[float, Result] = {1.0: sim}
    if result["is_overload"]:
        result["bias"] = {"finished": equivalent_bias(record, own, cache, lambda m: -m["finished"], real)}
    else:
        result["bias"] = {
            metric: equivalent_bias(record, own, cache, partial_value(metric), real)
            for metric in ("e2e_s.mean", "tpot_s.p50")
        }
    shown = ", ".join(f"{name} {value:+.1%}" for name, value in result["bias"].items() if value is not None)
    return result | {"words": f"equivalent bias {shown}; step times {result['step_times']['all']:+.1%}"}


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
    """Reads a metric by its dotted name."""
    name, statistic = metric.split(".")
    return lambda values: values[name][statistic]


def equivalent_bias(
    record: RunRecord,
    latency: LatencyModel,
    cache: dict[float, Result],
    value_of: Callable[[Result], float],
    real: Result,
) -> float | None:
    """By how much all step times are too long, judged by one metric; None beyond the last of STEPS.

    The factor on all step times with which the simulation gives the measured value is found by bisection; the bias is
    its inverse less one.
    """

    def value(factor: float) -> float:
        if factor not in cache:
            cache[factor] = simulated(record, ScaledLatency(latency, factor))
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

    A step is counted from its decision to the next, from where the steps before it had really come.
    """
    steps, depth = record.steps, record.run["settings"]["pipeline_depth"]
    captured_tokens = record.run["facts"]["captured_tokens"]
    totals: dict[str, list[int]] = {}
    ends = [0, 0]
    for number, (row, following) in enumerate(zip(steps, steps[1:], strict=False)):
        features = features_of(row, steps[number - 1] if number else None)
        cost = latency.step_cost(features) if features.seqs else StepCost(0, 0)
        launched, _, end = cost.times(row["decided_ns"], ends[-1])
        ends = [ends[-1], end]
        due = max(launched, ends[-1 - depth])
        stays_busy = row["waiting"] or following["running"] > len(following["admitted"])
        if features.seqs and stays_busy:
            for name in ("all", regime_of(features, captured_tokens)):
                entry = totals.setdefault(name, [0, 0])
                entry[0] += due - row["decided_ns"]
                entry[1] += following["decided_ns"] - row["decided_ns"]
        ends = [end + following["decided_ns"] - due for end in ends]
    return {name: modelled / measured - 1.0 for name, (modelled, measured) in totals.items()}


def ranking(runs: dict[str, Result]) -> Result:
    """The order of the settings by three metrics, measured and predicted, best first."""
    measures: dict[str, tuple[Callable[[Result], float], int, bool]] = {
        "TTFT p99, ms": (lambda values: values["ttft_s"]["p99"] * 1e3, 0, False),
        "TPOT median, ms": (lambda values: values["tpot_s"]["p50"] * 1e3, 0, False),
        "completed requests/s": (lambda values: values["finished"] / values["duration_s"], 0, True),
        "completed requests/s, overloaded": (lambda values: values["completed_per_s"], 1, True),
    }
    orders: Result = {}
    for measure, (value_of, which, more_is_better) in measures.items():
        named = {setting: names[which] for setting, names in SETTINGS.items() if names[which] in runs}
        orders[measure] = {
            world: sorted(
                ([setting, value_of(runs[name][world])] for setting, name in named.items()),
                key=lambda entry: -entry[1] if more_is_better else entry[1],
            )
            for world in ("real", "sim")
        }
    return orders


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


def prose(*paragraphs: str) -> list[str]:
    """Paragraphs in lines that a person can read in a terminal."""
    return [line for text in paragraphs for line in (*textwrap.wrap(" ".join(text.split()), 118), "")]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


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
        *table(["steps", "host, mean", "host, sum", "device, mean", "device, sum"], rows),
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
        *table(["run", "equal steps"], rows),
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
        *table(["metric", "least", "most", "simulated", ""], rows),
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
                    str(values["preemptions"]),
                ]
            )
    header = ["run (machine, process)", "tokens/s"]
    header += [f"{words}, {unit}" for words, unit, _ in LATENCIES.values()] + ["running", "preemptions"]
    return lines + table(header, rows)


def _percent(value: float | None) -> str:
    return "beyond" if value is None else f"{value:+.1%}"


def _bias(results: Result, windows: dict[str, Result]) -> list[str]:
    rows = []
    for name, run in windows.items():
        steady, exact, real = (run[kind]["e2e_s"]["mean"] for kind in ("steady_host", "recorded_decisions", "real"))
        rows.append(
            [
                f"`{name}`" + (" (fitted on)" if name in results["fitted_on"] else ""),
                run["process"],
                _percent(run["bias"]["e2e_s.mean"]),
                _percent(run["bias"]["tpot_s.p50"]),
                *(_percent(run["step_times"].get(regime)) for regime in ("all", "decode", "prompt", "eager")),
                _percent(exact / real - 1.0),
                _percent(steady / real - 1.0),
                _percent(run["sim"]["e2e_s"]["mean"] / real - 1.0),
            ]
        )
    header = ["run", "process", "bias by mean end to end", "bias by median TPOT", "steps", "decode", "prompt", "eager"]
    header += ["recorded times", "even host", "end to end"]
    return [
        "## The equivalent bias, and what is missed",
        "",
        *prose(
            """Near its capacity an engine turns a few percent of step time into tens of percent of latency. The
            *equivalent bias* is the one factor on all step times that would explain the error, found by bisection: +3%
            says that the model's steps are 3% too long. Beside it, from the record alone and one step at a time: how
            much too long the model's steps are given what was really scheduled, in all and by kind (decode; with prompt
            tokens, captured; launched kernel by kernel). Where the two agree, the error is that this run's machine was
            that much faster or slower than the one that the model was fitted on, and nothing else. Decode steps come
            out a little short everywhere, as a step takes the longer of the host's and the device's time: where both
            vary from step to step, that is more on average than the longer of the two averages.""",
            """The last three columns are errors of the mean end-to-end latency. *Recorded times*: every decision is
            made when it was made in the run. Nothing is left to go wrong but the policies and when a result is seen:
            the simulator hands tokens over at the next decision, vLLM a moment before. *Even host*: the model
            without the drift of the host's speed. *End to end*: the model as it is.""",
        ),
        *table(header, rows),
        *_remains(results, windows),
    ]


def _remains(results: Result, windows: dict[str, Result]) -> list[str]:
    """What is missed and why, as far as the numbers say it."""
    process = windows[results["fitted_on"][-1]]["process"]
    same = {name: run["bias"]["e2e_s.mean"] for name, run in windows.items() if run["process"] == process}
    biases = ", ".join(f"`{name}` {_percent(bias)}" for name, bias in same.items())
    apart = {name: run["bias"]["e2e_s.mean"] for name, run in windows.items() if run["bias"]["e2e_s.mean"] is not None}
    apart = {name: bias - windows[name]["step_times"]["all"] for name, bias in apart.items()}
    worst = max(apart, key=lambda name: abs(apart[name]))
    return prose(
        f"""What remains. In the process that the fit is from: {biases}. The windows of one process differ by as much:
        the host launched faster in one than in another. Where the bias and the column *steps* part, most of all in
        `{worst}` ({apart[worst]:+.1%}), the mean of the steps is not what matters but when the host was slow: the
        simulation goes through the fitted window's drift, the run had its own. Preemptions follow from a pool that is
        full by a few blocks, so their number is the least certain of all.""",
    )


def _overloads(overloads: dict[str, Result]) -> list[str]:
    rows = []
    for name, run in overloads.items():
        real, sim = run["real"], run["sim"]
        rows.append(
            [
                f"`{name}`",
                f"{real['finished']} / {sim['finished']}",
                f"{real['completed_per_s']:.1f} / {sim['completed_per_s']:.1f}",
                f"{cell(real, 'tpot_s', 'p50')} / {cell(sim, 'tpot_s', 'p50')}",
                f"{real['preemptions']} / {sim['preemptions']}",
                _percent(run["bias"]["finished"]),
                _percent(run["step_times"]["all"]),
                f"{run['outside']['steps']:,}, {run['outside']['excess']:.1f}x",
            ]
        )
    header = ["run", "finished", "completed/s", "TPOT p50, ms", "preemptions", "bias by finished", "steps"]
    return [
        "## Overload",
        "",
        *prose(
            """Far more is offered than can be served, and the run is cut off. Measured / simulated. The last
            column says how many steps are larger than any that the model was fitted on, and by how much; on those it is
            too fast, and why is not known: launch times of such steps were not recorded."""
        ),
        *table([*header, "beyond the range"], rows),
    ]


def _ranking(results: Result) -> list[str]:
    rows = []
    for measure, worlds in results["ranking"].items():
        orders = {world: [setting for setting, _ in entries] for world, entries in worlds.items()}
        for world, words in (("real", "measured"), ("sim", "simulated")):
            entries = ", ".join(f"{setting} ({value:.1f})" for setting, value in worlds[world])
            rows.append([measure if world == "real" else "", words, entries])
        rows.append(["", "", "the same order" if orders["real"] == orders["sim"] else "another order"])
    return [
        "## The ranking of settings",
        "",
        *prose(
            """Fitted on the default settings alone, which of the recorded settings does best? Best first. The windows
            are those at 0.80 of each setting's saturation (so rates differ), and the overloads. They were recorded on
            different machines, and where two settings lie closer than the repeats of one window, their order is the
            machines'."""
        ),
        *table(["metric", "", "order"], rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
