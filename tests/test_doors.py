"""README's doors are found, with what is run behind each; benchmarks/doors.py walks them, which takes minutes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import doors as walk
from doors import WITH_TORCH, commands, doors, took, ways
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


def test_a_walk_has_no_limit_and_its_file_has_each_command_that_ended(monkeypatch, tmp_path, capsys):
    """The third fails: what came before it is kept, and said by --help of the next."""
    lines = [("One", "true"), ("One", "sleep 0.1"), ("Two", "false"), ("Two", "true")]
    monkeypatch.setattr(walk, "copied", lambda folder: folder)
    monkeypatch.setattr(walk, "ways", lambda folder, *, with_torch: iter(lines))
    kept = tmp_path / "doors.json"
    monkeypatch.setattr(sys, "argv", ["doors.py", "--out", str(kept)])
    assert walk.main() == 1
    assert [row["command"] for row in walk.load_json(kept)["rows"]] == ["true", "sleep 0.1", "false"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "One: true" and said[1].endswith(" s") and said[4] == "Two: false"
    assert "One 0.0, Two 0.0" in took(kept) and "most of one is installing" in took(tmp_path / "none")
