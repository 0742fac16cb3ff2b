"""README's doors are found, with what is run behind each; benchmarks/doors.py walks them, which takes minutes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from doors import WITH_TORCH, commands, doors, ways
from environment import ROOT


def test_every_door_leads_somewhere_and_the_installation_comes_first(tmp_path):
    for name in ("README.md", "docs/policies.md", "docs/cycles/cycle1.md", "docs/cycles/cycle5.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    walked = list(ways(tmp_path, with_torch=False))
    assert walked[0] == ("Size a service", "pip install .")
    assert {name: sum(door == name for door, _ in walked) for name, _ in walked} == {
        "Size a service": 3,
        "Try a policy": 1,
        "Learn how vLLM works": 3,
    }
    assert "class FairShare" in (tmp_path / "fair_share.py").read_text(encoding="utf-8")
    behind = [line for _, line in list(ways(tmp_path, with_torch=True))[len(walked) :]]
    assert behind[:2] == list(WITH_TORCH)
    assert behind[2].startswith("twinserve generate") and behind[3].startswith("python -m pytest")


def test_torch_is_installed_as_the_makefile_does():
    made = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert '--constraint constraints.txt "torch==2.13.0"' in made and "torch==2.13.0" in WITH_TORCH[0]


def test_what_is_remarked_behind_a_command_is_no_part_of_it():
    page = "## Three doors\n\n### One\n\n    a b    # why\n\n### Two\n\nWords.\n\n## More\n\n    c\n"
    assert doors(page) == {"One": ["a b"], "Two": []} and commands(page) == ["a b", "c"]
