"""Where and by what something was measured: device, processor, versions, commit and command."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def device_folder(device: str) -> str:
    """The folder of a device's results: "cpu", or a card's name, as "h100"."""
    if device == "cpu":
        return device
    import torch

    name = torch.cuda.get_device_name()
    short = re.search(r"\b[A-Z]+\d+[A-Z]*\b", name)
    return (short.group() if short else re.sub(r"\W+", "-", name)).lower()


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "flash-attn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured, with a plus sign where the checkout has changes beside results; else "unknown"."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    written = [":!benchmarks/results", ":!benchmarks/results.md", ":!docs/cycles"]
    is_changed = git("diff", "--quiet", "HEAD", "--", ".", *written).returncode != 0
    return head.stdout.strip() + "+" * is_changed


def command() -> str:
    """What started this script."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def take_traces(parser: argparse.ArgumentParser) -> None:
    """The option that names the folder of the public traces."""
    parser.add_argument("--traces", type=Path, default=os.environ.get("TWINSERVE_TRACES"))


def traces_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Path:
    """The folder of the public traces; without one the process ends with status 2."""
    if arguments.traces is None:
        parser.exit(2, f"{parser.prog}: --traces is not given and TWINSERVE_TRACES is not set\n")
    return Path(arguments.traces)


def machine() -> dict[str, Any]:
    """What a measurement without torch runs on: Python, the processor as Linux names it, and its cores."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else platform.processor()
    return {"python": platform.python_version(), "cpu": cpu, "cores": os.cpu_count()}


def device_facts(device: str, measured_commit: str | None) -> dict[str, Any]:
    """Of a measurement on a device: the card or the processor, the versions, the commit and the command."""
    if device == "cpu":
        on: dict[str, Any] = {"machine": machine()}
    else:
        import torch

        on = {"card": torch.cuda.get_device_name()}
    return on | {"versions": versions(), "commit": measured_commit or commit(), "command": command()}


def cuda_facts(measured_commit: str | None) -> dict[str, Any]:
    """Of a measurement on a CUDA device: the card, the versions, the commit and the command."""
    return device_facts("cuda", measured_commit)
