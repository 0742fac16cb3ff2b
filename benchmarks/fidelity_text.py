"""docs/fidelity.md: the twin's errors, window by window."""

from __future__ import annotations

from itertools import combinations
from statistics import median
from typing import Any

from fidelity_numbers import KINDS, METRICS
from fidelity_windows import LARGE, SMALL
from pages import percent, prose, table
from svg import INK, LINE, MUTED, Drawing

from twinserve.sim.intervals import NUM_DRAWS

Result = dict[str, Any]

TARGETS = {
    "tpot_s.mean": (0.02, 0.05),
    "tpot_s.p99": (0.04, 0.08),
    "ttft_s.mean": (0.04, 0.10),
    "e2e_s.mean": (0.02, 0.06),
    "output_tok_s": (0.01, 0.01),
}
"""What the median and the worst error over windows are wanted below."""

WORST_BIAS = 0.03

LOADS = ((0.5, "#2563eb", "load to 0.5"), (0.8, "#d97706", "to 0.8"), (1.0, "#dc2626", "beyond"))
"""To which load a window has which color in the plot."""

RANKED = ("tpot_s.mean", "ttft_s.mean", "e2e_s.mean")


def error(window: Result, metric: str) -> float:
    """Relative, of a window's metric."""
    return float(window["sim"][metric] / window["real"][metric] - 1.0)


def spread(windows: dict[str, Result], name: str, metric: str) -> float | None:
    """By how much a window differs when it is served again; None if it was not."""
    again = windows.get(f"{name}-again")
    return None if again is None else again["real"][metric] / windows[name]["real"][metric] - 1.0


def page(results: Result) -> str:
    """The page as text."""
    windows = results["windows"]
    lines = [
        "# How far the twin is off",
        "",
        *prose(
            f"""Made by `python benchmarks/fidelity.py page` from the records in
            `benchmarks/results/{results["card"]}/fidelity/`: {len(windows)} windows, served in real time on an
            {results["device"]} by random weights, and simulated from a profile of the same engine. No window is part of
            any fit. `record` of the same script makes the records on any CUDA card; docs/fidelity-vllm.md holds the
            twin against a vLLM.""",
            f"""Of {results["decisions"][1]:,} recorded decisions {results["decisions"][0]:,} are made again from the
            facts, so what is off is the latency model and nothing else.""",
        ),
        *_summary(windows),
        *_every(windows),
        *_missed(windows),
        *_kinds(windows),
        *_saturation(results["saturation"]),
        *_limits(windows),
        *_ranking(windows),
        *_worst(windows),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _summary(windows: dict[str, Result]) -> list[str]:
    rows = []
    biases = [abs(window["bias"]) for window in windows.values()]
    rows.append(["equivalent bias", f"{median(biases):.1%}", f"{max(biases):.1%}", "1.0%", f"{WORST_BIAS:.1%}"])
    for metric, words in METRICS.items():
        errors = [abs(error(window, metric)) for window in windows.values()]
        wanted = TARGETS.get(metric)
        limits = ["", ""] if wanted is None else [f"{limit:.0%}" for limit in wanted]
        rows.append([words, f"{median(errors):.1%}", f"{max(errors):.1%}", *limits])
    return [
        "## In short",
        "",
        *prose(
            """Sizes of errors over the windows, simulated over measured. The *equivalent bias* is the one factor on all
            step times that would explain the error of the mean TPOT: near saturation an engine turns one percent of
            step time into many of latency."""
        ),
        *table(["", "median", "worst", "wanted", "worst wanted"], rows, numbers=True),
        "![Simulated over measured](fidelity.svg)",
        "",
    ]


def _every(windows: dict[str, Result]) -> list[str]:
    rows = []
    for name, window in windows.items():
        cells = []
        for metric in METRICS:
            other = spread(windows, name, metric)
            cells.append(percent(error(window, metric)) + ("" if other is None else f" ({percent(other)})"))
        marks = [str(round(window["real"]["preemptions"])), f"{window['real']['tpot_s.mean'] * 1e3:.1f}"]
        rows.append([f"`{name}`", percent(window["bias"]), *cells, *marks])
    return [
        "## Every window",
        "",
        *prose(
            """A name says the shape, the workload, the composition, the token budget, the sequences, the size of a
            block, whether prefixes are cached, the blocks, and the load as a share of what the workload saturates at
            under these settings. In brackets: by how much the same window differs when it is served again."""
        ),
        *table(["window", "bias", *METRICS.values(), "preemptions", "TPOT, ms"], rows, numbers=True),
    ]


def _missed(windows: dict[str, Result]) -> list[str]:
    """The windows whose errors are larger than the worst that is wanted."""
    rows = []
    for name, window in windows.items():
        missed = {"bias": window["bias"]} if abs(window["bias"]) > WORST_BIAS else {}
        for metric, (_, most) in TARGETS.items():
            if abs(found := error(window, metric)) > most:
                missed[METRICS[metric]] = found
        if missed:
            other = spread(windows, name, "tpot_s.mean")
            again = "" if other is None else percent(other)
            rows.append([f"`{name}`", ", ".join(f"{words} {percent(found)}" for words, found in missed.items()), again])
    return [
        "## Beyond the worst that is wanted",
        "",
        *prose(
            f"""{len(rows)} of the {len(windows)} windows have an error beyond the last column of the first table.
            Where such a window was served twice, the last column has the difference of its TPOT mean: what is beyond
            any model of steps. The large shape runs at the card's limit of power, and a profile measures each step
            behind others of its kind, where serving brings a prompt behind decodes, which take less; so its prompts
            alone come out too dear (see the next table)."""
        ),
        *table(["window", "beyond", "served again"], rows),
    ]


def _kinds(windows: dict[str, Result]) -> list[str]:
    rows = []
    for shape in sorted({name.split("-")[0] for name in windows}):
        for kind in KINDS:
            found = [w["kinds"][kind] for name, w in windows.items() if name.startswith(shape) and kind in w["kinds"]]
            if not found:
                continue
            errors = [said / taken - 1.0 for taken, said in found]
            taken, said = (sum(pair[place] for pair in found) for place in (0, 1))
            rows.append(
                [shape, kind, f"{taken:.1f}", percent(said / taken - 1.0), percent(min(errors)), percent(max(errors))]
            )
    return [
        "## By kind of step",
        "",
        *prose("Given the steps as they were decided: the device time that the model says over what was measured."),
        *table(["shape", "steps", "seconds", "sum", "least", "most"], rows, numbers=True),
    ]


def _saturation(rates: dict[str, Result]) -> list[str]:
    rows = [
        [f"`{name}`", f"{rate['real']:.1f}", f"{rate['sim']:.1f}", percent(rate["sim"] / rate["real"] - 1.0)]
        for name, rate in rates.items()
    ]
    return [
        "## What can be served",
        "",
        *prose("Requests that end a second while more come in than can be served, measured and simulated."),
        *table(["workload and settings", "measured", "simulated", "error"], rows, numbers=True),
    ]


def covered(windows: dict[str, Result]) -> dict[str, tuple[int, int]]:
    """By metric, in how many windows the measured value lies within the limits, of how many."""
    found = {}
    for metric in METRICS:
        inside = [w["limits"][metric][0] <= w["real"][metric] <= w["limits"][metric][1] for w in windows.values()]
        found[metric] = sum(inside), len(inside)
    return found


def _limits(windows: dict[str, Result]) -> list[str]:
    counts = covered(windows)
    rows = []
    for metric, (inside, of) in counts.items():
        widths = [(w["limits"][metric][1] - w["limits"][metric][0]) / w["sim"][metric] / 2 for w in windows.values()]
        rows.append([METRICS[metric], f"{inside} of {of}", f"{median(widths):.1%}", f"{max(widths):.1%}"])
    share = sum(inside for inside, _ in counts.values()) / sum(of for _, of in counts.values())
    return [
        "## How sure it says it is",
        "",
        *prose(
            f"""The limits of `twinserve sim --intervals`, within which nine of ten values are to lie, are those of
            {NUM_DRAWS} simulations a window. {share:.0%} of the measured values lie within them. Half the width of a
            metric's limits over its prediction:"""
        ),
        *table(["", "within", "median", "widest"], rows, numbers=True),
    ]


def _alike(name: str) -> tuple[str, str]:
    """Shape and workload of a window."""
    shape = next(shape for shape in (SMALL, LARGE) if name.startswith(shape))
    return shape, name.removeprefix(f"{shape}-").split("-")[0]


def _widest_spread(windows: dict[str, Result], name: str, metric: str) -> float:
    """The largest difference between two runs of a window of the same shape and workload; the median of all windows
    that were served twice, if none of these was."""
    known = {other: abs(found) for other in windows if (found := spread(windows, other, metric)) is not None}
    alike = [found for other, found in known.items() if _alike(other) == _alike(name)]
    return max(alike) if alike else median(known.values() or [0.0])


def ranked(windows: dict[str, Result]) -> dict[str, tuple[int, int]]:
    """By metric, the pairs of windows of one workload and shape whose results differ by more than the spread, and in
    how many of them the simulation says the same of which is better."""
    once = {name: window for name, window in windows.items() if not name.endswith("-again")}
    found: dict[str, tuple[int, int]] = {}
    for metric in RANKED:
        right = pairs = 0
        for one, other in combinations(once, 2):
            if _alike(one) != _alike(other):
                continue
            (real, theirs), (sim, their_sim) = (
                [once[name][world][metric] for name in (one, other)] for world in ("real", "sim")
            )
            if abs(real / theirs - 1.0) > _widest_spread(windows, one, metric):
                pairs += 1
                right += (real < theirs) == (sim < their_sim)
        found[metric] = right, pairs
    return found


def _ranking(windows: dict[str, Result]) -> list[str]:
    rows = [[METRICS[metric], str(pairs), str(right)] for metric, (right, pairs) in ranked(windows).items()]
    return [
        "## Which is better",
        "",
        *prose(
            """Pairs of windows of one shape and workload, under other settings or loads, whose measured results differ
            by more than the widest spread of such a window that was served twice (the median of all such where none
            was), and those of them in which the simulation names the same winner."""
        ),
        *table(["by", "pairs", "the same winner"], rows, numbers=True),
    ]


def _worst(windows: dict[str, Result]) -> list[str]:
    name = max(windows, key=lambda name: abs(windows[name]["bias"]))
    window = windows[name]
    rows = [
        [kind, f"{taken:.2f}", percent(said / taken - 1.0), f"{said - taken:+.3f}"]
        for kind, (taken, said) in window["kinds"].items()
    ]
    return [
        "## The worst window, taken apart",
        "",
        *prose(
            f"""`{name}` has the largest equivalent bias, {percent(window["bias"])}; its mean TPOT is off by
            {percent(error(window, "tpot_s.mean"))} and its mean TTFT by {percent(error(window, "ttft_s.mean"))}. Its
            steps, given as they were decided:"""
        ),
        *table(["steps", "seconds", "model over measured", "seconds too many"], rows, numbers=True),
    ]


def plot(windows: dict[str, Result]) -> str:
    """Simulated over measured, of each window and metric, by load."""
    metrics = [metric for metric in METRICS if metric != "output_tok_s"]
    width, height, left, top, lane = 900, 40 + 90 * len(metrics), 160, 20, 90
    drawing = Drawing(width, height, "Simulated over measured, by metric and load")
    limit = 0.25
    for number, metric in enumerate(metrics):
        middle = top + lane * number + lane / 2
        drawing.text(10, middle + 4, METRICS[metric])
        for share in (-0.2, -0.1, 0.0, 0.1, 0.2):
            y = middle - share / limit * lane / 2
            drawing.line([(left, y), (width - 20, y)], LINE if share else INK, width=0.5 if share else 1.0)
            drawing.text(left - 6, y + 4, f"{share:+.0%}", anchor="end", color=MUTED)
        for place, (name, window) in enumerate(windows.items()):
            value = max(-limit, min(limit, error(window, metric)))
            x = left + 12 + place * (width - left - 44) / max(1, len(windows) - 1)
            color = next(color for most, color, _ in LOADS if window["load"] <= most)
            drawing.dot(x, middle - value / limit * lane / 2, color, 4.0 if name.startswith("qwen") else 3.0)
    y = height - 10
    for number, (_, color, words) in enumerate(LOADS):
        drawing.dot(left + 110 * number, y - 4, color, 4.0)
        drawing.text(left + 110 * number + 8, y, words)
    return drawing.svg()
