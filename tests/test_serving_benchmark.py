"""The benchmark of served traffic: the same requests to each, one definition of each figure, and peers' files."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from engine_judge import SHAPE
from live_servers import Running, simulated
from shell import trace as trace
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import engine_page
from fidelity_windows import at_rate
from peers import read_peer
from result_files import RESULTS
from served import cells, of_rows, row

from twinserve.planning.attainment import Limits
from twinserve.settings.errors import InputError
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Part, Request
from twinserve.traces.runs import replay as replaying

SPEC = importlib.util.spec_from_file_location("serving_script", engine_page.ROOT / "benchmarks" / "serving.py")
serving = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(serving)

LIMITS = Limits.parse("TTFT <= 1 s and TPOT <= 50 ms")
FEW = ("--device", "cpu", "--first", 2, "--rate", 20, 40, "--duration-s", 0.2, "--max-prompt-tokens", 40)
"""Four requests of the trace, and then eight, of 40 prompt tokens each."""


@pytest.fixture
def script(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """The script in this process: its exit status, what it says on stderr, and what it has written, by name."""

    def run(*arguments: object) -> tuple[int, str, dict[str, Any]]:
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["serving.py", *map(str, arguments), "--out", str(out)])
        code = serving.main()
        entries: dict[str, Any] = {}
        for path in out.glob("cpu/serving-tiny.json"):
            entries |= json.loads(path.read_text())["repeats"]
        return code, capsys.readouterr().err, entries

    return run


@pytest.fixture
def tiny(tmp_path) -> Path:
    """The config of a tiny model, whose vocabulary has the ids that are sent."""
    fields = SHAPE | {"vocab_size": serving.TOKENS.vocab_size, "hidden_size": 32, "num_hidden_layers": 1}
    LlamaConfig(**fields, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


class StandIn(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers at once, but for `pause_s` before its first token and each later one.

    Attributes:
        bodies: what it was asked, in the order of arrival.
        heads: where, and by whom.
    """

    pause_s, has_usage, is_whole, longest = 0.0, True, False, 1 << 20

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.bodies: list[dict[str, Any]] = []
        self.heads: set[tuple[str, str | None]] = set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answering(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def say(self, status: int, content: bytes = b"") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        is_known = self.path.endswith("/v1/models")
        self.say(200 if is_known else 404, json.dumps({"data": [{"id": "org/tiny"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.heads.add((self.path, self.headers["authorization"]))
        if len(body["prompt"]) > self.server.longest:
            return self.say(400, b"too long")
        self.say(200)
        for _ in range(1 if self.server.is_whole else body["max_tokens"]):
            time.sleep(self.server.pause_s)
            self.event({"choices": [{"text": "x"}]})
        if self.server.has_usage:
            self.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, values: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(values).encode() + b"\n\n")


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.shutdown()
    server.server_close()


def test_a_trace_comes_at_another_rate_with_its_order_and_lengths():
    requests = [Request(7 + n, 100 * n * n, (Part(n, 0, 5 + n),), 3 + n) for n in range(1, 6)]
    moved = at_rate(requests, rate=2.0)
    assert [(one.id, one.prompt_tokens, one.max_tokens) for one in moved] == [(n, 6 + n, 4 + n) for n in range(4)]
    # 4 requests in 2 s; the fifth, 24 * 100 ns behind the first, would come at their end.
    assert [one.arrival_ns for one in moved] == [round((n * n - 1) / 24 * 2e9) for n in range(1, 5)]


def test_a_server_gets_the_requests_that_the_engine_serves(script, tiny, trace, stand_in):
    how = ("--trace", trace, *FEW, "--url", stand_in.url, "--model", tiny)
    code, said, entries = script(*how, "--max-model-len", 256, "--num-gpu-blocks", 64)
    assert code == 0, said
    ours = "twinserve, 256 sequences, 2,048 tokens a step"
    assert list(entries) == [f"{who} at {rate} requests/s" for who in (ours, "endpoint") for rate in (20, 40)]
    requests = read_trace(trace).requests[2:10]
    for entry in entries.values():
        count = round(entry["rate"] / 5)
        summary = entry["summary"]
        assert (summary["requests"], summary["finished"], summary["prompt_tokens"]) == (count, count, 40 * count)
        assert summary["output_tokens"] == sum(request.max_tokens for request in requests[:count])
        assert summary["ttft_s"]["p50"] > 0 and summary["tpot_s"]["p50"] > 0
        assert entry["attainment"]["limits"] == str(LIMITS) and entry["command"] and entry["commit"]
        assert entry["trace"]["transforms"][0]["parameters"] == {"first": 2, "requests": count, "rate": entry["rate"]}
        assert entry["trace"]["transforms"][1]["changed"] == {"prompts_shortened": count}
    for entry in list(entries.values())[:2]:
        assert entry["replay"]["exact"] and entry["replay"]["equal"] == entry["replay"]["recorded"] > 0
        assert entry["queue_s"]["p99"] >= entry["queue_s"]["p50"] >= 0
    bodies = stand_in.bodies[1:]
    assert len(bodies) == 12 and all(body["ignore_eos"] and body["stream"] for body in bodies)
    wanted = sorted((serving.TOKENS.token_ids(one, {})[:40], one.max_tokens) for one in requests)
    assert sorted((body["prompt"], body["max_tokens"]) for body in bodies[4:]) == wanted
    salts = [body["cache_salt"] for body in stand_in.bodies]
    assert len(set(salts[1:5])) == len(set(salts[5:])) == 1 and len(set(salts)) == 3, "no rate finds another's blocks"
    assert entries["endpoint at 20 requests/s"]["queue_s"] == {"mean": None}


def test_a_server_is_timed_from_when_a_request_is_sent(script, stand_in):
    stand_in.pause_s = 0.02
    how = ("--url", stand_in.url, "--rate", 50, "--duration-s", 0.1, "--prompt-tokens", "fixed:8", "--label", "slow")
    code, said, entries = script("--device", "cpu", *how, "--output-tokens", "fixed:5", "--limits", "TTFT <= 19 ms")
    entry = entries["slow at 50 requests/s"]
    summary = entry["summary"]
    assert code == 0, said
    assert summary["finished"] == 5 and summary["output_tokens"] == 25
    assert summary["ttft_s"]["mean"] >= 0.02 and summary["tpot_s"]["mean"] >= 0.019
    assert summary["e2e_s"]["p50"] >= summary["ttft_s"]["p50"] + 4 * 0.019
    assert entry["attainment"]["share"] == 0 and entry["sent_late_s"] >= 0
    assert entry["events_per_token"] == pytest.approx(7 / 5), "five tokens, usage and the end"


def test_a_key_is_shown_behind_any_path_and_rates_lie_beside_each_other(script, stand_in, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for rate in (20, 30):
        how = ("--url", f"{stand_in.url}/api/v1/", "--rate", rate, "--duration-s", 0.1, "--label", "keyed")
        code, said, entries = script("--device", "cpu", *how, "--output-tokens", "fixed:4")
        assert code == 0, said
    assert stand_in.heads == {("/api/v1/completions", "Bearer secret")}
    assert list(entries) == ["keyed at 20 requests/s", "keyed at 30 requests/s"]


def test_a_simulated_server_is_asked_as_vllm_is(script):
    running = Running(simulated()).wait()
    try:
        how = ("--url", f"{running.url}/v1", "--shape", "tiny", "--rate", 40, "--duration-s", 0.2)
        lengths = ("--prompt-tokens", "fixed:16", "--output-tokens", "fixed:6")
        code, said, entries = script("--device", "cpu", *how, *lengths)
    finally:
        running.stop()
    ((name, entry),) = entries.items()
    assert code == 0, said
    assert name.startswith("twinserve ") and entry["model"] == "round"
    assert entry["summary"]["finished"] == 8 and entry["summary"]["output_tokens"] == 48
    assert entry["queue_s"]["mean"] >= 0, "the server's own metrics say it"


def test_what_a_server_refuses_is_counted_and_said(script, stand_in):
    stand_in.longest = 24
    how = ("--url", stand_in.url, "--rate", 50, "--duration-s", 0.2, "--prompt-tokens", "lognormal:20:0.5")
    code, _, entries = script("--device", "cpu", *how, "--output-tokens", "fixed:3")
    (entry,) = entries.values()
    refused = sum(len(body["prompt"]) > 24 for body in stand_in.bodies[1:])
    assert 0 < refused < 10 and len(stand_in.bodies[0]["prompt"]) <= 24
    assert code == 1 and entry["first_failure"].endswith("400 Bad Request too long")
    assert (entry["summary"]["aborted"], entry["summary"]["finished"]) == (refused, 10 - refused)
    assert entry["attainment"]["share"] <= 1 - refused / 10
    assert cells([entry])[0][2] == f"{10 - refused} of 10"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"longest": 4}, "does not serve a prompt of 8 tokens: HTTP/1.0 400 Bad Request too long"),
        ({"has_usage": False}, "does not say how many tokens it generates: expected usage in its stream"),
        ({"is_whole": True}, "sends answers as wholes: expected an event for a token"),
    ],
)
def test_a_server_that_cannot_be_measured_is_one_line(fault, said, script, stand_in):
    for name, value in fault.items():
        setattr(stand_in, name, value)
    how = ("--url", stand_in.url, "--rate", 20, "--duration-s", 0.1, "--prompt-tokens", "fixed:8")
    code, line, entries = script("--device", "cpu", *how, "--output-tokens", "fixed:5")
    assert (code, line, entries) == (1, f"serving.py: {stand_in.url} {said}\n", {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "expected at least one of --model, --url and --peer"),
        ("--model tiny", "expected both or neither of --rate, and --model or --url"),
        ("--peer PEER --rate 3", "expected both or neither of --rate, and --model or --url"),
        ("--peer PEER", "shape is missing, expected what the results are called after"),
        ("--model tiny --rate -1", "rate is -1.0, expected a number above 0"),
        ("--model tiny --rate 5 --duration-s 0", "duration_s is 0.0, expected a number above 0"),
        ("--model tiny --rate 5 --limits fast", "limits is 'fast', expected limits such as 'TTFT <= 1 s'"),
        ("--model tiny --rate 20 --trace TRACE", "TRACE: expected 801 requests from row 0 on, of the 12 there are"),
        ("--model tiny --rate 0.05 --trace TRACE", "TRACE: expected requests from row 0 on that do not all come at"),
        ("--model tiny --rate 0.01 --trace TRACE --first -1", "TRACE: expected 2 requests from row -1 on"),
        ("--url http://127.0.0.1:9 --rate 5", "url is 'http://127.0.0.1:9', expected a server that names its model"),
        ("--model tiny --rate 5 --peer TRACE", "TRACE:"),
        ("--model nothing --rate 5 --peer PEER", "model is 'nothing', expected"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(options, said, script, trace):
    named = {"TRACE": str(trace), "PEER": str(RESULTS / "h200" / "vllm-0.24-qwen3-0.6b.json")}
    code, line, entries = script("--device", "cpu", *(named.get(word, word) for word in options.split()))
    assert code == 2 and line.startswith(f"serving.py: {said.replace('TRACE', str(trace))}")
    assert line.count("\n") == 1 and entries == {}


def test_turns_are_refused_where_their_answers_are_not_known(script, stand_in, tmp_path):
    rows = [
        {"arrival_ns": 1000 * n, "prompt_tokens": 4, "max_tokens": 2} | ({"after": 0, "think_ns": 0} if n == 1 else {})
        for n in range(4)
    ]
    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"format": "twinserve-trace/1"}, *rows)))
    how = ("--url", stand_in.url, "--trace", path, "--rate", 30, "--duration-s", 0.1)
    code, line, entries = script("--device", "cpu", *how)
    assert (code, entries, stand_in.bodies) == (2, {}, [])
    assert "expected a trace without turns" in line


def test_a_run_that_is_not_decided_again_is_no_success(script, tiny, trace, monkeypatch):
    monkeypatch.setattr(replaying.ReplayResult, "is_exact", property(lambda self: False))
    how = ("--device", "cpu", "--model", tiny, "--trace", trace, "--max-model-len", 256, "--num-gpu-blocks", 64)
    code, _, entries = script(*how, "--first", 2, "--rate", 20, "--duration-s", 0.1)
    assert code == 1 and len(entries) == 1 and not any(entry["replay"]["exact"] for entry in entries.values())


def detailed(**changes: Any) -> dict[str, Any]:
    """A result of `vllm bench serve --save-detailed`: three requests, of which the last one failed."""
    return {
        "backend": "vllm", "model_id": "m", "tokenizer_id": "m", "duration": 1.0, "completed": 2, "request_rate": 8.0,
        "input_lens": [20, 30, 40], "output_lens": [3, 1, 0], "errors": ["", "", "gone"],
        "ttfts": [0.25, 0.5, 0.0], "itls": [[0.125, 0.375], [], []], "start_times": [100.0, 100.5, 101.0],
    } | changes  # fmt: skip


def test_a_result_of_vllm_bench_is_judged_as_a_run_is(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(detailed()))
    (entry,) = read_peer(path, Limits.parse("TPOT <= 200 ms"))
    summary = entry["summary"]
    assert (entry["server"], entry["rate"], entry["recorded"]) == ("vllm, bench", 8.0, "bench.json")
    assert (summary["requests"], summary["finished"], summary["output_tokens"]) == (3, 2, 4)
    assert summary["ttft_s"]["mean"] == 0.375 and summary["tpot_s"]["p50"] == 0.25 and summary["e2e_s"]["p99"] < 0.75
    assert summary["duration_s"] == 1.0 and summary["output_tok_s"] == 4.0
    assert entry["attainment"]["share"] == pytest.approx(1 / 3), "one token has no time to the next"
    second = detailed(request_rate="inf", start_times=[200.0, 200.25, 200.5], ttfts=[0.25, 0.5, 0.125])
    path.write_text("".join(json.dumps(one) + "\n" for one in (detailed(), second)))
    assert [one["rate"] for one in read_peer(path, LIMITS)] == [8.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"itls": [[], []]}, "itls is '2 elements', expected 3 elements, one for each of start_times"),
        ({"itls": None}, "itls is None, expected: Input should be a valid list"),
        ({"ttfts": [0.25, 0.0, 0.0]}, "ttfts, expected the time to the first token of 2 requests"),
        ({"request_rate": "inf", "start_times": [1.0] * 3}, "request_rate, expected a number, as all were sent at"),
        ({"output_lens": [3, 1]}, "output_lens is '2 elements', expected 3"),
        ({"rates": {}, "about": "x"}, "server is missing"),
        ({"rates": {"40": {"ttft_s": {"p42": 1}}}, "about": "", "server": ""}, "rates.40.ttft_s"),
    ],
)
def test_a_peers_file_that_says_too_little_is_one_line(changes, said, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(detailed(**changes)))
    with pytest.raises(InputError) as error:
        read_peer(path, LIMITS)
    assert said in str(error.value) and str(error.value).startswith(str(path))


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-3-8b"])
def test_the_recorded_peer_can_be_read(shape):
    entries = read_peer(RESULTS / "h200" / f"vllm-0.24-{shape}.json", LIMITS)
    assert entries and all(entry["summary"]["tpot_s"].keys() == {"p50", "p99"} for entry in entries)


def test_the_page_shows_what_was_served_beside_its_peer(tmp_path):
    assert engine_page._traffic(tmp_path) == []
    peer = {"server": "peer", "rate": 40.0, "recorded": "peer.json", "about": "Elsewhere.", "summary": {"ttft_s": {"p50": 0.043}}}  # fmt: skip  # noqa: E501
    path = tmp_path / "serving-tiny.json"
    path.write_text(json.dumps({"shape": "tiny", "repeats": {"peer": peer}}))
    assert engine_page._traffic(tmp_path) == [], "what others did alone is no result of ours"
    rows = [row(n, 10, 3, n * 10**9, (n * 10**9 + 5_000_000, n * 10**9 + 25_000_000)) for n in range(3)]
    ours = {"server": "ours", "rate": 40.0, "command": "python x.py", "commit": "abc", "queue_s": {"mean": 0.001}}
    ours |= of_rows(rows, LIMITS) | {"replay": {"exact": True, "equal": 1234, "recorded": 1234}}
    path.write_text(json.dumps({"shape": "tiny", "repeats": {"peer": peer, "ours": ours}}))
    lines = engine_page._traffic(tmp_path)
    assert lines[0] == "## Served traffic" and "Elsewhere." in lines
    assert "| ours | 40 | 3 | 4 | 5.0 / 5.0 / 5.0 | 10.0 / 10.0 / 10.0 | 1.0 | 100.0% |" in lines
    assert "| peer | 40 | – | – | 43.0 / – / – | – / – / – | – | – |" in lines
    text = " ".join(lines)
    assert "The tiny shape, by `python x.py` (commit abc)." in text and "1,234 decisions of the engine" in text
