"""What the simulator takes: seconds and memory of two runs that others were measured on, and how both grow.

    python benchmarks/simulator.py [--json FILE] [--repeats 5] [--points a,b,c] [--grow 1000,10000,100000,1000000]
        [--other NAME=FOLDER ...] [--peer PYTHON]

- (a) 10,000 requests with the lengths of the Azure conversation trace (cut to 4,096 tokens, prompt and output together;
  shuffled with seed 42), Poisson arrivals at 7.0 requests/s, one replica: a budget of 512 tokens, 512 sequences, blocks
  of 16, no prefix cache (the trace does not say what prompts share), Llama-3-8B on an A100 whose shares of the peaks
  and host times are set so that it saturates at 7.6 requests/s.
- (b) The Mooncake conversation trace, all 12,031 requests as they arrive, 8 replicas round robin: prefix cache, 8,192
  blocks of 64 each, a budget of 8,192 tokens, Llama-3-8B on an H100.
- (c) As (b), on 4 replicas for prefill and 4 for decode, with 200 GB of CPU memory behind the prefix cache of each of
  the first, and behind these a store that they share.

With --other, other copies of twinserve run the same in turns with the one that is imported: another commit's checkout
(`git worktree add --detach FOLDER COMMIT`) or a compiled wheel, such as `make test-compiled` leaves in
build/compiled/site; PYTHONPATH chooses the one that is imported. With --peer, so does ai-dynamo's simulator, by a
Python that has it: the same requests and settings, but the latency is its own polynomial; it prints a summary and
writes no record.

Each run has a process of its own, all on the same core. `loop_s` is the simulation from the first arrival to the last
answer, every metric and every row of the record included; `wall_s` the whole process: Python, imports, reading the
trace, the simulation, the record on disk, the summary; `cpu_s` is how long of that it had the core. `peak_rss_mb` is
the process's largest resident set, in 10**6 bytes. Each is the median of the repeats; growth is measured once.

The traces are looked for in the folder that TWINSERVE_TRACES names.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from copies import Copy, add_other, medians, stay_on_one_core, with_imported
from environment import command, machine
from result_files import write_json

AZURE, MOONCAKE = "azure/AzureLLMInferenceTrace_conv.csv", "mooncake/conversation_trace.jsonl.gz"
SEED, RATE, MOST_TOKENS = 42, 7.0, 4096
PEER = "ai-dynamo"
HASHED_TOKENS = 512
"""Prompt tokens of a hash in Mooncake's format."""
SLOWER = 1.163
"""Times that everything takes longer than RooflineLatency says, so that 7.6 requests/s saturate the replica."""

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"max_num_batched_tokens": 512, "max_num_seqs": 512, "block_size": 16, "enable_prefix_caching": False},
    "b": {"max_num_batched_tokens": 8192, "max_num_seqs": 256, "block_size": 64, "num_gpu_blocks": 8192},
}
SETTINGS["c"] = SETTINGS["b"]
WORKERS = {"a": 1, "b": 8}
FLEETS: dict[str, dict[str, Any]] = {
    "b": {"replicas": WORKERS["b"]},
    "c": {
        "prefill_replicas": 4,
        "decode_replicas": 4,
        "kv_tier": ["cpu:200:50:10", "store:4000:25:500:shared"],
    },
}

# Measured on (a) and (b) with others' own code, as shipped, by November 2026; of the first three no version was noted.
ELSEWHERE = {
    "Vidur, with its output": {"a": 34.0},
    "Vidur": {"a": 13.3},
    "BLIS": {"a": 13.7},
    "ai-dynamo 1.3.1": {"a": 6.8, "b": 14.2},
}

Measured = Callable[[str, int], dict[str, Any]]
"""Runs a point with so many requests, once."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--points", default="a,b,c", help="which of a, b and c; the peer runs none but a and b")
    parser.add_argument("--grow", default="1000,10000,100000,1000000", help="requests of (a); empty for none")
    add_other(parser)
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="a Python that has ai-dynamo")
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
        run_a(traces, int(num_requests), Path(out)) if point == "a" else run_fleet_of(point, traces, Path(out))
        return 0
    stay_on_one_core()
    load_before = os.getloadavg()[0]
    copies = with_imported(arguments.other, parser)
    own = copies[-1]
    with tempfile.TemporaryDirectory(prefix="simulator-") as name:
        runners: dict[str, Measured] = {copy.name: partial(run_copy, copy) for copy in copies}
        if arguments.peer is not None:
            runners[PEER] = partial(run_peer, arguments.peer, write_peer_traces(traces, Path(name)))
        points = [point for point in arguments.points.split(",") if point]
        measured = measure(runners, points, 10_000, arguments.repeats)
    results: dict[str, Any] = measured.pop(own.name)
    if arguments.grow:
        sizes = arguments.grow.split(",")
        results["growth"] = {
            size: measure({own.name: runners[own.name]}, ["a"], int(size), 1)[own.name]["a"] for size in sizes
        }
    results |= {
        "policies": own.name,
        "others": measured,
        "command": command(),
        "date": date.today().isoformat(),
        "machine": machine(),
        "load_before": load_before,
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
    from twinserve.sim.devices import DEVICES, PEAKS
    from twinserve.sim.model_configs import SHAPES
    from twinserve.sim.roofline import RooflineLatency
    from twinserve.worlds.run import run_sim
    from twinserve.worlds.workload import Workload

    a100 = DEVICES["a100"]
    bandwidth, flops = 0.92 / SLOWER, 0.73 / SLOWER
    given = {"bandwidth": bandwidth, "flops": flops, "attention_bandwidth": bandwidth, "attention_flops": flops}
    shares = PEAKS.model_copy(update=given | {"source": "given, to saturate at RATE"})
    host = {name: round(getattr(a100, name) * SLOWER) for name in ("host_ns", "host_seq_ns")}
    latency = RooflineLatency(SHAPES["llama-3-8b"], a100.model_copy(update=host | {"shares": shares}))
    settings = Settings(**SETTINGS["a"], num_gpu_blocks=latency.num_blocks(16))
    facts = {"path": AZURE, "seed": SEED, "rate": RATE, "requests": num_requests}
    workload = Workload(azure_requests(azure_lengths(traces), num_requests), facts, 0, 0)  # type: ignore[arg-type]
    summary = run_sim(workload, settings, latency, latency_facts={"name": latency.name}, out=out)
    print(json.dumps(summary))


def run_fleet_of(point: str, traces: Path, out: Path) -> None:
    from twinserve.planning.fleets import FleetOptions
    from twinserve.worlds.workload import load_workload

    fleet = FleetOptions.load(FLEETS[point] | {"router": "round-robin"})
    replicas, _ = fleet.build_replicas(SETTINGS[point], latency="roofline:llama-3-8b@h100", like="own")
    print(json.dumps(fleet.serve(load_workload(traces / MOONCAKE, {}), replicas, out=out)))


# --- in the process that measures ---


def measure(runners: dict[str, Measured], points: list[str], num_requests: int, repeats: int) -> dict[str, Any]:
    """Run the points some times, all in turns; by runner and point the medians, and what it did."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {point: [] for point in points} for name in runners}
    for _ in range(repeats):
        for point in points:
            for name, run in runners.items():
                if name == PEER and point not in WORKERS:
                    continue
                runs[name][point].append(run(point, num_requests))
                print(f"{name}, {point} {num_requests}: {runs[name][point][-1]}", file=sys.stderr)
    return {
        name: {point: medians(found) for point, found in by_point.items() if found} for name, by_point in runs.items()
    }


def run_copy(copy: Copy, point: str, num_requests: int) -> dict[str, Any]:
    """One run of a copy of twinserve in its own process."""
    with tempfile.TemporaryDirectory(prefix="simulator-") as name:
        out = Path(name) / "run"
        command = [*copy.command(Path(__file__)), "--run", point, str(num_requests), str(out)]
        summary, taken = run_process(command, copy.environment())
        return taken | {
            "requests": summary["requests"],
            "steps": summary["steps"],
            "events": summary["events"],
            "mixed_steps": sum(map(num_mixed_steps, out.rglob("steps.jsonl"))),
            "mean_running": round(summary["output_tokens"] / summary["steps"], 1),
            "record_mb": round(sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6, 1),
        }


def run_peer(python: Path, traces: dict[str, tuple[Path, dict[str, Any]]], point: str, _: int) -> dict[str, Any]:
    """One run of ai-dynamo's simulator in its own process, of the traces that were written for it."""
    trace, engine = traces[point]
    script = Path(__file__).with_name("dynamo_replay.py")
    options = ["--engine", json.dumps(engine), "--workers", str(WORKERS[point])]
    summary, taken = run_process([str(python), str(script), str(trace), *options], dict(os.environ))
    return taken | {name: summary[name] for name in ("requests", "version")}


def run_process(command: list[str], environment: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a process that prints a summary: that, and what the process took."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
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
    return summary, {
        "loop_s": summary["wall_s"],
        "wall_s": round(wall_s, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
    }


def write_peer_traces(traces: Path, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The requests of (a) and (b) as Mooncake traces, and the engine's settings; no two prompts of (a) share a hash."""
    from twinserve.sim.devices import DEVICES
    from twinserve.sim.model_configs import SHAPES
    from twinserve.sim.roofline import RooflineLatency

    paths = {point: folder / f"{point}.jsonl" for point in WORKERS}
    hashes = itertools.count()
    with paths["a"].open("w", encoding="utf-8") as lines:
        for request in azure_requests(azure_lengths(traces), 10_000):
            blocks = -(-request.prompt_tokens // HASHED_TOKENS)
            line = {
                "timestamp": request.arrival_ns / 1e6,
                "input_length": request.prompt_tokens,
                "output_length": request.max_tokens,
                "hash_ids": list(itertools.islice(hashes, blocks)),
            }
            lines.write(json.dumps(line) + "\n")
    paths["b"].write_bytes(gzip.decompress((traces / MOONCAKE).read_bytes()))
    blocks_a = RooflineLatency(SHAPES["llama-3-8b"], DEVICES["a100"]).num_blocks(16)
    usual = {"backend": "vllm", "timing_model": {"type": "polynomial"}, "num_gpu_blocks": blocks_a}
    return {point: (path, usual | SETTINGS[point]) for point, path in paths.items()}


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
