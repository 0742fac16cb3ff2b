"""A study for whoever buys GPUs: what keeps which objective on the Azure and Mooncake traces, and what it costs.

    python benchmarks/studies.py [--traces FOLDER] [--work FOLDER] [--jobs N] [--page]

Runs the plans of docs/studies, writes benchmarks/results/studies.json, and from that docs/studies/azure-and-mooncake.md
and the pictures beside it. FOLDER of the public traces defaults to $TWINSERVE_TRACES; --work keeps finished points, so
that the next run goes on from there. --page writes page and pictures from the JSON alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from twinserve.capacity import find_capacities
from twinserve.capacity import rows_of as capacity_rows
from twinserve.objectives import interval
from twinserve.parallel import Workers
from twinserve.progress import say
from twinserve.sweep import Store, load_plan, opened, run_points
from twinserve.sweep import rows_of as sweep_rows
from twinserve.traces.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "docs" / "studies"
RESULTS = ROOT / "benchmarks" / "results" / "studies.json"
AZURE, MOONCAKE = "azure/AzureLLMInferenceTrace_conv.csv", "mooncake/conversation_trace.jsonl.gz"
OBJECTIVES = {
    "interactive": "p99 TTFT <= 1 s and p99 TPOT <= 50 ms",
    "strict": "p99 TTFT <= 300 ms and p99 TPOT <= 25 ms",
    "long": "p99 TTFT <= 10 s and p99 TPOT <= 50 ms",
}
TOLERANCE = 0.05
METRICS = ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "tpot_s.p99", "e2e_s.p99", "output_tok_s", "total_tok_s")

Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=os.environ.get("TWINSERVE_TRACES"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if not arguments.page:
        if arguments.traces is None:
            print("studies.py: --traces is not given and TWINSERVE_TRACES is not set", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.work or Path(scratch) / "points"
            with opened(folder) as store, Workers(arguments.jobs) as workers:
                results = computed(arguments.traces, store, workers)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for path, text in written(json.loads(RESULTS.read_text())).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        say(str(path.relative_to(ROOT)))
    return 0


# --- what is computed ---


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
    return results


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


# --- pictures ---

INK, MUTED, RULE, LIMIT = "#1b1f24", "#57606a", "#dfe3e8", "#b84f08"
COLORS = ("#1f5fa8", "#86afdc", "#0b3765", "#c4560b")


class Picture:
    """Shapes one after another, in pixels from the top left."""

    def __init__(self, width: int, height: int, title: str):
        self._width, self._height, self._title = width, height, title
        self._shapes: list[str] = []

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self._shapes.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>')

    def line(self, points: list[tuple[float, float]], color: str, *, width: float = 1.0, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        style = f'fill="none" stroke="{color}" stroke-width="{width}"{dashes}'
        self._shapes.append(f'<polyline points="{path}" {style}/>')

    def dot(self, x: float, y: float, color: str, radius: float = 3.0) -> None:
        style = f'fill="{color}" stroke="#ffffff"'
        self._shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {style}/>')

    def text(self, x: float, y: float, words: str, *, anchor: str = "start", color: str = INK) -> None:
        place = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">'
        self._shapes.append(f"{place}{escape(words, quote=False)}</text>")

    def svg(self) -> str:
        size = f'width="{self._width}" height="{self._height}" viewBox="0 0 {self._width} {self._height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
                f"<title>{escape(self._title, quote=False)}</title>",
                f'<rect width="{self._width}" height="{self._height}" rx="8" fill="#ffffff"/>',
                *self._shapes,
                "</svg>\n",
            ]
        )


def bars(title: str, groups: list[tuple[str, list[tuple[str, Result | None]]]], unit: str) -> str:
    """Horizontal bars: what every seed keeps; a dot a seed for what that seed alone keeps.

    Args:
        groups: a label, and for each series its name and a row of a capacity.
    """
    series = list(dict.fromkeys(name for _, of_group in groups for name, _ in of_group))
    left, right, top, thick, gap = 190, 60, 44, 16, 12
    height = top + sum(len(of_group) * thick + gap for _, of_group in groups) + 36
    picture = Picture(760, height, title)
    known = [row for _, of_group in groups for _, row in of_group if row is not None]
    most = max(value for row in known for value in (row["value"] or 0, *(v or 0 for v in row["by_seed"])))
    step = nice_step(most)
    scale = (760 - left - right) / (math.ceil(most / step) * step)
    key_x = float(left)
    for name, color in zip(series, COLORS, strict=False):
        picture.rectangle(key_x, 14, 12, 12, color)
        picture.text(key_x + 18, 24, name)
        key_x += 40 + 6.6 * len(name)
    for tick in range(math.ceil(most / step) + 1):
        x = left + tick * step * scale
        picture.line([(x, top - 6), (x, height - 34)], RULE)
        picture.text(x, height - 18, f"{tick * step:g}", anchor="middle", color=MUTED)
    picture.text(left + (760 - left - right) / 2, height - 3, unit, anchor="middle", color=MUTED)
    y = float(top)
    for label, of_group in groups:
        picture.text(left - 10, y + len(of_group) * thick / 2 + 4, label, anchor="end")
        for name, row in of_group:
            value = None if row is None else row["value"]
            color = COLORS[series.index(name)]
            if row is None or value is None:
                picture.text(left + 6, y + thick - 4, "none keeps it", color=MUTED)
            else:
                picture.rectangle(left, y + 1, value * scale, thick - 2, color)
                for found in row["by_seed"]:
                    picture.dot(left + found * scale, y + thick / 2, INK, 2.5)
                ends = [value, *row["by_seed"]]
                picture.text(left + max(ends) * scale + 8, y + thick - 4, f"{value:.3g}", color=MUTED)
            y += thick
        y += gap
    return picture.svg()


def curves(title: str, panels: list[Result], x_title: str) -> str:
    """Panels beside each other, each with a curve a series on a logarithmic axis, its intervals and a limit.

    Args:
        panels: `title`, `limit` and `series`: for each name its points (x, y, low, high).
    """
    width, height, top, bottom = 760, 320, 52, 44
    picture = Picture(width, height, title)
    key_x = 60.0
    for name, color in zip(panels[0]["series"], COLORS, strict=False):
        picture.line([(key_x, 20), (key_x + 22, 20)], color, width=2)
        picture.text(key_x + 28, 24, name)
        key_x += 50 + 6.6 * len(name)
    inner = (width - 60) / len(panels) - 60
    for number, panel in enumerate(panels):
        left = 60 + number * (inner + 60)
        points = [point for of_name in panel["series"].values() for point in of_name]
        low = 10 ** math.floor(math.log10(min(y for _, y, *_ in points)))
        high = 10 ** math.ceil(math.log10(max(max(y for _, y, *_ in points), panel["limit"])))
        most_x = max(x for x, *_ in points)

        def at(x: float, y: float, left: float = left, low: float = low, high: float = high) -> tuple[float, float]:
            share = (math.log10(min(high, max(low, y))) - math.log10(low)) / (math.log10(high) - math.log10(low))
            return left + x / most_x * inner, height - bottom - share * (height - top - bottom)

        picture.text(left, 44, panel["title"])
        for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
            y = at(0, 10**exponent)[1]
            picture.line([(left, y), (left + inner, y)], RULE)
            words = f"{10**exponent:g} s" if exponent >= 0 else f"{10 ** (exponent + 3):g} ms"
            picture.text(left - 6, y + 4, words, anchor="end", color=MUTED)
        for x in sorted({x for x, *_ in points}):
            picture.text(at(x, low)[0], height - bottom + 18, f"{x:g}", anchor="middle", color=MUTED)
        picture.text(left + inner / 2, height - 6, x_title, anchor="middle", color=MUTED)
        picture.line([at(0, panel["limit"]), at(most_x, panel["limit"])], LIMIT, dash="5 4")
        for (_, of_name), color in zip(panel["series"].items(), COLORS, strict=False):
            picture.line([at(x, y) for x, y, *_ in of_name], color, width=2)
            for x, y, least, greatest in of_name:
                picture.line([at(x, least), at(x, greatest)], color)
                picture.dot(*at(x, y), color)
    return picture.svg()


def nice_step(most: float) -> float:
    """A round distance between ticks, of which four to eight reach `most`."""
    power = 10 ** math.floor(math.log10(most))
    return next(step for step in (power / 5, power / 2, power, 2 * power) if most / step <= 8)
