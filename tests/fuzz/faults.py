"""Kills and full disks in the midst of commands: `python tests/fuzz/faults.py --count 240 --seed 0`.

A command is killed by a signal at some moment of its run or before it gives one of its files a name, can write no file
longer than so many bytes, writes to a disk that has room for so many, or finds the folder closed that it writes in,
from the beginning or from some moment on. Signals come to a process that has imported all, and to one that has yet to.
What it was to write is then whole or not there, or as it was where it was to be replaced; it has ended by one line and
the signal's status, nothing else is left behind, and the same command works the next time, when there is room, and
writes what it writes undisturbed. `--out` keeps the counts; the last run's are in benchmarks/results/faults.json.

The small disk is a tmpfs, which only root may mount: others do without that kind.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from malformed import import_all
from outcome import Outcome, keep, run
from valid import LATENCY, SMALLEST_PROFILE, Valid, valid_files

SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
"""And the status that each ends a command with."""
DISK, CLOSED, SMALL = "full disk", "closed folder", "small disk"
ANEW, AT_A_NAME = " anew", " at a name"
"""Behind the name of a signal that comes to a process that imports all anew, or before a file gets its name."""
KINDS = (
    *SIGNALS, DISK, CLOSED, *(number.name + ANEW for number in SIGNALS), SMALL, signal.SIGKILL.name + AT_A_NAME
)  # fmt: skip
FORCED = " --force"
"""Behind the name of a command whose files are there already."""
ROOM_MIB = 256
"""Of a disk that is not full."""
CHANGES = re.compile(rb'("wall_s": ?)[0-9.e-]+|took [0-9.]+ s|,\s*"torch": ?"[^"]*"')
"""What is another each time that a command runs, and by what had been imported."""
OF_CLOCKS = {"run", "profile"}
"""Commands that measure: each time their files say something else."""
IMPORTS_S = 1.0
"""In so many seconds a process that begins anew has imported what it needs, about."""
MOST_NAMES = 4
"""Before which a command may be killed; most give fewer."""
GOES_ON = {"sweep", "capacity"}
"""Commands that keep what they have found, and go on with it."""
PAIRS = {"profile"}
"""Commands that write two files, of which a kill may leave the one alone: it is whole, and the next run replaces it."""


def commands(valid: Valid) -> dict[str, list[str]]:
    """A call of each command that writes, to `out` in the working directory."""
    sim = ["sim", str(valid.trace), "--latency", LATENCY, "--out", "out"]
    aim = ["--objective", "p99 TTFT <= 1 s", "--jobs", "1", "--tolerance", "0.5"]
    small = ["--num-gpu-blocks", "64", "--max-num-seqs", "8"]
    plain = {
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
        "profile": ["profile", "--model", str(valid.model), *SMALLEST_PROFILE, "--out", "out"],
        "fetch": ["model", "fetch", "tiny"],
    }
    replacing = ("sim", "make", "convert", "report", "export", "fit", "profile")
    return plain | {name + FORCED: [*plain[name], "--force"] for name in replacing}


def make_package(folder: Path) -> None:
    """Have a package, in `folder`, be the only one that there is."""
    from packaged_model import Package  # heavy

    from twinserve.engine.hub.package_index import PACKAGED_MODELS

    package = Package(folder)
    PACKAGED_MODELS["tiny"] = package.model
    os.environ.update({"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(package.index)})


def bring_here() -> None:
    """Have models be brought to `out` in the working directory."""
    os.environ["XDG_CACHE_HOME"] = str(Path("out").absolute())


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in a folder but for locks, without what changes from run to run."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock"))

    def unchanged(match: re.Match[bytes]) -> bytes:
        return match[1] + b"0" if match[1] else b""

    return {str(path.relative_to(folder)): CHANGES.sub(unchanged, path.read_bytes()) for path in found}


def is_alike(name: str, found: dict[str, bytes], whole: dict[str, bytes]) -> bool:
    """Is it what the command writes undisturbed? Of what measures, are they the same files, none of them cut short?"""
    if name.removesuffix(FORCED) in OF_CLOCKS:
        return found.keys() == whole.keys() and all(map(is_json, found.values()))
    return found == whole


def is_json(content: bytes) -> bool:
    """Is it JSON, or lines of it, packed or not?"""
    try:
        text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        for part in [text] if text[:2] == b"{\n" else text.splitlines():
            json.loads(part)
    except (OSError, EOFError, ValueError):
        return False
    return text.endswith(b"\n")


def prepared(kind: str | signal.Signals, amount: float) -> Callable[[], None]:
    """What a child does before its work, so that something stops it: so many bytes a file, or in so many seconds a
    signal, or the folder is closed; or it has given so many names."""

    def disturb(child: int) -> None:
        time.sleep(amount)
        if kind == CLOSED:
            os.chmod(".", 0o555)
        else:
            os.kill(child, number_of(kind))

    def prepare() -> None:
        bring_here()
        child = os.getpid()
        if kind == CLOSED:
            obey_modes()
        if kind == DISK:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(amount), int(amount)))
        elif kind == SMALL:
            pass
        elif str(kind).endswith(AT_A_NAME):
            die_naming(int(amount))
        elif not amount:
            disturb(child)
        elif not os.fork():  # a process, as a thread would not outlive the beginning of a program
            try:
                disturb(child)
            finally:
                os._exit(0)

    return prepare


def number_of(kind: str | signal.Signals) -> signal.Signals:
    """The signal of a kind that is one."""
    return kind if isinstance(kind, signal.Signals) else signal.Signals[kind.split()[0]]


def die_naming(after: int) -> None:
    """Have this process be killed when it has given so many names and is to give another."""
    left = iter(range(after))

    def dying(name: Callable[..., None]) -> Callable[..., None]:
        def give(*paths: object, **options: object) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            name(*paths, **options)

        return give

    os.rename, os.replace, os.link = map(dying, (os.rename, os.replace, os.link))


@contextmanager
def own_disk(folder: Path) -> Iterator[Callable[[float | None], None]]:
    """Has a folder be a disk of its own, in memory; what gives it so many bytes of room, or enough.

    Raises:
        subprocess.CalledProcessError: this process may not.
    """

    def mount(option: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
        subprocess.run(words, check=True, capture_output=True)

    def give(room: float | None) -> None:
        found = os.statvfs(folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        mount(f"remount,size={ROOM_MIB << 20 if room is None else used + max(int(room), found.f_frsize)}")

    mount(f"size={ROOM_MIB}m")
    try:
        yield give
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def obey_modes() -> None:
    """Have a file's mode hold for this process, whoever it belongs to: root's may write where nobody may."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, among those in effect
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def begin_anew(words: list[str]) -> int:
    """A command as a process of its own begins it."""
    os.execv(sys.executable, [sys.executable, "-m", "twinserve", *words])


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
    number = None if kind in (DISK, CLOSED, SMALL) else number_of(kind)
    if number is not None and outcome.status == -number and not outcome.err and not left:
        return ""  # at once, before the command had begun
    killed = number is signal.SIGKILL
    if outcome.status != (2 if number is None else SIGNALS[number]):
        return f"status {outcome.status}"
    if not killed and (len(said) != 1 or outcome.err.splitlines()[-1] != said[0]):
        return "not one line"
    stray = [name for name in left if ".partial" in name]
    if stray and not killed and kind != CLOSED:  # of which nothing can be taken
        return f"left {stray}"
    kept = {one: content for one, content in left.items() if one not in stray}
    if name in GOES_ON or (killed and name.removesuffix(FORCED) in PAIRS):
        broken = [one for one in kept if one not in whole or not is_alike(name, {one: kept[one]}, {one: whole[one]})]
        return f"left {broken}, which is not whole" if broken else ""
    return "" if not kept or is_alike(name, kept, whole) else f"left {sorted(kept)}, which is not whole"


def main() -> None:
    """Disturb commands, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the counts")
    chosen = parser.parse_args()
    import_all()
    ends: Counter[str] = Counter()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        (kept := Path(scratch) / "valid").mkdir()
        calls = commands(valid_files(kept))
        make_package(kept)
        whole, seconds = {}, {}
        for name, words in calls.items():
            (folder := Path(scratch) / f"whole {name}").mkdir()
            begun = time.monotonic()
            outcome = run(words, folder, bring_here)
            assert outcome.status in (0, 3) and contents(folder), outcome
            whole[name], seconds[name] = contents(folder), time.monotonic() - begun
        kinds = KINDS
        try:
            with own_disk(kept):
                pass
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no small disk: {error}", file=sys.stderr)
            kinds = tuple(kind for kind in KINDS if kind != SMALL)
        for number in range(chosen.count):
            rng = random.Random(f"{chosen.seed}:{number}")
            name, kind = list(calls)[number % len(calls)], kinds[number // len(calls) % len(kinds)]
            is_anew = str(kind).endswith(ANEW) and name != "fetch"  # it knows no tiny model
            most = seconds[name] + IMPORTS_S * is_anew
            if kind in (DISK, SMALL):
                most = (max if kind == DISK else sum)(map(len, whole[name].values()))
            elif str(kind).endswith(AT_A_NAME):
                most = MOST_NAMES
            amount = rng.uniform(0, most) * (kind != CLOSED or rng.random() < 0.5)
            (folder := Path(scratch) / str(number)).mkdir()
            work = partial(begin_anew, calls[name]) if is_anew else calls[name]
            with ExitStack() as stack:
                give = stack.enter_context(own_disk(folder)) if kind == SMALL else None
                if name.endswith(FORCED):
                    assert run(calls[name.removesuffix(FORCED)], folder, bring_here).status in (0, 3)
                if give is not None:
                    give(amount)
                outcome = run(work, folder, prepared(kind, amount))
                folder.chmod(0o755)
                left = contents(folder)
                fault = wrong(name, kind, outcome, left, whole[name])
                if give is not None:
                    give(None)
                if not fault and outcome.status not in (0, 3):
                    again = run(calls[name], folder, bring_here)
                    found = contents(folder)
                    there = again.status == 2 and "exists already" in again.err and is_alike(name, left, whole[name])
                    if (again.status not in (0, 3) and not there) or not is_alike(name, found, whole[name]):
                        fault = f"the next run: status {again.status}, {again.err[-200:]!r}, {sorted(found)}"
            word = kind if isinstance(kind, str) else kind.name
            came = "done already" if outcome.status in (0, 3) else f"status {outcome.status}"
            ends[f"{name}, {word}: {came}"] += 1
            if fault:
                said = f"{fault}: {outcome.err[-500:]!r}"
                faults.append(f"input {number} of seed {chosen.seed}: {name}, {word} at {amount:.3f}: {said}")
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
