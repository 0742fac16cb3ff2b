"""A run record holds what happened, appears complete or not at all, and is read back with every fault named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import twinserve.traces.runs
from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.metrics import summarize
from twinserve.traces.runs.record import RunRecorder, load_record, single_steps

SCHEMA = json.loads((Path(twinserve.traces.runs.__file__).parent / "record.schema.json").read_text())
DECISIONS = (
    SCHEMA["$defs"]["step"]["properties"].keys() - set(SCHEMA["$defs"]["step"]["required"]) - {"digest", "launched_ns"}
)


def recorder(path: Path, world="sim") -> RunRecorder:
    return RunRecorder(path, world=world, settings={}, facts={})


def edit(path: Path, number: int, **values) -> None:
    """Change fields of line `number` of a file; `...` takes a field away."""
    lines = path.read_text().splitlines()
    row = json.loads(lines[number - 1]) | values
    lines[number - 1] = json.dumps({key: value for key, value in row.items() if value is not ...})
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def run(record_run):
    """A simulated run with preemptions, aborts and refusals."""
    return record_run(abort_share=0.02, num_gpu_blocks=30, max_model_len=250, pipeline_depth=1)


# --- writing ---


@pytest.mark.parametrize("real", [False, True])
def test_rows_keep_to_the_schema(record_run, real):
    from jsonschema import Draft202012Validator

    run = record_run(real=real, abort_share=0.02, num_gpu_blocks=30, max_model_len=250, pipeline_depth=1)
    record = load_record(run.path)
    assert run.summary["refused"] and run.summary["aborted"] and run.summary["preemptions"]
    Draft202012Validator.check_schema(SCHEMA)
    for name, rows in (("run", [record.run]), ("request", record.requests), ("step", record.steps)):
        validator = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})
        assert [error.message for row in rows for error in validator.iter_errors(row)] == []


def test_the_same_run_gives_the_same_bytes(record_run):
    first, second = (record_run(name, real=True, abort_share=0.02).path for name in ("first", "second"))
    names = sorted(file.name for file in first.iterdir())
    assert names == ["outputs.jsonl.gz", "requests.jsonl", "run.json", "steps.jsonl"]
    assert [(first / name).read_bytes() for name in names] == [(second / name).read_bytes() for name in names]


def test_a_simulation_has_no_outputs(run):
    assert sorted(file.name for file in run.path.iterdir()) == ["requests.jsonl", "run.json", "steps.jsonl"]


def test_requests_come_in_the_order_of_their_ingest_numbers(run):
    assert [row["ingest"] for row in load_record(run.path).requests] == list(range(60))


@pytest.mark.parametrize("name", ["steps.jsonl", "requests.jsonl"])
def test_a_row_is_json_without_spaces(run, name):
    lines = (run.path / name).read_text().splitlines()
    assert lines == [json.dumps(json.loads(line), separators=(",", ":")) for line in lines]


def test_steps_come_in_the_order_of_the_decisions(run):
    steps = load_record(run.path).steps
    assert [row["decision"] for row in steps] == list(range(len(steps)))


def test_outputs_are_the_tokens_that_came_out(record_run):
    record = load_record(record_run(real=True).path)
    assert [len(record.outputs[row["id"]]) for row in record.requests] == [
        row["output_tokens"] for row in record.requests
    ]


def test_cached_tokens_are_those_of_the_first_admission(run):
    record = load_record(run.path)
    first: dict[int, int] = {}
    for step in record.steps:
        for seq_id, start, _, _ in step["admitted"]:
            first.setdefault(seq_id, start)
    assert {row["id"]: row["cached_tokens"] for row in record.requests} == {
        row["id"]: first.get(row["id"], 0) for row in record.requests
    }


def test_the_summary_is_that_of_the_rows(run):
    record = load_record(run.path)
    assert record.run["summary"] == run.summary == summarize(record.requests, record.steps, world="sim")


def test_what_the_caller_knows_joins_the_summary(tmp_path):
    with recorder(tmp_path / "run") as record:
        assert (
            record.close({"capped": 3, "wall_s": 1.5}).items() >= {"capped": 3, "shortened": 0, "wall_s": 1.5}.items()
        )


def test_a_request_still_running_at_the_end_is_written_without_a_finish(tmp_path):
    with recorder(tmp_path / "run") as record:
        core = Settings().build_core(listener=record)
        request = Request(0, 0, (Part(0, 0, 5),), 10)
        record.expect(request, SamplingParams())
        core.ingest(request.to_sequence(SamplingParams()), 7)
        record.close()
    [row] = load_record(tmp_path / "run").requests
    assert (row["ingested_ns"], row["finish_ns"], row["finish_reason"]) == (7, None, None)


def test_a_sequence_that_nobody_expected_is_not_a_request_of_the_record(tmp_path):
    with recorder(tmp_path / "run") as record:
        core = Settings().build_core(listener=record)
        core.ingest(Sequence([1, 2, 3], SamplingParams(max_tokens=1)), 0)
        core.decide(0)
        core.commit([4], 1)
        record.close()
    loaded = load_record(tmp_path / "run")
    assert (len(loaded.requests), len(loaded.steps)) == (0, 1)


def test_limits_that_a_replay_needs_are_kept(tmp_path):
    with recorder(tmp_path / "run") as record:
        core = Settings().build_core(listener=record)
        request = Request(0, 0, (Part(8, 2, 5), Part(9, 0, 1)), 10, session=4)
        params = SamplingParams(stop_token_ids=(11, 12))
        record.expect(request, params)
        core.ingest(request.to_sequence(params), 0)
        record.close()
    [row] = load_record(tmp_path / "run").requests
    kept = {"prompt": [[8, 2, 5], [9, 0, 1]], "max_tokens": 10, "session": 4, "stop_token_ids": [11, 12]}
    assert {key: row[key] for key in kept} == kept


@pytest.mark.parametrize("name", ["requests", "steps"])
def test_pandas_reads_the_rows_in_a_line(run, name):
    import pandas

    assert len(pandas.read_json(run.path / f"{name}.jsonl", lines=True)) == run.summary[name]


# --- all or nothing ---


def test_nothing_is_at_the_folders_place_before_the_end(tmp_path):
    with recorder(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), recorder(tmp_path / "run"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_was_never_closed_leaves_nothing_behind(tmp_path):
    with recorder(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="exists already, expected a new name"):
        recorder(tmp_path / "run")


def test_a_folder_that_another_run_is_writing_is_refused(tmp_path):
    with recorder(tmp_path / "run"), pytest.raises(InputError, match="another run is writing it"):
        recorder(tmp_path / "run")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        recorder(tmp_path / "file" / "run")


# --- reading ---


@pytest.mark.parametrize("name", ["run.json", "requests.jsonl", "steps.jsonl", "outputs.jsonl.gz"])
def test_a_missing_file_is_named(record_run, name):
    path = record_run(real=True).path
    (path / name).unlink()
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        load_record(path)


def test_another_schema_version_is_refused(run):
    text = (run.path / "run.json").read_text()
    (run.path / "run.json").write_text(text.replace("twinserve-run/2", "twinserve-run/9"))
    with pytest.raises(
        InputError, match="schema is 'twinserve-run/9', expected 'twinserve-run/2' or 'twinserve-run/1'"
    ):
        load_record(run.path)


def test_a_broken_line_is_named(run):
    steps = run.path / "steps.jsonl"
    steps.write_text(steps.read_text()[:-20])
    with pytest.raises(InputError, match=rf"steps.jsonl:{run.summary['steps']}: expected JSON"):
        load_record(run.path)


@pytest.mark.parametrize("field", sorted(SCHEMA["$defs"]["step"]["required"]))
def test_a_missing_fact_of_a_step_is_named(run, field):
    edit(run.path / "steps.jsonl", 2, **{field: ...})
    with pytest.raises(InputError, match=f"steps.jsonl:2: {field} is missing"):
        load_record(run.path)


@pytest.mark.parametrize("field", sorted(SCHEMA["$defs"]["request"]["required"]))
def test_a_missing_field_of_a_request_is_named(run, field):
    edit(run.path / "requests.jsonl", 2, **{field: ...})
    with pytest.raises(InputError, match=f"requests.jsonl:2: {field} is missing"):
        load_record(run.path)


def test_decisions_other_than_the_digest_may_be_missing(run):
    for number in range(1, run.summary["steps"] + 1):
        edit(run.path / "steps.jsonl", number, **dict.fromkeys(DECISIONS, ...))
    assert len(load_record(run.path).steps) == run.summary["steps"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decision", 5),
        ("seen", -1),
        ("seen", True),
        ("aborted", ["a"]),
        ("committed", -2),
        ("start_ns", 1.5),
        ("end_ns", None),
        ("count", 0),
        ("digest", "xyz"),
        ("digest", 12),
        ("admitted", [[1, 2, 3]]),
        ("rows", [1]),
        ("left", {}),
        ("preempted", None),
        ("usual", "1"),
        ("running", []),
    ],
)
def test_a_wrong_value_of_a_step_is_named(run, field, value):
    edit(run.path / "steps.jsonl", 2, **{field: value})
    with pytest.raises(InputError, match=f"steps.jsonl:2: {field} is .*, expected"):
        load_record(run.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", None),
        ("ingest", 0),
        ("session", "x"),
        ("first_token_ns", -1),
        ("finish_reason", "other"),
        ("prompt", [[1, 2]]),
        ("prompt", [[1, -2, 3]]),
        ("prompt_tokens", 1),
        ("max_tokens", 0),
        ("refusal", 3),
        ("ignore_eos", 1),
        ("stop_token_ids", [-1]),
    ],
)
def test_a_wrong_value_of_a_request_is_named(run, field, value):
    edit(run.path / "requests.jsonl", 2, **{field: value})
    with pytest.raises(InputError, match=rf"requests.jsonl:2: {field} is .*, expected"):
        load_record(run.path)


@pytest.mark.parametrize("field", ["id", "ingest"])
def test_a_number_that_two_requests_have_is_refused(run, field):
    edit(run.path / "requests.jsonl", 3, **{field: load_record(run.path).requests[0][field]})
    with pytest.raises(InputError, match=f"requests.jsonl:3: {field} is .*, expected another one"):
        load_record(run.path)


def test_outputs_of_another_length_than_the_requests_row_says_are_refused(record_run):
    path = record_run(real=True).path
    edit(path / "requests.jsonl", 3, output_tokens=1000)
    with pytest.raises(InputError, match="requests.jsonl:3: output_tokens is 1000, expected"):
        load_record(path)


def test_outputs_cut_short_are_refused(record_run):
    path = record_run(real=True).path / "outputs.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="outputs.jsonl.gz: expected a whole gzip file"):
        load_record(path.parent)


def test_outputs_carry_no_time_of_writing(record_run):
    content = (record_run(real=True).path / "outputs.jsonl.gz").read_bytes()
    assert (content[4:8], bool(gzip.decompress(content))) == (bytes(4), True)


def test_the_row_of_several_steps_reads_as_the_page_about_traces_says():
    row = {"decision": 7, "committed": 6, "decided_ns": 1000, "start_ns": 1100, "end_ns": 2000, "count": 4}
    row |= {"admitted": [], "aborted": [], "left": [], "preempted": [], "grown": [], "rows": [], "used_blocks": 3}
    row |= {"tokens": 2, "decode_tokens": 2, "kv_tokens": 20, "attention_pairs": 20, "digest": "ab"}
    row["repeats"] = {"end_ns": [900, 910, 920], "start_ns": [100], "grown": [[2, 5, [17]]]}
    steps = list(single_steps(row))
    assert [step["decision"] for step in steps] == [7, 8, 9, 10]
    third = steps[2]
    assert [third[name] for name in ("decided_ns", "start_ns", "end_ns")] == [2900, 3000, 3810]
    assert (third["grown"], third["used_blocks"], third["kv_tokens"]) == ([[5, [17]]], 4, 24)
    assert [step.get("digest") for step in steps] == [None, None, None, "ab"]
    page = (Path(__file__).resolve().parents[3] / "docs" / "traces.md").read_text()
    assert '"repeats": ' + json.dumps(row["repeats"]) in page
