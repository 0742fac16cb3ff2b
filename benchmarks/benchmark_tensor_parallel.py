"""Tensor parallelism: tokens a second and milliseconds a token at each number of ranks, and an all-reduce's time.

    python benchmarks/benchmark_tensor_parallel.py [--device cuda] [--model NAME] [--ranks 1,2] [--out FOLDER]

Random weights of a shape that ships. Two workloads: W256, the requests of nano-vllm's own benchmark, or, with
--requests N --tokens M, N requests of M tokens in and out; and one request alone. On CUDA both once more with the
ranks' sums by NCCL. Then a sum over the ranks is timed by its size, on CUDA by the ranks' memory and by NCCL, and a
line is fitted to those that steps make: a time, and one for the bytes that go over the link, as `[collectives]` of
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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from cuda_engine import Work, close, make_llm, throughput
from environment import commit, device_folder, versions
from result_files import write_json
from torch import Tensor, multiprocessing

from twinserve.commands.progress import say
from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.models.source import ModelSource
from twinserve.engine.options import EngineOptions
from twinserve.engine.parallel.group import Group
from twinserve.engine.parallel.shards import Shard
from twinserve.settings.errors import InputError

if TYPE_CHECKING:
    from twinserve.engine.parallel.peer_memory import PeerSums

SIZES = tuple(1 << power for power in range(10, 25, 2))
"""Bytes of the sums on a CPU."""
AT_ONCE = 20
"""Sums that are timed together."""
ROWS = (1, 2, 4, 16, 64, 256, 1024, 2048)
"""Rows of a hidden state of the sums on CUDA."""


def sums_of(size: int, device: str, hidden: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Microseconds of a sum of each size between so many ranks, the median of the repeats, by how it is made: that of a
    Group, "nccl" or "gloo", and on CUDA by the ranks' memory, "peers"."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    common = device, hidden, repeats
    others = [
        context.Process(target=_sum_beside, args=(Shard(rank, size), store.port, *common), daemon=True)
        for rank in range(1, size)
    ]
    for process in others:
        process.start()
    found = _times(Shard(0, size), store, *common)
    for process in others:
        process.join()
    return {
        how: [{"bytes": count, "us": statistics.median(times)} for count, times in by_size.items()]
        for how, by_size in found.items()
    }


def _sum_beside(shard: Shard, port: int, *common: Any) -> None:
    """What a rank other than the first does meanwhile."""
    _times(shard, dist.TCPStore("127.0.0.1", port, is_master=False), *common)


def _times(
    shard: Shard, store: dist.Store, device: str, hidden: int, repeats: int
) -> dict[str, dict[int, list[float]]]:
    """Microseconds of each repeat, by how a sum is made and by bytes."""
    torch.set_num_threads(1)
    own = torch.device("cuda", shard.rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(own)
    group = Group(shard, dist.PrefixStore("timing", store), own)
    if device == "cpu":
        found = {"gloo": {count: _times_of(group, count, repeats) for count in SIZES}}
    else:
        states = [torch.zeros(rows, hidden, dtype=torch.bfloat16, device=own) for rows in ROWS]
        found = {"nccl": {state.nbytes: _times_of(group, state.nbytes, repeats) for state in states}}
        if (sums := group.peer_sums(torch.bfloat16, ROWS[-1], hidden, AT_ONCE + 1)) is not None:
            found["peers"] = {
                state.nbytes: _peer_times(sums, state, repeats) for state in states if sums.has(len(state))
            }
    group.abort()
    return found


def _times_of(group: Group, count: int, repeats: int) -> list[float]:
    """Microseconds of each repeat of a sum of so many bytes; on CUDA within a graph, as they are in a step."""
    x = torch.zeros(count // 4, device=group.device)

    def several() -> None:
        for _ in range(AT_ONCE):
            group.sum(x)

    if x.device.type == "cuda":
        return _in_a_graph(several, repeats)
    several()
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        several()
        found.append((time.perf_counter() - begun) / AT_ONCE * 1e6)
    return found


def _peer_times(sums: PeerSums, residual: Tensor, repeats: int) -> list[float]:
    """Microseconds of each repeat of a sum by the ranks' memory, which is added to `residual`."""
    from twinserve.engine.kernels.peer_sums import add_peers

    def several() -> None:
        sums.begin()
        for number in range(1, 1 + AT_ONCE):
            add_peers(sums.sum(number, len(residual)), residual, early=False)

    return _in_a_graph(several, repeats)


def _in_a_graph(several: Callable[[], None], repeats: int) -> list[float]:
    """Microseconds of one of AT_ONCE in each repeat of a graph of them."""
    several()
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


def served(size: int, arguments: argparse.Namespace, work: Work, *, by_memory: bool = True) -> dict[str, Any]:
    """The workload and one request alone at a number of ranks, which sum by their memory or not."""
    options: dict[str, Any] = {"device": arguments.device, "tensor_parallel_size": size}
    if not by_memory:
        options["graph_options"] = GraphOptions(peer_sums=False)
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
    how = "" if by_memory else ", sums by NCCL"
    say(f"{size} ranks{how}: {found['output_tok_s']:,.0f} tokens/s; alone {found['ms_a_token']:.2f} ms a token")
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
    shared = [size for size in sizes if size > 1]
    by_nccl = [served(size, arguments, work, by_memory=False) for size in shared if arguments.device == "cuda"]
    hidden = ModelSource.of(arguments.model, EngineOptions.load({"load_format": "dummy"})).config.hidden_size
    sums = {size: sums_of(size, arguments.device, hidden, arguments.repeats) for size in shared}
    found = {
        "benchmark": "tensor-parallel",
        "device": device_folder(arguments.device),
        "model": arguments.model,
        "workload": f"{arguments.requests} of {arguments.tokens} in and out" if arguments.requests else "W256",
        "load_before": load,
        "repeats": arguments.repeats,
        "cases": cases,
        "cases_by_nccl": by_nccl,
        "sums": {str(size): times for size, times in sums.items()},
        "collectives": {str(size): fitted_line(size, list(times.values())[-1]) for size, times in sums.items()},
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
