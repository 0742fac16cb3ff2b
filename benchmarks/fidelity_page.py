"""docs/fidelity-vllm.md, from the results of fidelity_vllm.py."""

from __future__ import annotations

from statistics import median

from fidelity_runs import BLOCK_S, LATENCIES, PHASES, REPEATS, STATISTICS, Result
from pages import percent, prose, table

from twinserve.sim.fit import REGIMES

REPLACED = {
    "recorded_decisions": "recorded times",
    "own_host": "own host",
    "mean_host_even": "its mean, even",
    "mean_host": "its mean, the fit's drift",
    "sim": "predicted",
}


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


def _bias(results: Result, windows: dict[str, Result]) -> list[str]:
    rows = [
        [
            f"`{name}`" + (" (fitted on)" if name in results["fitted_on"] else ""),
            run["process"],
            percent(run["bias"]["e2e_s.mean"]),
            percent(run["bias"]["tpot_s.p50"]),
            f"{run['host_level']:.2f} ± {run['host_spread']:.2f}",
            *(percent(run[kind]["e2e_s"]["mean"] / run["real"]["e2e_s"]["mean"] - 1.0) for kind in REPLACED),
            " to ".join(percent(run[end]["e2e_s"] / run["real"]["e2e_s"]["mean"] - 1.0) for end in ("least", "most")),
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
    biases = ", ".join(f"`{name}` {percent(bias)}" for name, bias in same.items())
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
            *(percent(run["step_times"][kind]) if kind in run["step_times"] else "" for kind in ("all", *REGIMES)),
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
                percent(run["bias"]["finished"]),
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
