"""docs/engine.md and its picture are what the results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_what_the_results_say():
    command = [sys.executable, "benchmarks/engine_page.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, f"python benchmarks/engine_page.py, and commit what it changed: {checked.stdout}"
