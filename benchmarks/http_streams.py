"""Open streams over a simulated server on one core: how far it falls behind, by its own metrics and to its clients.

python benchmarks/http_streams.py --streams 500 --latency roofline:llama-3-8b@h100
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

from environment import command, commit, machine
from http_load import Streamed, scraped, served, stream
from result_files import RESULTS, write_json

LAGS = {"simulation_lag_s": "twinserve:simulation_lag_seconds", "stream_lag_s": "twinserve:stream_lag_seconds"}


async def load(url: str, streams: int, tokens: int, every_s: float) -> dict[str, Any]:
    """Hold so many streams open until each has got so many tokens; what the server and its clients say."""
    bodies = [{"prompt": [number] * 32, "max_tokens": tokens, "ignore_eos": True} for number in range(streams)]
    begun = time.perf_counter()
    asks = [asyncio.ensure_future(stream(url, body)) for body in bodies]
    seen: dict[str, list[float]] = {name: [] for name in LAGS}
    running = []
    while not all(ask.done() for ask in asks):
        await asyncio.sleep(every_s)
        values = await asyncio.to_thread(scraped, url)
        running.append(values["vllm:num_requests_running"])
        for name, metric in LAGS.items():
            seen[name].append(values[metric])
    done: list[Streamed] = [ask.result() for ask in asks]
    wall_s = time.perf_counter() - begun
    values = scraped(url)
    gaps, count = values["vllm:inter_token_latency_seconds_sum"], values["vllm:inter_token_latency_seconds_count"]
    return {
        "streams": streams,
        "whole": sum(one.is_whole for one in done),
        "tokens": tokens,
        "wall_s": round(wall_s, 2),
        "most_open": max(running, default=0),
        "tokens_per_s": round(streams * tokens / wall_s),
        "events_per_token": round(statistics.mean(one.events for one in done) / tokens, 3),
        "simulated_itl_s": round(gaps / count, 5),
        "lag_s": {name: _spread(found) for name, found in seen.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 4),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 4),
        "last": round(values[-1], 4),
    }


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--streams", type=int, default=500)
    parsing.add_argument("--tokens", type=int, default=400, help="of each stream")
    parsing.add_argument("--latency", default="roofline:llama-3-8b@h100")
    parsing.add_argument("--time-scale", type=float, default=1.0)
    parsing.add_argument("--out", type=Path, default=RESULTS / "http-streams.json")
    arguments = parsing.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("http_streams.py: needs two cores, one for the server and one for its clients")
    os.sched_setaffinity(0, set(cores[1:]))
    options = ["--simulate", "--latency", arguments.latency, "--time-scale", str(arguments.time_scale)]
    options += ["--max-num-seqs", str(arguments.streams), "--num-gpu-blocks", "200000"]
    with served(options, {cores[0]}) as url:
        asyncio.run(load(url, arguments.streams, 8, 0.2))  # what is used first is made first
        measured = asyncio.run(load(url, arguments.streams, arguments.tokens, 0.25))
    result = {"machine": machine(), "commit": commit(), "command": command(), "latency": arguments.latency}
    write_json(arguments.out, result | {"time_scale": arguments.time_scale} | measured)
    print(arguments.out.read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
