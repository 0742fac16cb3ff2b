"""One trace through ai-dynamo's own simulator, offline in virtual time; benchmarks/simulator.py starts it.

    PYTHON benchmarks/dynamo_replay.py TRACE --engine JSON --workers N [--requests FILE]

PYTHON is one that has ai-dynamo; `pip install --no-deps ai-dynamo ai-dynamo-runtime` and typing-extensions are enough.
TRACE is in Mooncake's format, 512 tokens a hash. Workers are chosen round robin. Seconds of the replay are its own.
With --requests, what became of each request is written as a JSON list, in the order of the trace.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--engine", type=json.loads, required=True, help="its engine's settings")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--requests", type=Path, help="write what became of each request")
    arguments = parser.parse_args()
    from dynamo.replay import run_trace_replay

    found = run_trace_replay(
        arguments.trace,
        extra_engine_args={"engine": arguments.engine},
        num_workers=arguments.workers,
        router_mode="round_robin",
        trace_block_size=512,
        **({"capture_per_request": True} if arguments.requests else {}),
    )
    if arguments.requests:
        arguments.requests.write_text(json.dumps(found.per_request), encoding="utf-8")
    report = found.summary
    summary = {
        "version": version("ai-dynamo"),
        "requests": report["num_requests"],
        "finished": report["completed_requests"],
        "wall_s": round(report["wall_time_ms"] / 1e3, 3),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
