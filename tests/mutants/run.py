"""Applies each patch of a folder to a copy of the code, runs the tests of what it changes, and shows which caught it.

    python tests/mutants/run.py [FOLDER] [--json]

A patch is a unified diff with one bug, said in its first line; paths may begin with `a/` and `b/` or not. FOLDER
defaults to this one, whose patches change policies/, orders/ and sim/horizon.py and are for the policies' tests; those
of the folder `worlds` change a file of TESTS_OF. Quick tests run first, and the first that fails ends it.
The exit status is 1 if a bug survives, a patch does not apply, or the tests fail without any. Where TWINSERVE_ORACLES
is set, they read it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
COPIED = (
    "benchmarks",
    "docs",
    "engine",
    "orders",
    "policies",
    "reports",
    "serving",
    "settings",
    "sim",
    "tests",
    "traces",
    "twinserve",
    "pyproject.toml",
)
SLOW = (
    "test_core.py",
    "test_pool_machine.py",
    "test_machines.py",
    "test_drafting_machines.py",
    "test_horizon.py",
    "test_slow_model.py",
    "test_oracle_vllm.py",
    "test_cache_oracle.py",
    "test_own_rules.py",
)
TESTS_OF = {
    "traces/runs/metrics.py": (
        "traces/runs/test_metrics.py",
        "traces/runs/test_speculative_records.py",
        "sim/test_disaggregation.py",
    ),
    "traces/runs/waits.py": ("traces/runs/test_waits.py",),
    "traces/statistics.py": ("traces/test_statistics.py",),
    "traces/arrivals.py": ("traces/test_arrivals.py",),
    "traces/transforms.py": ("traces/test_transforms.py",),
    "twinserve/planning/objectives.py": ("planning/test_objectives.py",),
    "sim/clients.py": ("sim/test_clients.py",),
    "sim/slowness.py": ("sim/test_restarts.py",),
    "sim/latency.py": ("sim/test_latency.py",),
    "sim/kernels.py": ("sim/test_kernels.py",),
    "sim/drafting.py": ("sim/test_drafting.py",),
    "sim/shapes.py": ("sim/test_model_configs.py",),
    "sim/fit.py": ("sim/test_fit.py", "sim/test_recorded_steps.py"),
    "sim/roofline.py": ("sim/test_roofline.py", "sim/test_splits.py"),
    "sim/splits.py": ("sim/test_splits.py", "sim/test_roofline.py"),
    "sim/stages.py": ("sim/test_splits.py",),
    "sim/fleet.py": (
        "sim/test_routers.py",
        "sim/test_scaling.py",
        "sim/test_disaggregation.py",
        "sim/test_restarts.py",
        "sim/test_fleet.py",
        "sim/test_fleet_laws.py",
        "sim/test_replica.py",
    ),
    "sim/disaggregation.py": ("sim/test_disaggregation.py",),
    "sim/tiers.py": ("sim/test_tiers.py",),
    "sim/scaling.py": ("sim/test_scaling.py",),
    "sim/power.py": ("sim/test_power.py",),
    "sim/routers.py": ("sim/test_routers.py", "sim/test_fleet.py", "sim/test_fleet_laws.py"),
    "sim/replica.py": ("sim/test_replica.py", "sim/test_routers.py", "sim/test_fleet.py"),
    "engine/sampler.py": ("engine/test_sampler.py", "engine/test_sampling.py"),
    "engine/inference.py": ("test_speculation.py",),
    "engine/model_runner.py": ("engine/test_speculation.py",),
    "engine/speculation/proposers.py": ("engine/test_speculation.py",),
    "engine/speculation/runner.py": ("engine/test_speculation.py",),
    "sim/speculation.py": ("sim/test_speculation.py", "sim/test_drafted_runs.py"),
    "serving/metrics.py": ("traces/runs/test_speculative_records.py",),
}
"""The test files of what is no policy, quick ones first."""
LEAST_LIMIT_S = 60.0
NUM_WORKERS = os.cpu_count() or 1
FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
OLD_FILE = re.compile(r"^--- (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """A line of the table: a bug, and the test that caught it (empty if it survived)."""

    patch: str
    bug: str
    caught_by: str
    why_not: str
    seconds: float


def policy_tests() -> list[str]:
    """The test files of the policies, quick ones first."""
    paths = sorted((ROOT / "tests" / "policies").glob("test_*.py"))
    paths.sort(key=lambda path: SLOW.index(path.name) if path.name in SLOW else -1)
    return [str(path.relative_to(ROOT)) for path in paths]


def tests_of(patch: Path) -> list[str]:
    """The test files of the file that a patch changes; those of the policies where it is one of theirs."""
    names = {name.removeprefix("a/") for name in OLD_FILE.findall(patch.read_text(encoding="utf-8"))}
    own = [f"tests/{test}" for file, tests in TESTS_OF.items() if file in names for test in tests]
    return own or policy_tests()


def bug_of(patch: Path) -> str:
    """The first line of a patch that says something."""
    lines = [line.strip().lstrip("#").strip() for line in patch.read_text(encoding="utf-8").splitlines()]
    return next((line for line in lines if line), "")


@contextmanager
def a_copy() -> Iterator[Path]:
    """A copy of the code and its tests in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="twinserve-mutant-") as folder:
        copy = Path(folder)
        unwanted = shutil.ignore_patterns("__pycache__", ".*")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
            else:
                shutil.copy(ROOT / name, copy / name)
        yield copy


def apply(patch: Path, copy: Path) -> str:
    """Apply a patch to a copy; what git says if it does not apply."""
    old_files = OLD_FILE.findall(patch.read_text(encoding="utf-8"))
    strip = "-p0" if old_files and all((copy / name).exists() for name in old_files) else "-p1"
    command = ["git", "apply", strip, "--whitespace=nowarn", str(patch.resolve())]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def run_tests(copy: Path, tests: list[str], limit_s: float | None = None) -> str:
    """The test of a copy that failed first; empty if all passed. Not to end within the limit is to fail."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "HYPOTHESIS_PROFILE": "mutants",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return f"no end within {limit_s:.0f} s"
    if done.returncode == 0:
        return ""
    failure = FAILURE.search(done.stdout)
    return failure.group(1) if failure else f"pytest ended with {done.returncode}: {done.stdout[-200:]}{done.stderr}"


def examine(patch: Path, tests: list[str], limit_s: float | None = None) -> Row:
    """Apply one patch to a copy, and see which test notices."""
    start = time.perf_counter()
    with a_copy() as copy:
        refused = apply(patch, copy)
        caught_by = "" if refused else run_tests(copy, tests, limit_s)
    seconds = round(time.perf_counter() - start, 1)
    why_not = "" if caught_by else f"does not apply: {refused}" if refused else "survived"
    return Row(patch.name, bug_of(patch), caught_by, why_not, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, metavar="FOLDER", help="where the patches are")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    patches = sorted([*arguments.folder.glob("*.patch"), *arguments.folder.glob("*.diff")])
    if not patches:
        parser.error(f"{arguments.folder} holds no *.patch and no *.diff")
    start = time.perf_counter()
    with a_copy() as copy:
        failed = run_tests(copy, [*dict.fromkeys(test for patch in patches for test in tests_of(patch))])
    limit_s = max(LEAST_LIMIT_S, 3 * NUM_WORKERS * (time.perf_counter() - start))
    if failed:
        print(f"without a patch, the tests fail: {failed}", file=sys.stderr)
        return 1
    rows = []
    if not arguments.json:
        print("| bug | caught by | seconds |\n| --- | --- | ---: |", flush=True)
    with ThreadPoolExecutor(NUM_WORKERS) as workers:
        for row in workers.map(lambda patch: examine(patch, tests_of(patch), limit_s), patches):
            rows.append(row)
            if not arguments.json:
                test = row.caught_by.split("::", 1)[-1] if row.caught_by else f"**{row.why_not}** ({row.patch})"
                print(f"| {row.bug} | {test} | {row.seconds:.1f} |", flush=True)
    caught = sum(bool(row.caught_by) for row in rows)
    seconds = round(time.perf_counter() - start, 1)
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "caught": caught, "seconds": seconds}, indent=1))
    else:
        print(f"\n{caught} of {len(rows)} caught in {seconds:.0f} s")
    return 0 if caught == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
