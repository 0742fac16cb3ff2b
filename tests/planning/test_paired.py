"""Two policies over seeds: differences pair by pair, their interval, and which runs are no pairs."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import own_rules
import pytest

from twinserve.planning.paired import paired
from twinserve.settings.errors import InputError
from twinserve.traces.runs.compare import METRICS
from twinserve.traces.runs.record import load_record

T_975_2 = 4.302652729911275
"""Student's t at 97.5% with two degrees of freedom, from a table."""


@pytest.fixture
def runs(twinserve, trace, latency, tmp_path) -> dict[str, list[Path]]:
    """First come and last come, three seeds each."""
    mine = shutil.copy(own_rules.__file__, tmp_path / "mine.py")
    found: dict[str, list[Path]] = {}
    for name, policy in (("first", ()), ("last", ("--scheduling-policy", f"{mine}:LastCome"))):
        for seed in range(3):
            found.setdefault(name, []).append(tmp_path / f"{name}-{seed}")
            options = ("--latency", latency, "--max-num-seqs", 1, "--shuffle-seed", seed, *policy)
            assert twinserve("sim", trace, *options, "--out", found[name][-1]).code == 0
    return found


def summaries(folders: list[Path], name: str, statistic: str) -> list[float]:
    return [load_record(folder).run["summary"][name][statistic] for folder in folders]


def test_differences_are_b_minus_a_in_pairs_with_students_interval(twinserve, runs):
    result = twinserve("compare", "--json", "--paired", *runs["first"], "--", *runs["last"])
    assert (result.code, result.err) == (0, "the sides differ in scheduling_policy\n")
    rows = json.loads(result.out)
    assert tuple(rows) == METRICS
    first, last = (summaries(runs[name], "ttft_s", "p90") for name in ("first", "last"))
    pairs = [b - a for a, b in zip(first, last, strict=True)]
    row = rows["ttft_s.p90"]
    mean, half = statistics.fmean(pairs), T_975_2 * statistics.stdev(pairs) / 3**0.5
    assert (row["a"], row["b"], row["difference"]) == pytest.approx(
        (statistics.fmean(first), statistics.fmean(last), mean)
    )
    assert row["interval"] == pytest.approx([mean - half, mean + half]) and half > 0
    unpaired = twinserve("compare", "--json", "--paired", *runs["first"], "--", *reversed(runs["last"]))
    assert unpaired.code == 2 and "facts.trace.transforms" in unpaired.err


def test_a_metric_that_a_run_lacks_has_no_difference(twinserve, trace, latency, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        twinserve("sim", trace, "--latency", latency, "--max-output-tokens", 1, "--out", folder)
    rows = {row.metric: row for row in paired([load_record(folders[0])] * 2, [load_record(folders[1])] * 2)}
    assert (rows["tpot_s.mean"].difference, rows["tpot_s.mean"].interval) == (None, None)
    assert rows["ttft_s.mean"].difference == 0 and rows["ttft_s.mean"].interval == (0, 0)


def test_one_pair_has_no_interval_and_that_is_said(twinserve, runs):
    result = twinserve("compare", "--paired", runs["first"][0], "--", runs["last"][0])
    assert result.code == 0 and "one pair alone: no interval" in result.err
    words = next(line for line in result.out.splitlines() if "ttft_s.p90" in line).replace("│", " ").split()
    assert words[0] == "ttft_s.p90" and words[-1] == "-"
    assert float(words[3]) == pytest.approx(float(words[2]) - float(words[1]), rel=0.01)


def test_what_is_no_pairs_is_refused(twinserve, runs):
    first, last = runs["first"], runs["last"]
    for arguments, words in (
        (("--paired", *first, "--", *last[:2]), "runs: 3 before -- and 2 after it, expected as many"),
        (("--paired", *first, *last), "expected A... -- B... beside paired"),
        (("--paired", "--", *last), "expected A... -- B... beside paired"),
        ((first[0],), "expected SIM REAL, or A... -- B... beside paired"),
        ((first[0], "--", last[0], last[1]), "expected SIM REAL, or A... -- B... beside paired"),
        (("--paired", "--max-error", "steps=1", first[0], "--", last[0]), "max_error is ['steps=1'], expected none"),
        (("--paired", first[0], last[1], "--", *first[:2]), "settings.scheduling_policy is "),
    ):
        result = twinserve("compare", *arguments)
        assert (result.code, result.out) == (2, "") and words in result.err.splitlines()[-1], result.err


def test_a_side_is_of_one_policy_which_is_a_files_content_and_not_its_place(twinserve, trace, latency, tmp_path):
    def run(name: str, folder: Path, content: str):
        folder.mkdir(exist_ok=True)
        (folder / "mine.py").write_text(content)
        options = ("--latency", latency, "--scheduling-policy", f"{folder / 'mine.py'}:LastCome")
        assert twinserve("sim", trace, *options, "--out", tmp_path / name).code == 0
        return load_record(tmp_path / name)

    content = Path(own_rules.__file__).read_text()
    here, there = run("here", tmp_path / "a", content), run("there", tmp_path / "b", content)
    other = run("other", tmp_path / "c", content + "# changed\n")
    assert here.run["settings"] != there.run["settings"]
    assert {row.difference for row in paired([here, there], [there, here])} <= {0, None}
    with pytest.raises(InputError, match="other/run.json: settings.scheduling_policy is .*, expected that of .*here"):
        paired([here, other], [here, here])

    said = twinserve("compare", tmp_path / "here", tmp_path / "there")
    assert (said.code, said.err) == (0, "")
    said = twinserve("compare", tmp_path / "here", tmp_path / "other")
    assert (said.code, said.err) == (0, "the runs differ in scheduling_policy\n")
    for name, remark in (
        ("there", "The runs have equal settings, facts and loads."),
        ("other", "The runs differ in scheduling_policy."),
    ):
        page = tmp_path / f"{name}.html"
        assert twinserve("report", tmp_path / "here", tmp_path / name, "--out", page).code == 0
        assert remark in page.read_text()
