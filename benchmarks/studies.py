"""A study for whoever buys GPUs: what keeps which objective on the Azure and Mooncake traces, and what it costs.

    python benchmarks/studies.py [--traces FOLDER] [--work FOLDER] [--jobs N] [--page | --check]

Runs the plans of docs/studies, writes benchmarks/results/studies.json, and from that docs/studies/azure-and-mooncake.md
and the pictures beside it. FOLDER of the public traces defaults to $TWINSERVE_TRACES; --work keeps finished points, so
that the next run goes on from there. --page writes page and pictures from the JSON alone; with --check nothing is
written, and the exit status is 1 where one of them is another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from pages import prose, table

from twinserve.capacity import find_capacities
from twinserve.capacity import rows_of as capacity_rows
from twinserve.objectives import interval
from twinserve.parallel import Workers
from twinserve.point import Point
from twinserve.progress import say
from twinserve.sweep import Store, load_plan, opened, run_points
from twinserve.sweep import rows_of as sweep_rows
from twinserve.traces.statistics import shared_tokens

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
PRICE = 2.5
SYSTEM_PROMPT = 512
"""Tokens that all prompts of the Mooncake trace begin with."""
METRICS = ("ttft_s.p50", "ttft_s.p99", "tpot_s.p50", "tpot_s.p99", "e2e_s.p99", "output_tok_s", "total_tok_s")

Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=os.environ.get("TWINSERVE_TRACES"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.page or arguments.check):
        if arguments.traces is None:
            print("studies.py: --traces is not given and TWINSERVE_TRACES is not set", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.work or Path(scratch) / "points"
            with opened(folder) as store, Workers(arguments.jobs) as workers:
                results = computed(arguments.traces, store, workers)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    files = written(json.loads(RESULTS.read_text()))
    if arguments.check:
        others = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
        for path in others:
            say(f"{path.relative_to(ROOT)} is another")
        return 1 if others else 0
    for path, text in files.items():
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
        scale = inner / max(x for x, *_ in points)

        def at(
            x: float, y: float, left: float = left, scale: float = scale, low: float = low, high: float = high
        ) -> tuple[float, float]:
            share = (math.log10(min(high, max(low, y))) - math.log10(low)) / (math.log10(high) - math.log10(low))
            return left + x * scale, height - bottom - share * (height - top - bottom)

        picture.text(left, 44, panel["title"])
        for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
            y = at(0, 10**exponent)[1]
            picture.line([(left, y), (left + inner, y)], RULE)
            words = f"{10**exponent:g} s" if exponent >= 0 else f"{10 ** (exponent + 3):g} ms"
            picture.text(left - 6, y + 4, words, anchor="end", color=MUTED)
        for x in sorted({x for x, *_ in points}):
            picture.text(at(x, low)[0], height - bottom + 18, f"{x:g}", anchor="middle", color=MUTED)
        picture.text(left + inner / 2, height - 6, x_title, anchor="middle", color=MUTED)
        limit_y = at(0, panel["limit"])[1]
        picture.line([(left, limit_y), (left + inner, limit_y)], LIMIT, dash="5 4")
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


# --- the page ---


def written(results: Result) -> dict[Path, str]:
    """The page and its pictures, by where they lie."""
    pictures = STUDIES / "pictures"
    interactive, strict = results["azure-interactive"], results["azure-strict"]
    one_gpu = [
        (named(row), [(OBJECTIVES["interactive"], row), (OBJECTIVES["strict"], other)])
        for row, other in zip(interactive, strict, strict=True)
    ]
    routers = list(dict.fromkeys(row["varied"]["router"] for row in results["mooncake"]))
    budgets = list(dict.fromkeys(row["varied"]["max_num_batched_tokens"] for row in results["mooncake"]))
    fleets = [
        (router, [(f"{budget:,} tokens", case(results["mooncake"], router=router, max_num_batched_tokens=budget))
                  for budget in budgets])
        for router in routers
    ]  # fmt: skip
    return {
        pictures / "azure-capacity.svg": bars("The highest rate one H100 keeps", one_gpu, "requests a second"),
        pictures / "azure-rates.svg": curves("Latency against rate", rate_panels(results), "requests a second"),
        pictures / "mooncake-fleet.svg": bars("The fewest H100s that keep the objective", fleets, "H100s"),
        STUDIES / "azure-and-mooncake.md": "\n".join(page(results)),
    }


def rate_panels(results: Result) -> list[Result]:
    """p99 TTFT and p99 TPOT of one H100 against the rate, a curve a token budget."""
    panels = []
    for metric, title, limit in (("ttft_s.p99", "p99 TTFT", 0.3), ("tpot_s.p99", "p99 TPOT", 0.025)):
        series: dict[str, list[tuple[float, ...]]] = {}
        for row in results["azure-rates"]:
            found = row["metrics"][metric]
            low, high = found["interval"]
            name = f"{row['varied']['max_num_batched_tokens']:,} tokens a step"
            series.setdefault(name, []).append((row["varied"]["rate"], found["mean"], low, high))
        panels.append({"title": title, "limit": limit, "series": series})
    return panels


def case(rows: list[Result], **varied: Any) -> Result:
    """The case with these values."""
    return next(row for row in rows if all(row["varied"].get(name) == value for name, value in varied.items()))


def named(row: Result) -> str:
    return f"{row['varied']['composition']}, {row['varied']['max_num_batched_tokens']:,} tokens"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def spread(row: Result, digits: int = 3) -> str:
    """What the seeds keep by themselves, in their mean with its interval."""
    if row["mean"] is None:
        return "–"
    half = (row["interval"][1] - row["mean"]) if row["interval"] else 0.0
    return f"{row['mean']:.{digits}g} ± {half:.2g}"


def at_capacity(row: Result) -> list[str]:
    """Latencies and costs at the capacity, or dashes."""
    if row["value"] is None:
        return ["–"] * 4
    metrics = row["metrics"]
    return [
        seconds(metrics["ttft_s.p99"]["mean"]),
        seconds(metrics["tpot_s.p99"]["mean"]),
        f"{row['cost']['total']:.3f}",
        f"{row['cost']['output']:.3f}",
    ]


def capacity_table(heads: list[str], labels: list[list[str]], rows: list[Result]) -> list[str]:
    """A table of capacities, with what they cost and what stops them."""
    lines = [
        [*label, "–" if row["value"] is None else f"{row['value']:.3g}", spread(row), *at_capacity(row),
         "; ".join(row["missed"]).replace("<=", "≤") or "nothing"]
        for label, row in zip(labels, rows, strict=True)
    ]  # fmt: skip
    rest = ["seeds alone", "p99 TTFT", "p99 TPOT", "$ per M tokens", "$ per M output tokens", "what stops it"]
    return table([*heads, *rest], lines)


def page(results: Result) -> list[str]:
    """docs/studies/azure-and-mooncake.md."""
    return [
        "<!-- Written by benchmarks/studies.py from benchmarks/results/studies.json. -->",
        "",
        *_opening(results),
        *_azure(results),
        *_azure_rates(results),
        *_azure_fleet(results),
        *_mooncake(results),
        *_mooncake_affine(results),
        *_mooncake_split(results),
        *_again(),
    ]


def best(rows: list[Result]) -> Result:
    """The case with the highest capacity, the cheapest of those."""
    return max((row for row in rows if row["value"] is not None), key=lambda row: (row["value"], -row["cost"]["total"]))


def _opening(results: Result) -> list[str]:
    interactive, strict, fleet = best(results["azure-interactive"]), best(results["azure-strict"]), results["mooncake"]
    fewest = min(row["value"] for row in fleet if row["value"] is not None)
    most = max(row["value"] for row in fleet if row["value"] is not None)
    prompts = results["mooncake-prompts"]["window"]
    return [
        "# How many H100s for which traffic",
        "",
        *prose(
            f"""Two public traces, one model of eight billion parameters, and the question of whoever pays for it: which
            composition, token budget and router keep which objective, on how many H100s, and what do a million tokens
            cost? In short, with {PRICE} dollars for a GPU-hour:"""
        ),
        f"- **Azure's chat** (short prompts, no reuse): one H100 keeps `{OBJECTIVES['interactive']}` up to "
        f"{interactive['value']:.3g} requests/s ({named(interactive)}),",
        f"  at {interactive['cost']['total']:.3f} $ per million tokens; `{OBJECTIVES['strict']}` up to "
        f"{strict['value']:.3g} requests/s ({named(strict)}), at {strict['cost']['total']:.3f} $.",
        f"- **Mooncake's conversations** (prompts of {prompts['mean_prompt']:,.0f} tokens, the longest "
        f"{prompts['longest_prompt']:,}), at the rate that was recorded: {fewest} to {most} H100s keep",
        f"  `{OBJECTIVES['long']}`. The router decides which, before the token budget does.",
        "",
        "## What was simulated",
        "",
        *prose(
            f"""**Latency**: {results["azure-strict"][0]["latency"]}. No Llama-3-8B was timed. A roofline takes the
            model's shape, the peaks of NVIDIA's data sheet, the shares of them that were measured on an H100, and the
            host time of vLLM's records; what engines lose between operations is not in it. So take orders and ratios
            from this page rather than last digits. `docs/fidelity-vllm.md` says how far fitted models are off.""",
            """**Azure** (conversations of 2023): the first 2,000 arrivals of the trace (4,000 for the fleet) as
            bursty as
            they are, made denser to the rate in question; the lengths of the requests are drawn from the whole trace
            without replacement, anew with each seed. **Mooncake** (conversation trace): the five minutes from 600 s
            to 900 s, at the recorded rate, the three-second steps of its clock spread out anew with each seed; its
            prefixes are as recorded, and the caches are empty at the start. Clipping the traces keeps this page at
            minutes of computing; it also keeps rare long prompts and far reuse out.""",
            f"""**Search**: three seeds, each with a search of its own; rates to {TOLERANCE:.0%}. The value given is one
            that every seed kept, simulated with every seed; *seeds alone* is the mean of what each
            keeps by itself, with
            its 95% interval (Student's t with two degrees of freedom, so it is wide). All cases share the seeds, so a
            difference between two cases that every seed shows is one, even within these intervals. One step ahead
            (`pipeline_depth` 1), 256 sequences, the pool that the device's memory leaves beside the weights.""",
        ),
    ]


def better_in_every_seed(row: Result, other: Result) -> str:
    """In words, in how many seeds a case has the higher capacity."""
    pairs = list(zip(row["by_seed"], other["by_seed"], strict=True))
    wins = sum(mine > theirs for mine, theirs in pairs)
    return f"with {wins} of {len(pairs)} seeds"


def _azure(results: Result) -> list[str]:
    lines = [
        "## Azure on one H100",
        "",
        "![The highest rate by composition and budget](pictures/azure-capacity.svg)",
        "",
    ]
    lines += ["Bars: the rate that every seed keeps. Dots: what each seed keeps alone.", ""]
    for name in ("interactive", "strict"):
        rows = results[f"azure-{name}"]
        lines += [f"**{OBJECTIVES[name].replace('<=', '≤')}**", ""]
        labels = [[row["varied"]["composition"], f"{row['varied']['max_num_batched_tokens']:,}"] for row in rows]
        lines += capacity_table(["composition", "tokens a step", "requests/s"], labels, rows)
    strict = results["azure-strict"]
    mixed, small = (case(strict, composition="mixed", max_num_batched_tokens=budget) for budget in (2048, 512))
    first = case(strict, composition="prefill-first", max_num_batched_tokens=2048)
    return lines + prose(
        f"""**Mixed batches serve more than prefill first**: {mixed["value"]:.3g} against
        {first["value"]:.3g} requests/s
        under the strict limits with 2,048 tokens ({better_in_every_seed(mixed, first)}). Prefill first
        is the quicker to a
        first token ({seconds(first["metrics"]["ttft_s.p99"]["mean"])} against
        {seconds(mixed["metrics"]["ttft_s.p99"]["mean"])} at p99, though at less load), as every decode
        waits while prompts are
        computed; that is what its p99 TPOT is made of, and its limit.""",
        f"""**The budget moves the limit from one metric to the other.** With 512 tokens a step, what stops it is
        {" and ".join(small["missed"]).replace("<=", "≤")}: a step that reads all weights anyway
        computes 512 prompt tokens at
        most, and prompts queue, while p99 TPOT is {seconds(small["metrics"]["tpot_s.p99"]["mean"])}. With more it is
        {" and ".join(mixed["missed"]).replace("<=", "≤")}: a decode shares its step with
        up to 2,048 prompt tokens or more.""",
    )


def _azure_rates(results: Result) -> list[str]:
    rows = results["azure-rates"]
    budgets = list(dict.fromkeys(row["varied"]["max_num_batched_tokens"] for row in rows))
    rates = list(dict.fromkeys(row["varied"]["rate"] for row in rows))
    cells = []
    for rate in rates:
        line = [f"{rate:g}"]
        for budget in budgets:
            metrics = case(rows, rate=rate, max_num_batched_tokens=budget)["metrics"]
            line.append(f"{seconds(metrics['ttft_s.p99']['mean'])}, {seconds(metrics['tpot_s.p99']['mean'])}")
        cells.append(line)
    heads = ["requests/s", *(f"{budget:,} tokens: p99 TTFT, p99 TPOT" for budget in budgets)]
    return [
        "## Where the knee is",
        "",
        "![p99 TTFT and p99 TPOT against the rate](pictures/azure-rates.svg)",
        "",
        "Means over seeds with 95% intervals; dashed: the strict limits. Mixed batches on one H100.",
        "",
        *table(heads, cells),
        *prose(
            """Both latencies are flat far below capacity and leave together. Beyond the knee a number depends on
            how long
            the trace goes on, as the queue grows until the arrivals end: it says that the rate cannot
            be served, not how
            long somebody would wait."""
        ),
    ]


def _azure_fleet(results: Result) -> list[str]:
    rows = results["azure-fleet"]
    one = case(results["azure-interactive"], composition="mixed", max_num_batched_tokens=2048)
    return [
        "## Azure on a fleet",
        "",
        *prose(
            f"""At 60 requests/s, eleven times the recorded rate, `{OBJECTIVES["interactive"]}`, mixed
            batches, 2,048 tokens.
            Dividing by what one H100 keeps ({one["value"]:.3g} requests/s) would give
            {60 / one["value"]:.2f} of them."""
        ),
        *capacity_table(["router", "H100s"], [[row["varied"]["router"]] for row in rows], rows),
    ]


def _mooncake(results: Result) -> list[str]:
    rows = results["mooncake"]
    labels = [[row["varied"]["router"], f"{row['varied']['max_num_batched_tokens']:,}"] for row in rows]
    window, trace = results["mooncake-prompts"]["window"], results["mooncake-prompts"]["trace"]
    least, tripled = (case(rows, router="least-outstanding", max_num_batched_tokens=budget) for budget in (2048, 8192))
    affine = case(rows, router="prefix-affine", max_num_batched_tokens=8192)
    return [
        "## Mooncake on a fleet",
        "",
        f"{window['requests']:,} requests in five minutes, `{OBJECTIVES['long']}`.",
        "",
        "![The fewest H100s by router and budget](pictures/mooncake-fleet.svg)",
        "",
        *capacity_table(["router", "tokens a step", "H100s"], labels, rows),
        *prose(
            """**Count tokens, not requests.** Prompts differ by a factor of a hundred. A router that
            counts requests, or
            nothing, piles long prompts onto one replica while another idles: round robin and random need more H100s
            than the replica with the least outstanding tokens, for the same traffic and the same objective.""",
            f"""**p99 TPOT is what stops every case**, never TTFT: while a long prompt is computed, every decode
            beside it gets one token a step, and a step of 8,192 prompt tokens takes long. At four H100s and the
            least outstanding tokens, p99 TPOT is {seconds(least["metrics"]["tpot_s.p99"]["mean"])} with 2,048 tokens a
            step, and {seconds(tripled["metrics"]["tpot_s.p99"]["mean"])} with 8,192.""",
            f"""**The prefix cache has little to give in this window.** With a cache without end
            {window["reusable"]:.0%} of
            its prompt tokens could be reused; over the whole hour it is {trace["reusable"]:.0%}, as
            conversations come back
            after more than five minutes. What was hit is {least["hit_ratio"]:.1%} (least outstanding, 2,048) to
            {affine["hit_ratio"]:.1%} (prefix-affine, 8,192) of prompt tokens.""",
        ),
    ]


def _mooncake_affine(results: Result) -> list[str]:
    rows = results["mooncake-affine"]
    window = results["mooncake-prompts"]["window"]
    cells = [
        [
            f"{row['varied']['max_num_batched_tokens']:,}",
            f"{row['varied']['max_lead_tokens']:,}",
            f"{row['hit_ratio']:.1%}",
            seconds(row["metrics"]["ttft_s.p99"]["mean"]),
            seconds(row["metrics"]["tpot_s.p99"]["mean"]),
            "; ".join(row["missed"]).replace("<=", "≤") or "nothing",
        ]
        for row in rows
    ]
    return [
        "### Why does the router that knows prefixes need more?",
        "",
        *prose(
            f"""It sends a request to the replica that has its longest known prefix, unless that replica is more than
            `max_lead_tokens` outstanding tokens (32,768 unless given) ahead of the least loaded. But
            all prompts of this trace
            begin with the same {SYSTEM_PROMPT} tokens, and {window["system_prompt_alone"]:.0%} of the
            window's requests share nothing
            more with an earlier one: they know a prefix all the same, that of the system prompt, on the
            replica to which the
            request before them was sent. To save {SYSTEM_PROMPT} tokens they follow it, and queue
            behind up to 32,768. Four H100s
            with smaller leads:"""
        ),
        *table(["tokens a step", "max_lead_tokens", "hit", "p99 TTFT", "p99 TPOT", "misses"], cells),
    ]


def _mooncake_split(results: Result) -> list[str]:
    rows = results["mooncake-split"]
    cells = [
        [
            f"{row['varied']['replicas']} of {8 // row['varied']['replicas']}",
            "on" if row["varied"]["enable_prefix_caching"] else "off",
            f"{row['hit_ratio']:.1%}",
            seconds(row["metrics"]["ttft_s.p50"]["mean"]),
            seconds(row["metrics"]["ttft_s.p99"]["mean"]),
            seconds(row["metrics"]["tpot_s.p50"]["mean"]),
            seconds(row["metrics"]["tpot_s.p99"]["mean"]),
            f"{row['cost']['total']:.3f}",
        ]
        for row in rows
    ]
    window = results["mooncake-prompts"]["window"]
    alone, halves, quarters = (
        case(rows, replicas=count, enable_prefix_caching=True)["metrics"]["ttft_s.p99"]["mean"] for count in (8, 4, 2)
    )
    heads = [
        "replicas of H100s",
        "prefix cache",
        "hit",
        "p50 TTFT",
        "p99 TTFT",
        "p50 TPOT",
        "p99 TPOT",
        "$ per M tokens",
    ]
    return [
        "## A floor that no number of replicas lowers",
        "",
        *prose(
            f"""Eight H100s hardly queue, and yet p99 TTFT stays at {seconds(alone)}. It is the time
            that a prompt of some
            hundred thousand tokens takes by itself ({window["over_64k"]} of the {window["requests"]:,}
            have more than 65,536):
            more replicas do not help one request. Splitting each replica over more GPUs does:"""
        ),
        *table(heads, cells),
        *prose(
            f"""With the same eight H100s, p99 TTFT goes from {seconds(alone)} to {seconds(halves)} with pairs and
            {seconds(quarters)} with fours. So an objective below the floor is a matter of tensor
            parallelism, not of fleet
            size; a search for replicas alone would add GPUs until it gave up."""
        ),
    ]


def _again() -> list[str]:
    return [
        "## Again, and on your own traffic",
        "",
        "    python benchmarks/studies.py",
        "",
        "or one part of it, from its plan:",
        "",
        "    twinserve capacity TRACE --plan docs/studies/azure.toml --objective 'p99 TTFT <= 1 s' --tolerance 0.05",
        "    twinserve capacity TRACE --plan docs/studies/mooncake.toml --find replicas --objective 'p99 TTFT <= 9 s'",
        "",
        "[capacity.md](../capacity.md) says what is searched and how sure it is.",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
