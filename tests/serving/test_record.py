"""The record of what was served over HTTP, to the end and up to a kill, and what the commands make of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from live_servers import TinyModel, simulated

from twinserve.traces.readers import read_trace
from twinserve.traces.runs.record import load_record


def served_until_killed(path: Path, latency: Path, replicas: int = 1) -> subprocess.Popen:
    """A server in a process of its own, killed without a word once three segments of each replica are whole; one of its
    clients asks for answers that take longer than those."""
    command = [sys.executable, "-m", "twinserve", "serve", "--simulate", "--latency", str(latency), "--port", "0"]
    command += ["--num-gpu-blocks", "60", "--record", str(path), "--record-segment-s", "0.15"]
    command += ["--replicas", str(replicas)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
    stop = threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            most = 20 + number if number else 500
            body = {"prompt": f"{number % 3} once upon a time " * 12, "max_tokens": most, "ignore_eos": True}
            try:
                httpx.post(f"{url}/v1/completions", json=body, headers={"x-session-id": f"{number}"}, timeout=30)
            except httpx.HTTPError:
                time.sleep(0.05)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        while process.poll() is None and num_third_segments(path) < replicas:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
        stop.set()
        for thread in threads:
            thread.join()
    return process


def num_third_segments(path: Path) -> int:
    """Of how many replicas the third segment is whole; folders may get another name while they are walked."""
    return sum(folder.endswith(os.path.join("segments", "000002")) for folder, _, _ in os.walk(path))


def test_every_command_takes_the_record_of_a_server_that_was_killed(twinserve, latency, tmp_path):
    path = tmp_path / "live"
    served_until_killed(path, latency)
    assert list(path.glob("segments/*.partial"))
    record = load_record(path)
    assert any(row["finish_reason"] is None for row in record.requests)
    replayed = twinserve("replay", path)
    assert (replayed.code, replayed.out) == (
        0,
        f"exact: {len(record.steps)} of {len(record.steps)} decisions made again; "
        f"{record.num_unanswered} requests were left unanswered\n",
    )
    for command in (
        ("sim", path, "--latency", latency, "--num-gpu-blocks", "60", "--out", tmp_path / "twin"),
        ("compare", tmp_path / "twin", path),
        ("compare", "--paired", path, "--", tmp_path / "twin"),
        ("report", tmp_path / "twin", path, "--out", tmp_path / "report.html"),
        ("trace", "stat", path),
        ("trace", "convert", path, tmp_path / "shared.jsonl.gz"),
    ):
        result = twinserve(*command)
        assert result.code == 0, result.err
    shared, own = read_trace(tmp_path / "shared.jsonl.gz"), read_trace(path)
    assert shared.requests == own.requests
    assert len(own.requests) == sum(row["finish_reason"] is not None for row in record.requests)


def test_every_command_takes_the_record_of_a_fleet_that_was_killed(twinserve, latency, tmp_path):
    path = tmp_path / "live"
    served_until_killed(path, latency, replicas=2)
    replayed = twinserve("replay", path)
    assert replayed.code == 0 and replayed.out.startswith("exact: ")
    fleet = ("--latency", latency, "--num-gpu-blocks", "60", "--replicas", "2")
    for command in (
        ("sim", path, *fleet, "--out", tmp_path / "twin"),
        ("compare", tmp_path / "twin", path),
        ("report", tmp_path / "twin", path, "--out", tmp_path / "report.html"),
        ("trace", "convert", path, tmp_path / "shared.jsonl"),
    ):
        result = twinserve(*command)
        assert result.code == 0, result.err


@pytest.mark.parametrize("world", [TinyModel, simulated])
def test_nothing_that_was_said_is_in_the_record_or_in_a_trace_made_of_it(serving, twinserve, tmp_path, world):
    running = serving(world(), record=tmp_path / "live")
    body = {"prompt": "my secret is swordfish", "max_tokens": 4, "cache_salt": "hunter2"}
    headers = {"x-session-id": "alice@example.org"}
    said = httpx.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=60).json()
    tokens = httpx.post(f"{running.url}/tokenize", json={"prompt": body["prompt"]}, timeout=60).json()["tokens"]
    running.stop()
    assert twinserve("trace", "convert", tmp_path / "live", tmp_path / "shared.jsonl").code == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        content = path.read_text()
        for word in ("swordfish", "hunter2", "alice", said["choices"][0]["text"]):
            assert word not in content, (path, word)
        assert ",".join(map(str, tokens[:3])) not in content, path
    assert str(tmp_path) not in (tmp_path / "shared.jsonl").read_text()


def test_a_latency_is_fitted_to_the_steps_of_live_traffic(serving, twinserve, tmp_path):
    running = serving(TinyModel(), record=tmp_path / "live", segment_bytes=20_000)

    def ask(number: int) -> None:
        for turn in range(4):
            body = {"prompt": "a b c " * (1 + 3 * number + turn), "max_tokens": 15, "ignore_eos": True}
            httpx.post(f"{running.url}/v1/completions", json=body, timeout=None)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    running.stop()
    fitted = twinserve("fit", tmp_path / "live", "--out", tmp_path / "fitted.json")
    assert fitted.code == 0, fitted.err
    simulated = twinserve("sim", tmp_path / "live", "--latency", tmp_path / "fitted.json", "--out", tmp_path / "twin")
    assert simulated.code == 0, simulated.err
    assert twinserve("compare", tmp_path / "twin", tmp_path / "live").code == 0


def test_tokens_that_are_kept_are_those_that_were_sent_and_answered(tmp_path):
    from live_servers import Running

    from twinserve.traces.runs.concealed import as_they_are

    running = Running(TinyModel(), record=tmp_path / "live", tokens=as_they_are).wait()
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    said = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).json()
    running.stop()
    record = load_record(tmp_path / "live")
    assert (record.prompts, record.outputs) == ({0: [5, 6, 7]}, {0: said["choices"][0]["token_ids"]})
