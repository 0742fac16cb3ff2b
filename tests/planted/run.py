"""Plants each wrong version of the guide's functions, runs the guide's tests, and shows which test caught it.

    python tests/planted/run.py [--json] [--only TEXT]

Each is planted in a process of its own, a fork of this one, so that torch is imported once. The test that is about the
planted function has to fail; if it does not, the others say whether they would have noticed. The exit status is 1 if a
wrong version survives its test, or a test has none. What needs SmolLM2 is left out: the tiny model tells as much.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # The models are tiny, and a thread pool does not outlive a fork.
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # The tests need none, and each process would load them again.

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from plants import Plant, load_all

ROOT = Path(__file__).resolve().parents[2]
NO_MODELS = ROOT / "tests" / "planted" / "no-models"  # Never made: what needs SmolLM2 is skipped.
LIMIT_S = 60.0
GUIDE_TESTS = {
    "test_naive_inference": "tests/test_naive_inference.py",
    "test_compare_with_hf_generate": "tests/test_naive_inference.py",
    "test_kv_cache_correctness": "tests/test_kv_cache.py",
    "test_past_key_values_growth": "tests/test_kv_cache.py",
    "test_sequence_basic": "tests/test_block_manager.py",
    "test_block_manager_allocate": "tests/test_block_manager.py",
    "test_continuous_batching_basic": "tests/test_continuous_batching.py",
    "test_short_request_finishes_first": "tests/test_continuous_batching.py",
    "test_prefix_cache_hit": "tests/test_prefix_cache.py",
    "test_partial_cache_hit": "tests/test_prefix_cache.py",
    "test_flash_attention_correctness": "tests/test_flash_attention.py",
    "test_quantization_reconstruction": "tests/test_quantization.py",
    "test_model_output_quality": "tests/test_quantization.py",
}


@dataclass(frozen=True)
class Outcome:
    """What the tests said.

    Attributes:
        passed: tests that passed.
        failed: the test that failed, and in a line why; empty if none did.
        error: what kept the tests from running to an end.
    """

    passed: tuple[str, ...] = ()
    failed: str = ""
    why: str = ""
    error: str = ""


class Witness:
    """A pytest plugin that notes what passed and what failed."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed = self.why = self.error = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("::")[-1].split("[")[0]
        if report.failed and report.when == "call":
            self.failed, self.why = name, _reason(report)
        elif report.failed:
            self.error = f"{report.when} of {name}: {_reason(report)}"
        elif report.passed and report.when == "call":
            self.passed.append(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.error = f"{report.nodeid} cannot be imported: {report.longreprtext.splitlines()[-1]}"


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.splitlines()[0] if crash else report.longreprtext.splitlines()[-1]


def _tell(sender: Connection, plant: Plant | None, tests: list[str]) -> None:
    """Run tests with a wrong version in place, in a process that ends with it."""
    witness = Witness()
    if plant is not None:
        plant.apply()
    places = [f"{GUIDE_TESTS[test]}::{test}" for test in tests]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["-x", "-p", "no:cacheprovider", *places], plugins=[witness])
    sender.send(Outcome(tuple(witness.passed), witness.failed, witness.why, witness.error))


def judge(plant: Plant | None, tests: list[str]) -> Outcome:
    """What `tests` say with a wrong version in place, or with none."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(sender, plant, tests))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT_S) else Outcome(error=f"no end within {LIMIT_S:.0f} s")
    except EOFError:
        process.join()
        return Outcome(error=f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


@dataclass(frozen=True)
class Row:
    """A line of the table: a wrong version, and the test that caught it (empty if it survived)."""

    target: str
    wrong: str
    test: str
    caught_by: str
    why: str
    seconds: float

    @property
    def is_caught(self) -> bool:
        return self.caught_by == self.test


def examine(plant: Plant, tests: list[str]) -> Row:
    """Plant one wrong version and see who notices."""
    start = time.perf_counter()
    outcome = judge(plant, [plant.test])
    if not (outcome.failed or outcome.error):
        outcome = judge(plant, [test for test in tests if test != plant.test])
    seconds = round(time.perf_counter() - start, 2)
    return Row(plant.target, plant.wrong, plant.test, outcome.failed, outcome.why or outcome.error, seconds)


def warm_up() -> None:
    """Import, in the process that is forked, all that the tests need, and make the tiny model."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    os.environ["XDG_CACHE_HOME"] = str(NO_MODELS)
    os.environ.pop("TWINSERVE_FETCH", None)
    import guide_models

    from twinserve.engine import continuous_batching, inference, llm, model_runner  # noqa: F401

    guide_models.subject("tiny")
    gc.freeze()  # What is made by now is shared by all the forks; collecting it in each would copy it.


def show(rows: list[Row]) -> None:
    """Print the table, in Markdown."""
    print("| function | wrong version | caught by | seconds |")
    print("| --- | --- | --- | ---: |")
    for row in rows:
        verdict = row.caught_by if row.is_caught else f"**{row.caught_by or 'nobody'}, not {row.test}** ({row.why})"
        print(f"| `{row.target.split(':')[1]}` | {row.wrong} | {verdict} | {row.seconds:.1f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="plant only what has TEXT in its function or its words"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    warm_up()
    tests = [test for test, path in GUIDE_TESTS.items() if (ROOT / path).exists()]
    plants = [plant for plant in load_all() if plant.test in tests]
    unplanted = sorted(set(tests) - {plant.test for plant in plants})
    plants = [plant for plant in plants if arguments.only in f"{plant.target} {plant.wrong}"]

    right = judge(None, tests)
    if right.failed or right.error:
        print(
            f"without a wrong version, {right.failed or 'the tests'} failed: {right.why or right.error}",
            file=sys.stderr,
        )
        return 1
    rows = [examine(plant, tests) for plant in plants]
    survived = [row for row in rows if not row.is_caught]
    seconds = round(time.perf_counter() - start, 1)
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "unplanted": unplanted, "seconds": seconds}, indent=1))
    else:
        show(rows)
        print(f"\n{len(rows) - len(survived)} of {len(rows)} caught in {seconds:.0f} s")
        for test in unplanted:
            print(f"{test} has no wrong version that it catches")
    return 1 if survived or unplanted else 0


if __name__ == "__main__":
    sys.exit(main())
