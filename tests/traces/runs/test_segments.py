"""The record of live traffic in segments: those that are whole are a record, wherever the process is killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.compare import check_same_trace
from twinserve.traces.runs.concealed import ConcealedTokens, as_they_are
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.segments import SegmentedRecorder


def segments(path: Path) -> list[Path]:
    return sorted((path / "segments").iterdir())


def small(path: Path, **how) -> SegmentedRecorder:
    facts = {"settings": {}, "facts": {}, "device": None, "tokens": as_they_are}
    return SegmentedRecorder(path, world="sim", **facts, **({"most_bytes": 1 << 20, "most_s": 1e9} | how))


def serve_one(core, recorder, number: int) -> None:
    request = Request(number, number, (Part(number, 0, 5),), 1)
    recorder.expect(request, SamplingParams())
    core.ingest(request.to_sequence(SamplingParams()), number)
    core.decide(number)
    core.commit(None, number + 1)


@pytest.mark.parametrize("pipeline_depth", [0, 1])
@pytest.mark.parametrize("real", [False, True])
def test_the_rows_of_all_segments_are_those_of_a_record_in_one_piece(record_run, record_live, real, pipeline_depth):
    how = {"real": real, "abort_share": 0.02, "pipeline_depth": pipeline_depth}
    whole, live = load_record(record_run(**how).path), record_live(**how)
    assert len(segments(live._out)) > 5
    record = load_record(live._out)
    assert (record.requests, record.steps, record.outputs) == (whole.requests, whole.steps, whole.outputs)
    assert record.run["summary"] == whole.run["summary"] | {"events": len(record.steps)}
    assert live.counts["requests"] == 60 == live.counts.total() // 2
    assert live.counts["abort"] == record.run["summary"]["aborted"] > 0


@pytest.mark.parametrize("pipeline_depth", [0, 1])
@pytest.mark.parametrize("tokens", [None, as_they_are, ConcealedTokens(5)], ids=["sim", "tokens", "concealed"])
def test_whatever_is_whole_when_the_process_is_killed_replays_exactly(record_live, tmp_path, tokens, pipeline_depth):
    live = record_live(real=tokens is not None, tokens=tokens, abort_share=0.02, pipeline_depth=pipeline_depth)
    pieces, unfinished = segments(live._out), set()
    for number in range(1, len(pieces) + 1):
        killed = tmp_path / f"killed-{number}"
        shutil.copytree(live._out, killed)
        for piece in segments(killed)[number:]:
            piece.rename(piece.with_name(f"{piece.name}.partial"))
        record = load_record(killed)
        assert len(record.steps) > 0
        unfinished |= {row["id"] for row in record.requests if row["finish_reason"] is None}
        result = replay(record)
        assert result.is_exact, result.difference
        assert record.run["summary"]["requests"] == len(record.requests)
    assert len(unfinished) > 10


def test_a_segment_that_is_old_enough_ends_when_nothing_is_served(tmp_path):
    now = [0.0]
    recorder = small(tmp_path / "live", most_s=60, clock=lambda: now[0])
    core = Settings().build_core(listener=recorder)
    recorder.tick()
    assert [piece.name for piece in segments(tmp_path / "live")] == ["000000.partial"]
    serve_one(core, recorder, 0)
    now[0] = 59.0
    recorder.tick()
    assert [piece.name for piece in segments(tmp_path / "live")] == ["000000.partial"]
    now[0] = 61.0
    recorder.tick()
    assert [piece.name for piece in segments(tmp_path / "live")] == ["000000", "000001.partial"]
    now[0] = 500.0
    recorder.tick()
    serve_one(core, recorder, 1)
    recorder.close()
    assert [piece.name for piece in segments(tmp_path / "live")] == ["000000", "000001"]
    assert len(load_record(tmp_path / "live").requests) == 2


def test_a_record_of_nothing_is_one_too_once_it_is_closed(tmp_path):
    recorder = small(tmp_path / "live")
    Settings().build_core(listener=recorder)
    with pytest.raises(InputError, match="segments: has no segment that is whole"):
        load_record(tmp_path / "live")
    recorder.close()
    recorder.discard()
    assert load_record(tmp_path / "live").requests == []


def test_a_server_that_never_served_leaves_nothing_behind(tmp_path):
    small(tmp_path / "live").discard()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="live: exists already"):
        small(tmp_path / "live"), small(tmp_path / "live")


def test_what_decides_is_in_the_record_before_the_first_segment_is_whole(tmp_path):
    recorder = small(tmp_path / "live")
    assert json.loads((tmp_path / "live" / "run.json").read_text())["settings"]["scheduling_policy"] != "priority"
    Settings(scheduling_policy="priority").build_core(listener=recorder)
    assert json.loads((tmp_path / "live" / "run.json").read_text())["settings"]["scheduling_policy"] == "priority"


def test_a_segment_that_is_missing_is_named(record_live):
    path = record_live()._out
    shutil.rmtree(segments(path)[1])
    with pytest.raises(InputError, match="000002: expected the segments from 000000 on, without a gap"):
        load_record(path)
    with pytest.raises(InputError, match="000002: expected the segments from 000000 on, without a gap"):
        read_trace(path)


def test_a_broken_line_in_a_segment_is_named(record_live):
    path = record_live()._out
    file = segments(path)[2] / "steps.jsonl"
    file.write_text("{\n" + file.read_text())
    with pytest.raises(InputError, match=r"segments/000002/steps.jsonl:1: expected JSON"):
        load_record(path)


def test_a_record_in_segments_is_a_trace_of_what_was_answered(record_live, record_run):
    live, whole = record_live(abort_share=0.02)._out, record_run(abort_share=0.02).path
    assert read_trace(live).requests == read_trace(whole).requests == read_trace(whole / "requests.jsonl").requests
    assert read_trace(live).sha256 == load_record(live).run["facts"]["trace"]["sha256"]
    last = segments(live)[-1]
    last.rename(last.with_name("killed.partial"))
    cut = read_trace(live)
    assert 0 < len(cut.requests) < 60
    check_same_trace(load_record(live), load_record(live))
