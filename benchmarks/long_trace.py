"""A week of traffic in one file, 27.3 million rows as Azure's of 2024 has them: seconds and memory of each command.

    python benchmarks/long_trace.py --rows 27303999 --simulated 1000000

The rows are synthetic, and their file lies in a temporary folder. `sim` takes the whole file with --simulated 0, and
its first requests otherwise. Results: benchmarks/results/long-trace.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import ROOT, command, commit, machine
from result_files import RESULTS, write_json

CHUNK = 1 << 18
SIM = ["--latency", "roofline:llama-3-8b@h100:tp=8", "--max-num-seqs", "1024", "--json"]


def write_week(path: Path, rows: int) -> None:
    """So many rows of a week: a daily wave of arrivals, long-tailed lengths."""
    rng = np.random.default_rng(0)
    begun = np.datetime64("2024-05-10T00:00:00.000000")
    days = np.linspace(0, 7, 7 * 24 * 60 + 1)
    passed = days - 0.6 / (2 * np.pi) * np.sin(2 * np.pi * days)  # of the week's requests, in days
    ends = np.append(np.arange(0, rows, CHUNK), rows) / rows * 7
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens")
        for first, (low, high) in zip(range(0, rows, CHUNK), zip(ends[:-1], ends[1:], strict=True), strict=True):
            count = min(CHUNK, rows - first)
            when = np.interp(np.sort(rng.uniform(low, high, count)), passed, days) * 86_400e6
            stamps = np.datetime_as_string(begun + when.astype("timedelta64[us]")).tolist()
            prompts = rng.lognormal(7.0, 1.0, count).astype(int).clip(1, 100_000).tolist()
            outputs = rng.lognormal(4.5, 0.9, count).astype(int).clip(1, 8_000).tolist()
            rows_of = zip(stamps, prompts, outputs, strict=True)
            file.write("".join(map("\r\n%s+00:00,%d,%d".__mod__, rows_of)).replace("T", " "))


def measured(*arguments: Any) -> tuple[dict[str, Any], str]:
    """Seconds and the most memory of a command, and what it printed."""
    line = [sys.executable, "-m", "twinserve", *map(str, arguments)]
    with tempfile.TemporaryFile() as out:
        begun = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1)]
        pid = os.posix_spawn(sys.executable, line, os.environ | {"PYTHONPATH": str(ROOT)}, file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - begun
        out.seek(0)
        printed = out.read().decode()
    if status:
        raise RuntimeError(f"{' '.join(line)}: status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": round(seconds, 1), "peak_mb": round(usage.ru_maxrss / 1024)}, printed


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--rows", type=int, default=27_303_999)
    parsing.add_argument("--simulated", type=int, default=1_000_000, help="requests that sim takes; 0 is all")
    parsing.add_argument("--results", type=Path, default=RESULTS / "long-trace.json")
    arguments = parsing.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        trace, again = Path(scratch) / "week.csv", Path(scratch) / "week.jsonl"
        write_week(trace, arguments.rows)
        limit = ["--limit", arguments.simulated] if arguments.simulated else []
        result: dict[str, Any] = {"machine": machine(), "commit": commit(), "command": command()}
        result |= {"rows": arguments.rows, "bytes": trace.stat().st_size}

        def note(**found: Any) -> None:
            """Keep what was found so far: the whole takes an hour."""
            result.update(found)
            write_json(arguments.results, result)

        stat, printed = measured("trace", "stat", trace, "--json")
        statistics = json.loads(printed)
        note(stat=stat)
        first, _ = measured("trace", "stat", trace, "--limit", 100, "--json")
        note(stat_of_100=first)
        sim, printed = measured("sim", trace, *limit, *SIM)
        note(sim=sim | {"options": [*map(str, limit), *SIM]} | counted(json.loads(printed)))
        convert, _ = measured("trace", "convert", trace, again)
        note(convert=convert | {"bytes": again.stat().st_size})
        stat_again, printed = measured("trace", "stat", again, "--json")
        note(stat_of_converted=stat_again, is_alike=without_trace(json.loads(printed)) == without_trace(statistics))
    print(json.dumps(result, indent=1))
    return 0


def without_trace(statistics: dict[str, Any]) -> dict[str, Any]:
    """Statistics without what names the file."""
    return {name: value for name, value in statistics.items() if name != "trace"}


def counted(summary: dict[str, Any]) -> dict[str, Any]:
    """Of a run, what says how long it was."""
    return {name: summary[name] for name in ("requests", "finished", "duration_s", "steps", "events")}


if __name__ == "__main__":
    raise SystemExit(main())
