"""What a command reads of a record is whole, or the command says in one line where it ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from twinserve.settings.errors import InputError
from twinserve.traces.runs.fleet_record import load_fleet, load_replicas


def cut(path: Path, keep: int) -> None:
    """Keep so many lines of a file."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:keep]))


@pytest.fixture
def fleet(twinserve, trace, latency, tmp_path) -> Path:
    out = tmp_path / "fleet"
    arguments = ("--latency", latency, "--replicas", 2, "--die", "0:0.05:0.2", "--out", out)
    assert twinserve("sim", trace, *arguments).code == 0
    return out


def test_a_fleet_without_one_of_its_lives_is_refused(fleet):
    assert load_fleet(fleet).requests
    lives = sorted(folder.name for folder in (fleet / "replicas").iterdir())
    shutil.rmtree(fleet / "replicas" / lives[-1])
    for load in (load_fleet, load_replicas):
        with pytest.raises(
            InputError, match=r"replicas: the record is not whole: the \d folders have \d+ \w+, expected"
        ):
            load(fleet)


def test_commands_refuse_a_record_that_ends_early(twinserve, trace, latency, tmp_path):
    out = tmp_path / "run"
    assert twinserve("sim", trace, "--latency", latency, "--out", out).code == 0
    assert twinserve("replay", out).out.startswith("exact: ")
    rows = len((out / "steps.jsonl").read_bytes().splitlines()) // 2
    cut(out / "steps.jsonl", rows)
    page, fitted = tmp_path / "page.html", tmp_path / "fitted.json"
    for command in (
        ("replay", out),
        ("compare", out, out),
        ("compare", "--paired", out, "--", out),
        ("report", out, "--out", page),
        ("fit", out, "--out", fitted),
        ("sim", trace, "--latency-from", out),
    ):
        result = twinserve(*command)
        assert (result.code, result.out) == (2, ""), (command, result)
        (line,) = result.err.splitlines()
        assert f"steps.jsonl:{rows}: the record is not whole: it ends here" in line
    assert not page.exists() and not fitted.exists()


def test_step_times_of_a_run_with_other_settings_are_refused(twinserve, trace, latency, tmp_path):
    out = tmp_path / "run"
    assert twinserve("sim", trace, "--latency", latency, "--out", out).code == 0
    assert twinserve("sim", trace, "--latency-from", out).code == 0
    result = twinserve("sim", trace, "--latency-from", out, "--max-num-seqs", 1)
    assert result.code == 2
    assert "expected the trace and the settings of the run" in result.err.splitlines()[-1]
