"""All seven benchmarks, each in a process of its own and within a time limit: one that fails takes none with it.

    python benchmarks/run_all.py [--device cuda] [--model NAME] [--shape NAME] [--cycles 1,2] [--out FOLDER]

Each prints its table as it goes; the JSON files are FOLDER/CARD/cycleN-MODEL.json, FOLDER being a scratch folder unless
given. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from command_line import options_for, parser, subjects
from result_files import scratch_folder

from twinserve.commands.progress import say

CYCLES = range(1, 8)


def main() -> int:
    parsing = parser((__doc__ or "").splitlines()[0])
    parsing.add_argument("--cycles", type=cycles, default=list(CYCLES), help="such as 1,2; all unless given")
    parsing.add_argument("--limit", type=float, default=600.0, help="seconds for one cycle of one model")
    arguments = parsing.parse_args()
    arguments.out = arguments.out or scratch_folder()
    failures = 0
    for name, load_format in subjects(arguments):
        for cycle in arguments.cycles:
            begun = time.perf_counter()
            outcome = run(cycle, name, load_format, arguments)
            say(f"cycle {cycle}, {name}: {outcome}, {time.perf_counter() - begun:.0f} s")
            failures += outcome != "done"
    print(f"results: {arguments.out}")
    return 1 if failures else 0


def cycles(text: str) -> list[int]:
    """Numbers of cycles from "1,2"."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not set(numbers) <= set(CYCLES):
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers from {CYCLES[0]} to {CYCLES[-1]} with commas")
    return numbers


def run(cycle: int, name: str, load_format: str, arguments: argparse.Namespace) -> str:
    """Run a cycle's benchmark of one model; "done", or what happened instead."""
    script = Path(__file__).with_name(f"benchmark_cycle{cycle}.py")
    command = [sys.executable, str(script), *options_for(name, load_format, arguments), "--out", str(arguments.out)]
    if arguments.commit:
        command += ["--commit", arguments.commit]
    try:
        status = subprocess.run(command, timeout=arguments.limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped at the limit of {arguments.limit:g} s"
    return "done" if status == 0 else f"failed with exit status {status}"


if __name__ == "__main__":
    sys.exit(main())
