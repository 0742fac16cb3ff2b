"""The page docs/studies/anchors.md: this simulator beside others, on the same inputs where they run here.

    python benchmarks/anchors.py [--traces FOLDER] [--dynamo PYTHON] [--aiconfigurator PYTHON] [--page | --check]

Writes benchmarks/results/anchors.json and, from that, docs/studies/anchors.md. FOLDER of the public traces defaults to
$TWINSERVE_TRACES. Each PYTHON has what it names: `pip install --no-deps ai-dynamo ai-dynamo-runtime typing-extensions`,
and `pip install aiconfigurator`. What is not given stays as the JSON has it. --page writes the page from the JSON
alone; with --check nothing is written, and the exit status is 1 where it is another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import ROOT, commit, take_traces, traces_of
from pages import percent, prose, table, write_or_check
from result_files import RESULTS, write_json
from study_plan import AZURE, MOONCAKE

from twinserve.sim.latency import StepFeatures

MEASURED, PAGE = RESULTS / "anchors.json", ROOT / "docs" / "studies" / "anchors.md"
HASHED_TOKENS = 512
"""Prompt tokens of a hash in Mooncake's format."""
PREFILL_MS, DECODE_MS = 30, 15
"""Of a step with prompts, and of one with decodes; one with both takes both. The mocker's own timing model "fixed"."""
COMMON = {"max_num_seqs": 256, "max_num_batched_tokens": 512}
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "Azure": (AZURE, 2000, 1, {"block_size": 16, "num_gpu_blocks": 28_000, "enable_prefix_caching": False}),
    "Azure, a small pool": (
        AZURE,
        2000,
        1,
        {"block_size": 16, "num_gpu_blocks": 1_500, "enable_prefix_caching": False},
    ),
    "Mooncake, prefix cache": (
        MOONCAKE,
        1000,
        8,
        {"block_size": 64, "num_gpu_blocks": 8192, "enable_prefix_caching": True, "max_num_batched_tokens": 8192},
    ),
}
"""Of each: the trace, how many of its requests, replicas behind a round-robin router, and their settings."""
METRICS = ("TTFT", "TPOT", "E2E")
SYSTEMS = {"h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200"}
MODELS = {"meta-llama/Meta-Llama-3.1-8B": ("llama-3-8b", 1), "meta-llama/Meta-Llama-3.1-70B": ("llama-3-70b", 8)}
"""By their names there: ours, and how many devices share them."""
STEPS = (("decode", 1, 1024), ("decode", 16, 1024), ("decode", 128, 1024), ("prompt", 1, 1024), ("prompt", 1, 8192))
"""Kind, batch, and tokens of the context or of the prompt."""
SHOWDOWN = "BLIS, docs/blog/posts/inference-simulator-showdown.md at 0632ebb, April 2026"
PUBLISHED = (
    ("Vidur", "latency, several models and traces on A100 and H100", "less than 9%", "arXiv 2405.05465, abstract"),
    ("BLIS-Evolved", "E2E mean, 38 runs of vLLM 0.15.1", "11.79% (MAPE)", SHOWDOWN),
    ("BLIS-Evolved", "TTFT mean, the same", "22.81% (MAPE)", SHOWDOWN),
    ("BLIS-Evolved", "E2E mean, median of the same", "7.4%", SHOWDOWN),
    ("Vidur", "E2E mean, median of the 4 of them that it covers", "619%", SHOWDOWN),
)
"""What others have published of themselves and of others, against measured runs: whose, of what, how far off, where."""


# --- the Dynamo mocker ---


class Fixed:
    """Steps that take as long as the mocker's "fixed" ones."""

    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        """See `LatencyModel`."""
        took_ms = PREFILL_MS * bool(features.prompt_tokens) + DECODE_MS * bool(features.decode_tokens)
        return 0, took_ms * 10**6


def beside_mocker(traces: Path, python: Path) -> dict[str, Any]:
    """Every case through both simulators, and how far they differ."""
    found: dict[str, Any] = {"prefill_ms": PREFILL_MS, "decode_ms": DECODE_MS, "cases": {}}
    for name, (path, count, workers, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            trace, told = Path(folder) / "trace.jsonl", Path(folder) / "requests.json"
            write_mooncake(traces / path, count, trace)
            engine = COMMON | settings
            theirs, version = run_mocker(python, trace, told, engine, workers)
            ours = run_ours(trace, engine, workers)
        found["version"] = version
        found["cases"][name] = {"requests": count, "workers": workers, "settings": engine} | compared(ours, theirs)
    return found


def write_mooncake(path: Path, count: int, out: Path) -> None:
    """The first requests of a trace in Mooncake's format; those of one without hashes share nothing."""
    from twinserve.traces.readers import read_trace

    if path.name.endswith(".gz"):
        import gzip

        lines = gzip.decompress(path.read_bytes()).decode().splitlines()[:count]
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return
    rows, hashes = [], 0
    for request in read_trace(path).requests[:count]:
        blocks = -(-request.prompt_tokens // HASHED_TOKENS)
        row = {"timestamp": round(request.arrival_ns / 1e6), "input_length": request.prompt_tokens}
        row |= {"output_length": request.max_tokens, "hash_ids": [*range(hashes, hashes + blocks)]}
        rows.append(json.dumps(row) + "\n")
        hashes += blocks
    out.write_text("".join(rows), encoding="utf-8")


def run_mocker(
    python: Path, trace: Path, told: Path, engine: dict[str, Any], workers: int
) -> tuple[list[dict[str, float]], str]:
    """What becomes of each request there, in the order of the trace, in ms; the mocker's version."""
    timing = {"type": "fixed", "prefill_ms": PREFILL_MS, "decode_ms": DECODE_MS}
    options = ["--engine", json.dumps(engine | {"backend": "vllm", "timing_model": timing}), "--workers", str(workers)]
    script = Path(__file__).with_name("dynamo_replay.py")
    command = [str(python), str(script), str(trace), *options, "--requests", str(told)]
    version = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["version"]
    rows = json.loads(told.read_text(encoding="utf-8"))
    return [
        {
            "arrival": row["arrival_time_ms"],
            "first": row["first_token_ms"],
            "last": row["last_token_ms"],
            "tokens": row["output_length"],
            "cached": row["reused_input_tokens"],
        }
        for row in rows
    ], version


def run_ours(trace: Path, engine: dict[str, Any], workers: int) -> list[dict[str, float]]:
    """The same here."""
    from twinserve.settings.build_core import Settings
    from twinserve.sim.routers import RoundRobin
    from twinserve.traces.runs.fleet_record import load_fleet
    from twinserve.worlds.run import ReplicaSpec, run_fleet
    from twinserve.worlds.workload import load_workload

    workload = load_workload(trace, {})
    specs = [ReplicaSpec(Settings.load(engine), Fixed(), {"name": "fixed", "identity": "fixed"})] * workers
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run_fleet(workload, specs, RoundRobin(), router_facts={"name": "round-robin"}, out=out)
        rows = sorted(load_fleet(out).requests, key=lambda row: row["id"])
    return [
        {
            "arrival": row["arrival_ns"] / 1e6,
            "first": row["first_token_ns"] / 1e6,
            "last": row["finish_ns"] / 1e6,
            "tokens": row["output_tokens"],
            "cached": row["cached_tokens"],
        }
        for row in rows
    ]


def compared(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    """How many requests have equal times, and both sides' metrics in ms."""
    begins = min(row["arrival"] for row in ours), min(row["arrival"] for row in theirs)
    keyed = [
        sorted((row["arrival"] - begin, row["first"] - begin, row["last"] - begin, row["tokens"]) for row in rows)
        for rows, begin in zip((ours, theirs), begins, strict=True)
    ]
    equal = sum(all(abs(a - b) < 0.01 for a, b in zip(*pair, strict=True)) for pair in zip(*keyed, strict=True))
    return {
        "equal": equal,
        "cached_tokens": [sum(row["cached"] for row in rows) for rows in (ours, theirs)],
        "metrics": {
            name: {which: [value(rows) for rows in (ours, theirs)] for which, value in _statistics(name)}
            for name in METRICS
        },
    }


def _statistics(name: str) -> list[tuple[str, Any]]:
    def values(rows: list[dict[str, float]]) -> list[float]:
        if name == "TTFT":
            return [row["first"] - row["arrival"] for row in rows]
        if name == "E2E":
            return [row["last"] - row["arrival"] for row in rows]
        return [(row["last"] - row["first"]) / (row["tokens"] - 1) for row in rows if row["tokens"] > 1]

    return [
        ("mean", lambda rows: statistics.fmean(values(rows))),
        ("p99", lambda rows: statistics.quantiles(values(rows), n=100, method="inclusive")[98]),
    ]


# --- AIConfigurator ---


def beside_aiconfigurator(python: Path) -> dict[str, Any]:
    """Steps as its measured operations add up, and as the rooflines here have them."""
    asked = [
        {"system": system, "model": model, "tp": tp, "kind": kind, "batch": batch, "tokens": tokens}
        for model, (_, tp) in MODELS.items()
        for system in SYSTEMS
        for kind, batch, tokens in STEPS
    ]
    script = Path(__file__).with_name("aiconfigurator_steps.py")
    told = subprocess.run([str(python), str(script), json.dumps(asked)], check=True, capture_output=True, text=True)
    answer = json.loads(told.stdout)
    rows = [
        step | {"ours_ms": our_ms(step), "theirs_ms": ms}
        for step, ms in zip(asked, answer["milliseconds"], strict=True)
    ]
    return {"version": answer["version"], "steps": rows}


def our_ms(step: dict[str, Any]) -> float:
    """What the roofline says of a step, the device's time alone."""
    from twinserve.sim.roofline import RooflineLatency

    latency = RooflineLatency.parse(f"{MODELS[step['model']][0]}@{SYSTEMS[step['system']]}:tp={step['tp']}")
    batch, tokens = step["batch"], step["tokens"]
    if step["kind"] == "prompt":
        pairs = tokens * (tokens + 1) // 2
        features = StepFeatures(0, 1, tokens, 0, tokens, pairs, 1, prompts=((0, tokens),))
    else:
        whole = batch * tokens
        features = StepFeatures(0, batch, 0, batch, whole, whole, batch, longest_decode=tokens)
    return latency.step_cost(features)[1] / 1e6


# --- the page ---


def page(results: dict[str, Any]) -> str:
    """docs/studies/anchors.md."""
    lines = [
        "<!-- Written by benchmarks/anchors.py from benchmarks/results/anchors.json. -->",
        "",
        "# Beside other simulators",
        "",
        *prose(
            """What others say of the same inputs, as far as they run on a CPU from the package index, and what they
            have published where they do not. `python benchmarks/anchors.py` makes this page."""
        ),
    ]
    if "mocker" in results:
        lines += _of_mocker(results["mocker"])
    if "aiconfigurator" in results:
        lines += _of_aiconfigurator(results["aiconfigurator"])
    lines += [
        "## By published numbers",
        "",
        *prose(
            """Errors against measured runs, each on inputs of its own; they cannot be held against one another, or
            against [fidelity.md](../fidelity.md) and [fidelity-vllm.md](../fidelity-vllm.md), which say the same of
            this simulator. None of these was run here."""
        ),
        *table(["simulator", "of what", "off by", "published in"], PUBLISHED),
        "## What did not run",
        "",
        *prose(
            """AISimulate 0.13.0 is on the package index as a name alone, which fetches the package from an index of its
            vendor's."""
        ),
    ]
    return "\n".join(lines)


def _of_mocker(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, case in found["cases"].items():
        cells = []
        for metric in METRICS:
            for which in ("mean", "p99"):
                ours, theirs = case["metrics"][metric][which]
                cells.append(f"{ours:,.1f} / {theirs:,.1f} ({percent(ours / theirs - 1)})")
        cached = " / ".join(f"{count:,}" for count in case["cached_tokens"])
        rows.append([name, f"{case['equal']:,} of {case['requests']:,}", cached, *cells])
    heads = [f"{metric} {which}, ms" for metric in METRICS for which in ("mean", "p99")]
    settings = "; ".join(
        f"{name}: {case['workers']} replica{'s' if case['workers'] > 1 else ''}, "
        + ", ".join(f"{setting} {json.dumps(value)}" for setting, value in case["settings"].items())
        for name, case in found["cases"].items()
    )
    return [
        f"## The Dynamo mocker, ai-dynamo {found['version']}",
        "",
        *prose(
            f"""The first requests of each trace as they arrive, the same settings, and the same step times: a step with
            prompts takes {found["prefill_ms"]} ms, one with decodes {found["decode_ms"]} ms, one with both both, which
            is the mocker's timing model `fixed`. So what differs is what was scheduled. Ours / theirs; a request is
            equal whose first and last token come at the same instants. {settings}."""
        ),
        *table(["trace", "equal requests", "cached prompt tokens", *heads], rows),
    ]


def _of_aiconfigurator(found: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    missing: dict[str, None] = {}
    by_kind: dict[tuple[int, str], list[float]] = {}
    for step in found["steps"]:
        name, what = f"{MODELS[step['model']][0]}, {SYSTEMS[step['system']]}, tp={step['tp']}", step["theirs_ms"]
        words = (
            f"{step['batch']} decode{'s' if step['batch'] > 1 else ''} at {step['tokens']:,}"
            if step["kind"] == "decode"
            else f"a prompt of {step['tokens']:,}"
        )
        if isinstance(what, str):
            missing[f"{name}: {what}"] = None
            continue
        off = step["ours_ms"] / what - 1
        by_kind.setdefault((step["tp"], f"{step['kind']}s"), []).append(off)
        rows.append([name, words, f"{step['ours_ms']:.2f}", f"{what:.2f}", percent(off)])
    spans = [f"{kind} at tp={tp} {percent(min(of))} to {percent(max(of))}" for (tp, kind), of in by_kind.items()]
    lines = [
        f"## AIConfigurator {found['version']}",
        "",
        *prose(
            f"""Steps of a vLLM without a scheduler (`static_ctx`, `static_gen`), as the operations that NVIDIA measured
            add up, beside the rooflines here, in ms of the device. Ours differ by: {"; ".join(spans)}."""
        ),
        *table(["model", "step", "ours", "theirs", "difference"], rows),
    ]
    return lines + ([*prose("Without an answer:"), *(f"- {words}" for words in missing), ""] if missing else [])


def main() -> int:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    take_traces(parser)
    parser.add_argument("--dynamo", type=Path, metavar="PYTHON")
    parser.add_argument("--aiconfigurator", type=Path, metavar="PYTHON")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    if not (arguments.page or arguments.check):
        if arguments.dynamo is not None:
            results["mocker"] = beside_mocker(traces_of(parser, arguments), arguments.dynamo)
        if arguments.aiconfigurator is not None:
            results["aiconfigurator"] = beside_aiconfigurator(arguments.aiconfigurator)
        write_json(MEASURED, results | {"commit": commit()})
    text = page(results)
    return write_or_check({PAGE: text}, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
