"""The study's page and pictures are what its script makes of its results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_page_and_pictures_are_what_the_results_say():
    command = [sys.executable, "benchmarks/studies.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"python benchmarks/studies.py --page, and commit what it changed: {done.stderr}"


def test_the_page_of_plans_is_what_the_results_say():
    command = [sys.executable, "benchmarks/plan.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"python benchmarks/plan.py --page, and commit what it changed: {done.stderr}"


def test_the_page_beside_other_simulators_is_what_the_results_say():
    command = [sys.executable, "benchmarks/anchors.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"python benchmarks/anchors.py --page, and commit what it changed: {done.stderr}"
