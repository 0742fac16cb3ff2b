"""A journal that vLLM 0.33's own scheduler wrote through RecordingScheduler: read, decided again, cut off, refused.

tests/data/vllm_journal holds 60 requests in a small pool, among them some that stopped by themselves, three aborts and
next turns that begin with an earlier answer; `tests/vllm_world.py` makes others.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from latencies import Uneven

from twinserve.cli import main
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.recorded_steps import features_of, fit_records
from twinserve.sim.replica import simulate
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.vllm_journal import JOURNAL
from twinserve.traces.runs.vllm_records import load_run, requests_of

FOLDER = Path(__file__).resolve().parents[1] / "data" / "vllm_journal"


def test_every_decision_of_a_journal_is_made_again():
    record = load_run(FOLDER)
    result = replay(record)
    assert result.is_exact and result.recorded == 316, result.difference
    reasons = [row["finish_reason"] for row in record.requests]
    assert {reason: reasons.count(reason) for reason in set(reasons)} == {"length": 42, "stop": 15, "abort": 3}
    assert sum(row["preemptions"] for row in record.requests) == 11
    assert sum(row["cached_tokens"] for row in record.requests) == 1104
    assert record.run["settings"]["vllm_version"] == "0.33" and record.run["settings"]["pipeline_depth"] == 1


def test_a_next_turn_begins_with_what_another_was_asked_and_answered():
    record = load_run(FOLDER)
    turns = [row for row in record.requests if any(text < 0 for text, _, _ in row["prompt"])]
    assert turns and all(sum(part[2] for part in row["prompt"]) == row["prompt_tokens"] for row in record.requests)


def test_by_another_versions_rules_or_a_setting_changed_the_replay_says_where_it_parts():
    record = load_run(FOLDER)
    record.run["settings"]["max_num_batched_tokens"] -= 8
    difference = replay(record).difference
    assert difference is not None and difference.field in ("admitted", "rows", "tokens")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_what_a_kill_left_of_a_journal_is_read_up_to_its_last_whole_line(tmp_path, share):
    content = (FOLDER / JOURNAL).read_bytes()
    cut = content[: int(len(content) * share)]
    assert not cut.endswith(b"\n"), "in the middle of a line"
    (tmp_path / JOURNAL).write_bytes(cut)
    record = load_run(tmp_path)
    result = replay(record)
    assert result.is_exact and 0 < result.recorded < 316, result.difference


def test_the_trace_of_a_journal_can_be_simulated():
    record = load_run(FOLDER)
    requests = requests_of(record)
    stopped = [row for row in record.requests if row["finish_reason"] == "stop"]
    assert all(requests[row["id"]].max_tokens == row["output_tokens"] == 8 for row in stopped)
    ended = []
    core = Settings.recorded(record.run["settings"], record.path).build_core()
    simulate(requests, core, Uneven(), progress=ended.append)
    assert len(ended) == 60


def timed(lines: list[str], device_s) -> list[str]:
    """The journal of a server whose steps take so long, by their tokens, and each launch a fifth of a millisecond."""
    head, *events = (json.loads(line) for line in lines)
    head[2]["cudagraph_capture_sizes"] = [32]
    now = busy_until = 0.0
    launched, ends = {}, {}

    def written(*times_s: float) -> list[int]:
        return [round(time_s * 1e6) for time_s in times_s]

    for event in events:
        if event[0] == "q":
            event[2:3] = written(now)
        elif event[0] == "s":
            step, num_tokens = event[1], event[-1]
            begun = now + 50e-6
            event[2:4] = written(now, begun)
            now = begun + 200e-6
            busy_until = max(busy_until, begun if num_tokens > 32 else now) + device_s(num_tokens)
            launched[step], ends[step] = now, busy_until
        elif event[0] == "u":
            known = max(now, ends[event[1]])
            now = known + 30e-6
            event[2:5] = written(launched[event[1]], known, now)
        else:
            event[1:2] = written(now)
    return [json.dumps(event) for event in (head, *events)]


def test_from_a_journal_follows_a_latency_by_which_the_run_comes_out_as_it_was(tmp_path):
    def device_s(num_tokens: int) -> float:
        return 2e-3 + 20e-6 * num_tokens if num_tokens else 0.0

    lines = (FOLDER / JOURNAL).read_text().splitlines()
    (tmp_path / JOURNAL).write_text("\n".join(timed(lines, device_s)) + "\n")
    record = load_run(tmp_path)
    assert replay(record).is_exact
    latency = fit_records([record], about={})
    for features in features_of(record):
        if features.seqs:
            cost = latency.step_cost(features)
            assert cost.device_ns == pytest.approx(device_s(features.tokens) * 1e9, rel=0.05)
            assert cost.host_ns == pytest.approx(280_000, rel=0.1)
    ended = []
    core = Settings.recorded(record.run["settings"], record.path).build_core()
    simulate(requests_of(record), core, latency, progress=ended.append)
    assert max(seq.finish_ns for seq in ended) == pytest.approx(record.steps[-1]["end_ns"], rel=0.05)


def test_a_command_reads_the_folder_of_a_journal(tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "mine"))
    monkeypatch.setattr(sys, "argv", ["twinserve", "replay", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and "316 of 316" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        (0, '["format","other/1",{},0]', "expected a journal of format"),
        (3, '["s",0]', "expected a line of a journal"),
        (3, '["s",0', "expected JSON"),
        (3, '["u",99,100000,100000,200000,1,[]]', "expected a line of a journal"),
    ],
)
def test_what_is_no_journal_is_refused_with_its_line(tmp_path, line, text, expected):
    lines = (FOLDER / JOURNAL).read_text().splitlines()
    lines[line] = text
    (tmp_path / JOURNAL).write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=expected) as error:
        load_run(tmp_path)
    assert f"{JOURNAL}:{line + 1}" in str(error.value)


def test_a_journal_holds_no_token():
    """Of a prompt only its length, and where an earlier one begins alike."""
    rows = [json.loads(line) for line in (FOLDER / JOURNAL).read_text().splitlines()]
    asked = [row for row in rows if row[0] == "q"]
    assert len(asked) == 60 and all(len(row) == 7 for row in asked)
    assert {type(value) for row in asked for value in row[1:]} <= {int, float, list, type(None)}
    assert all(len(row[6]) == 2 for row in asked if row[6] is not None)
