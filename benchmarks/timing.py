"""Seconds on the host, and microseconds on a CUDA device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch

from twinserve.commands.progress import say


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that `work` takes, until the device has done its part."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each of `repeats` times each of `ways`, which take turns, so that what else happens on the machine
    meets all of them alike. Each turn is said on stderr. On CUDA each way is gone once before: kernels are loaded, and
    products of matrices chosen, when they are first used."""
    if device == "cuda":
        for work in ways.values():
            timed(work, device)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1, repeats + 1):
        for name, work in ways.items():
            taken[name].append(timed(work, device))
            say(f"    turn {turn} of {repeats}: {name}, {taken[name][-1]:.3g} s")
    return taken


def synchronize(device: str) -> None:
    """Wait for all that was launched on a CUDA device."""
    if device == "cuda":
        torch.cuda.synchronize()


def spread(repeats_s: Seq[float]) -> dict[str, Any]:
    """Repeated seconds, their mean and their median."""
    return {
        "repeats_s": list(repeats_s),
        "mean_s": statistics.fmean(repeats_s),
        "median_s": statistics.median(repeats_s),
    }


def device_us(call: Callable[[], object], repeats: int = 30) -> float:
    """Microseconds of a call on the device, the mean over calls in a row."""
    for _ in range(3):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats * 1e3


def graph_us(calls: Seq[Callable[[], object]], repeats: int = 20) -> float:
    """Microseconds of a call, on the device alone: the median over replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes what the calls read
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    seconds = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    del kept
    return statistics.median(seconds) / len(calls) * 1e6
