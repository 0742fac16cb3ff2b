"""An input of each kind is refused in one line each; tests/fuzz/malformed.py tries as many as are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked_scripts import run_script


def test_a_sample_of_malformed_inputs_is_taken_or_refused_in_one_line():
    pytest.importorskip("torch")
    pytest.importorskip("fastapi")
    result = run_script(Path(__file__).parent / "malformed.py", "--count", "12", "--seed", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "12 inputs, 0 faults" in result.stdout
