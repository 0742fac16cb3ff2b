"""What the simulator takes: seconds and memory of two runs that others were measured on, and how both grow.

    python benchmarks/simulator.py [--json FILE] [--repeats 5] [--points a,b] [--grow 1000,10000,100000,1000000]

- (a) 10,000 requests with the lengths of the Azure conversation trace (cut to 4,096 tokens, prompt and output together;
  shuffled with seed 42), Poisson arrivals at 7.0 requests/s, one replica: a budget of 512 tokens, 512 sequences, blocks
  of 16, no prefix cache (the trace does not say what prompts share), Llama-3-8B on an A100 whose shares of the peaks
  and host times are set so that it saturates at 7.6 requests/s.
- (b) The Mooncake conversation trace, all 12,031 requests as they arrive, 8 replicas round robin: prefix cache, 8,192
  blocks of 64 each, a budget of 8,192 tokens, Llama-3-8B on an H100.

Each run has a process of its own, on one core. `loop_s` is the simulation from the first arrival to the last answer,
every metric and every row of the record included; `wall_s` the whole process: Python, imports, reading the trace, the
simulation, the record on disk, the summary. `peak_rss_mb` is the process's largest resident set, in 10**6 bytes. Each
is the median of the repeats; growth is measured once.

The traces are looked for in the folder that TWINSERVE_TRACES names.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from environment import command, machine
from result_files import write_json

AZURE, MOONCAKE = "azure/AzureLLMInferenceTrace_conv.csv", "mooncake/conversation_trace.jsonl.gz"
SEED, RATE, MOST_TOKENS = 42, 7.0, 4096
SLOWER = 1.163
"""Times that everything takes longer than RooflineLatency says, so that 7.6 requests/s saturate the replica."""

# Measured on (a) and (b) with others' own code, as shipped.
ELSEWHERE = {
    "Vidur, with its output": {"a": 34.0},
    "Vidur": {"a": 13.3},
    "BLIS": {"a": 13.7},
    "a simulator in Rust": {"a": 6.8, "b": 14.2},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--points", default="a,b", help="which of a and b")
    parser.add_argument("--grow", default="1000,10000,100000,1000000", help="requests of (a); empty for none")
    parser.add_argument("--run", nargs=3, metavar=("POINT", "REQUESTS", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    traces = Path(os.environ.get("TWINSERVE_TRACES", ""))
    if missing := [name for name in (AZURE, MOONCAKE) if not (traces / name).is_file()]:
        print(
            f"simulator.py: TWINSERVE_TRACES is {str(traces)!r}, expected a folder with {missing[0]}", file=sys.stderr
        )
        return 2
    if arguments.run:
        point, num_requests, out = arguments.run
        run_a(traces, int(num_requests), Path(out)) if point == "a" else run_b(traces, Path(out))
        return 0
    results: dict[str, Any] = {
        point: measure(point, 10_000, arguments.repeats) for point in arguments.points.split(",") if point
    }
    if arguments.grow:
        results["growth"] = {size: measure("a", int(size), 1) for size in arguments.grow.split(",")}
    results |= {
        "command": command(),
        "machine": machine(),
        "repeats": arguments.repeats,
        "elsewhere_s": ELSEWHERE,
    }
    print(json.dumps(results, indent=1))
    if arguments.json is not None:
        write_json(arguments.json, results)
    return 0


# --- in the process that is measured ---


def azure_lengths(traces: Path) -> list[tuple[int, int]]:
    """Prompt and output tokens of the Azure conversation trace, cut."""
    from twinserve.traces.readers import read_trace

    lengths = []
    for request in read_trace(traces / AZURE).requests:
        output = min(request.max_tokens, MOST_TOKENS - 1)
        lengths.append((min(request.prompt_tokens, MOST_TOKENS - output), output))
    return lengths


def azure_requests(lengths: list[tuple[int, int]], num_requests: int) -> Iterator[Any]:
    """Requests of (a), made as they are asked for; beyond the trace's 19,366 lengths it is shuffled again."""
    from twinserve.traces.request import Part, Request

    shuffles, gaps = random.Random(SEED), random.Random(SEED)
    shuffled: list[tuple[int, int]] = []
    arrival_s = 0.0
    for number in range(num_requests):
        if not shuffled:
            shuffles.shuffle(lengths)
            shuffled = lengths[::-1]
        prompt, output = shuffled.pop()
        yield Request(number, round(arrival_s * 1e9), (Part(number, 0, prompt),), output)
        arrival_s += gaps.expovariate(RATE)


def run_a(traces: Path, num_requests: int, out: Path) -> None:
    from twinserve.settings.build_core import Settings
    from twinserve.sim.roofline import DEVICES, RooflineLatency
    from twinserve.sim.shapes import SHAPES
    from twinserve.worlds.run import run_sim
    from twinserve.worlds.workload import Workload

    a100 = DEVICES["a100"]
    shares = {name: getattr(a100, name) / SLOWER for name in ("bandwidth_share", "flops_share")}
    host = {name: round(getattr(a100, name) * SLOWER) for name in ("host_ns", "host_seq_ns")}
    latency = RooflineLatency(SHAPES["llama-3-8b"], replace(a100, **shares, **host))
    settings = Settings(
        max_num_batched_tokens=512,
        max_num_seqs=512,
        block_size=16,
        num_gpu_blocks=latency.num_blocks(16),
        enable_prefix_caching=False,
    )
    facts = {"path": AZURE, "seed": SEED, "rate": RATE, "requests": num_requests}
    workload = Workload(azure_requests(azure_lengths(traces), num_requests), facts, 0, 0)  # type: ignore[arg-type]
    summary = run_sim(workload, settings, latency, latency_facts={"name": latency.name}, out=out)
    print(json.dumps(summary))


def run_b(traces: Path, out: Path) -> None:
    from twinserve.planning.fleets import FleetOptions
    from twinserve.worlds.run import run_fleet
    from twinserve.worlds.workload import load_workload

    fleet = FleetOptions(replicas=8, router="round-robin")
    settings = {"block_size": 64, "num_gpu_blocks": 8192, "max_num_batched_tokens": 8192}
    replicas, _ = fleet.build_replicas(settings, latency="roofline:llama-3-8b@h100")
    workload = load_workload(traces / MOONCAKE, {})
    print(json.dumps(run_fleet(workload, replicas, fleet.build_router(), router_facts=fleet.router_facts, out=out)))


# --- in the process that measures ---


def measure(point: str, num_requests: int, repeats: int) -> dict[str, Any]:
    """Run a point some times, each in its own process; medians, and what it did."""
    runs = []
    for _ in range(repeats):
        folder = Path(tempfile.mkdtemp(prefix="simulator-"))
        try:
            runs.append(measured(point, num_requests, folder / "run"))
        finally:
            shutil.rmtree(folder)
        print(f"{point} {num_requests}: {runs[-1]}", file=sys.stderr)
    return runs[0] | {
        name: statistics.median(run[name] for run in runs) for name in ("loop_s", "wall_s", "peak_rss_mb")
    }


def measured(point: str, num_requests: int, out: Path) -> dict[str, Any]:
    """One run in its own process."""
    command = [sys.executable, __file__, "--run", point, str(num_requests), str(out)]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} ended with exit status {process.returncode}")
    summary = json.loads(output)
    if summary["finished"] != summary["requests"]:
        raise RuntimeError(f"{summary['finished']} of {summary['requests']} requests were served")
    return {
        "loop_s": summary["wall_s"],
        "wall_s": round(wall_s, 3),
        "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
        "requests": summary["requests"],
        "steps": summary["steps"],
        "events": summary["events"],
        "mixed_steps": sum(map(num_mixed_steps, out.rglob("steps.jsonl"))),
        "mean_running": round(summary["output_tokens"] / summary["steps"], 1),
        "record_mb": round(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6, 1),
    }


def num_mixed_steps(path: Path) -> int:
    """Steps of a record with prompt tokens and decodes."""
    pattern = re.compile(r'"count":(\d+).*?"prompt_tokens":(\d+),"decode_tokens":(\d+)')
    total = 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            count, prompt, decode = map(int, pattern.search(line).groups())  # type: ignore[union-attr]
            total += count if prompt and decode else 0
    return total


if __name__ == "__main__":
    sys.exit(main())
