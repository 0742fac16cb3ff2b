"""Traces that others publish, and logs of what a team measured: each becomes the requests it says."""

from __future__ import annotations

import gzip
import json

import pytest

from twinserve.settings.errors import InputError
from twinserve.traces.formats.prefixes import Prefixes
from twinserve.traces.readers import read_trace
from twinserve.traces.request import Part, PrefixKeys

SECOND = 10**9

VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.314579000000001,396,109\n1e1,879,55\n"
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,0,0,0,Conversation log\n"
    "45,ChatGPT,1087,0,1087,API log\n"
    "45,ChatGPT,0,7,7,API log\n"
    "118.5,GPT-4,417,276,693,Conversation log\n"
)
SHAREGPT = [
    {"arrival_time_ns": 46, "input_toks": 4, "output_toks": 2, "input_tok_ids": [5, 6, 7, 8], "output_tok_ids": [1, 2]},
    {"arrival_time_ns": 46, "input_toks": 5, "output_toks": 1, "input_tok_ids": [5, 6, 9, 9, 9], "output_tok_ids": [1]},
    {"arrival_time_ns": 90, "input_toks": 6, "output_toks": 1, "input_tok_ids": [5, 6, 9, 9, 4, 4]},
    {"arrival_time_ns": 91, "input_toks": 3, "output_toks": 1},
]
VLLM = {
    "date": "20260120-101500",
    "backend": "vllm",
    "model_id": "m",
    "tokenizer_id": "m",
    "request_rate": "inf",
    "rtfx": float("nan"),
    "completed": 3,
    "failed": 1,
    "input_lens": [100, 200, 300, 400],
    "output_lens": [3, 0, 2, 0],
    "ttfts": [0.1, 0.0, 0.2, 0.1],
    "itls": [[0.05, 0.07], [], [0.1], []],
    "start_times": [353400.725848632, 353399.0, 353400.5, 353401.000000001],
    "generated_texts": ["a", "", "b", ""],
    "errors": ["", "timed out", "", ""],
}


def guidellm_request(start, prompt, output, **values):
    return {
        "request_id": "r",
        "output": "text",
        "prompt_tokens": prompt,
        "output_tokens": output,
        "request_start_time": start,
        "info": {"status": "completed"},
    } | values


GUIDELLM = {
    "metadata": {"version": 1, "guidellm_version": "0.5.0"},
    "args": {},
    "benchmarks": [
        {
            "requests": {
                "successful": [guidellm_request(1700000011.5, 30, 3), guidellm_request(1700000010.0, 20, 2)],
                "incomplete": [guidellm_request(1700000012.0, 40, None)],
                "errored": [],
                "total": None,
            }
        },
        {
            "requests": {
                "successful": [guidellm_request(1700000020.0, 50, 5), guidellm_request(1700000021.0, None, 5)],
                "incomplete": [],
                "errored": [guidellm_request(1700000022.0, None, None)] * 2,
            }
        },
    ],
}


def turn(t, length, ids, output=7, **values):
    return {"t": t, "type": "n", "model": "m", "in": length, "out": output, "hash_ids": ids} | values


SUBAGENT = {
    "t": 40.25,
    "type": "subagent",
    "agent_id": "agent_001",
    "requests": [turn(0.0, 8, [9, 10], api_time=1.0, think_time=0.0), turn(30.0, 13, [9, 10, 11], think_time=20.0)],
}
WEKA = {
    "id": "trace_1",
    "block_size": 4,
    "hash_id_scope": "local",
    "requests": [
        turn(0.0, 10, [1, 2], api_time=10.02, think_time=0.0),
        turn(19.0, 14, [1, 2, 3], api_time=7.5, think_time=9.0),
        SUBAGENT,
        turn(60.0, 17, [1, 2, 3, 4], output=0, think_time=33.0),
        turn(75.0, 9, [1, 2], api_time=3.0, think_time=5.0),
    ],
}


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def lengths(trace):
    return [(request.arrival_ns, request.prompt_tokens, request.max_tokens) for request in trace.requests]


def shared(one, other) -> int:
    """How many tokens two prompts share from the start on."""
    keys, others = PrefixKeys(one.parts, -1 - one.id), PrefixKeys(other.parts, -1 - other.id)
    most = min(one.prompt_tokens, other.prompt_tokens)
    return max((num for num in range(1, most + 1) if keys(num) == others(num)), default=0)


# --- any format ---


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (VIDUR, "vidur"),
        (BURSTGPT, "burstgpt"),
        (json_lines(SHAREGPT), "sharegpt"),
        (json.dumps(WEKA), "weka"),
        (json.dumps(WEKA, indent=1), "weka"),
        (json.dumps(VLLM) + "\n", "vllm-bench"),
        (json.dumps(VLLM, indent=2), "vllm-bench"),
        (json.dumps(GUIDELLM), "guidellm"),
        (json.dumps(GUIDELLM, indent=4), "guidellm"),
    ],
)
def test_the_content_says_which_format_it_is(read, content, name):
    trace = read(content)
    assert trace.format == name
    assert read(gzip.compress(content.encode())).requests == trace.requests
    assert [request.id for request in trace.requests] == list(range(len(trace.requests)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]\n", ": [1, 2], expected a trace, one of twinserve, twinserve-record,"),
        ('{"input": 3}\n', ":1: '{\"input\": 3}', expected a trace, one of"),
        (json.dumps({"input": 3}, indent=1), ":1: '{', expected a trace, one of"),
        (json.dumps(GUIDELLM, indent=1)[:-40], ":"),
    ],
)
def test_content_of_no_format_is_refused(refused, content, message):
    refused(content, message)


def test_broken_json_of_many_lines_is_refused_where_it_breaks(refused):
    refused('{\n "benchmarks": [\n  1,,\n ]\n}\n', ":3: expected JSON: ")


# --- Vidur ---


def test_vidurs_times_are_seconds_and_float_noise_is_rounded_and_counted(read):
    trace = read(VIDUR)
    assert lengths(trace) == [(0, 374, 44), (4_314_579_000, 396, 109), (10 * SECOND, 879, 55)]
    assert trace.handled["repaired"] == {"time_rounded_to_ns": 1}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            ",num_decode_tokens",
            "",
            ":1: num_decode_tokens is missing: by arrived_at, num_prefill_tokens it is of the format vidur",
        ),
        ("0.0,374", "-1.0,374", ":2: arrived_at is '-1.0', expected seconds >= 0"),
        ("0.0,374", "nan,374", ":2: arrived_at is 'nan', expected seconds >= 0"),
        ("0.0,374", "1_0,374", ":2: arrived_at is '1_0', expected seconds >= 0"),
        ("0.0,374", ",374", ":2: arrived_at is '', expected seconds >= 0"),
        ("0.0,374", "1e99,374", ":2: arrived_at is '1e99', expected seconds >= 0"),
        ("1e1,", "1e0,", ":4: arrived_at is '1e0', expected no earlier time than in the line before"),
        (",396,", ",396.5,", ":3: num_prefill_tokens is '396.5', expected an integer >= 1"),
        (",109", ',"109', ":4: expected CSV: "),
        (",109", ",109,3", ":3: '4.314579000000001,396,109,3', expected 3 columns"),
    ],
)
def test_a_wrong_vidur_file_is_refused(refused, old, new, message):
    refused(VIDUR.replace(old, new, 1), message)


# --- BurstGPT ---


def test_burstgpts_failed_calls_and_empty_prompts_are_dropped_and_counted(read):
    trace = read(BURSTGPT)
    assert lengths(trace) == [(0, 472, 18), (113_500_000_000, 417, 276)]
    assert trace.handled == {"dropped": {"failed": 2, "empty_prompt": 1}, "clipped": {}, "repaired": {}}


def test_burstgpts_session_ids_tell_sessions_apart(read):
    rows = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens\n" + "".join(
        f"{time},{session},1,GPT-4,10,3\n" for time, session in [(0, "x"), (1, "y"), (2, "x"), (3, "")]
    )
    assert [request.session for request in read(rows).requests] == [0, 1, 0, None]


def test_a_trace_of_failures_alone_says_so(refused):
    refused(
        "".join(BURSTGPT.splitlines(True)[:1] + BURSTGPT.splitlines(True)[2:4]), ": has no requests to replay, 2 were"
    )


# --- ShareGPT with ids ---


def test_sharegpt_prompts_share_what_their_ids_share(read):
    requests = read(json_lines(SHAREGPT)).requests
    assert requests[0].parts == (Part(0, 0, 4),)
    assert requests[1].parts == (Part(0, 0, 2), Part(1, 2, 3))
    assert requests[2].parts == (Part(0, 0, 2), Part(1, 2, 2), Part(2, 4, 2))
    assert [request.arrival_ns for request in requests] == [0, 0, 44, 45]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_toks": 3}, ":2: input_tok_ids is '5 ids', expected 3 ids"),
        ({"output_tok_ids": [1, 2]}, ":2: output_tok_ids is '2 ids', expected 1 ids"),
        (
            {"input_tok_ids": [5, -1, 1, 1, 1]},
            ":2: input_tok_ids is [5, -1, 1, 1, 1], expected a list of integers >= 0",
        ),
        ({"arrival_time_ns": 3}, ":2: arrival_time_ns is 3, expected no earlier time than in the line before"),
        ({"output_toks": 0}, ":2: output_toks is 0, expected an integer >= 1"),
    ],
)
def test_a_wrong_sharegpt_row_is_refused(refused, values, message):
    refused(json_lines([SHAREGPT[0], SHAREGPT[1] | values, *SHAREGPT[2:]]), message)


def test_prefixes_of_ids_and_of_parts_are_equal_alike():
    lists = [[1, 2, 3, 4], [1, 2, 5], [1, 2], [1, 2, 5, 6], [7], [1, 2, 3, 4], [1], [1, 2, 3, 8]]
    prefixes = Prefixes()
    keys = [PrefixKeys(prefixes.parts(list(ids), number), -1) for number, ids in enumerate(lists)]
    for one, ids in enumerate(lists):
        for other, others in enumerate(lists):
            for length in range(1, min(len(ids), len(others)) + 1):
                assert (keys[one](length) == keys[other](length)) == (ids[:length] == others[:length])


# --- WEKA ---


def test_a_sub_agents_requests_are_served_at_their_time_among_its_parents(read):
    trace = read(json.dumps(WEKA))
    assert [request.arrival_ns / SECOND for request in trace.requests] == [0, 19, 40.25, 60, 70.25, 75]
    assert trace.handled["repaired"] == {"out_of_time_order": 1}
    assert {request.session for request in trace.requests} == {0}


def test_a_weka_request_waits_for_the_answer_before_it_and_then_thinks(read):
    requests = read(json.dumps(WEKA)).requests
    assert [request.after for request in requests] == [None, 0, 1, 1, 2, 3]
    thinks = [request.think_ns / SECOND for request in requests]
    # The sub-agent begins 13.75 s after the answer that called it; the last follows a request without api_time.
    assert thinks == [0, 9, 13.75, 33, 20, 15]


def test_weka_blocks_are_shared_within_a_conversation_and_the_rest_is_not(read):
    first, second, agent, third, again, shorter = read(json.dumps(WEKA)).requests
    assert (shared(first, second), shared(second, third), shared(third, shorter)) == (8, 12, 8)
    assert (shared(first, agent), shared(agent, again)) == (0, 8)
    assert [request.prompt_tokens for request in (first, second, agent)] == [10, 14, 8]


def test_a_zero_output_is_served_as_one_and_counted(read):
    trace = read(json.dumps(WEKA))
    assert trace.requests[3].max_tokens == 1
    assert trace.handled["clipped"] == {"zero_output_served_as_one": 1}


def test_the_conversations_of_a_folder_share_nothing(tmp_path):
    folder = tmp_path / "weka"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(WEKA))
    (folder / "b.json.gz").write_bytes(gzip.compress(json.dumps(WEKA).encode()))
    (folder / "README.md").write_text("not a conversation")
    trace = read_trace(folder)
    assert (trace.format, len(trace.requests)) == ("weka", 12)
    assert [request.session for request in trace.requests] == [0, 1] * 6
    one, other = trace.requests[:2]
    assert shared(one, other) == 0
    assert all(trace.requests[request.after].session == request.session for request in trace.requests[2:])


def test_a_folder_without_conversations_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no \*\.json, expected a conversation of WEKA in each"):
        read_trace(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="other.json: expected a conversation of WEKA"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": ...}, ":1: block_size is missing"),
        (
            {"requests": [turn(0.0, 10, [1])]},
            ":1: requests[0].hash_ids is '1 ids', expected 2 ids, one for each whole 4",
        ),
        (
            {"requests": [turn(0.0, 10, [1, 2]), turn("x", 10, [1, 2])]},
            ":1: requests[1].t is 'x', expected seconds >= 0",
        ),
        ({"requests": [turn(0.0, 0, [])]}, ":1: requests[0].in is 0, expected an integer >= 1"),
        (
            {"requests": [SUBAGENT | {"requests": [turn(0.0, 8, [1])]}]},
            ":1: requests[0].requests[0].hash_ids is '1 ids'",
        ),
        ({"requests": [3]}, ":1: requests[0] is 3, expected an object"),
        ({"requests": {}}, ":1: requests is {}, expected a list of objects"),
    ],
)
def test_a_wrong_conversation_is_refused(refused, change, message):
    refused(json.dumps({key: value for key, value in (WEKA | change).items() if value is not ...}), message)


# --- logs of serving benchmarks ---


def test_a_vllm_log_is_replayed_as_it_was_sent(read):
    trace = read(json.dumps(VLLM))
    assert lengths(trace) == [(0, 300, 2), (225_848_632, 100, 3), (500_000_001, 400, 1)]
    assert trace.handled == {
        "dropped": {"failed": 1},
        "clipped": {"zero_output_served_as_one": 1},
        "repaired": {"out_of_time_order": 1},
    }
    assert trace.notes["private_prompt"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": ...}, ":1: errors is missing, expected a result of"),
        ({"input_lens": [1, 2, 3]}, ":1: input_lens is '3 elements', expected 4 elements, one for each of start_times"),
        ({"input_lens": 4}, ":1: input_lens is 4, expected a list"),
        ({"input_lens": [1, 2, 0, 4]}, ":1: request 2 of input_lens is 0, expected an integer >= 1"),
        ({"start_times": [1.0, 2.0, float("nan"), 3.0]}, ":1: request 2 of start_times is nan, expected seconds >= 0"),
    ],
)
def test_a_vllm_log_that_says_too_little_is_refused(refused, change, message):
    refused(json.dumps({key: value for key, value in (VLLM | change).items() if value is not ...}), message)


def test_guidellms_benchmarks_are_replayed_one_after_the_other(read):
    trace = read(json.dumps(GUIDELLM))
    assert lengths(trace) == [(0, 20, 2), (1_500_000_000, 30, 3), (10 * SECOND, 50, 5)]
    assert trace.handled["dropped"] == {"incomplete": 1, "errored": 2, "without_time_or_lengths": 1}
    assert trace.handled["repaired"] == {"out_of_time_order": 1}
    assert trace.epoch_ns == 1_700_000_010 * SECOND


def test_guidellms_older_start_time_is_read(read):
    old = [{"prompt_tokens": 20, "output_tokens": 2, "start_time": 1700000010.25, "end_time": 1700000011.0}]
    report = {"benchmarks": [{"requests": {"successful": old, "incomplete": [], "errored": []}}]}
    assert lengths(read(json.dumps(report))) == [(0, 20, 2)]


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"benchmarks": []}, ": has no requests"),
        ({"benchmarks": [{}]}, ":1: benchmarks[0].requests is missing"),
        ({"benchmarks": [{"requests": {}}]}, ":1: benchmarks[0].requests.successful is missing"),
        (
            {"benchmarks": [{"requests": {"successful": [guidellm_request(1.0, "9", 2)]}}]},
            ":1: benchmarks[0].requests.successful[0].prompt_tokens is '9', expected an integer >= 1",
        ),
        (
            {"benchmarks": [{"requests": {"successful": [{"prompt_tokens": 9, "output_tokens": 2}]}}]},
            ":1: benchmarks[0].requests.successful[0].start_time is missing",
        ),
    ],
)
def test_a_wrong_guidellm_report_is_refused(refused, report, message):
    refused(json.dumps(report), message)


# --- the public traces, whole ---


def test_vidurs_trace_is_the_azure_trace(public_traces):
    vidur = read_trace(public_traces / "vidur" / "splitwise_conv.csv")
    assert vidur.requests == read_trace(public_traces / "azure" / "AzureLLMInferenceTrace_conv.csv").requests
    assert vidur.handled["repaired"] == {"time_rounded_to_ns": 9}


def test_the_sharegpt_trace_is_read_whole(public_traces):
    trace = read_trace(public_traces / "llmservingsim" / "sharegpt-llama-3.1-8b-300-sps10.jsonl.gz")
    assert (len(trace.requests), trace.notes["repeated_prompt"]) == (300, 2)
    assert sum(request.prompt_tokens for request in trace.requests) == 257_239
    assert trace.requests[0].arrival_ns == 0 < trace.requests[1].arrival_ns


def test_the_weka_conversations_are_read_whole(public_traces):
    trace = read_trace(public_traces / "weka")
    assert (len(trace.requests), len({request.session for request in trace.requests})) == (101, 3)
    assert sum(request.prompt_tokens for request in trace.requests) == 2_254_119 + 1_420_918 + 1_898_182
    assert trace.handled["clipped"] == {"zero_output_served_as_one": 1}
    with_agents = read_trace(public_traces / "weka" / "trace_0291.json")
    assert len(with_agents.requests) == 32
    assert max(request.arrival_ns for request in with_agents.requests) == 1363 * SECOND
