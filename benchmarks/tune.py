"""The page docs/studies/tune.md: what `twinserve tune` answers for two public traces, each at one load.

    python benchmarks/tune.py --traces FOLDER [--page docs/studies/tune.md] [--jobs 2]

FOLDER is that of the public traces. Each trace's requests arrive at random at a rate, on one H200 that serves
llama-3-8b with vLLM 0.33's defaults; the search sees three seeds and is judged on three others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import page_arguments, table

from twinserve.planning.objectives import Objective
from twinserve.planning.parallel import Workers
from twinserve.planning.sweep import load_plan
from twinserve.planning.tune import Tuning, tune

LATENCY, LIKE, SEEDS = "roofline:llama-3-8b@h200", "vllm-0.33@h200", 3
TRACES: dict[str, tuple[str, dict[str, Any]]] = {
    "Azure": ("azure/AzureLLMInferenceTrace_conv.csv", {"limit": 2000}),
    "Mooncake": ("mooncake/conversation_trace.jsonl.gz", {"limit": 500}),
}
CASES: dict[str, tuple[tuple[float, str], ...]] = {
    "Azure": ((14.0, "p99 TTFT <= 1 s and p99 TPOT <= 15 ms"),),
    "Mooncake": ((0.2, "p99 TTFT <= 10 s and p99 TPOT <= 25 ms"),),
}

HEAD = """# Which flags suit a trace

`python benchmarks/tune.py` writes this page. One H200 serves llama-3-8b (`{latency}`) with the
defaults of vLLM 0.33 on it; the first {azure:,} requests of Azure's conversation trace and the first {mooncake:,} of
Mooncake's arrive at random. What is made small is the share of its limit that an objective's worst term takes. Each
search sees {seeds} seeds; what it finds is judged on {seeds} others. The gain is the mean by which the share became
less there, beside the interval that holds it with a confidence of 95%. For a trace of one's own:

    twinserve tune TRACE --latency {latency} --like {like} --rate {rate:g} --seeds {seeds} \
--arrivals poisson --objective "{objective}"
"""


def answer(traces: Path, trace: str, rate: float, objective: str, jobs: int | None) -> Tuning:
    """What the search finds for a trace at a rate."""
    path, options = TRACES[trace]
    values = {"trace": str(traces / path), "latency": LATENCY, "like": LIKE, "rate": rate, "arrivals": "poisson"}
    points = load_plan(None, values | options | {"seeds": SEEDS, "objective": objective}).points
    with Workers(jobs) as workers:
        return tune(points, Objective.parse(objective), workers)


def cells(trace: str, rate: float, objective: str, found: Tuning) -> list[str]:
    """A line of the page's table."""
    said = f"`{found.flags}`" if found.helps else "none helps" + (f"; best `{found.flags}`" if found.changed else "")
    limits = "-" if found.interval is None or not found.changed else "{:.1%} to {:.1%}".format(*found.interval)
    shares = f"{found.before:.1%}", f"{found.after:.1%}"
    return [trace, f"{rate:g}", objective, said, *shares, f"{found.gain:.1%}", limits, str(found.num_runs)]


def main() -> None:
    arguments = page_arguments(__doc__, "docs/studies/tune.md")
    rows = []
    for trace, cases in CASES.items():
        for rate, objective in cases:
            found = answer(arguments.traces, trace, rate, objective, arguments.jobs)
            rows.append(cells(trace, rate, objective, found))
            print(" | ".join(rows[-1]), flush=True)
    heads = ["trace", "requests/s", "objective", "answer", "share before", "with it", "gain", "interval", "simulations"]
    limits = {trace.lower(): options["limit"] for trace, (_, options) in TRACES.items()}
    rate, objective = CASES["Azure"][0]
    head = HEAD.format(latency=LATENCY, like=LIKE, seeds=SEEDS, rate=rate, objective=objective, **limits)
    arguments.page.write_text("\n".join([head.rstrip("\n"), "", *table(heads, rows)]), encoding="utf-8")


if __name__ == "__main__":
    main()
