"""One session on a machine with a GPU: tests, benchmarks, a profile, and traces served in real time.

    python benchmarks/gpu_session.py --out FOLDER [--run "TRACE OPTIONS"]... [--only NAME,NAME] [--commit ID]

Each step runs in a process of its own and within a limit: one that fails or hangs takes none with it. Names of steps:
tests, cycles, profile, and run1, run2... for each --run, which takes a trace and options of `twinserve run`, such as
"azure.csv --window-s 600:660 --max-output-tokens 256". Every change that they make to the trace is in the record.

FOLDER gets session.log (all that the steps said), session.json (the environment, and how each step ended), junit.xml
and results.tar.gz (what the steps wrote: latency.json, the records, the cycles' results), as of the latest step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "torch", "triton", "flash-attn", "einops", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy",
    "scipy", "simpy", "pydantic", "xxhash", "typer", "rich", "pytest", "hypothesis",
)  # fmt: skip
"""The distributions that the steps import; plotly, for pages, is not among them."""
SHOWN_LINES = 15


@dataclass(frozen=True)
class Step:
    """A command, and how many seconds it may take."""

    name: str
    command: list[str]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: Step
    status: str
    seconds: float


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    facts = environment(options.commit)
    print(json.dumps(facts), flush=True)
    with tempfile.TemporaryDirectory() as work:
        outcomes = run_steps(steps_of(options, Path(work)), options.out, Path(work), facts, options.budget_s)
    for outcome in outcomes:
        print(f"{outcome.step.name:10} {outcome.seconds:6.0f} s  {outcome.status}")
    return 0 if all(outcome.status == "done" for outcome in outcomes) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--run", action="append", default=[], help="a trace and options of `twinserve run`; repeatable")
    parser.add_argument("--only", default="", help="names of steps with commas; all unless given")
    parser.add_argument("--model", default="qwen3-0.6b", help="a shape that ships, given random weights")
    parser.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for all steps together")
    return parser.parse_args()


def steps_of(options: argparse.Namespace, work: Path) -> list[Step]:
    """The steps that were asked for, in order; what they write goes into `work`."""
    python = [sys.executable, "-m"]
    engine = ["--device", "cuda", "--dtype", "bfloat16", "--model", options.model, "--load-format", "dummy"]
    sizes = ["--shapes", "512", "--max-seqs", "256", "--max-context", "8192", "--max-prompt", "2048"]
    cycles = ["--device", "cuda", "--shape", options.model, "--out", str(work / "cycles")]
    cycles += ["--commit", options.commit] if options.commit else []
    junit = f"--junitxml={options.out.resolve() / 'junit.xml'}"
    tests = ["-m", "gpu", "-rs", "--continue-on-collection-errors", junit, *gpu_tests()]
    steps = [
        Step("tests", [*python, "pytest", *tests], 300),
        Step("cycles", [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), *cycles], 400),
        Step("profile", [*python, "twinserve", "profile", "--out", str(work / "latency.json"), *engine, *sizes], 200),
    ]
    for number, trace in enumerate(options.run, start=1):
        record = ["--pipeline-depth", "1", "--json", "--out", str(work / f"run{number}")]
        steps.append(Step(f"run{number}", [*python, "twinserve", "run", *shlex.split(trace), *engine, *record], 200))
    wanted = [name for name in options.only.split(",") if name]
    unknown = set(wanted) - {step.name for step in steps}
    if unknown:
        raise SystemExit(f"no step is called {', '.join(sorted(unknown))}")
    return [step for step in steps if not wanted or step.name in wanted]


def gpu_tests() -> list[str]:
    """The test modules that have tests for a GPU; others may import what is not installed here."""
    modules = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in modules if "mark.gpu" in path.read_text()]


def run_steps(steps: list[Step], out: Path, work: Path, facts: dict[str, Any], budget_s: float) -> list[Outcome]:
    """Run steps one after another; how each ended. `out` is brought up to date after each."""
    outcomes: list[Outcome] = []
    end = time.monotonic() + budget_s
    with (out / "session.log").open("wb") as log:
        for step in steps:
            outcomes.append(run_step(step, min(step.limit_s, end - time.monotonic()), log))
            session = {**facts, "steps": [asdict(outcome) for outcome in outcomes]}
            (out / "session.json").write_text(json.dumps(session, indent=1) + "\n")
            with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
                archive.add(work, arcname="results")
    return outcomes


def run_step(step: Step, limit_s: float, log: BinaryIO) -> Outcome:
    """Run a step for at most `limit_s` seconds, its output going to `log`; the last lines of it are shown."""
    if limit_s <= 0:
        return Outcome(step, "not begun: no time was left", 0.0)
    log.write(f"\n=== {step.name}: {shlex.join(step.command)}\n".encode())
    log.flush()
    begun, first = time.monotonic(), log.tell()
    # A process group, so that what a step started ends with it.
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=surroundings(), stdout=log, stderr=subprocess.STDOUT, process_group=0
    )
    try:
        status = process.wait(limit_s)
        outcome = "done" if status == 0 else f"failed with exit status {status}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped at the limit of {limit_s:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log.seek(0, os.SEEK_END)
    said = Path(log.name).read_bytes()[first:].decode(errors="replace").splitlines()
    print(f"--- {step.name}: {outcome}", *(line[:160] for line in said[-SHOWN_LINES:]), sep="\n", flush=True)
    return Outcome(step, outcome, round(time.monotonic() - begun, 1))


def surroundings() -> dict[str, str]:
    """The environment of a step: it finds the packages of this checkout, and says everything at once."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def environment(commit: str | None) -> dict[str, Any]:
    """The card, the driver, the versions of what is needed, and the commit."""
    card = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    versions = {"python": platform.python_version()}
    for package in NEEDED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    commit = commit or output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    return {"card": card, "cpus": os.cpu_count(), "versions": versions, "commit": commit}


def output_of(*command: str) -> str:
    """What a command prints; "unknown" where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
