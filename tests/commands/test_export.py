"""A run for other tools: what is written says what the record says."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

import twinserve
from twinserve.settings.errors import InputError
from twinserve.traces.runs.perfetto import DEVICE, HOST, SEQUENCES, export_perfetto
from twinserve.traces.runs.tables import export_tables, request_rows, step_rows
from twinserve.traces.runs.vllm_records import load_run

SCHEMA = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "otherData": {"type": "object"},
        "traceEvents": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["ph", "pid", "name"],
                "properties": {
                    "ph": {"enum": ["X", "M", "C", "i", "s", "t", "f"]},
                    "pid": {"type": "integer", "minimum": 1},
                    "tid": {"type": "integer", "minimum": 0},
                    "ts": {"type": "number", "minimum": 0},
                    "dur": {"type": "number", "minimum": 0},
                    "name": {"type": "string"},
                    "args": {"type": "object"},
                },
                "allOf": [
                    {"if": {"properties": {"ph": {"const": "X"}}}, "then": {"required": ["tid", "ts", "dur"]}},
                    {"if": {"properties": {"ph": {"const": "C"}}}, "then": {"required": ["ts", "args"]}},
                    {"if": {"properties": {"ph": {"const": "M"}}}, "then": {"required": ["args"]}},
                    {"if": {"properties": {"ph": {"const": "i"}}}, "then": {"required": ["tid", "ts", "s"]}},
                    {
                        "if": {"properties": {"ph": {"enum": ["s", "t", "f"]}}},
                        "then": {"required": ["tid", "ts", "id", "cat"]},
                    },
                ],
            },
        },
    },
}
"""What the document "Trace Event Format" says of the events that are written."""


@pytest.fixture
def run(twinserve, trace, latency, tmp_path):
    """The folder of a run that preempts."""
    out = tmp_path / "run"
    options = ("--block-size", 2, "--num-gpu-blocks", 52, "--max-num-seqs", 6, "--pipeline-depth", 1)
    assert twinserve("sim", trace, "--latency", latency, *options, "--out", out).code == 0
    return out


@pytest.fixture
def fleet(twinserve, trace, latency, tmp_path):
    """The folder of a fleet of which a replica was down."""
    out = tmp_path / "fleet"
    options = ("--replicas", 2, "--router", "round-robin", "--die", "1:0.05:0.12")
    assert twinserve("sim", trace, "--latency", latency, *options, "--out", out).code == 0
    return out


def events_of(path):
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(text)["traceEvents"]


def test_the_trace_is_of_the_documented_form_packed_or_not(run, tmp_path):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    record = load_run(run)
    for name in ("a.json", "b.json.gz"):
        export_perfetto(record, tmp_path / name)
    assert events_of(tmp_path / "a.json") == events_of(tmp_path / "b.json.gz")
    jsonschema.validate(json.loads((tmp_path / "a.json").read_text()), SCHEMA)


def test_a_launch_that_is_null_is_drawn_as_one_that_is_not_there(run, tmp_path):
    for name, change in (("null.json", lambda row: row | {"launched_ns": None}), ("absent.json", dict)):
        record = load_run(run)
        export_perfetto(replace(record, steps=[*map(change, record.steps)]), tmp_path / name)
    assert events_of(tmp_path / "null.json") == events_of(tmp_path / "absent.json")


def test_slices_of_a_track_nest_or_follow_one_another(run, fleet, tmp_path):
    """Perfetto drops a slice that begins within another and ends behind it."""
    for number, path in enumerate((run, fleet)):
        export_perfetto(load_run(path), tmp_path / f"{number}.json")
        tracks = defaultdict(list)
        for event in events_of(tmp_path / f"{number}.json"):
            if event["ph"] == "X":
                tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        assert tracks
        for track, spans in tracks.items():
            spans.sort()
            for (_, end), (begin, _) in zip(spans, spans[1:], strict=False):
                assert begin >= end - 1e-3, (track, begin, end)


def test_the_trace_holds_every_step_and_every_phase_of_every_request(run, tmp_path):
    record = load_run(run)
    export_perfetto(record, tmp_path / "run.json")
    events = events_of(tmp_path / "run.json")
    slices = [event for event in events if event["ph"] == "X"]
    origin = min(row["arrival_ns"] for row in record.requests)
    device = [event for event in slices if event["pid"] == 1 and event["tid"] == DEVICE]
    assert [event["args"]["decision"] for event in device] == [row["decision"] for row in record.steps]
    for event, row in zip(device, record.steps, strict=True):
        assert event["ts"] + event["dur"] == pytest.approx((row["end_ns"] - origin) / 1e3)
    assert sum(event["pid"] == 1 and event["tid"] == HOST for event in slices) == len(record.steps)
    for row in record.requests:
        own = {e["name"]: e for e in slices if (e["pid"], e["tid"]) == (1 + SEQUENCES, 1 + row["id"])}
        assert list(own) == ["queued", "prefill", "decode"]
        total = sum(event["dur"] for event in own.values())
        assert total == pytest.approx((row["finish_ns"] - row["arrival_ns"]) / 1e3)
    marks = [event for event in events if event["ph"] == "i"]
    assert len(marks) == record.run["summary"]["preemptions"] > 0


def test_an_arrow_leads_from_each_arrival_over_the_step_that_gave_the_first_token(run, tmp_path):
    record = load_run(run)
    export_perfetto(record, tmp_path / "run.json")
    events = events_of(tmp_path / "run.json")
    origin = min(row["arrival_ns"] for row in record.requests)
    device = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (1, DEVICE)]
    for row in record.requests:
        flow = {event["ph"]: event for event in events if event.get("id") == row["id"]}
        assert flow.keys() == {"s", "t", "f"}
        assert flow["s"]["ts"] == pytest.approx((row["arrival_ns"] - origin) / 1e3)
        assert flow["f"]["ts"] == pytest.approx((row["first_token_ns"] - origin) / 1e3)
        (step,) = [one for one in device if one["ts"] == flow["t"]["ts"]]
        assert step["ts"] + step["dur"] == pytest.approx(flow["f"]["ts"])


def test_a_fleet_has_a_process_a_replica_and_one_for_its_sequences(fleet, tmp_path):
    record = load_run(fleet)
    export_perfetto(record, tmp_path / "fleet.json")
    events = events_of(tmp_path / "fleet.json")
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {
        1: "replica 0",
        2: "replica 1",
        1 + SEQUENCES: "sequences of replica 0",
        2 + SEQUENCES: "sequences of replica 1",
    }
    steps = Counter(
        event["pid"] for event in events if event["ph"] == "X" and event["tid"] == DEVICE and event["pid"] < 3
    )
    assert sum(steps.values()) == record.run["summary"]["steps"] and len(steps) == 2


def test_tables_hold_every_row_and_the_summarys_latencies(run, fleet):
    for path in (run, fleet):
        record = load_run(path)
        requests, steps = request_rows(record), step_rows(record)
        assert len(requests) == record.run["summary"]["requests"] and len(steps) == record.run["summary"]["steps"]
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            values = [row[name] for row in requests if row[name] is not None]
            assert sum(values) / len(values) == pytest.approx(record.run["summary"][name]["mean"])
        assert sum(row["preempted"] for row in steps) == record.run["summary"]["preemptions"]
        assert not [value for row in (*requests, *steps) for value in row.values() if isinstance(value, (list, dict))]
    assert {row["replica"] for row in steps} == {0, 1} and {row["life"] for row in steps} == {0, 1}


def test_csv_and_parquet_and_pandas_say_the_same(run, tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    record = load_run(run)
    export_tables(record, tmp_path / "csv", "csv")
    export_tables(record, tmp_path / "parquet", "parquet")
    requests, steps = twinserve_load(run)
    for name, frame, rows in (
        ("requests", requests.reset_index(), request_rows(record)),
        ("steps", steps, step_rows(record)),
    ):
        pandas.testing.assert_frame_equal(
            pandas.read_parquet(tmp_path / "parquet" / f"{name}.parquet"), frame, check_dtype=False
        )
        with (tmp_path / "csv" / f"{name}.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        texts = [{key: "" if row.get(key) is None else str(row[key]) for key in found[0]} for row in rows]
        assert found == texts and set(found[0]) == {key for row in rows for key in row}
    assert requests.index.name == "id" and requests.loc[3, "prompt_tokens"] == record.requests[3]["prompt_tokens"]


def twinserve_load(run):
    return twinserve.load(str(run))


def test_pandas_is_imported_only_when_frames_are_asked_for_and_named_where_it_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="needs pandas: pip install pandas"):
        twinserve_load(run)


@pytest.mark.parametrize("kind", ["perfetto", "csv"])
def test_the_command_writes_once_and_refuses_what_exists(twinserve, run, tmp_path, kind):
    out = tmp_path / "exported"
    result = twinserve("export", run, "--format", kind, "--out", out)
    assert (result.code, result.out.strip()) == (0, str(out))
    again = twinserve("export", run, "--format", kind, "--out", out)
    assert again.code == 2 and "exists already" in again.err
    assert twinserve("export", tmp_path / "none", "--format", kind, "--out", tmp_path / "x").code == 2
