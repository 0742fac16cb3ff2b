"""Kills and full disks in the midst of commands: `python tests/fuzz/faults.py --count 120 --seed 0`.

A command is killed by a signal at some moment of its run, or can write no file longer than so many bytes. What it was
to write is then whole or not there, it has ended by one line and the signal's status, nothing else is left behind,
and the same command works the next time and writes what it writes undisturbed. `--out` keeps the counts; those of the
last run are in benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from malformed import import_all
from outcome import Outcome, keep, run
from valid import LATENCY, Valid, valid_files

SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
"""And the status that each ends a command with."""
DISK = "full disk"
CHANGES = re.compile(rb'"wall_s": ?[0-9.e-]+|took [0-9.]+ s')
"""What is another each time that a command runs."""
OF_CLOCKS = {"run", "profile"}
"""Commands that measure: each time their files say something else."""
GOES_ON = {"sweep", "capacity"}
"""Commands that keep what they have found, and go on with it."""


def commands(valid: Valid) -> dict[str, list[str]]:
    """A call of each command that writes, to `out` in the working directory."""
    sim = ["sim", str(valid.trace), "--latency", LATENCY, "--out", "out"]
    aim = ["--objective", "p99 TTFT <= 1 s", "--jobs", "1", "--tolerance", "0.5"]
    small = ["--num-gpu-blocks", "64", "--max-num-seqs", "8"]
    return {
        "sim": sim,
        "fleet": [*sim, "--replicas", "3"],
        "sweep": ["sweep", str(valid.plan), "--out", "out", "--jobs", "1"],
        "capacity": ["capacity", str(valid.trace), "--latency", LATENCY, *aim, "--out", "out"],
        "make": ["trace", "make", "--requests", "3000", "--out", "out"],
        "convert": ["trace", "convert", str(valid.trace), "out"],
        "report": ["report", str(valid.record), "--out", "out"],
        "export": ["export", str(valid.record), "--format", "csv", "--out", "out"],
        "fit": ["fit", str(valid.real), "--profile", str(valid.profile), "--out", "out"],
        "config init": ["config", "init", "out"],
        "run": ["run", str(valid.trace), "--model", str(valid.model), "--time-scale", "0", *small, "--out", "out"],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in a folder but for locks, without what changes from run to run."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): CHANGES.sub(b"", path.read_bytes()) for path in found}


def is_alike(name: str, found: dict[str, bytes], whole: dict[str, bytes]) -> bool:
    """Is it what the command writes undisturbed?"""
    return found.keys() == whole.keys() if name in OF_CLOCKS else found == whole


def prepared(kind: str | signal.Signals, amount: float) -> Callable[[], None]:
    """What a child does before its work, so that something stops it: so many bytes a file, or a signal in seconds."""
    if isinstance(kind, str):
        return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (int(amount), int(amount)))

    def set_timer() -> None:
        timer = threading.Timer(amount, os.kill, (os.getpid(), kind))
        timer.daemon = True
        timer.start()

    return set_timer


def wrong(
    name: str, kind: str | signal.Signals, outcome: Outcome, left: dict[str, bytes], whole: dict[str, bytes]
) -> str:
    """What should not have been, in words; empty if all was well."""
    is_whole = is_alike(name, left, whole)
    said = [line for line in outcome.err.splitlines() if line.startswith("twinserve: ")]
    if "Traceback" in outcome.err or "Exception ignored" in outcome.err:
        return "a traceback"
    if outcome.status == 0:
        return "" if is_whole else f"ended well, and left {sorted(left)}"
    if not isinstance(kind, str) and outcome.status == -kind and not outcome.err and not left:
        return ""  # at once, before the command had begun
    killed = kind is signal.SIGKILL
    if outcome.status != (2 if isinstance(kind, str) else SIGNALS[kind]):
        return f"status {outcome.status}"
    if not killed and (len(said) != 1 or outcome.err.splitlines()[-1] != said[0]):
        return "not one line"
    stray = [name for name in left if ".partial" in name]
    if stray and not killed:
        return f"left {stray}"
    kept = left.keys() - set(stray)
    if name in GOES_ON:
        broken = [one for one in kept if left[one] != whole.get(one)]
        return f"left {broken}, which is not whole" if broken else ""
    return "" if not kept or is_whole else f"left {sorted(kept)}, which is not whole"


def main() -> None:
    """Disturb commands, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the counts")
    chosen = parser.parse_args()
    import_all()
    ends: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        (kept := Path(scratch) / "valid").mkdir()
        calls = commands(valid_files(kept))
        whole, seconds = {}, {}
        for name, words in calls.items():
            (folder := Path(scratch) / f"whole {name}").mkdir()
            begun = time.monotonic()
            outcome = run(words, folder)
            assert outcome.status in (0, 3) and contents(folder), outcome
            whole[name], seconds[name] = contents(folder), time.monotonic() - begun
        kinds: tuple[str | signal.Signals, ...] = (*SIGNALS, DISK)
        for number in range(chosen.count):
            rng = random.Random(f"{chosen.seed}:{number}")
            name, kind = list(calls)[number % len(calls)], kinds[number // len(calls) % len(kinds)]
            largest = max(map(len, whole[name].values()))
            amount = rng.uniform(0, largest) if isinstance(kind, str) else rng.uniform(0, seconds[name])
            (folder := Path(scratch) / str(number)).mkdir()
            outcome = run(calls[name], folder, prepared(kind, amount))
            left = contents(folder)
            fault = wrong(name, kind, outcome, left, whole[name])
            again = run(calls[name], folder) if outcome.status != 0 and not is_alike(name, left, whole[name]) else None
            if not fault and again is not None:
                found = contents(folder)
                if again.status not in (0, 3) or not is_alike(name, found, whole[name]):
                    fault = f"the next run: status {again.status}, {again.err[-200:]!r}, {sorted(found)}"
            word = kind if isinstance(kind, str) else kind.name
            came = "done already" if outcome.status in (0, 3) else f"status {outcome.status}"
            ends[f"{name}, {word}: {came}"] += 1
            if fault:
                faults.append(f"input {number} of seed {chosen.seed}: {name}, {word} at {amount:.3f}: {fault}")
                print(faults[-1], flush=True)
            shutil.rmtree(folder)
    for end, times in sorted(ends.items()):
        print(f"{end}: {times}")
    disturbed = sum(times for end, times in ends.items() if not end.endswith("done already"))
    print(f"{ends.total()} runs, {disturbed} of them disturbed, {len(faults)} faults")
    if chosen.out is not None:
        found = {"runs": ends.total(), "disturbed": disturbed, "faults": faults, "ends": dict(sorted(ends.items()))}
        keep(chosen.out, found)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
