"""docs/engine.md and its picture are what the results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_what_the_results_say():
    command = [sys.executable, "benchmarks/engine_page.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, f"python benchmarks/engine_page.py, and commit what it changed: {checked.stdout}"


def test_a_larger_model_is_shown_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import engine_page

    path = tmp_path / "decode.json"
    assert engine_page._larger(path) == []
    step = {"decodes": 32, "context": 920, "us": 8000.0, "limit_us": 6400.0, "weight_bytes": 15_000_000_000}
    values = {"shape": "llama-3-8b", "read_gb_s": 2950.0, "command": "python x.py", "steps": [step]}
    path.write_text(json.dumps(values), encoding="utf-8")
    lines = engine_page._larger(path)
    assert "| 32 x 920 | 8.00 | 6.40 | 1.25 | 4,000 |" in lines
    assert "reads 15.0 GB of weights" in " ".join(lines) and "2,950 GB/s" in " ".join(lines)
