"""The page docs/studies/plan.md: the cheapest deployments of Llama 3 70B that `twinserve plan` finds for two traces.

    python benchmarks/plan.py [--traces FOLDER] [--work FOLDER] [--jobs N] [--page | --check]

Writes benchmarks/results/plan.json and, from that, docs/studies/plan.md. FOLDER of the public traces defaults to
$TWINSERVE_TRACES; --work keeps finished points and, of each trace, the page that the command writes. --page writes
docs/studies/plan.md from the JSON alone; with --check nothing is written, and the exit status is 1 where it is another.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import ROOT
from pages import prose, table, write_or_check
from result_files import RESULTS, write_json
from study_plan import AZURE, MOONCAKE, study_arguments

from twinserve.commands.progress import say
from twinserve.commands.sweep_views import deployment_cases, page_of
from twinserve.planning.answers import deployment_of
from twinserve.planning.deployments import best_of_each, candidates, find_deployments, parse_choices, plan_of
from twinserve.planning.fleets import FleetOptions
from twinserve.planning.parallel import Workers
from twinserve.planning.sweep import opened
from twinserve.sim.devices import DEVICES

MEASURED, PAGE = RESULTS / "plan.json", ROOT / "docs" / "studies" / "plan.md"
MODEL = "llama-3-70b"
PRICES = {"h100": 2.5, "h200": 3.5, "b200": 6.0, "l40s": 1.1}
"""Dollars of a GPU-hour, for the example."""
MOST_GPUS = 64
SPLITS = ("tp=1", "tp=2", "tp=4", "tp=8", "tp=4:pp=2")
SEARCH = (
    "Prefill and decode are together, and apart where that takes no more of them, or where no number keeps the "
    "objective together."
)
CHOICES = ("max_num_batched_tokens=2048,8192",)
TRACES: dict[str, tuple[str, dict[str, Any]]] = {
    "Azure": (
        AZURE,
        {"limit": 600, "rate_scale": 3.0, "objective": "p99 TTFT <= 1 s and p99 TPOT <= 50 ms"},
    ),
    "Mooncake": (
        MOONCAKE,
        {"window_s": "600:660", "objective": "99% of requests with TTFT <= 20 s and TPOT <= 100 ms"},
    ),
}


def found(name: str, traces: Path, folder: Path, jobs: int | None) -> dict[str, Any]:
    """The deployments of a trace, the cheapest first, and why others were not tried."""
    path, options = TRACES[name]
    latencies, left_out = candidates(MODEL, list(PRICES), splits=SPLITS, most_gpus=MOST_GPUS)
    values = {"trace": str(traces / path), "price_per_gpu_hour": PRICES, "router": "least-outstanding", "seeds": 1}
    plan = plan_of(latencies, values | options, parse_choices(CHOICES))
    with opened(folder) as store, Workers(jobs) as workers:
        deployments = find_deployments(plan, store, workers, most_gpus=MOST_GPUS)
    best = best_of_each(deployments)
    rows = [
        {
            "gpus": one.gpus,
            "latency": one.capacity.case.varied["latency"],
            "max_num_batched_tokens": one.capacity.case.varied["max_num_batched_tokens"],
            "replicas": one.num_replicas,
            "prefill": one.num_prefill,
            "price_per_hour": one.price_per_hour,
            "missed": one.capacity.missed,
            "words": deployment_of(plan, one.capacity),
        }
        for one in best
    ]
    remarks = [f"{place}. {row['words']}" for place, row in enumerate(rows[:3], 1)]
    (folder / "page.html").write_text(page_of("Plan", remarks, plan, deployment_cases(plan, deployments)))
    runs = deployments[0].capacity.results if deployments else []
    return {
        "options": options,
        "kinds": len(latencies),
        "cases": len(plan.cases),
        "left_out": left_out,
        "requests": runs[0]["summary"]["requests"] if runs else None,
        "span_s": runs[0]["span_s"] if runs else None,
        "deployments": rows,
    }


def page(results: dict[str, Any]) -> str:
    """docs/studies/plan.md."""
    prices = ", ".join(f"{price:g} for {kind}" for kind, price in PRICES.items())
    lines = [
        "<!-- Written by benchmarks/plan.py from benchmarks/results/plan.json. -->",
        "",
        "# The cheapest deployments of Llama 3 70B for two traces",
        "",
        *prose(
            f"""`python benchmarks/plan.py` asks what `twinserve plan` asks: which GPUs, how many of them together, how
            many such replicas, and which token budget keep an objective for a trace, and what is cheapest? Prices, in
            dollars a GPU-hour, are made up for the example: {prices}. GPUs share the model as {", ".join(SPLITS)}; the
            router sends a request to the replica with the fewest outstanding tokens; settings are vLLM 0.33's on that
            GPU but for the token budget, of which {CHOICES[0].partition("=")[2].replace(",", " and ")} are tried.
            {results["words"]["search"]}"""
        ),
    ]
    for name in TRACES:
        lines += _of_trace(name, results[name])
    return "\n".join(
        [
            *lines,
            "## For a trace of one's own",
            "",
            _command(results["Azure"]["options"]["objective"]),
            "",
            *prose(
                f"""A roofline stands behind each, and nobody knows how far it is off: it ranks, and what it names is to
                be measured. {results["words"]["links"]}"""
            ),
        ]
    )


def _command(objective: str) -> str:
    """The command that asks the same."""
    prices = ",".join(f"{kind}={price:g}" for kind, price in PRICES.items())
    asked = f"--model {MODEL} --devices {','.join(PRICES)} --price {prices} --splits {','.join(SPLITS)}"
    tried = f"--most-gpus {MOST_GPUS} --try {CHOICES[0]}"
    return f'    twinserve plan TRACE {asked} {tried} --objective "{objective}" --out plans/first'


def _links() -> str:
    """Of which devices the links were measured, and what the others are held to."""
    devices = [DEVICES[kind] for kind in PRICES]
    measured = [
        f"on the {device.name}, {device.collectives.link / 1e9:.0f} of the {device.link / 1e9:.0f} GB/s of its sheet"
        for device in devices
        if device.collectives is not None
    ]
    others = [device for device in devices if device.collectives is None]
    assumed = ", ".join(device.name for device in others if device.all_reduces is not None)
    by_model = ", ".join(device.name for device in others if device.all_reduces is None)
    return (
        f"What links reach was measured {' and '.join(measured)}; {assumed} are assumed to reach the same share of "
        f"theirs, with the same latency, and {by_model} what NCCL's own model of its speed says. Nobody has measured "
        f"KV on its way from prefill to decode: it goes over {FleetOptions().ports}."
    )


def _of_trace(name: str, found: dict[str, Any]) -> list[str]:
    """A trace's part of the page."""
    options, rows = found["options"], found["deployments"]
    kinds = len({row["latency"] for row in rows})
    scale = f", at {options['rate_scale']:g} times their rate" if "rate_scale" in options else ""
    are_apart = any(row.get("prefill") for row in rows)
    heads = ["GPUs", "a replica", "replicas", "tokens a step", "$ an hour", "one fewer misses"]
    if are_apart:
        heads.insert(3, "prefill and decode")
    cells = [
        [
            " and ".join(f"{count} x {kind}" for kind, count in row["gpus"].items()),
            row["latency"].partition("@")[2].partition(":")[2].replace(":", ", "),
            str(row["replicas"]),
            f"{row['max_num_batched_tokens']:,}",
            f"{row['price_per_hour']:.2f}",
            "; ".join(row["missed"]).replace("<=", "≤") or "there are none fewer",
        ]
        for row in rows
    ]
    for row, of_row in zip(rows, cells, strict=True):
        if are_apart:
            prefill = row["prefill"]
            of_row.insert(3, f"{prefill} and {row['replicas'] - prefill}" if prefill else "together")
    return [
        f"## {name}",
        "",
        f"{found['requests']:,} requests in {found['span_s']:.0f} s{scale}; `{options['objective']}`. {kinds} of "
        f"{found['kinds']} kinds of replica keep it with at most {MOST_GPUS} GPUs.",
        "",
        *table(heads, cells),
        "The three cheapest in words:",
        "",
        *[f"{place}. {row['words']}" for place, row in enumerate(rows[:3], 1)],
        "",
        "Left out:",
        "",
        *[f"- {reason}" for reason in found["left_out"]],
        "",
    ]


def main() -> int:
    """As the command line says."""
    arguments, traces = study_arguments(__doc__)
    if traces is not None:
        results: dict[str, Any] = {
            "command": "python benchmarks/plan.py",
            "words": {"search": SEARCH, "links": _links()},
        }
        with tempfile.TemporaryDirectory() as scratch:
            for name in TRACES:
                folder = (arguments.work or Path(scratch)) / name.lower()
                results[name] = found(name, traces, folder, arguments.jobs)
                say(f"{name}: {len(results[name]['deployments'])} kinds of replica keep the objective")
        write_json(MEASURED, results)
    text = page(json.loads(MEASURED.read_text(encoding="utf-8")))
    return write_or_check({PAGE: text}, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
