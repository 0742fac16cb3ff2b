"""The writer of a vLLM's journal, told by a Core what vLLM's scheduler would tell it: whole, whatever stops it."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from time import perf_counter_ns

import pytest
from vllm_world import token, workloads

from twinserve.policies import SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.runs import journal_writer
from twinserve.traces.runs.journal_writer import JournalWriter
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.vllm_journal import JOURNAL
from twinserve.traces.runs.vllm_records import load_run

WRITTEN = Path(__file__).resolve().parents[2] / "data" / "vllm_journal" / JOURNAL
BLOCK_SIZE = 16


def settings_of(workload) -> dict:
    """What vLLM 0.33 says of its settings, with a workload's."""
    with WRITTEN.open() as file:
        found = json.loads(file.readline())[2]
    found |= {"max_num_seqs": workload.max_num_seqs, "max_num_batched_tokens": workload.budget}
    return found | {"num_gpu_blocks": workload.num_blocks + 1}


def hashes_of(token_ids: list[int]) -> list[int]:
    """A number for each whole block, that stands for all tokens up to its end."""
    return [hash(tuple(token_ids[:end])) for end in range(BLOCK_SIZE, len(token_ids) + 1, BLOCK_SIZE)]


def serve(workload, note, *, abort_at: int | None = None, pause_s: float = 0.0) -> int:
    """Decide a workload one step ahead, and note it; the number of decisions.

    Args:
        abort_at: before this decision the request that came last is taken out.
    """
    values = {"max_num_seqs": workload.max_num_seqs, "max_num_batched_tokens": workload.budget}
    core = Settings.load(values | {"num_gpu_blocks": workload.num_blocks, "pipeline_depth": 1}).build_core()
    coming, in_flight, prompts, before, num_steps = deque(workload.arrivals), deque(), {}, None, 0

    def left(seq: Sequence, reason: str):
        answer = [token(seq.seq_id, number) for number in range(seq.num_completion_tokens)]
        return f"request {seq.seq_id}", reason, hashes_of(prompts[seq.seq_id] + answer)

    while coming or core.sequences:
        while coming and coming[0].step <= num_steps:
            one = coming.popleft()
            prompts[one.number] = one.prompt
            params = SamplingParams(max_tokens=one.max_tokens, ignore_eos=True)
            assert core.ingest(Sequence(one.prompt, params, seq_id=one.number), 0)
            limits = len(one.prompt), one.max_tokens, 0
            note(("q", f"request {one.number}", perf_counter_ns(), *limits, hashes_of(one.prompt)))
        if num_steps == abort_at:
            *_, seq = core.sequences.values()
            note(("a", perf_counter_ns(), [left(seq, "abort")]))
            core.abort(seq.seq_id, 0)
        begun = perf_counter_ns()
        batch = core.decide(0)
        ended = perf_counter_ns()
        scheduled = {f"request {row.seq.seq_id}": row.num_tokens for row in batch.rows}
        changes = None
        if scheduled != before:
            fresh = {f"request {row.seq.seq_id}" for row in batch.admitted if not row.seq.num_preemptions}
            starts = {f"request {row.seq.seq_id}": row.start for row in batch.rows}
            known = [name for name in scheduled if name not in fresh]
            admitted = [(name, starts[name]) for name in scheduled if name in fresh]
            before, changes = scheduled, (scheduled, known, [starts[name] for name in known], admitted)
        manager, preempted = core.scheduler.block_manager, tuple(f"request {seq.seq_id}" for seq in batch.preempted)
        counts = len(core.scheduler.waiting), len(core.scheduler.running), manager.num_free_blocks, batch.num_tokens
        note(("s", id(batch), begun, ended, changes, preempted, counts))
        note(("l", id(batch), perf_counter_ns()))
        in_flight.append(batch)
        num_steps += 1
        if len(in_flight) > 1:
            done, begun = in_flight.popleft(), perf_counter_ns()
            num_outputs = sum(seq.seq_id in core.sequences for seq in done.sampled)  # none of a request taken out since
            finished = core.commit([token(seq.seq_id, seq.num_completion_tokens) for seq in done.sampled], 0)
            gone = tuple(left(seq, "length") for seq in finished)
            note(("u", id(done), begun, perf_counter_ns(), num_outputs, gone))
        time.sleep(pause_s)
    return num_steps


@pytest.fixture
def quick(monkeypatch):
    """The thread writes all the while, a few notes at a time."""
    monkeypatch.setattr(journal_writer, "_FLUSH_S", 0.001)
    monkeypatch.setattr(journal_writer, "_PIECE", 3)


@pytest.mark.parametrize("name", ["burst", "shared prompts", "dense"])
def test_what_was_noted_is_decided_again(tmp_path, quick, name):
    workload = next(found for found in workloads() if found.name == name)
    writer = JournalWriter(tmp_path / "mine", settings_of(workload), BLOCK_SIZE, 10_000)
    num_steps = serve(workload, writer.note, abort_at=40)
    writer.close()
    record = load_run(tmp_path / "mine")
    result = replay(record)
    assert result.is_exact and num_steps - 2 <= result.recorded <= num_steps, result.difference
    reasons = [row["finish_reason"] for row in record.requests]
    assert (reasons.count("abort"), reasons.count("length")) == (1, 59)
    assert sum(row["preemptions"] for row in record.requests) > 0
    assert name != "shared prompts" or sum(row["cached_tokens"] for row in record.requests) > 0


def test_so_many_steps_are_written_and_no_more(tmp_path, quick):
    workload = workloads()[0]
    writer = JournalWriter(tmp_path / "mine", settings_of(workload), BLOCK_SIZE, 100)
    assert serve(workload, writer.note) > 200
    writer.close()
    assert not writer.is_open
    rows = [json.loads(line) for line in (tmp_path / "mine" / JOURNAL).read_text().splitlines()]
    assert [row[1] for row in rows if row[0] == "s"] == list(range(100))
    result = replay(load_run(tmp_path / "mine"))
    assert result.is_exact and result.recorded >= 98, result.difference


def test_a_name_that_comes_again_is_another_request(tmp_path):
    workload = workloads()[0]
    writer = JournalWriter(tmp_path / "mine", settings_of(workload), BLOCK_SIZE, 100)
    for _ in range(2):
        writer.note(("q", "the same", perf_counter_ns(), 40, 3, 0, [1, 2]))
        writer.note(("a", perf_counter_ns(), [("the same", "abort", [1, 2])]))
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "mine" / JOURNAL).read_text().splitlines()]
    assert [row[1] for row in rows if row[0] == "q"] == [0, 1]
    assert [row[2] for row in rows if row[0] == "a"] == [[0], [1]]
    assert [row[-1] for row in rows if row[0] == "q"] == [None, [0, 32]]


def test_a_folder_that_is_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written: File exists"):
        JournalWriter(tmp_path, {}, BLOCK_SIZE, 100)


def child(folder: Path, most_bytes: int | None) -> None:
    """Serve in a process of its own, which may write files of so many bytes; says on stdout that it has served."""
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    journal_writer._FLUSH_S = 0.02
    workload = workloads()[0]
    writer = JournalWriter(folder, settings_of(workload), BLOCK_SIZE, 10_000)
    serve(workload, writer.note, pause_s=0.001)
    print(f"served, {threading.active_count()} threads", flush=True)
    writer.close()


def started(folder: Path, most_bytes: int | None = None) -> subprocess.Popen:
    here = Path(__file__).resolve()
    code = f"import test_journal_writer as test; test.child(test.Path({str(folder)!r}), {most_bytes})"
    paths = [str(here.parent), str(here.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_kill_leaves_what_had_been_written(tmp_path):
    process, file = started(tmp_path / "mine"), tmp_path / "mine" / JOURNAL
    try:
        while process.poll() is None and not (file.exists() and file.stat().st_size > 4000):
            time.sleep(0.005)
    finally:
        process.kill()
        said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL and not said
    result = replay(load_run(tmp_path / "mine"))
    assert result.is_exact and result.recorded > 20, result.difference


def test_a_disk_that_is_full_ends_the_record_and_not_the_server(tmp_path):
    process = started(tmp_path / "mine", 8192)
    said, told = process.communicate()
    assert process.returncode == 0 and said == "served, 1 threads\n", told
    expected = f"{tmp_path / 'mine' / JOURNAL}: cannot be written, so nothing more is recorded: File too large"
    assert told.splitlines() == [expected]
    result = replay(load_run(tmp_path / "mine"))
    assert result.is_exact and result.recorded > 20, result.difference
