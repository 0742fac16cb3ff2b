"""README's three doors as a stranger walks them: an environment with nothing in it, and the seconds of each command.

    python benchmarks/doors.py [--torch] [--out FILE]

What is committed is copied, an empty environment made beside it, and each command of the doors run there as README has
it, `pip install .` first. Behind the door to learning the commands of docs/cycles/cycle5.md are walked, which want no
torch. With --torch that is installed then, as the Makefile does, and what wants it is run: README's first answer of a
model, and the tests of docs/cycles/cycle1.md. Nothing here has a limit of time: each command is named when it begins,
and runs until it ends. Status 1 at the first command that fails. --out writes a JSON file, anew behind each command, so
that a walk that is cut leaves what it has. --help says how long the walk of results/doors.json took.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environment import ROOT, command, commit, machine
from result_files import RESULTS, load_json, write_json

WITH_TORCH = (
    'pip install --constraint constraints.txt "torch==2.13.0"',
    'pip install --constraint constraints.txt ".[engine,test]"',
)
BEHIND = "With torch"
"""What is called a door as well: all that --torch adds."""


def took(kept: Path) -> str:
    """How long a walk took whose JSON file is kept, door by door."""
    if not kept.is_file():
        return "No walk is kept in results/doors.json; most of one is installing: minutes, and more with torch."
    found = load_json(kept)
    minutes = ", ".join(f"{door} {seconds / 60:.1f}" for door, seconds in by_door(found["rows"]).items())
    return f"Minutes that it took on {found['machine']['cores']} cores (commit {found['commit']}): {minutes}."


def by_door(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The seconds of all commands of each door, in their order."""
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row["door"]] = seconds.get(row["door"], 0.0) + row["seconds"]
    return seconds


def commands(page: str, begin: str = r"\S") -> list[str]:
    """The commands of a page that begin so, without what is remarked behind them."""
    return re.findall(rf"^ {{4}}({begin}.*?)(?: +# .*)?$", page, re.MULTILINE)


def doors(readme: str) -> dict[str, list[str]]:
    """The commands of README's doors, by their names."""
    (part,) = re.findall(r"^## Three doors\n(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    _, *parts = re.split(r"^### (.*)\n", part, flags=re.MULTILINE)
    return {name: commands(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def ways(folder: Path, *, with_torch: bool) -> Iterator[tuple[str, str]]:
    """The doors of a copy of the project, and what is run behind each, in their order."""
    readme, cycle1, cycle5, policies = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("README.md", "docs/cycles/cycle1.md", "docs/cycles/cycle5.md", "docs/policies.md")
    )
    blocks = re.findall(r"```python\n(.*?)```", policies, re.DOTALL)
    (own,) = [block for block in blocks if "class FairShare" in block]
    (folder / "fair_share.py").write_text(own, encoding="utf-8")
    for door, lines in doors(readme).items():
        yield from ((door, line) for line in lines or commands(cycle5, "twinserve "))
    if with_torch:
        for line in (*WITH_TORCH, *commands(readme, "twinserve generate"), *commands(cycle1, "python -m pytest")):
            yield BEHIND, line


def copied(folder: Path) -> Path:
    """The committed project, in a new folder below `folder`, beside an empty environment."""
    copy = folder / "twinserve"
    copy.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "--extract"], cwd=copy, input=archive.stdout, check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "empty"], check=True)
    return copy


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog=took(RESULTS / "doors.json").replace("%", "%%")
    )
    parser.add_argument("--torch", action="store_true", help="install torch behind the doors, and run what wants it")
    parser.add_argument("--out", type=Path, help="JSON file of the seconds")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    about = {"machine": machine(), "commit": commit(), "command": command()}
    with tempfile.TemporaryDirectory() as scratch:
        copy = copied(Path(scratch))
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment["PATH"] = f"{Path(scratch) / 'empty' / 'bin'}:{environment['PATH']}"
        for door, line in ways(copy, with_torch=arguments.torch):
            print(f"{door}: {line}", flush=True)
            begun_s = time.perf_counter()
            ran = subprocess.run(
                line, shell=True, cwd=copy, env=environment, capture_output=True, text=True, check=False
            )
            rows.append({"door": door, "command": line, "seconds": round(time.perf_counter() - begun_s, 1)})
            print(f"{rows[-1]['seconds']:7.1f} s", flush=True)
            if arguments.out is not None:
                write_json(arguments.out, {"rows": rows} | about)
            if ran.returncode != 0:
                print(f"status {ran.returncode}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}")
                return 1
    for door, seconds in by_door(rows).items():
        print(f"{seconds:7.1f} s  {door}, in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
