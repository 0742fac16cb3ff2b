"""Bodies made from the interface's own page: every one is answered or refused, and nothing is left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import httpx
from live_servers import simulated


def test_no_body_makes_the_server_fail(serving):
    """TWINSERVE_FUZZ_CASES says how many examples each path gets at most, 8 unless set; 280 make more than 2,000."""
    running = serving(simulated(0.05, max_model_len=256))
    cases = os.environ.get("TWINSERVE_FUZZ_CASES", "8")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json", "--no-color"]
    command += [
        "--checks",
        "not_a_server_error",
        "--max-examples",
        cases,
        "--seed",
        "1",
        "--phases",
        "coverage,fuzzing",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = re.search(r"(\d+) generated", result.stdout)
    assert counts is not None and int(counts[1]) > 5 * int(cases), result.stdout
    print(counts[0])
    assert httpx.get(f"{running.url}/health", timeout=60).status_code == 200
    running.settle()
