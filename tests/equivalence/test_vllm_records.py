"""Step logs of a real vLLM are decided again from their facts, and what differs is named."""

import functools
import json
import os
import random
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from vllm_log import encoded, pack, unpack, write_log

import twinserve.traces.runs
from twinserve.settings.errors import InputError
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import load_record, write_record
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.vllm_records import load_run, read_vllm_record, requests_of

MS = 1_000_000
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "max_model_len": 256, "num_gpu_blocks": 24}

RECORDS = Path(os.environ.get("TWINSERVE_RECORDS", "")) / "vllm-0.24.0-h100"
RUNS = sorted(path for path in RECORDS.iterdir() if path.is_dir()) if "TWINSERVE_RECORDS" in os.environ else [None]


@functools.lru_cache(maxsize=1)
def real_record(run: Path):
    return read_vllm_record(run)


@pytest.mark.parametrize("run", RUNS, ids=[path.name if path else "none" for path in RUNS])
def test_every_step_of_a_real_run_is_decided_again(run):
    if run is None:
        pytest.skip("TWINSERVE_RECORDS is not set: it names the folder that holds vllm-0.24.0-h100")
    record = real_record(run)
    result = replay(record)
    assert result.difference is None
    assert result.equal == result.recorded == len(record.steps) > 400
    assert [row["decision"] for row in record.steps] == list(range(result.recorded))


@pytest.mark.parametrize("run", RUNS, ids=[path.name if path else "none" for path in RUNS])
def test_cached_tokens_and_preemptions_of_a_real_run_are_those_of_its_requests(run):
    if run is None:
        pytest.skip("TWINSERVE_RECORDS is not set: it names the folder that holds vllm-0.24.0-h100")
    record = real_record(run)
    first_hit: dict[int, int] = {}
    preemptions: dict[int, int] = {}
    for row in record.steps:
        for seq_id, start, *_ in row["admitted"]:
            first_hit.setdefault(seq_id, start)
        for seq_id in row["preempted"]:
            preemptions[seq_id] = preemptions.get(seq_id, 0) + 1
    finished = [row for row in record.requests if row["finish_reason"] == "length"]
    assert finished
    for row in finished:
        assert row["cached_tokens"] == first_hit[row["id"]]
        assert row["preemptions"] == preemptions.get(row["id"], 0)
        assert row["output_tokens"] == row["max_tokens"]


def requests(count: int = 60, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    at = 0
    made = []
    for number in range(count):
        at += round(rng.expovariate(1.0) * MS)
        made.append(Request(number, at, (Part(number, 0, rng.randint(4, 90)),), rng.randint(1, 40)))
    return made


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("until_ms", [None, 60])
def test_a_log_is_decided_again(tmp_path, depth, until_ms):
    until_ns = None if until_ms is None else until_ms * MS
    log = write_log(tmp_path / "log", requests(), SMALL | {"pipeline_depth": depth}, until_ns=until_ns)
    record = load_run(log)
    assert sum(len(row["preempted"]) for row in record.steps) > 0, "the pool is small enough for preemptions"
    assert any(row["rows"] for row in record.steps), "prompts come in chunks"
    assert record.run["summary"]["device_wait_share"] is None, "a log does not say when a step started on the device"
    assert any(row["aborted"] for row in record.steps) == (until_ms is not None)
    result = replay(record)
    assert result.difference is None and result.equal == len(record.steps)


def test_an_import_is_read_back_and_is_decided_again(tmp_path):
    log = write_log(tmp_path / "log", requests(), SMALL | {"pipeline_depth": 1})
    imported = read_vllm_record(log)
    write_record(imported, tmp_path / "run")
    again = load_record(tmp_path / "run")
    schema = json.loads((Path(twinserve.traces.runs.__file__).parent / "record.schema.json").read_text())
    for kind, rows in (("run", [again.run]), ("request", again.requests), ("step", again.steps)):
        validator = Draft202012Validator(schema | {"$ref": f"#/$defs/{kind}"})
        for row in rows:
            validator.validate(row)
    assert (again.run, again.requests, again.steps) == (imported.run, imported.requests, imported.steps)
    assert replay(again).is_exact
    with pytest.raises(InputError, match="exists already"):
        write_record(imported, tmp_path / "run")


def test_the_requests_of_a_log_are_a_trace_again(tmp_path):
    made = requests()
    assert requests_of(load_run(write_log(tmp_path / "log", made, SMALL))) == made


def admitting(steps: list[list], count: int) -> list:
    """The first row from the middle on that admits so many requests."""
    return next(row for row in steps[len(steps) // 3 :] if len(row[6]) >= count and not row[5])


def swap_order(steps: list[list]) -> None:
    row = admitting(steps, 2)
    row[6][0], row[6][1] = row[6][1], row[6][0]


def more_tokens(steps: list[list]) -> None:
    admitting(steps, 1)[6][0][1] += 1


def other_hit(steps: list[list]) -> None:
    row = admitting(steps, 1)
    row[6][0][2] += 16


def no_preemption(steps: list[list]) -> None:
    next(row for row in steps if row[8])[8].clear()


def one_more(column: int):
    def change(steps: list[list]) -> None:
        steps[len(steps) // 2][column] += 1

    return change


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (swap_order, {"admitted"}),
        (more_tokens, {"admitted"}),
        (other_hit, {"admitted"}),
        (no_preemption, {"preempted"}),
        (one_more(9), {"waiting"}),
        (one_more(10), {"running"}),
        (one_more(11), {"used_blocks"}),
        (one_more(12), {"sampled"}),
    ],
    ids=["order", "tokens", "computed", "preempted", "waiting", "running", "free", "emitted"],
)
def test_what_was_logged_otherwise_is_named(tmp_path, change, fields):
    log = write_log(tmp_path / "log", requests(seed=2), SMALL | {"pipeline_depth": 1})
    steps = unpack(log / "steps.jsonl.gz")
    change(steps)
    pack(log / "steps.jsonl.gz", steps)
    difference = replay(load_run(log)).difference
    assert difference is not None and difference.field in fields, difference


def test_a_carried_row_out_of_order_is_found(tmp_path):
    log = write_log(tmp_path / "log", requests(), SMALL | {"pipeline_depth": 1})
    steps = unpack(log / "steps.jsonl.gz")
    before, after = next(
        (a, b)
        for a, b in zip(steps, steps[1:], strict=False)
        if len(a[6]) == 2 and not a[5] and not b[5] and not b[6] and not b[7]
    )
    first, second = before[6]
    after[5] = [first[0]]
    after[6] = [[first[0], 1, first[2] + first[1]]]
    pack(log / "steps.jsonl.gz", steps)
    difference = replay(load_run(log)).difference
    assert difference is not None and (difference.decision, difference.field) == (after[0], "admitted")
    assert second[0] != first[0]


def test_prompts_of_the_mooncake_trace_share_its_blocks(tmp_path):
    rows = [
        {
            "timestamp": 20 * number,
            "input_length": 1025 + 7 * number,
            "output_length": 5,
            "hash_ids": [1, 2, 3 + number],
        }
        for number in range(6)
    ]
    (tmp_path / "mooncake").mkdir()
    pack(tmp_path / "mooncake" / "conversation_trace.jsonl.gz", rows)
    made = [
        Request(i, row["timestamp"] * MS, (Part(1, 0, 512), Part(2, 0, 512), Part(3 + i, 0, 1 + 7 * i)), 5)
        for i, row in enumerate(rows)
    ]
    settings = {"max_num_batched_tokens": 2048, "max_model_len": 2048, "num_gpu_blocks": 400, "pipeline_depth": 1}
    log = write_log(tmp_path / "log", made, settings, kind="mooncake")
    record = load_run(log, tmp_path)
    assert replay(record).is_exact
    assert sum(row["cached_tokens"] for row in record.requests) > 4000
    with pytest.raises(
        InputError, match="expected mooncake/conversation_trace.jsonl.gz in the folder of public traces"
    ):
        load_run(log)


def broken(log: Path, what: str) -> None:
    if what == "steps":
        pack(log / "steps.jsonl.gz", [{"a": 1}])
    elif what == "field":
        pack(log / "requests.jsonl.gz", [{"i": 0}])
    elif what == "policy":
        run = json.loads((log / "run.json").read_text())
        run["settings"]["policy"] = "priority"
        (log / "run.json").write_text(json.dumps(run))
    else:
        (log / "steps.jsonl.gz").unlink()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("steps", "steps.jsonl.gz:1: expected a list of 13 or 14 values"),
        ("field", "expected a step log"),
        ("policy", "settings.policy is 'priority', expected 'fcfs'"),
        ("missing", "steps.jsonl.gz: cannot be read"),
    ],
)
def test_a_broken_log_is_refused_in_one_line(tmp_path, what, words):
    log = write_log(tmp_path / "log", requests(3), SMALL)
    broken(log, what)
    with pytest.raises(InputError) as error:
        load_run(log)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_coding_of_the_steps_is_the_recorders():
    step = {"decided": 0, "schedule_end": 0, "ready": 0, "end": 0, "launched": 0, "preempted": []}
    step |= {"waiting": 0, "running": 0, "free": 0, "emitted": 0}
    rows = encoded(
        [step | {"scheduled": s} for s in ([(0, 4, 0), (1, 3, 0)], [(0, 1, 4), (1, 2, 3)], [(1, 1, 5), (2, 9, 0)])]
    )
    assert [row[5:8] for row in rows] == [
        [[], [[0, 4, 0], [1, 3, 0]], []],
        [[], [], [[1, 2]]],
        [[0], [[2, 9, 0]], []],
    ]
