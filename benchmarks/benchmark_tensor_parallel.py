"""Tensor parallelism: tokens a second and milliseconds a token at each number of ranks, and an all-reduce's time.

    python benchmarks/benchmark_tensor_parallel.py [--device cuda] [--model NAME] [--ranks 1,2] [--out FOLDER]

Random weights of a shape that ships. Two workloads: W256, the requests of nano-vllm's own benchmark, or, with
--requests N --tokens M, N requests of M tokens in and out; and one request alone. Around them an all-reduce of each
size is timed, and a line is fitted to it: a time, and one for the bytes that go over the link, as `[collectives]` of
twinserve/data/devices.toml has them. With --device-file, on a CPU, a file for `--latency roofline:MODEL@FILE:tp=N` is
written: what products of matrices, the all-reduces and the host's part of the steps show of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cuda_engine import Work, close, make_llm, throughput
from environment import commit, device_folder, versions
from result_files import write_json
from torch import Tensor, multiprocessing

from twinserve.commands.progress import say
from twinserve.engine.parallel.group import Group
from twinserve.engine.parallel.shards import Shard
from twinserve.settings.errors import InputError

SIZES = tuple(1 << power for power in range(10, 25, 2))
"""Bytes of the all-reduces."""
AT_ONCE = 20
"""All-reduces that are timed together."""


def all_reduces(size: int, device: str, repeats: int) -> list[dict[str, float]]:
    """Microseconds of an all-reduce of each of SIZES between so many ranks, the median of the repeats."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_reduce_beside, args=(Shard(rank, size), store.port, device, repeats), daemon=True)
        for rank in range(1, size)
    ]
    for process in others:
        process.start()
    found = _times(Shard(0, size), store, device, repeats)
    for process in others:
        process.join()
    return [{"bytes": count, "us": statistics.median(times)} for count, times in zip(SIZES, found, strict=True)]


def _reduce_beside(shard: Shard, port: int, device: str, repeats: int) -> None:
    """What a rank other than the first does meanwhile."""
    _times(shard, dist.TCPStore("127.0.0.1", port, is_master=False), device, repeats)


def _times(shard: Shard, store: dist.Store, device: str, repeats: int) -> list[list[float]]:
    """Microseconds of each repeat, by size."""
    torch.set_num_threads(1)
    own = torch.device("cuda", shard.rank) if device == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    group = Group(shard, dist.PrefixStore("timing", store), own)
    found = [_times_of(group, torch.zeros(count // 4, device=own), repeats) for count in SIZES]
    group.abort()
    return found


def _times_of(group: Group, x: Tensor, repeats: int) -> list[float]:
    """Microseconds of each repeat; on CUDA within a graph, as they are in a step."""

    def several() -> None:
        for _ in range(AT_ONCE):
            group.sum(x)

    several()
    if x.device.type == "cpu":
        found = []
        for _ in range(repeats):
            begun = time.perf_counter()
            several()
            found.append((time.perf_counter() - begun) / AT_ONCE * 1e6)
        return found
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        several()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) * 1e3 / AT_ONCE for first, second in zip(events, events[1:], strict=False)]


def fitted_line(size: int, measured: list[dict[str, float]]) -> dict[str, float]:
    """`[collectives]` of a device: least squares of the relative error, neither number below zero."""
    from scipy.optimize import nnls

    moved = np.array([2 * (size - 1) / size * one["bytes"] for one in measured])
    ns = np.array([one["us"] * 1e3 for one in measured])
    (fixed_ns, byte_ns), _ = nnls(np.stack((1 / ns, moved / ns), axis=1), np.ones_like(ns))
    link = 1e9 / byte_ns if byte_ns > 0 else float("inf")
    return {"ranks": size, "all_reduce_ns": round(fixed_ns, 1), "link": round(link, 1)}


def products(repeats: int) -> dict[str, float]:
    """Bytes a second of float32 weights in a product with one row, and operations a second in one with many; one
    thread of a CPU."""
    torch.set_num_threads(1)
    weight = torch.randn(4096, 4096)
    found = {}
    for name, rows, amount in (("bandwidth", 1, weight.nbytes), ("flops", 256, 2 * 256 * weight.numel())):
        x, times = torch.randn(rows, 4096), []
        for _ in range(1 + repeats):
            begun = time.perf_counter()
            x @ weight.T
            times.append(time.perf_counter() - begun)
        found[name] = amount / statistics.median(times[1:])
    return found


def served(size: int, arguments: argparse.Namespace, work: Work) -> dict[str, Any]:
    """The workload and one request alone at a number of ranks."""
    options: dict[str, Any] = {"device": arguments.device, "tensor_parallel_size": size}
    if arguments.device == "cpu":
        options |= {"dtype": "float32", "threads": 1}
    llm = make_llm(arguments.model, **options)
    if arguments.device == "cuda":
        llm.warm_up()
    alone = Work.of_lengths([(16, arguments.alone)])
    one = [throughput(llm, alone) for _ in range(1 + arguments.repeats)][1:]
    many = [throughput(llm, work) for _ in range(arguments.repeats)]
    name = llm.device_name
    close(llm)
    found = {
        "ranks": size,
        "machine": name,
        "output_tok_s": statistics.median(found["output_tok_s"] for found in many),
        "ms_a_token": statistics.median(1e3 * found["seconds"] / found["output_tokens"] for found in one),
        "repeats": {"many": many, "alone": one},
    }
    say(f"{size} ranks: {found['output_tok_s']:,.0f} tokens/s; alone {found['ms_a_token']:.2f} ms a token")
    return found


def benchmark_tensor_parallel(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is measured at each number of ranks."""
    sizes = arguments.ranks
    if arguments.device == "cuda" and max(sizes) > torch.cuda.device_count():
        problem = f"but torch finds {torch.cuda.device_count()} CUDA devices"
        raise InputError(problem, field="ranks", value=max(sizes))
    lengths = [(arguments.tokens, arguments.tokens)] * arguments.requests
    work = Work.of_lengths(lengths) if arguments.requests else Work.w256()
    load = os.getloadavg()[0]
    cases = [served(size, arguments, work) for size in sizes]
    reduces = {size: all_reduces(size, arguments.device, arguments.repeats) for size in sizes if size > 1}
    found = {
        "benchmark": "tensor-parallel",
        "device": device_folder(arguments.device),
        "model": arguments.model,
        "workload": f"{arguments.requests} of {arguments.tokens} in and out" if arguments.requests else "W256",
        "load_before": load,
        "repeats": arguments.repeats,
        "cases": cases,
        "all_reduce": {str(size): times for size, times in reduces.items()},
        "collectives": {str(size): fitted_line(size, times) for size, times in reduces.items()},
        "versions": versions(),
        "commit": arguments.commit or commit(),
    }
    if arguments.device == "cpu":
        found["products"] = products(5 * arguments.repeats)
        found["host_ns"] = _host_ns(cases[0]["repeats"]["alone"])
    else:
        found["card"] = torch.cuda.get_device_name()
        found["link"] = _topology()
    return found


def _host_ns(alone: list[dict[str, Any]]) -> int:
    """What the host takes beside a step, as one request alone shows it."""
    return round(statistics.median(one["seconds"] * (1 - one["device_share"]) / one["steps"] for one in alone) * 1e9)


def device_file(found: dict[str, Any]) -> str:
    """The TOML of this machine as a device of which each rank is a thread; see `twinserve.sim.devices.Device`.

    A roofline counts two bytes a number, and here a number has four: a byte of it is two of these.
    """
    size = max(found["collectives"], key=int)
    line = found["collectives"][size]
    memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (1 << 20)
    source = f"benchmark_tensor_parallel.py, commit {found['commit']}, load {found['load_before']:.1f}"
    return f"""name = "CPU thread"
bandwidth = {found["products"]["bandwidth"] / 2:.4g}
flops = {found["products"]["flops"]:.4g}
memory_mib = {memory_mib}
link = {line["link"] / 2:.4g}
host_ns = {found["host_ns"]}
host_seq_ns = 0
source = "{source}"

[shares]
device = "CPU thread"
bandwidth = 1.0
flops = 1.0
attention_bandwidth = 1.0
attention_flops = 1.0
layer_ns = 0
source = "{source}"

[collectives]
ranks = {line["ranks"]}
all_reduce_ns = {line["all_reduce_ns"]}
link = {line["link"] / 2:.4g}
source = "{source}"
"""


def _topology() -> str:
    """How the driver says that the devices are joined."""
    import subprocess

    told = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def main() -> int:
    """As the command line says."""
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parsing.add_argument("--model", default="smollm2-135m-shape", help="a shape that ships")
    parsing.add_argument("--ranks", type=_numbers, default=[1, 3], help="such as 1,2,4")
    parsing.add_argument("--requests", type=int, default=0, help="0: W256")
    parsing.add_argument("--tokens", type=int, default=32, help="in and out, of each of --requests")
    parsing.add_argument("--alone", type=int, default=64, help="tokens that the request alone generates")
    parsing.add_argument("--repeats", type=int, default=3)
    parsing.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    parsing.add_argument("--out", type=Path, default=None, help="a folder of results")
    parsing.add_argument("--device-file", type=Path, help="write this machine's CPU as a device")
    arguments = parsing.parse_args()
    if arguments.device_file is not None and (arguments.device != "cpu" or max(arguments.ranks) < 2):
        parsing.error("--device-file: expected a CPU, and more than one rank")
    try:
        found = benchmark_tensor_parallel(arguments)
    except InputError as error:
        say(f"benchmark_tensor_parallel.py: {error}")
        return 2
    print(json.dumps(found, indent=2))
    if arguments.device_file is not None:
        arguments.device_file.write_text(device_file(found), encoding="utf-8")
    if arguments.out is not None:
        write_json(arguments.out / found["device"] / f"tensor-parallel-{found['model']}.json", found)
    return 0


def _numbers(text: str) -> list[int]:
    """Numbers of ranks from "1,2"."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers of ranks with commas")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
