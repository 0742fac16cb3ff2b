"""`twinserve serve`: as a process that is told to end, and what it refuses in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay

SIMULATED = ("--simulate", "--latency", "smollm2-135m-cpu-2-threads")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_serves_until_it_is_told_to_end_and_leaves_its_record(tmp_path, latency, number):
    command = [sys.executable, "-m", "twinserve", "serve", "--simulate", "--latency", latency, "--port", "0"]
    command += ["--num-gpu-blocks", "64", "--record", tmp_path / "run"]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as server:
        assert server.stderr is not None
        lines = []
        while not any(line.startswith("listening at") for line in lines) or "serving" not in "".join(lines):
            lines.append(server.stderr.readline())
            assert lines[-1], lines
        url = next(line for line in lines if line.startswith("listening at")).split()[-1]
        body = json.dumps({"prompt": "one two", "max_tokens": 6}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 6
        server.send_signal(number)
        rest = server.stderr.read()
        assert server.wait() == 0
    assert rest.endswith(f"1 requests: 1 length; recorded in {tmp_path / 'run'}\n")
    assert replay(load_record(tmp_path / "run")).is_exact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--latency", "x"), "latency is 'x', expected --simulate beside it"),
        (("--output-tokens", "fixed:3"), "output_tokens is 'fixed:3', expected --simulate beside it"),
        (("--replicas", "2"), "replicas is 2, expected --simulate beside it"),
        (("--simulate", "--output-tokens", "long"), "output_tokens is 'long', expected"),
        (("--simulate", "--time-scale", "0"), "time_scale is 0.0, expected a number from 1e-06 to 1000000"),
        (("--simulate", "--latency", "nowhere"), "latency is 'nowhere', expected a file"),
        (("--simulate", "--port", "65536"), "port is 65536, expected: Input should be less than or equal to 65535"),
        ((*SIMULATED, "--host", "no such host"), "host and port is 'no such host:8000', cannot be listened at"),
        (("--model", "./nowhere", "--port", "0"), "model is './nowhere', expected"),
        ((*SIMULATED, "--max-num-queued-reqs=-1"), "max_num_queued_reqs is -1, expected: Input should be greater than"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(twinserve, arguments, message):
    result = twinserve("serve", *arguments)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"twinserve: {message}")


def test_a_port_that_is_taken_and_a_record_that_exists_are_refused(twinserve, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = twinserve("serve", *SIMULATED, "--port", port)
    assert (result.code, "cannot be listened at: Address already in use" in result.err) == (2, True)
    result = twinserve("serve", *SIMULATED, "--record", tmp_path)
    assert result.err == f"twinserve: {tmp_path}: exists already, expected a new name\n"
