"""The windows that hold the twin against the engine, and the page about them."""

from __future__ import annotations

import gzip
import json
import os
import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import fidelity
import fidelity_text
from fidelity_numbers import METRICS, kind_of, unpacked, workload_of
from fidelity_windows import GROUPS, SMALL, served_rate
from result_files import RESULTS

from twinserve.policies import SamplingParams, Sequence
from twinserve.sim.latency import StepFeatures
from twinserve.sim.profiles import Profile
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.replay import replay

FOLDERS = sorted(path.parent for path in RESULTS.glob("*/fidelity/saturation.json"))


def test_each_pair_of_settings_occurs():
    rows = [
        (
            group.composition, group.tokens, group.seqs, group.block_size, group.has_cache,
            group.blocks * group.block_size > 500_000,
        )
        for group in GROUPS
        if group.shape == SMALL
    ]  # fmt: skip
    for one, other in combinations(range(len(rows[0])), 2):
        columns = [{row[place] for row in rows} for place in (one, other)]
        missing = set(product(*columns)) - {(row[one], row[other]) for row in rows}
        assert missing <= {(512, 1024)}, f"{missing} do not occur; each of 1,024 sequences has to have a token"
    assert {group.workload for group in GROUPS} == {"azure", "mooncake", "bursty", "sessions"}
    assert sum(len(group.repeated) for group in GROUPS) >= 5


@pytest.mark.parametrize("workload", ["bursty", "sessions"])
def test_a_workload_comes_as_often_as_it_is_asked_to_and_is_the_same_twice(workload):
    group = next(group for group in GROUPS if group.workload == workload)
    requests = group.requests(30.0)
    assert requests == group.requests(30.0) and len(requests) == 600
    begun = [request for request in requests if request.after is None]
    assert 10 < begun[-1].arrival_ns / 1e9 < 40


def test_what_is_served_under_overload_is_told_by_the_tokens_of_its_settled_part():
    seqs = []
    for number in range(4):
        seq = Sequence([1], SamplingParams(max_tokens=100), seq_id=number)
        seq.token_ids += [0] * 100
        seq.num_tokens = 101
        seq.first_token_ns, seq.finish_ns = 0, 7_000_000_000
        seqs.append(seq)
    requests = [Request(0, 0, (Part(0, 0, 5),), 100)]
    assert served_rate(seqs, requests, (2.5, 7.0)) == pytest.approx(4 / 7, abs=1e-3)
    seqs[0].finish_ns = 2_500_000_000
    assert served_rate(seqs, requests, (2.5, 7.0)) == pytest.approx(3 / 7, abs=1e-3)


def window(tpot: float, ttft: float, sim: float = 1.0, **more: Any) -> dict[str, Any]:
    """A window's numbers, the simulation's so many times the measured."""
    real = dict.fromkeys(METRICS, 1.0) | {"tpot_s.mean": tpot, "ttft_s.mean": ttft, "e2e_s.mean": tpot}
    real |= {"preemptions": 0.0}
    predicted = {name: value * sim for name, value in real.items()}
    limits = {name: (0.9 * value, 1.1 * value) for name, value in predicted.items()}
    kinds = {"decodes, 1 to 15": (1.0, sim)}
    return {"real": real, "sim": predicted, "limits": limits, "bias": sim - 1.0, "kinds": kinds, "load": 0.8} | more


def test_the_page_says_what_its_numbers_say():
    one, other = "qwen3-0.6b-azure-mixed-0.50", "qwen3-0.6b-azure-mixed-0.80"
    windows = {
        one: window(0.010, 0.10),
        f"{one}-again": window(0.011, 0.10),
        other: window(0.020, 0.30, sim=1.2),
    }
    assert fidelity_text.ranked(windows)["tpot_s.mean"] == (1, 1)
    assert fidelity_text.covered(windows)["tpot_s.mean"] == (2, 3)
    windows["qwen3-0.6b-azure-mixed-0.90"] = window(0.016, 0.2, sim=0.5)
    assert fidelity_text.ranked(windows)["tpot_s.mean"] == (2, 3), "8 ms where 10 are less than 16"
    results = {"card": "x", "device": "X", "decisions": [5, 6], "saturation": {}, "windows": windows}
    text = fidelity_text.page(results)
    assert "Of 6 recorded decisions 5 are made again" in text
    assert f"`{other}` | +20.0%" in text and "(+10.0%)" in text and "| TPOT mean | 10.0% | 50.0% |" in text
    assert f"| `{other}` | bias +20.0%, TPOT mean +20.0%" in text and f"| `{one}` | bias" not in text
    assert text.count("`qwen3-0.6b-azure-mixed-0.90`") == 3, "the worst window is taken apart"
    assert fidelity_text.plot(windows).count("<circle") == 4 * 5 + 3


def test_kinds_tell_steps_apart_by_what_is_in_them():
    steps = [
        StepFeatures(0, decodes + prompts, 9 * prompts, decodes, 0, 0, 0, prompts=((0, 9),) * prompts)
        for decodes, prompts in ((1, 0), (16, 0), (128, 0), (0, 1), (1, 1))
    ]
    assert [kind_of(step) for step in steps] == list(fidelity_text.KINDS)


@pytest.mark.skipif(not FOLDERS, reason="no card's windows are recorded")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_the_windows_that_ship_are_whole(folder: Path):
    named = {f"{name}.tar.xz" for group in GROUPS for name, _ in group.windows}
    shipped = sorted(folder.glob("*.tar.xz"))
    assert shipped and {path.name for path in shipped} <= named
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    written = json.loads((folder.parent / "fidelity.json").read_text())
    assert set(written["windows"]) == {path.name.removesuffix(".tar.xz") for path in shipped}
    for path in folder.glob("profile-*"):
        assert len(Profile.load(path).samples) > 500
        assert gzip.decompress(path.read_bytes()).count(b"\n") > 500
    shortest = min(shipped, key=lambda path: path.stat().st_size)
    with unpacked(shortest) as record:
        result = replay(record)
        assert result.is_exact and result.recorded > 1000
        if record.run["facts"]["trace"]["path"] in ("bursty", "sessions") or "TWINSERVE_TRACES" in os.environ:
            assert len(workload_of(record).requests) == len(record.requests)


def test_what_parts_from_what_is_written_is_named():
    written = {"a": {"b": 0.25, "c": [5, 0.1]}, "d": "x"}
    assert fidelity.parted({"a": {"b": 0.2501, "c": [5, 0.1]}, "d": "x"}, written) == []
    assert fidelity.parted({"a": {"b": 0.26, "c": [6, 0.1]}, "d": "x"}, written) == ["/a/b", "/a/c/0"]
    assert fidelity.parted({"a": {"b": 0.25, "c": [5]}, "d": "x"}, written) == ["/a/c"]
    assert fidelity.parted({"a": {}, "d": "x"}, written) == ["/a"]
    assert fidelity.parted({"limits": [1.0, 1.04]}, {"limits": [1.0, 1.0]}) == []
