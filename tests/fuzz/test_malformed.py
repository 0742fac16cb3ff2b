"""An input of each kind is refused in one line each; tests/fuzz/malformed.py tries as many as are wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_sample_of_malformed_inputs_is_taken_or_refused_in_one_line():
    pytest.importorskip("torch")
    pytest.importorskip("fastapi")
    script = Path(__file__).parent / "malformed.py"
    command = [sys.executable, str(script), "--count", "12", "--seed", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "12 inputs, 0 faults" in result.stdout
