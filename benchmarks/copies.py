"""Copies of twinserve that are measured in turns on one core: the one that is imported, other commits', wheels."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import twinserve
from twinserve.policies import IS_COMPILED


@dataclass(frozen=True)
class Copy:
    """A folder with the package twinserve in it: a checkout, or what a wheel was installed into."""

    name: str
    folder: Path

    def command(self, script: Path) -> list[str]:
        """Starts `script`, or a checkout's own, which knows what its twinserve calls things."""
        own = self.folder / "benchmarks" / script.name
        return [sys.executable, str(own if own.is_file() else script)]

    def environment(self) -> dict[str, str]:
        """In which Python imports this copy, keeps its bytecode, as of what is installed, numpy has one thread, and
        pydantic looks for no plugins, as under the command line."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        own = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
        return kept | own


def policies() -> str:
    """Are the policies that this process imports compiled or interpreted?"""
    return "compiled" if IS_COMPILED else "interpreted"


def imported() -> Copy:
    """The copy that this process imports, named by what its policies are."""
    return Copy(policies(), Path(twinserve.__file__).parents[1])


def add_other(parser: argparse.ArgumentParser) -> None:
    """The option --other NAME=FOLDER, any number of times."""
    words = "another copy, measured in turns with the one that is imported: a checkout, or an installed wheel"
    parser.add_argument("--other", type=_named, action="append", default=[], metavar="NAME=FOLDER", help=words)


def with_imported(others: list[Copy], parser: argparse.ArgumentParser) -> list[Copy]:
    """The copies of --other and, as the last, the one that this process imports."""
    copies = [*others, imported()]
    names = [copy.name for copy in copies]
    if len(set(names)) < len(names):
        parser.error(f"--other: {', '.join(names)}, expected each name once")
    return copies


def _named(text: str) -> Copy:
    name, _, folder = text.partition("=")
    if not (name and folder and (Path(folder) / "twinserve").is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=FOLDER, a folder that has twinserve in it")
    return Copy(name, Path(folder).resolve())


def stay_on_one_core() -> None:
    """This process and all that it starts: the last core that it may run on, as others prefer the first."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def medians(found: list[Any]) -> Any:
    """Every number's median over the same figures taken several times; anything else as it was the first time."""
    if isinstance(found[0], dict):
        return {key: medians([figures[key] for figures in found]) for key in found[0]}
    return statistics.median(found) if isinstance(found[0], float) else found[0]
