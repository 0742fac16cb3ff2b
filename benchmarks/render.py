"""results.md and the figures in the pages of the seven cycles, from the JSON files of the benchmarks alone.

    python benchmarks/render.py [--results FOLDER] [--out FILE] [--pages FOLDER] [--check]

With --check nothing is written, and the exit status is 1 where something would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from pages import table

HERE = Path(__file__).resolve().parent
MARKED = re.compile(r"(<!-- figures of cycle (\d+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
DEVICES = {"cpu": "a CPU", "h100": "an H100"}
"""The devices that every page tells of, measured or not, in this order."""
NOTHING = "–"
SIMULATIONS: dict[str, tuple[str, float, float, float]] = {
    "a": ("10,000 requests of the Azure conversation trace, 1 replica", 1.0, 3.0, 150.0),
    "b": ("the Mooncake conversation trace, 12,031 requests, 8 replicas", 3.5, 6.0, 150.0),
}
"""What benchmarks/simulator.py runs; at most how many seconds of simulation, seconds in all, and MB that may take."""

INTRODUCTION = """\
# What each cycle buys

Rendered from the JSON files in [results](results) by `python benchmarks/render.py`; `make bench` measures and renders.

Latency, throughput and memory of a row are those of the same requests in every row, served with what the cycle adds to
the one before it; so the speed-ups compare like with like. Latency is the time until the last token of the last
request. The figures below a table are what the learning guide lists for each cycle, with its own prompts and lengths.
"""


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--results", type=Path, default=HERE / "results")
    parsing.add_argument("--out", type=Path, default=HERE / "results.md")
    parsing.add_argument("--pages", type=Path, default=HERE.parent / "docs" / "cycles")
    parsing.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    arguments = parsing.parse_args()
    results = load(arguments.results)
    simulator = arguments.results / "simulator.json"
    measured = json.loads(simulator.read_text(encoding="utf-8")) if simulator.exists() else None
    texts = {arguments.out: results_page(results, measured)}
    for path in sorted(arguments.pages.glob("cycle*.md")):
        texts[path] = with_figures(path.read_text(encoding="utf-8"), results)
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        print(path)
        if not arguments.check:
            path.write_text(texts[path], encoding="utf-8")
    return 1 if arguments.check and changed else 0


def load(folder: Path) -> list[dict[str, Any]]:
    """All results, by device, model and cycle."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/cycle*.json")]
    order = list(DEVICES)

    def place(result: dict[str, Any]) -> tuple:
        device = result["device"]
        known = order.index(device) if device in order else len(order)
        return known, device, result["weights"] == "random", result["model"], result["cycle"]

    return sorted(results, key=place)


def results_page(results: list[dict[str, Any]], simulator: dict[str, Any] | None) -> str:
    """The page of all results; `simulator`, if it was measured, has what the simulator takes."""
    parts = [INTRODUCTION]
    if not results:
        parts.append("Nothing is measured yet.\n")
    for _, group in groupby(results, key=lambda result: (result["device"], result["model"])):
        parts.append(section(list(group)))
    if simulator is not None:
        parts.append(simulator_section(simulator))
    return "\n".join(parts)


def simulator_section(simulator: dict[str, Any]) -> str:
    """What the simulator takes for two runs, beside its limits and others, and how that grows."""
    machine = simulator["machine"]
    rows, growth = [], []
    for point, (what, limit_s, limit_wall_s, limit_mb) in SIMULATIONS.items():
        if point in simulator:
            run = simulator[point]
            others = [f"{who} {seconds(s[point])}" for who, s in simulator["elsewhere_s"].items() if point in s]
            rows.append(
                [
                    f"({point}) {what}",
                    f"{run['steps']:,}",
                    f"{seconds(run['loop_s'])}{within(run['loop_s'], limit_s, seconds)}",
                    f"{seconds(run['wall_s'])}{within(run['wall_s'], limit_wall_s, seconds)}",
                    f"{megabytes(run['peak_rss_mb'])}{within(run['peak_rss_mb'], limit_mb, megabytes)}",
                    ", ".join(others),
                ]
            )
    for run in simulator.get("growth", {}).values():
        each = f"{number(1e6 * run['loop_s'] / run['requests'])} us"
        counts = [f"{run['requests']:,}", f"{run['steps']:,}"]
        growth.append(
            [*counts, seconds(run["loop_s"]), each, megabytes(run["peak_rss_mb"]), megabytes(run["record_mb"])]
        )
    lines = [
        "## The simulator",
        "",
        f"On one of {machine['cores']} cores ({machine['cpu']}), Python {machine['python']}, by "
        f"`{simulator['command']}`; medians of {simulator['repeats']} runs. The simulation goes from the first arrival "
        "to the last answer, metrics and the record's rows included; the whole process has Python's start, reading the "
        "trace and the record on disk beside it. What others take was measured with their own code, as shipped.",
        "",
        *table(["Run", "Steps", "Simulation (limit)", "Whole process (limit)", "Memory (limit)", "Others"], rows),
    ]
    if growth:
        lines += ["Growth of (a) with its requests, each measured once:", ""]
        lines += table(["Requests", "Steps", "Simulation", "A request", "Memory", "Record"], growth, numbers=True)
    return "\n".join(lines)


def within(value: float, limit: float, words: Callable[[float], str]) -> str:
    """The limit and whether the value keeps it."""
    return f" ({words(limit)}: {'kept' if value <= limit else 'missed'})"


def section(cycles: list[dict[str, Any]]) -> str:
    """The results of one model on one device."""
    first = cycles[0]
    header = ["Cycle", "What", "Latency, median (mean)", "Throughput", "Memory"]
    header += ["Over the cycle before", "Over cycle 1", "The guide expects", "Seen", "Met"]
    rows = [table_row(result, cycles) for result in cycles]
    figures = [(str(result["cycle"]), *line) for result in cycles for line in listed(result)]
    included = [f"- Cycle {result['cycle']}: {result['timing']}." for result in cycles]
    lines = [
        f"## {title(first)}",
        "",
        f"Weights: {first['weights']}, {first['dtype']}. The requests: {first['yardstick']}. {measured_with(cycles)}",
        "",
        *table(header, rows),
        f"Memory: {first['memory_is']}.",
        "",
        "What the guide lists, times as median (mean):",
        "",
        *table(["Cycle", "Measured", "Figure"], figures),
        "What each time includes:",
        "",
        *included,
    ]
    return "\n".join(lines) + "\n"


def title(result: dict[str, Any]) -> str:
    """The model and what it ran on."""
    return f"{result['model']} on {result['machine']}"


def measured_with(cycles: list[dict[str, Any]]) -> str:
    """Versions and commits, each said once."""
    versions = unique(", ".join(f"{name} {number}" for name, number in r["versions"].items()) for r in cycles)
    commits = unique(result["commit"] for result in cycles)
    word = "Commit" if len(commits) == 1 else "Commits"
    return f"{'; '.join(versions)}. {word} {', '.join(commits)}."


def table_row(result: dict[str, Any], cycles: list[dict[str, Any]]) -> list[str]:
    """A cycle's row of the table."""
    expected = result["expectations"]
    return [
        str(result["cycle"]),
        result["what"],
        f"{seconds(result['median_s'])} ({seconds(result['mean_s'])})",
        f"{number(result['tokens_per_s'])} tok/s",
        f"{number(result['memory_mb'])} MB",
        speed_up(result, cycles, result["cycle"] - 1),
        speed_up(result, cycles, 1),
        "<br>".join(one["text"] for one in expected),
        "<br>".join(one["seen"] or NOTHING for one in expected),
        "<br>".join(verdict(one["met"]) for one in expected),
    ]


def speed_up(result: dict[str, Any], cycles: list[dict[str, Any]], over: int) -> str:
    """How many times faster than the cycle `over` the same requests were served."""
    for other in cycles:
        if other["cycle"] == over and other["yardstick"] == result["yardstick"]:
            return f"{number(other['median_s'] / result['median_s'])}x"
    return NOTHING


def verdict(met: bool | None) -> str:
    """Whether an expectation was met, in a word."""
    return NOTHING if met is None else "yes" if met else "no"


def with_figures(page: str, results: list[dict[str, Any]]) -> str:
    """`page` with the figures of its cycle between its marks."""
    return MARKED.sub(lambda found: f"{found[1]}\n{cycle_figures(int(found[2]), results)}\n{found[3]}", page)


def cycle_figures(cycle: int, results: list[dict[str, Any]]) -> str:
    """A cycle's figures on every device."""
    devices = unique([*DEVICES, *(result["device"] for result in results)])
    parts = []
    for device in devices:
        of_device = [result for result in results if result["device"] == device]
        measured = [result for result in of_device if result["cycle"] == cycle]
        parts += [figures_table(result, [r for r in of_device if r["model"] == result["model"]]) for result in measured]
        if not measured:
            parts.append(f"On {DEVICES.get(device, device)}: not measured yet.\n")
    return "\n".join(parts)


def figures_table(result: dict[str, Any], cycles: list[dict[str, Any]]) -> str:
    """A cycle's figures of one model on one device."""
    rows = [("the requests that every cycle serves", duration(result))]
    if result["cycle"] > 1:
        rows.append(("their speed-up over the cycle before", speed_up(result, cycles, result["cycle"] - 1)))
        rows.append(("their speed-up over cycle 1", speed_up(result, cycles, 1)))
    rows += listed(result)
    for one in result["expectations"]:
        if one["seen"]:
            met = "" if one["met"] is None else f" ({verdict(one['met'])})"
            rows.append((f"the guide: {one['text']}", one["seen"] + met))
    heading = f"**{title(result)}** ({result['dtype']}, weights {result['weights']}, commit {result['commit']})"
    return "\n".join([heading, "", *table(["Measured", "Median (mean), or figure"], rows)])


def listed(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the guide lists for a cycle, as measured: what, and how much."""
    times = [(one["name"], duration(one)) for one in result["cases"]]
    return times + [(one["name"], quantity(one)) for one in result["figures"]]


def duration(measured: dict[str, Any]) -> str:
    """A measurement's median, mean and, where it counts tokens, throughput."""
    text = f"{seconds(measured['median_s'])} ({seconds(measured['mean_s'])})"
    return f"{text}, {number(measured['tokens_per_s'])} tok/s" if "tokens_per_s" in measured else text


def seconds(value: float) -> str:
    """Seconds, or milliseconds where they are few."""
    return f"{number(value)} s" if value >= 1 else f"{number(1000 * value)} ms"


def megabytes(value: float) -> str:
    """Memory or disk in 10**6 bytes."""
    return f"{number(value)} MB"


def quantity(shown: dict[str, Any]) -> str:
    """A figure with its unit."""
    value = shown["value"]
    text = value if isinstance(value, str) else number(value)
    return text + ("" if shown["unit"] in ("x", "%") else " ") * bool(shown["unit"]) + shown["unit"]


def number(value: float) -> str:
    """A number to three digits, or all digits before the point."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{value:.3g}"


def unique(values: Iterable[str]) -> list[str]:
    """The values, each once, in their order."""
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    sys.exit(main())
