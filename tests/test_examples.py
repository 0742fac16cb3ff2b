"""The scripts of examples/ print what stands in examples/expected/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_prints_what_it_promises(script, tmp_path):
    if script.stem == "read_with_pandas":
        pytest.importorskip("pandas", reason="pandas is not installed")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == (FOLDER / "expected" / f"{script.stem}.txt").read_text(encoding="utf-8")


def test_every_expected_output_is_of_a_script_and_readme_names_each():
    names = [script.stem for script in SCRIPTS]
    assert sorted(path.stem for path in (FOLDER / "expected").iterdir()) == names and len(names) == 6
    told = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert not [name for name in names if f"`{name}.py`" not in told]
