"""The engine and those who serve HTTP for it are two processes: what either does when the other fails, or is slow."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from engine_judge import judge_of
from forked_servers import Served, serve_command
from hypothesis import given
from hypothesis import strategies as st
from live_servers import Running, TinyModel, byte_tokenizer

from twinserve.serving.links import LoopWire, message
from twinserve.settings.errors import RunError
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay

JSON = {"content-type": "application/json"}
LONG = {"prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    judge_of("llama").model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def command(*arguments: object) -> AbstractContextManager[tuple[Served, str]]:
    """`twinserve serve` with a small pool, in a group of its own, once it serves, and its URL."""
    return serve_command("--num-gpu-blocks", 64, *arguments)


def front() -> multiprocessing.process.BaseProcess:
    """The process that serves HTTP for a model of this one."""
    (process,) = [child for child in multiprocessing.active_children() if child.name == "http"]
    return process


def spawned_by(parent: int) -> list[int]:
    """The processes that another has started: the one that serves HTTP for its model, then the ranks of the model."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            numbers, line = (path / "stat").read_text().rpartition(")")[2].split(), (path / "cmdline").read_text()
        except OSError:
            continue  # it has ended
        if int(numbers[1]) == parent and "spawn_main" in line:
            found.append((int(numbers[19]), int(path.name)))  # when it was started
    return [number for _, number in sorted(found)]


def test_a_front_whose_engine_is_killed_tells_its_clients_and_ends_with_a_line(folder, tmp_path):
    record = ("--record", tmp_path / "run", "--record-segment-s", 0.05, "--record-tokens")
    with command("--model", folder, "--dtype", "float32", *record) as (process, url):
        httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 30, "stream": False}, timeout=60)
        while not (tmp_path / "run" / "segments" / "000000").is_dir():
            httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 3, "stream": False}, timeout=60)
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.kill()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        said = process.stderr.read()  # to the end of both processes
    assert events[-1]["error"]["message"] == "the engine has failed: its process has ended"
    assert events[-1]["error"]["code"] == 500
    assert said == "twinserve: the process of the engine has ended without a word\n"
    kept = load_record(tmp_path / "run")
    assert kept.requests and replay(kept).is_exact


def test_an_engine_whose_front_is_killed_ends_what_runs_and_closes_its_record(tmp_path):
    running = Running(TinyModel(), record=tmp_path / "run").wait()
    with (
        pytest.raises(httpx.HTTPError),
        httpx.stream("POST", f"{running.url}/v1/completions", json=LONG, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        front().kill()
        list(lines)
    running._thread.join()
    with pytest.raises(RunError, match="the process that serves HTTP has ended: killed by signal 9"):
        running.stop()
    running.core.scheduler.check_integrity()
    assert running.core.scheduler.block_manager.num_used_blocks == 0
    record = load_record(tmp_path / "run")
    assert [row["finish_reason"] for row in record.requests] == ["abort"]
    assert replay(record).is_exact


def test_a_command_whose_front_is_killed_says_so_and_ends_with_status_1(folder):
    with command("--model", folder) as (process, _):
        (front,) = spawned_by(process.pid)
        os.kill(front, signal.SIGKILL)
        said = process.stderr.read()
        assert process.wait() == 1
    assert said == "twinserve: the process that serves HTTP has ended: killed by signal 9\n"


def test_a_server_whose_rank_is_killed_while_nobody_asks_is_gone_in_seconds(folder):
    with command("--model", folder, "--tensor-parallel-size", 2) as (process, _):
        _, rank = spawned_by(process.pid)
        begun = time.monotonic()
        os.kill(rank, signal.SIGKILL)
        said = process.stderr.read()  # to the end of all processes
        assert process.wait() == 1
        assert time.monotonic() - begun < 60
    assert said == "twinserve: rank 1 has ended: killed by signal 9\n"


@pytest.mark.parametrize(("number", "to_all", "ranks"), [(signal.SIGTERM, False, 1), (signal.SIGINT, True, 2)])
def test_a_signal_ends_all_processes_once_what_runs_has_ended(folder, tmp_path, number, to_all, ranks):
    """Whether the first process alone gets it, as from a supervisor, or all do, as from a terminal."""
    answers = []
    over = ("--tensor-parallel-size", ranks)
    with command("--model", folder, "--record", tmp_path / "run", *over) as (process, url):

        def ask() -> None:
            with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"max_tokens": 100}, timeout=60) as response:
                begun.set()
                answers.append(list(response.iter_lines()))

        begun = threading.Event()
        asking = threading.Thread(target=ask)
        asking.start()
        begun.wait()
        (os.killpg if to_all else os.kill)(process.pid, number)
        said = process.stderr.read()
        assert process.wait() == 0
        asking.join()
    assert said == f"1 requests: 1 length; recorded in {tmp_path / 'run'}\n"
    assert answers[0][-2] == "data: [DONE]"
    assert replay(load_record(tmp_path / "run")).is_exact


@pytest.mark.parametrize("world", ["engine", "simulation"])
@pytest.mark.parametrize(("seconds", "signals"), [(0, 1), (60, 2)])
def test_what_runs_when_the_time_of_a_shutdown_is_over_is_told_its_end_and_one_line_says_so(
    folder, tmp_path, world, seconds, signals
):
    """Whoever streams, waits for a whole answer or in the queue, sends half a body, or reads nothing."""
    simulated = ("--simulate", "--latency", "qwen3-0.6b-h100", "--time-scale", 50)  # all are there before one ends
    served = ("--model", folder) if world == "engine" else simulated
    how = ("--max-num-seqs", 2, "--shutdown-timeout", seconds, "--record", tmp_path / "run", "--max-model-len", 1024)
    body = {"prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True, "n": 4}
    last = body | {"echo": True, "n": 1} | ({"logprobs": 1, "max_tokens": 0} if world == "engine" else {})
    with command(*served, *how) as (process, url), ThreadPoolExecutor(2) as pool:
        path, at = f"{url}/v1/completions", urlsplit(url)
        streamed = json.dumps(body | {"stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        head += b"content-length: %d\r\n\r\n" % len(streamed)
        with (
            httpx.stream("POST", path, content=streamed, headers=JSON, timeout=60) as read,
            socket.create_connection((at.hostname, at.port), timeout=60) as unread,
            socket.create_connection((at.hostname, at.port), timeout=60) as half,
        ):
            unread.sendall(head + streamed)
            half.sendall(head + streamed[:-1])
            whole, waiting = (pool.submit(httpx.post, path, json=asked, timeout=60) for asked in (body, last))
            page = ""
            while sum(map(float, re.findall(r"^vllm:num_requests_(?:running|waiting){.*} (.+)$", page, re.M))) < 13:
                page = httpx.get(f"{url}/metrics", timeout=60).text
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            lines = list(read.iter_lines())
            assert half.recv(1) == b""
        reasons = [choice["finish_reason"] for found in (whole, waiting) for choice in found.result().json()["choices"]]
        said = process.stderr.read()
        assert process.wait() == 0
    assert lines[-2] == "data: [DONE]"
    choices = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
    ends = {choice["index"]: choice["finish_reason"] for [choice] in choices}
    assert ends == dict.fromkeys(range(4), "abort")
    assert reasons == ["abort"] * 5
    assert said == (
        "13 requests have not ended within the time, and are aborted\n"
        f"13 requests: 13 abort; recorded in {tmp_path / 'run'}\n"
    )
    assert replay(load_record(tmp_path / "run")).is_exact


def test_an_engine_goes_on_while_its_front_takes_nothing(serving):
    """A process that is stopped reads no socket; what it is told waits, and the loop does not."""
    running = serving(TinyModel())
    how = LONG | {"n": 4, "max_tokens": 250, "logprobs": 20}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=how, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        pid = front().pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            running.settle()  # log-probabilities of 1,000 tokens: far more than a socket holds
        finally:
            os.kill(pid, signal.SIGCONT)
        choices = [choice for line in lines if line.startswith("data: {") for choice in json.loads(line[6:])["choices"]]
    assert sum(choice["finish_reason"] == "length" for choice in choices) == 4


def test_what_goes_wrong_as_a_request_comes_in_ends_the_server(tmp_path):
    model = TinyModel()
    running = Running(model, record=tmp_path / "run").wait()

    def broken(request, ask):
        raise ValueError("no sequence today")

    running.service.host.sequence = broken
    with pytest.raises(openai.InternalServerError, match="the engine has failed: no sequence today"):
        running.client().completions.create(model="tiny", prompt="a")
    running._thread.join()
    with pytest.raises(ValueError, match="no sequence today"):
        running.stop()
    assert load_record(tmp_path / "run").requests == []


class Side:
    """Takes down what it is told."""

    def __init__(self) -> None:
        self.heard: list = []

    def hear(self, *what: object) -> None:
        self.heard.append(what)


@given(st.lists(st.binary(max_size=40), max_size=8), st.data())
def test_messages_are_heard_as_they_were_told_however_the_bytes_come(told, data):
    content, side = b"".join(message("hear", number, item) for number, item in enumerate(told)), Side()
    wire = LoopWire(side)
    while content:
        size = data.draw(st.integers(1, len(content)))
        wire.data_received(content[:size])
        content = content[size:]
    assert side.heard == list(enumerate(told))
