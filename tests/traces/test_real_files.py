"""Files as people have them: read, or refused for the right reason; fields and shapes are the formats' own."""

from __future__ import annotations

import gzip
import io
import json

import pytest

from twinserve.settings.errors import InputError
from twinserve.traces.readers import read_trace, write_trace
from twinserve.traces.request import Part, Request, answer_text
from twinserve.worlds.workload import load_workload

S, MS = 10**9, 10**6
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930,2162,5\n2024-05-10 00:00:01.5,2399,6\n"
BAILIAN = [
    {
        "chat_id": 0,
        "parent_chat_id": -1,
        "timestamp": 0.0,
        "input_length": 40,
        "output_length": 30,
        "hash_ids": [0, 1, 2],
    },
    {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.4, "input_length": 7, "output_length": 12, "hash_ids": [3]},
    {
        "chat_id": 5,
        "parent_chat_id": 0,
        "timestamp": 9.1,
        "input_length": 48,
        "output_length": 2,
        "hash_ids": [0, 1, 4],
    },
    {"chat_id": 6, "parent_chat_id": 3, "timestamp": 9.2, "input_length": 16, "output_length": 2, "hash_ids": [9]},
]
SESSIONS = [
    {
        "session_id": "a",
        "input_length": 600,
        "output_length": 20,
        "hash_ids": [0, 1],
        "timestamp": 1000.0,
        "group_id": 4,
    },
    {"session_id": "a", "input_length": 100, "output_length": 35, "hash_ids": [3], "delay": 1219.3},
    {"session_id": "b", "input_length": 50, "timestamp": 1250.5},
]
VLLM = {
    "backend": "openai",
    "tokenizer_id": "m",
    "completed": 2,
    "failed": 1,
    "duration": 3.5,
    "input_lens": [20, 21, 22],
    "output_lens": [10, 0, 9],
    "ttfts": [0.02, 0.0, 0.03],
    "start_times": [5.5, 6.0, 7.5],
    "errors": ["", "", ""],
}
GUIDELLM = {"prompt_tokens": 20, "output_tokens": 2, "start_time": 1700000010.25}
SHAREGPT = [
    {
        "id": "x",
        "conversations": [
            {"from": "human", "value": "12345678"},
            {"from": "gpt", "value": "1234"},
            {"from": "human", "value": "123"},
            {"from": "gpt", "value": "12345"},
            {"from": "human", "value": "unanswered"},
        ],
    },
    {"id": "y", "conversations": [{"from": "gpt", "value": "first"}]},
]
PERF = [
    {
        "start_time": 7.5,
        "end_time": 8,
        "request": "",
        "response": "",
        "info": {"input_tokens": 9, "output_tokens": 3},
        "error": None,
    },
    {
        "start_time": 6.0,
        "end_time": 8,
        "info": {"input_tokens": 8, "response_metrics": {"output_tokens": 5}},
        "error": None,
    },
    {"start_time": 6.5, "end_time": 8, "info": {"input_tokens": 8}, "error": {"error_type": "E", "error_msg": "m"}},
]


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def lengths(trace):
    return [(request.arrival_ns, request.prompt_tokens, request.max_tokens) for request in trace.requests]


# --- each new format ---


def test_bailians_blocks_are_of_16_tokens_and_a_turn_waits_for_its_parent(read):
    trace = read(json_lines(BAILIAN))
    assert (trace.format, lengths(trace)[2]) == ("bailian", (9_100_000_000, 48, 2))
    assert tuple(trace.requests[2].parts) == (Part(0, 0, 16), Part(1, 0, 16), Part(4, 0, 16))
    assert tuple(trace.requests[0].parts)[-1] == Part(2, 0, 8)
    assert [(request.after, request.session) for request in trace.requests] == [(None, 0), (None, 1), (0, 0), (None, 3)]
    assert trace.handled["repaired"] == {"parent_before_the_trace": 1}


@pytest.mark.parametrize(("parents", "line"), [((7, 7), 1), ((8, 7), 2), ((6, 8), 2)])
def test_a_bailian_chat_that_goes_on_with_itself_or_with_one_behind_it_is_refused(refused, parents, line):
    rows = [BAILIAN[0] | {"chat_id": 7 + n, "parent_chat_id": parent} for n, parent in enumerate(parents)]
    words = f":{line}: chat_id is {6 + line}, expected no parent of itself or of a row before it"
    refused(json_lines(rows), words)


def test_aiperfs_sessions_go_on_after_the_answer_with_all_that_was_said(read):
    trace = read(json_lines(SESSIONS))
    first, other, second = trace.requests
    assert (trace.format, lengths(trace)) == (
        "aiperf",
        [(0, 600, 20), (250_500_000, 50, 1), (1_219_300_000, 720, 35)],
    )
    assert (second.after, second.think_ns, second.session) == (first.id, 1_219_300_000, first.session)
    assert second.parts[-2:] == (Part(answer_text(first.id), 0, 20), Part(3, 0, 100))
    assert trace.handled["clipped"] == {"unknown_output_served_as_one": 1}
    assert other.session != first.session


def test_aiperfs_fixed_schedule_needs_neither_outputs_nor_ids(read):
    trace = read(
        json_lines([{"timestamp": 500, "input_length": 100}, {"timestamp": 750, "input_length": 9, "output_length": 3}])
    )
    assert (trace.format, lengths(trace)) == ("aiperf", [(0, 100, 1), (250 * MS, 9, 3)])


def test_wekas_conversations_may_stand_one_a_line_and_have_an_id_for_a_part_filled_block(read):
    requests = [
        {"t": 0.0, "in": 130, "out": 20, "hash_ids": [1, 2, 3]},
        {"t": 9.0, "in": 128, "out": 3, "hash_ids": [1, 2]},
    ]
    conversation = {"id": "c", "block_size": 64, "requests": requests}
    trace = read(json_lines([conversation, conversation]))
    assert (trace.format, len(trace.requests)) == ("weka", 4)
    assert {request.session for request in trace.requests} == {0, 1}
    assert trace.handled["repaired"]["id_of_a_part_filled_block"] == 2


@pytest.mark.parametrize(
    "time", ["2024-10-15T12:00:00.269Z", "2024-10-15 12:00:00.269", "2024-10-15T14:00:00.269+02:00"]
)
def test_azures_times_are_any_instant_of_iso_8601_and_images_are_counted(read, time):
    rows = f"TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n{time},0,770,491\n"
    rows += "2024-10-15T12:00:05.819000001Z,3,949,126\n"
    trace = read(rows)
    assert lengths(trace) == [(0, 770, 491), (5_550_000_001, 949, 126)]
    assert trace.epoch_ns == 1_728_993_600_269_000_000
    assert trace.handled["clipped"] == {"images_left_out": 1}


def test_a_vllm_request_without_tokens_or_a_first_one_has_failed(read):
    trace = read(json.dumps(VLLM))
    assert lengths(trace) == [(0, 20, 10), (2 * S, 22, 9)]
    assert trace.handled["dropped"] == {"failed": 1}


@pytest.mark.parametrize("completed", [3, 1])
def test_a_vllm_result_that_counts_other_answers_than_it_holds_is_refused(refused, completed):
    refused(json.dumps(VLLM | {"completed": completed}), f":1: completed is {completed}, expected 2, the requests that")


def test_results_a_line_are_replayed_one_after_the_other(read):
    trace = read(json_lines([VLLM, VLLM]))
    assert lengths(trace) == [(0, 20, 10), (2 * S, 22, 9), (3_500_000_000, 20, 10), (5_500_000_000, 22, 9)]


def test_sglangs_results_hold_lengths_and_no_times(read, tmp_path):
    sglang = {name: value for name, value in VLLM.items() if name not in ("start_times", "tokenizer_id")}
    trace = read(json_lines([sglang, sglang]))
    assert (trace.format, trace.is_timed, len(trace.requests)) == ("sglang-bench", False, 4)
    assert (trace.notes["arrival_not_said"], {request.arrival_ns for request in trace.requests}) == (4, {0})
    assert trace.handled["repaired"] == {}
    with pytest.raises(InputError, match="a sglang-bench file does not say when requests come: expected session_rate"):
        load_workload(tmp_path / "trace", {})
    assert load_workload(tmp_path / "trace", {}, is_replayed=False).requests
    spread = load_workload(tmp_path / "trace", {"session_rate": 1.0}).requests
    assert len({request.arrival_ns for request in spread}) == 4


def test_sharegpt_v3s_turns_hold_what_was_said_before(read):
    trace = read(json.dumps(SHAREGPT))
    first, second = trace.requests
    assert (trace.format, trace.is_timed, lengths(trace)) == ("sharegpt-v3", False, [(0, 2, 1), (0, 4, 2)])
    assert (second.after, second.parts[:2]) == (0, (Part(0, 0, 2), Part(answer_text(0), 0, 1)))
    assert trace.handled["dropped"] == {"question_without_an_answer": 1, "turn_without_a_question": 1}
    assert trace.handled["clipped"] == {"lengths_from_bytes": 2}


def test_inference_perfs_report_is_read_in_both_its_shapes(read):
    trace = read(json.dumps(PERF, indent=1))
    assert (trace.format, lengths(trace)) == ("inference-perf", [(0, 8, 5), (1_500_000_000, 9, 3)])
    assert trace.handled["dropped"] == {"failed": 1}


def test_inference_perfs_outputs_are_as_many_as_the_server_counted(read):
    def lasted(**metrics):
        return read(json.dumps([PERF[1] | {"info": {"input_tokens": 8, "response_metrics": metrics}}])).requests[0]

    assert lasted(output_tokens=5, server_usage={"completion_tokens": 7}).max_tokens == 7
    for usage in ({"prompt_tokens": 8}, {"completion_tokens": None}, None):
        assert lasted(output_tokens=5, server_usage=usage).max_tokens == 5


def test_a_turn_of_aiperfs_without_a_delay_follows_the_answer_at_once(read):
    trace = read(json_lines([SESSIONS[0], {"session_id": "a", "input_length": 9, "timestamp": 1600.5}, SESSIONS[1]]))
    assert [(request.arrival_ns // MS, request.think_ns) for request in trace.requests] == [
        (0, 0),
        (600, 0),
        (1819, 1_219_300_000),
    ]


SIZED = {
    "aiperf": lambda size: json_lines([{"timestamp": 5, "input_length": size}]),
    "bailian": lambda size: json_lines([BAILIAN[1] | {"input_length": size}]),
    "guidellm": lambda size: json.dumps(
        {"benchmarks": [{"requests": {"successful": [GUIDELLM | {"prompt_tokens": size}]}}]}
    ),
    "inference-perf": lambda size: json.dumps([PERF[1] | {"info": {"input_tokens": size, "output_tokens": 5}}]),
    "mooncake": lambda size: json_lines(
        [{"timestamp": 5, "input_length": size, "output_length": 2, "hash_ids": [1]}] * 2
    ),
    "servegen": lambda size: f"timestamp,input_tokens,output_tokens\n1.5,{size},32\n",
    "splitwise": lambda size: f"arrival_timestamp,prompt_size,token_size\n1.5,{size},32\n",
    "vidur": lambda size: f"arrived_at,num_prefill_tokens,num_decode_tokens\n1.5,{size},32\n",
    "vllm-bench": lambda size: json.dumps(VLLM | {"input_lens": [size, 21, 22]}),
    "weka": lambda size: json_lines([{"block_size": 4, "requests": [{"t": 0, "in": size, "out": 3, "hash_ids": [1]}]}]),
}


@pytest.mark.parametrize("name", SIZED)
def test_the_shortest_prompt_has_one_token(read, name):
    trace = read(SIZED[name](1))
    assert (trace.format, trace.requests[0].prompt_tokens) == (name, 1)
    with pytest.raises(InputError, match=r"is '?0'?, expected an integer >= 1$"):
        read(SIZED[name](0))


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (
            "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
            "0,2,0,{},1,4096,32\n",
            "splitwise",
        ),
        ("timestamp,input_tokens,output_tokens\n{},4096,32\n", "servegen"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n{},4096,32\n", "vidur"),
    ],
)
def test_tables_of_seconds_and_lengths_count_from_their_first_row(read, head, name):
    columns, row = head.splitlines(keepends=True)
    trace = read(columns + row.format(5184000.5) + row.format(5184002))
    assert (trace.format, lengths(trace)) == (name, [(0, 4096, 32), (1_500_000_000, 4096, 32)])


# --- times ---


@pytest.mark.parametrize(
    ("rows", "field"),
    [
        ([VLLM | {"start_times": ["5.5", 6.0, 7.5]}], "start_times"),
        ([{"benchmarks": [{"requests": {"successful": [GUIDELLM | {"start_time": "17"}]}}]}], "start_time"),
        ([BAILIAN[0] | {"timestamp": "0.0"}], "timestamp"),
        ([SESSIONS[0], SESSIONS[1] | {"delay": "1219"}], "delay"),
        ([SESSIONS[2] | {"timestamp": True}], "timestamp"),
        ([[PERF[0] | {"start_time": "7.5"}]], "start_time"),
        ([{"block_size": 4, "requests": [{"t": "0", "in": 8, "out": 3, "hash_ids": [1, 2]}]}], "t"),
    ],
)
def test_a_time_in_json_is_a_number_and_not_its_text(read, rows, field):
    with pytest.raises(InputError, match=rf"{field} is .*, expected (milli)?seconds >= 0"):
        read(json_lines(rows))


def test_milliseconds_since_1970_count_from_the_first_row_and_when_that_was_is_kept(read, tmp_path):
    rows = [{"timestamp": 1759522419154 + n, "input_length": 9, "output_length": 2, "hash_ids": [n]} for n in (0, 700)]
    trace = read(json_lines(rows))
    assert [request.arrival_ns for request in trace.requests] == [0, 700 * MS]
    assert trace.epoch_ns == 1759522419154 * MS


@pytest.mark.parametrize("format", ["twinserve", "mooncake", "azure"])
def test_what_begins_late_is_written_so_that_it_is_read_so(tmp_path, format):
    requests = [Request(0, 5 * S + 1, (Part(1 << 40, 0, 7),), 3), Request(1, 9 * S, (Part((1 << 40) + 1, 0, 7),), 3)]
    write_trace(tmp_path / "trace", requests, {}, format=format)
    assert read_trace(tmp_path / "trace").requests == requests


# --- what is refused, and as what ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (AZURE.replace("GeneratedTokens\n", "ContextTokens\n"), "'ContextTokens' stands 2 times, expected"),
        ('{"timestamp": 1, "timestamp": 2, "input_length": 9}\n', "'timestamp' stands twice in an object"),
        (json_lines([{"timestamp": 2, "requests": [{"prompt": "w"}]}]), "is an AIBrix workload, by requests,"),
        (json_lines([{"custom_id": "1", "body": {}}]), "is a batch of OpenAI's interface, by body, custom_id"),
        (json_lines([{"timestamp": 0, "output_length": 3, "hash_ids": [1]}]), "input_length is missing: by hash_ids"),
        ("TIMESTAMP,ContextTokens\n", "TIMESTAMP it is of the format azure"),
        ("\0" * 100_000, ":1: expected text, it holds NUL"),
    ],
)
def test_a_file_is_called_what_it_is(refused, read, content, words):
    with pytest.raises(InputError) as error:
        read(content)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "totals",
    [
        {"request_totals": {"successful": 400}},
        {"metrics": {"request_totals": {"successful": 400}}},
        {"run_stats": {"requests_made": {"successful": 400}}},
        {"scheduler_metrics": {"requests_made": {"successful": 400}}},
    ],
)
def test_a_guidellm_report_of_a_sample_is_refused_whatever_its_version(refused, totals):
    report = {"benchmarks": [{"requests": {"successful": [GUIDELLM]}} | totals]}
    refused(
        json.dumps(report), ":1: benchmarks[0].requests.successful is '1 requests', holds a sample, 1 of 400 requests"
    )


def test_what_a_guidellm_report_counts_as_failed_is_counted_though_it_is_not_listed(read):
    totals = {"request_totals": {"successful": 1, "errored": 7, "incomplete": 2}}
    trace = read(json.dumps({"benchmarks": [{"requests": {"successful": [GUIDELLM]}} | totals]}))
    assert trace.handled["dropped"] == {"errored": 7, "incomplete": 2}


# --- texts, packings, sizes ---


def test_a_table_may_have_a_byte_order_mark_and_quoted_names(read):
    import pandas

    table = pandas.read_csv(io.StringIO(AZURE)).to_csv(index=False, quoting=1)
    assert lengths(read("\ufeff" + table)) == lengths(read(AZURE)) == [(0, 2162, 5), (1_490_070_000, 2399, 6)]


def test_a_line_beyond_the_largest_is_refused_before_it_is_read(refused, monkeypatch):
    monkeypatch.setenv("TWINSERVE_LARGEST_VALUE", "100000")
    refused(
        "x" * 100_001, ":1: expected lines of at most 100000 bytes; TWINSERVE_LARGEST_VALUE can name a larger number"
    )
    refused(json.dumps({"benchmarks": ["x" * 1000] * 100}, indent=1), ":102: expected a text of at most 100000 bytes")


def test_a_line_that_goes_on_is_not_put_together_before_it_is_known_to_end(refused, monkeypatch):
    import tracemalloc

    monkeypatch.setenv("TWINSERVE_LARGEST_VALUE", str(8 << 20))
    packed = gzip.compress(b'{"a": "' + b"x" * (64 << 20))
    tracemalloc.start()
    try:
        refused(packed, ":1: expected lines of at most 8388608 bytes")
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


def test_gigabytes_of_zeros_in_a_small_file_are_refused_at_once(refused):
    refused(gzip.compress(bytes(50_000_000)), ":1: expected text, it holds NUL")


def test_a_prompt_of_thousands_of_parts_is_read_as_it_was_written(tmp_path):
    parts = tuple(Part(7_000_000 + number, 0, 16) for number in range(12_000))
    for format in ("twinserve", "mooncake", "azure"):
        write_trace(tmp_path / format, [Request(0, 0, parts, 5)], {}, format=format)
        assert tuple(read_trace(tmp_path / format).requests[0].parts) == parts


def test_zstd_is_unpacked_as_gzip_is(read):
    zstandard = pytest.importorskip("zstandard")
    assert read(zstandard.compress(AZURE.encode())).requests == read(AZURE).requests


def test_parquet_is_read_as_the_table_that_it_is(tmp_path, read):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    path = tmp_path / "table.parquet"
    parquet.write_table(csv.read_csv(io.BytesIO(AZURE.encode())), path)
    assert read_trace(path).requests == read(AZURE).requests
    rows = [{"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [3]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_trace(path).requests == read(json_lines(rows)).requests
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="expected a whole Parquet file"):
        read_trace(path)


@pytest.mark.parametrize(("content", "package"), [(b"PAR1...", "pyarrow"), (b"\x28\xb5\x2f\xfd...", "zstandard")])
def test_a_packing_whose_package_is_not_there_is_named(refused, monkeypatch, content, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    refused(
        content,
        f": is {'a Parquet file' if package == 'pyarrow' else 'packed with zstd'}: expected the package {package}",
    )


# --- as far as it is wanted ---


@pytest.mark.parametrize(
    ("options", "kept"), [({"limit": 3}, 3), ({"window_s": "0:5"}, 5), ({"window_s": "2:4", "limit": 1}, 1)]
)
def test_a_trace_is_read_as_far_as_it_is_wanted(tmp_path, options, kept):
    rows = [{"timestamp": 1000 * n, "input_length": 9, "output_length": 2, "hash_ids": [n]} for n in range(50)]
    (tmp_path / "trace").write_text(json_lines(rows))
    whole = load_workload(tmp_path / "trace", {})
    wanted = load_workload(tmp_path / "trace", options)
    assert (len(wanted.requests), wanted.dropped) == (kept, 50 - kept)
    assert wanted.facts["sha256"] == whole.facts["sha256"]
    (tmp_path / "broken").write_text(json_lines(rows[:10]) + "broken\n" * 40)
    assert load_workload(tmp_path / "broken", options).requests == wanted.requests


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\nb", "\udcff", "no/such/place"])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, name):
    with pytest.raises(InputError) as error:
        read_trace(tmp_path / name)
    assert "cannot be read: " in str(error.value) and "\n" not in str(error.value)
