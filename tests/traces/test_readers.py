"""Each trace format becomes the requests it says, exactly; whatever is wrong with a file is named."""

from __future__ import annotations

import gzip
import hashlib
import json

import pytest

from twinserve.settings.errors import InputError
from twinserve.traces.formats import azure
from twinserve.traces.formats.reading import Reading
from twinserve.traces.readers import read_trace, write_trace
from twinserve.traces.request import Blocks, Part, Request, answer_text

AZURE = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 18:15:46.6805900,374,44\r\n"
    b"2023-11-16 18:15:50.9951690,396,109\r\n"
    b"2023-11-16 18:15:50.9951691,879,55"
)
MOONCAKE_ROWS = [
    {"timestamp": 0, "input_length": 1024, "output_length": 500, "hash_ids": [0, 1]},
    {"timestamp": 0, "input_length": 1030, "output_length": 1, "hash_ids": [0, 1, 2]},
    {"timestamp": 3001, "input_length": 7, "output_length": 9, "hash_ids": [3]},
]
OWN_ROWS = [
    {"format": "twinserve-trace/1", "made_by": "hand"},
    {"arrival_ns": 0, "prompt": [[7, 0, 40], [8, 10, 2]], "max_tokens": 5, "session": 1},
    {"arrival_ns": 3, "prompt_tokens": 9, "max_tokens": 6},
    {"arrival_ns": 3, "prompt": [[7, 0, 40], [-1, 0, 5], [9, 0, 1]], "max_tokens": 7, "session": 1, "after": 0},
]


def json_lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def changed(rows, index, **values):
    """The rows with some fields of one changed; `...` takes a field away."""
    row = {key: value for key, value in (rows[index] | values).items() if value is not ...}
    return [*rows[:index], row, *rows[index + 1 :]]


# --- Azure ---


def test_azure_times_are_exact_to_100_ns(read):
    assert [request.arrival_ns for request in read(AZURE).requests] == [0, 4_314_579_000, 4_314_579_100]


def test_azure_lengths_are_read_past_crlf_and_a_missing_last_newline(read):
    assert [(request.prompt_tokens, request.max_tokens) for request in read(AZURE).requests] == [
        (374, 44),
        (396, 109),
        (879, 55),
    ]


def test_azure_prompts_share_nothing(read):
    trace = read(AZURE)
    assert len({request.parts[0].text for request in trace.requests}) == 3
    assert trace.notes["private_prompt"] == 3


def test_a_shorter_fraction_counts_from_its_first_digit(read):
    requests = read(AZURE.replace(b"50.9951690,", b"50.9,")).requests
    assert requests[1].arrival_ns == 4_219_410_000


def test_azure_columns_are_found_by_name(read):
    [request] = read(b"GeneratedTokens,TIMESTAMP,ContextTokens\n5,2024-05-10 00:00:00.009930+00:00,6\n").requests
    assert (request.max_tokens, request.prompt_tokens) == (5, 6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b",GeneratedTokens",
            b"",
            ":1: GeneratedTokens is missing: by ContextTokens, TIMESTAMP it is of the format azure",
        ),
        (b",396,109", b",396", ":3: '2023-11-16 18:15:50.9951690,396', expected 3 columns"),
        (b",396,", b",-396,", ":3: ContextTokens is '-396', expected an integer >= 1"),
        (b",396,", b",396.0,", ":3: ContextTokens is '396.0', expected an integer >= 1"),
        (b",396,", b",nan,", ":3: ContextTokens is 'nan', expected an integer >= 1"),
        (b",396,", ",٣,".encode(), ":3: ContextTokens is '٣', expected an integer >= 1"),
        (b",109", b",0", ":3: GeneratedTokens is '0', expected an integer >= 1"),
        (b",109", b",1" + b"0" * 5000, ":3: GeneratedTokens is '10"),
        (b"18:15:46.6", b"18:16:46.6", ":3: TIMESTAMP is '2023-11-16 18:15:50.9951690', expected no earlier time"),
        (b"11-16 18:15:46.6", b"11-31 18:15:46.6", ":2: TIMESTAMP is '2023-11-31 18:15:46.6805900', expected a time"),
        (b".6805900", b".6805900000", ":2: TIMESTAMP is '2023-11-16 18:15:46.6805900000', expected a time like"),
        (b",44\r\n", b",44\r\n\r\n", ":3: '', expected 3 columns"),
        (b",44", b",\xff44", ":2: expected UTF-8: invalid start byte at byte"),
    ],
)
def test_a_wrong_azure_file_is_refused(refused, old, new, message):
    refused(AZURE.replace(old, new, 1), message)


# --- Mooncake ---


def test_mooncake_times_are_milliseconds(read):
    assert [request.arrival_ns for request in read(json_lines(MOONCAKE_ROWS)).requests] == [0, 0, 3_001_000_000]


def test_mooncake_ids_become_texts_of_512_tokens_the_last_one_filled_in_part(read):
    requests = read(json_lines(MOONCAKE_ROWS)).requests
    assert requests[0].parts == (Part(0, 0, 512), Part(1, 0, 512))
    assert requests[1].parts == (Part(0, 0, 512), Part(1, 0, 512), Part(2, 0, 6))


def test_a_prompt_of_blocks_is_the_tuple_of_its_parts():
    blocks, parts = Blocks([7, 3, 7], 4, 9), (Part(7, 0, 4), Part(3, 0, 4), Part(7, 0, 1))
    assert tuple(blocks) == parts and (len(blocks), blocks[1], blocks[1:]) == (3, parts[1], parts[1:])
    assert blocks == parts and parts == blocks and blocks == Blocks([7, 3, 7], 4, 9) and len({blocks, parts}) == 1
    assert blocks != Blocks([7, 3, 7], 4, 10) and blocks != parts[:2] and {type(part) for part in blocks} == {Part}


def test_equal_rows_stay_requests_of_their_own(read):
    trace = read(json_lines([MOONCAKE_ROWS[0], *MOONCAKE_ROWS]))
    assert [request.id for request in trace.requests] == [0, 1, 2, 3]
    assert trace.notes == {"same_instant": 2, "repeated_prompt": 1, "private_prompt": 0, "one_token_output": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_length": ...}, ":2: input_length is missing"),
        ({"timestamp": -1}, ":2: timestamp is -1, expected an integer >= 0"),
        ({"timestamp": 1.5}, ":2: timestamp is 1.5, expected an integer >= 0"),
        ({"timestamp": True}, ":2: timestamp is True, expected an integer >= 0"),
        ({"timestamp": 1 << 80}, f":2: timestamp is {1 << 80}, expected an integer >= 0"),
        ({"timestamp": float("nan")}, ":2: expected JSON: NaN is not a number"),
        ({"timestamp": 5000}, ":3: timestamp is 3001, expected no earlier time than in the line before"),
        ({"input_length": "1030"}, ":2: input_length is '1030', expected an integer >= 1"),
        ({"input_length": 0}, ":2: input_length is 0, expected an integer >= 1"),
        ({"output_length": 0}, ":2: output_length is 0, expected an integer >= 1"),
        ({"hash_ids": [0, 1]}, ":2: hash_ids is '2 ids', expected 3 ids, one for each 512 of 1030 tokens begun"),
        ({"hash_ids": [0, 1, -2]}, ":2: hash_ids is [0, 1, -2], expected a list of integers >= 0"),
        ({"hash_ids": [0, 1, "2"]}, ":2: hash_ids is [0, 1, '2'], expected a list of integers >= 0"),
        ({"hash_ids": None}, ":2: hash_ids is None, expected a list of integers >= 0"),
    ],
)
def test_a_wrong_mooncake_row_is_refused(refused, values, message):
    refused(json_lines(changed(MOONCAKE_ROWS, 1, **values)), message)


# --- our own format ---


def test_a_row_of_parts_is_its_request(read):
    assert read(json_lines(OWN_ROWS)).requests[2] == Request(
        id=2,
        arrival_ns=3,
        parts=(Part(7, 0, 40), Part(answer_text(0), 0, 5), Part(9, 0, 1)),
        max_tokens=7,
        session=1,
        after=0,
    )


def test_a_bare_prompt_length_is_a_text_that_no_other_row_has(read):
    rows = [*OWN_ROWS, {"arrival_ns": 4, "prompt": [[(1 << 40) + 3, 0, 3]], "max_tokens": 1}]
    texts = [request.parts[0].text for request in read(json_lines(rows)).requests]
    assert texts[1] not in (texts[0], texts[3])


@pytest.mark.parametrize("number", [0, 2])
def test_a_row_that_names_the_text_of_a_bare_prompt_length_is_refused_before_or_behind_it(read, number):
    rows = [{"arrival_ns": n, "prompt": [[n, 0, 3]], "max_tokens": 1} for n in range(3)]
    rows[1] = {"arrival_ns": 1, "prompt_tokens": 4, "max_tokens": 1}
    rows[number]["prompt"] = [[(1 << 40) + 1, 0, 3]]
    with pytest.raises(InputError, match="expected a text that is not 1099511627777, as request 1 has prompt_tokens"):
        read(json_lines([OWN_ROWS[0], *rows]))


@pytest.mark.parametrize(
    ("index", "values", "message"),
    [
        (0, {"format": "twinserve-trace/2"}, """:1: format is 'twinserve-trace/2', expected "twinserve-trace/1\""""),
        (2, {"arrival_ns": ...}, ":3: arrival_ns is missing"),
        (2, {"arrival_ns": 9}, ":4: arrival_ns is 3, expected no earlier time than in the line before"),
        (2, {"max_tokens": 0}, ":3: max_tokens is 0, expected an integer >= 1"),
        (2, {"prompt_tokens": 0}, ":3: prompt_tokens is 0, expected an integer >= 1"),
        (2, {"prompt_tokens": ...}, ":3: expected either prompt or prompt_tokens"),
        (2, {"prompt": [[1, 0, 1]]}, ":3: expected either prompt or prompt_tokens"),
        (2, {"sesion": 1}, ":3: sesion is 1, expected only arrival_ns, prompt,"),
        (3, {"prompt": []}, ":4: prompt is [], expected at least one part"),
        (3, {"prompt": [[1, 0]]}, ":4: prompt is [[1, 0]], expected a list of lists of 3 integers"),
        (3, {"prompt": [[1, 0, 0]]}, ":4: prompt is [1, 0, 0], expected text numbers below 2^63, start >= 0"),
        (3, {"prompt": [[1 << 63, 0, 1]]}, f":4: prompt is [{1 << 63}, 0, 1], expected text numbers below 2^63"),
        (3, {"prompt": [[-2, 0, 1]]}, ":4: prompt is [-2, 0, 1], expected answers only of requests that `after` leads"),
        (3, {"prompt": [[-1, 0, 6]]}, ":4: prompt is [-1, 0, 6], expected at most the answer's 5 tokens"),
        (3, {"after": 2}, ":4: after is 2, expected the number of an earlier request, below 2"),
        (3, {"after": "0"}, ":4: after is '0', expected an integer >= 0"),
        (3, {"think_ns": -1}, ":4: think_ns is -1, expected an integer >= 0"),
        (2, {"think_ns": 1}, ":3: think_ns is 1, expected `after` beside it"),
        (2, {"tenant": 1}, ":3: tenant is 1, expected text"),
        (2, {"salt": "\ud800"}, ":3: salt is '\\ud800', expected text without lone surrogates"),
        (0, {"epoch_ns": "x"}, ":1: epoch_ns is 'x', expected an integer >= 0"),
    ],
)
def test_a_wrong_row_of_our_own_is_refused(refused, index, values, message):
    refused(json_lines(changed(OWN_ROWS, index, **values)), message)


# --- any format ---


@pytest.mark.parametrize("content", [AZURE, json_lines(MOONCAKE_ROWS), json_lines(OWN_ROWS)])
def test_a_packed_file_is_read_like_the_file_inside_it(read, content):
    trace = read(content)
    assert read(gzip.compress(content)) == trace
    assert trace.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": is empty, expected a trace"),
        (b"\n\n", ": is empty, expected a trace"),
        (
            b"arrived,prompt\n0.0,3\n",
            ":1: 'arrived,prompt', expected a trace, one of twinserve, twinserve-record, bailian,",
        ),
        (b'{"prompt": 3}\n', ":1: '{\"prompt\": 3}', expected a trace, one of twinserve, twinserve-record, bailian,"),
        (b'{"hash_ids": [}\n', ":1: expected JSON: Expecting value"),
        (b'{"hash_ids": ' + b"[" * 100_000, ":1: expected JSON: "),
        (json_lines(MOONCAKE_ROWS[:1]) + b"7\n", ":2: 7, expected a JSON object"),
        (json_lines(OWN_ROWS[:1]), ": has no requests"),
        (AZURE[:41], ": has no requests"),
        (gzip.compress(AZURE, mtime=0)[:-12], ": expected a whole gzip file: "),
        (gzip.compress(AZURE, mtime=0)[:-8] + bytes(8), ": expected a whole gzip file: CRC check failed"),
        (gzip.compress(AZURE, mtime=0)[:10] + b"\xff" * 30, ": expected a whole gzip file: "),
        (b"\x1f\x8b" + bytes(30), ": expected a whole gzip file: "),
    ],
)
def test_a_file_that_is_no_trace_is_refused(refused, content, message):
    refused(content, message)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: cannot be read: No such file"):
        read_trace(tmp_path / "nowhere")


# --- the public traces, whole ---


def test_the_azure_conversation_trace_is_read_whole(public_traces):
    trace = read_trace(public_traces / "azure" / "AzureLLMInferenceTrace_conv.csv")
    times = [request.arrival_ns for request in trace.requests]
    assert len(times) == 19_366
    assert (times[1] - times[0], times[-1]) == (4_314_579_000, 3_501_721_937_000)
    assert trace.epoch_ns == 1_700_158_546_680_590_000
    assert trace.sha256 == "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8"


def test_the_mooncake_conversation_trace_is_read_whole(public_traces):
    trace = read_trace(public_traces / "mooncake" / "conversation_trace.jsonl.gz")
    assert len(trace.requests) == 12_031
    assert sum(request.prompt_tokens for request in trace.requests) == 144_793_823
    assert trace.notes == {"same_instant": 10_851, "repeated_prompt": 118, "private_prompt": 0, "one_token_output": 72}
    assert trace.sha256 == "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df"


@pytest.mark.parametrize("format", ["twinserve", "mooncake", "azure"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_rows_behind_a_limit_may_wait_for_answers_of_others_behind_it(tmp_path, format, limit):
    """They are counted, and not understood."""
    turns = [Request(0, 0, (Part(7, 0, 8),), 4)]
    for number in range(1, 5):
        answer = Part(answer_text(number - 1), 0, 4)
        parts = (*turns[-1].parts, answer, Part(7 + number, 0, 3))
        turns.append(Request(number, number * 10**9, parts, 4, after=number - 1))
    write_trace(tmp_path / "trace", turns, {}, format=format)
    trace = read_trace(tmp_path / "trace", limit=limit)
    assert list(trace.requests) == turns[:limit] and trace.num_unread == 5 - limit
    assert trace.sha256 == read_trace(tmp_path / "trace").sha256


# --- many rows at once ---

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROWS = [
    f"2023-11-16 18:{15 + number // 600:02}:{number // 10 % 60:02}.{number % 10},{1 + number % 7},{1 + number % 5}"
    for number in range(2_500)
]
SECONDS = "arrived_at,num_prefill_tokens,num_decode_tokens"


def table(header: str, rows) -> bytes:
    return "\n".join((header, *rows)).encode()


def with_column(name: str, values) -> bytes:
    return table(f"{HEADER},{name}", map(",".join, zip(ROWS, values, strict=True)))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(table(HEADER, ROWS), id="plain"),
        pytest.param(table(HEADER, [*ROWS[:1500], f"{ROWS[1500]}0000000000", *ROWS[1501:]]), id="a long answer"),
        pytest.param(table(HEADER, [row.replace(" ", "T") for row in ROWS]), id="with T"),
        pytest.param(table(HEADER, [row.replace(",", "+02:00,", 1) for row in ROWS]), id="with offsets"),
        pytest.param(with_column("NumImages", ["0"] * 1500 + ["2"] + ["0"] * 999), id="with an image"),
        pytest.param(with_column("twinserve", [""] * 1500 + ['"{""tenant"":""a""}"'] + [""] * 999), id="with a tenant"),
        pytest.param(table(SECONDS, (f"{n / 8},{1 + n % 9},2" for n in range(2_500))), id="seconds"),
        pytest.param(table(SECONDS, (f"{n}.{'1' * (n % 12)}1,3,2" for n in range(2_500))), id="rounded seconds"),
    ],
)
def test_rows_read_together_are_those_read_one_by_one(read, content):
    together, one_by_one = read(content), read(content, until_s=1e9)
    assert len(together.requests) == 2_500
    assert together == one_by_one


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1_500, "2023-11-16 18:17:30.0,0,1", ":1502: ContextTokens is '0', expected an integer >= 1"),
        (1_500, "2023-11-16 18:17:30.0,5", ":1502: '2023-11-16 18:17:30.0,5', expected 3 columns"),
        (1_500, "2023-11-16 18:17:30,\xff,5", ":1502: ContextTokens is 'ÿ', expected an integer >= 1"),
        (1_500, "2023-11-16 18:17:29.8,5,5", ":1502: TIMESTAMP is '2023-11-16 18:17:29.8', expected no earlier time"),
        (1_024, "2023-11-16 18:15:00.0,5,5", ":1026: TIMESTAMP is '2023-11-16 18:15:00.0', expected no earlier time"),
        (2_499, "2323-11-16 18:17:29.8,5,5", ":2501: TIMESTAMP is '2323-11-16 18:17:29.8', expected a time between"),
    ],
)
def test_a_wrong_row_among_many_is_named(refused, read, number, line, message):
    lines = [*ROWS]
    lines[number] = line
    refused(table(HEADER, lines), message)
    assert len(read(table(HEADER, lines), limit=number).requests) == number


def test_tables_come_as_columns(tmp_path):
    pieces = list(azure.rows([HEADER, *ROWS], tmp_path, Reading()))
    assert [len(piece.arrivals_ns) for piece in pieces] == [1_024, 1_024, 452]
