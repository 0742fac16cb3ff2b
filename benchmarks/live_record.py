"""An hour of synthetic traffic sent over HTTP to a simulated server, recorded, decided again and simulated again.

    python benchmarks/live_record.py --hours 1 --time-scale 0.02

Results: benchmarks/results/live-record.json. The record of --out is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import command, commit, machine
from http_load import Streamed, scraped, served, stream, twinserve
from result_files import RESULTS, write_json

from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Request, TokenMaker
from twinserve.traces.runs.compare import METRICS, value_of
from twinserve.traces.runs.record import load_record

SETTINGS = ["--num-gpu-blocks", "6000", "--max-num-seqs", "64", "--max-model-len", "8192"]


def traffic(hours: float, rate: float) -> list[Request]:
    """Bursty arrivals, long tails, a system prompt for each request out of eight."""
    return generate(
        seed=0,
        num_requests=round(hours * 3600 * rate),
        rate=rate,
        prompt_tokens=LengthSpec.parse("lognormal:300:1:1:4000"),
        output_tokens=LengthSpec.parse("lognormal:120:0.8:1:2000"),
        arrivals="gamma",
        cv=2.0,
        num_system_prompts=8,
        system_prompt_tokens=256,
    )


async def send(url: str, requests: list[Request], time_scale: float) -> list[Streamed]:
    """Send each request when it is due, and read its answer."""
    maker, begun, asks = TokenMaker(1 << 20, 1), time.perf_counter(), []
    for request in requests:
        await asyncio.sleep(request.arrival_ns * time_scale / 1e9 - (time.perf_counter() - begun))
        body = {"prompt": maker.token_ids(request, {}), "max_tokens": request.max_tokens, "ignore_eos": True}
        asks.append(asyncio.ensure_future(stream(url, body)))
    return await asyncio.gather(*asks)


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--hours", type=float, default=1.0)
    parsing.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parsing.add_argument("--time-scale", type=float, default=0.02, help="seconds on the wall for one of the traffic")
    parsing.add_argument("--latency", default="qwen3-0.6b-h100")
    parsing.add_argument("--out", type=Path, help="folder of the record, its twin and the comparison; kept")
    parsing.add_argument("--results", type=Path, default=RESULTS / "live-record.json")
    arguments = parsing.parse_args()
    requests = traffic(arguments.hours, arguments.rate)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        live, twin = folder / "live", folder / "twin"
        how = ["--latency", arguments.latency, *SETTINGS]
        scale = ["--time-scale", str(arguments.time_scale)]
        begun = time.perf_counter()
        with served(["--simulate", *how, *scale, "--record", str(live), "--record-segment-s", "10"]) as url:
            done = asyncio.run(send(url, requests, arguments.time_scale))
            lag_s = scraped(url)["twinserve:simulation_lag_seconds"]
        wall_s = time.perf_counter() - begun
        replayed = json.loads(twinserve("replay", live, "--json"))
        twinserve("sim", live, *how, "--out", twin)
        record, again = load_record(live), load_record(twin)
        result: dict[str, Any] = {
            "machine": machine(),
            "commit": commit(),
            "command": command(),
            "requests": len(record.requests),
            "whole_answers": sum(one.is_whole for one in done),
            "traffic_s": record.run["summary"]["duration_s"],
            "wall_s": round(wall_s, 1),
            "last_lag_s": round(lag_s, 4),
            "segments": len(list((live / "segments").iterdir())),
            "bytes": sum(path.stat().st_size for path in live.rglob("*") if path.is_file()),
            "replay": replayed,
            "simulated_again": {
                "last_digest_is_equal": again.steps[-1].get("digest") == record.steps[-1].get("digest"),
                "metrics": {
                    metric: {
                        "sim": value_of(again.run["summary"], metric),
                        "live": value_of(record.run["summary"], metric),
                    }
                    for metric in METRICS
                },
            },
        }
    write_json(arguments.results, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
