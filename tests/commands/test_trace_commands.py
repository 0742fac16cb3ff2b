"""The commands for traces: what they print, what they write, how they exit."""

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from twinserve.traces.readers import read_trace

BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,0,0,0,Conversation log\n"
    "118,GPT-4,417,276,693,Conversation log\n"
)


def stat(twinserve, *arguments):
    result = twinserve("trace", "stat", *arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


# --- stat ---


def test_stat_prints_lengths_rates_burstiness_reuse_and_what_was_handled_as_json(twinserve, trace):
    statistics = stat(twinserve, trace, "--limit", 6)
    assert statistics["requests"] == 6
    assert statistics["prompt_tokens"]["mean"] == 56
    assert statistics["rate"] > 0 and statistics["gap_cv"] > 0
    assert set(statistics["peak_to_mean"]) == {"1s", "10s", "60s"}
    assert statistics["reuse"]["16"] == {"hit_tokens": 5 * 32, "hit_ratio": 5 * 32 / (6 * 56)}
    assert statistics["trace"]["transforms"][0]["changed"] == {"requests_dropped": 6}


def test_stat_prints_the_same_as_tables(twinserve, tmp_path):
    (tmp_path / "burst.csv").write_text(BURSTGPT)
    result = twinserve("trace", "stat", tmp_path / "burst.csv", "--max-output-tokens", 20)
    assert result.code == 0, result.err
    assert result.out.startswith("burstgpt: 2 requests over 113.0 s\n")
    rows = [" ".join(line.replace("│", " ").split()) for line in result.out.splitlines()]
    for row in (
        "prompt_tokens 444.5 444.5 466.5 469.2 471.4 472 889",
        "requests a second 0.00885",
        "peak to mean, 1s 57",
        "16 0 0.00%",
        "dropped failed 1",
        "noted have prompts of which the length alone is known 2",
        "cap_output_tokens {'most': 20} outputs_shortened 1",
    ):
        assert row in rows, result.out


def test_stat_says_nothing_of_what_did_not_happen(twinserve, tmp_path):
    rows = [{"arrival_ns": n * 10**9, "prompt": [[n, 0, 40]], "max_tokens": 5} for n in range(3)]
    lines = [{"format": "twinserve-trace/1"}, *rows]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = twinserve("trace", "stat", tmp_path / "trace.jsonl")
    assert shown.code == 0 and "of these" not in shown.out


def test_every_note_of_a_reader_has_words(twinserve, tmp_path):
    from twinserve.commands.tables import _NOTES

    (tmp_path / "burst.csv").write_text(BURSTGPT)
    assert {*stat(twinserve, tmp_path / "burst.csv")["trace"]["notes"], "arrival_not_said"} == set(_NOTES)


def test_what_a_reader_dropped_counts_in_a_runs_summary_and_record(twinserve, latency, tmp_path):
    (tmp_path / "burst.csv").write_text(BURSTGPT)
    out = tmp_path / "run"
    result = twinserve("sim", tmp_path / "burst.csv", "--latency", latency, "--json", "--out", out)
    summary = json.loads(result.out)
    assert (summary["requests"], summary["dropped"]) == (2, 1)
    facts = json.loads((out / "run.json").read_text())["facts"]["trace"]
    assert facts["handled"] == {"dropped": {"failed": 1}, "clipped": {}, "repaired": {}}


def test_sessions_that_began_nobody_knows_when_begin_at_random(twinserve, tmp_path):
    turn = {"in": 9, "out": 3, "hash_ids": [1, 2], "api_time": 1.0, "think_time": 2.0}
    for name in ("a.json", "b.json", "c.json"):
        conversation = {"block_size": 4, "requests": [turn | {"t": 0.0}, turn | {"t": 3.0}]}
        (tmp_path / name).write_text(json.dumps(conversation))
    assert stat(twinserve, tmp_path)["trace"]["notes"]["same_instant"] == 4
    started = stat(twinserve, tmp_path, "--session-rate", 0.5, "--session-seed", 3)
    assert (started["trace"]["notes"]["same_instant"], started["sessions"]) == (4, 3)
    assert started["trace"]["transforms"] == [
        {"transform": "start_sessions", "parameters": {"rate": 0.5, "seed": 3}, "changed": {"arrivals_moved": 4}}
    ]
    assert started["span_s"] > 3


# --- make ---


def test_make_gives_the_same_bytes_for_the_same_seed(twinserve, tmp_path):
    options = ("--requests", 30, "--rate", 5, "--arrivals", "gamma", "--cv", 2, "--turns", 3, "--think-time-s", 1)
    for name in ("a", "b"):
        assert twinserve("trace", "make", "--out", tmp_path / name, "--seed", 4, *options).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    statistics = stat(twinserve, tmp_path / "a")
    assert (statistics["requests"], statistics["sessions"]) == (30, 10)


def test_make_takes_the_lengths_of_another_trace_and_says_of_which(twinserve, tmp_path):
    (tmp_path / "burst.csv").write_text(BURSTGPT)
    lengths = f"empirical:{tmp_path / 'burst.csv'}"
    out = tmp_path / "made"
    result = twinserve("trace", "make", "--out", out, "--prompt-tokens", lengths, "--output-tokens", lengths)
    assert result.code == 0, result.err
    requests = read_trace(out).requests
    assert {(request.prompt_tokens, request.max_tokens) for request in requests} == {(472, 18), (417, 276)}
    header = json.loads(out.read_text().splitlines()[0])
    assert header["made_by"]["prompt_tokens"] == lengths
    assert header["sha256_of_lengths"] == dict.fromkeys(
        ("prompt_tokens", "output_tokens"), read_trace(tmp_path / "burst.csv").sha256
    )


def test_make_refuses_lengths_of_no_trace(twinserve, tmp_path):
    result = twinserve("trace", "make", "--out", tmp_path / "made", "--prompt-tokens", "empirical:nowhere")
    assert (result.code, result.err) == (2, "twinserve: nowhere: cannot be read: No such file or directory\n")
    assert not (tmp_path / "made").exists()


# --- convert ---


@pytest.mark.parametrize("format", ["ours", "mooncake", "azure"])
def test_convert_writes_a_format_and_back_again(twinserve, trace, tmp_path, format):
    out, back = tmp_path / "out.gz", tmp_path / "back"
    assert twinserve("trace", "convert", trace, out, "--format", format).code == 0
    assert read_trace(out).format == {"ours": "twinserve"}.get(format, format)
    assert twinserve("trace", "convert", out, back).code == 0
    assert read_trace(back).requests == read_trace(trace).requests


def test_convert_says_what_the_formats_own_fields_cannot_hold(twinserve, trace, tmp_path):
    result = twinserve("trace", "convert", trace, tmp_path / "out", "--format", "azure")
    assert "12 requests\n" in result.err
    assert "in the field twinserve, as azure's own cannot hold it: prompt of 12" in result.err


def test_a_part_of_a_trace_of_lengths_needs_no_prompts_beside_it(twinserve, tmp_path):
    (tmp_path / "burst.csv").write_text(BURSTGPT)
    out = tmp_path / "part"
    result = twinserve(
        "trace", "convert", tmp_path / "burst.csv", out, "--format", "azure", "--window-s", "113:200", "--rate-scale", 2
    )
    assert (result.code, result.err) == (0, f"{out}: 1 requests\n")
    assert out.read_bytes() == b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n1970-01-01 00:00:00.0000000,417,276"


def test_convert_writes_a_changed_trace_in_our_own_format(twinserve, trace, tmp_path):
    out = tmp_path / "part.jsonl.gz"
    assert twinserve("trace", "convert", trace, out, "--limit", 5).code == 0
    assert stat(twinserve, out)["requests"] == 5


def test_convert_refuses_an_unknown_format_and_an_existing_file(twinserve, trace, tmp_path):
    assert twinserve("trace", "convert", trace, tmp_path / "out", "--format", "vidur").code == 2
    assert not (tmp_path / "out").exists()
    result = twinserve("trace", "convert", trace, trace)
    assert (result.code, result.err) == (2, f"twinserve: {trace}: exists already, expected a new name, or --force\n")


# --- fetch ---


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


def test_fetch_brings_a_trace_from_a_mirror_and_prints_where_it_lies(twinserve, public_traces, cache):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(public_traces / "azure")))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        result = twinserve("trace", "fetch", "azure-2023-conv", "--mirror", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert result.code == 0, result.err
    assert result.out == f"{cache / 'twinserve' / 'traces' / 'AzureLLMInferenceTrace_conv.csv'}\n"
    assert "CC-BY 4.0" in result.err
    assert len(read_trace(result.out.strip()).requests) == 19_366
    assert twinserve("trace", "fetch", "azure-2023-conv", "--mirror", "http://127.0.0.1:9").code == 0, "it lies there"


def test_fetch_without_a_network_says_so_in_one_line(twinserve, cache):
    result = twinserve("trace", "fetch", "mooncake-conversation", "--mirror", "http://127.0.0.1:9")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("twinserve: http://127.0.0.1:9/conversation_trace.jsonl: cannot be reached")
    assert not cache.exists()


@pytest.mark.parametrize("command", ["stat", "make", "convert", "fetch"])
def test_every_command_has_help(twinserve, command):
    result = twinserve("trace", command, "--help")
    assert result.code == 0 and f"Usage: twinserve trace {command}" in result.out


def test_the_traffic_of_a_vllm_that_was_recorded_is_a_trace(twinserve):
    """Its requests are simulated, and next turns hit what was answered before."""
    journal = Path(__file__).resolve().parents[1] / "data" / "vllm_journal"
    result = twinserve("sim", journal, "--latency", "qwen3-0.6b-h100", "--like", "own", "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["finished"] == 60 and summary["cached_tokens"] > 500
    found = json.loads(twinserve("trace", "stat", journal, "--json").out)
    assert found["requests"] == 60
    limited = json.loads(twinserve("trace", "stat", journal, "--limit", 7, "--json").out)
    assert limited["requests"] == 7


def test_a_closed_loop_with_priorities_is_made_and_simulated(twinserve, tmp_path, latency):
    out = tmp_path / "loop.jsonl"
    loop = ("--requests", 60, "--users", 4, "--think-time-s", 0.01, "--priority-shares", "0.5,0.5")
    made = twinserve("trace", "make", "--out", out, *loop)
    assert made.code == 0, made.err
    run = tmp_path / "run"
    result = twinserve("sim", out, "--latency", latency, "--scheduling-policy", "priority", "--out", run, "--json")
    assert result.code in (0, 3), result.err
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert max(step["waiting"] + step["running"] for step in steps) == 4
    refused = twinserve("trace", "make", "--out", tmp_path / "x", "--priority-shares", "0.5,a")
    assert refused.code == 2 and "priority_shares is '0.5,a', expected numbers such as 0.2,0.8" in refused.err
