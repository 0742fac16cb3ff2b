"""Whatever a trace holds, it holds it still when it was written in another format and read again."""

from __future__ import annotations

import csv
import gzip
import json
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twinserve.settings.errors import InputError
from twinserve.traces.formats.reading import private_prompt, with_own_private_prompts
from twinserve.traces.readers import read_trace, write_trace
from twinserve.traces.request import Part, PrefixKeys, Request, answer_text

FORMATS = ("twinserve", "mooncake", "azure")
LARGE = (1 << 62) - 1


@st.composite
def traces(draw) -> list[Request]:
    """Traces of every kind: coarse and fine times, private and shared prompts, conversations that hold answers."""
    gaps = draw(
        st.lists(st.sampled_from([0, 1, 99, 100, 10**6, 10**9]) | st.integers(0, 10**12), min_size=1, max_size=8)
    )
    requests: list[Request] = []
    for number, arrival_ns in enumerate(accumulate(gaps)):
        after = draw(st.none() | st.integers(0, number - 1)) if number else None
        request = Request(
            id=number,
            arrival_ns=arrival_ns,
            parts=draw(prompts(number)),
            max_tokens=draw(st.integers(1, 3000)),
            session=draw(st.none() | st.integers(0, LARGE)),
            after=after,
            think_ns=0 if after is None else draw(st.integers(0, 10**10)),
            priority=draw(st.integers(-2, 2)),
            salt=draw(st.sampled_from(["", "ä"])),
            tenant=draw(st.sampled_from(["", "a,b", '"'])),
        )
        if after is not None and draw(st.booleans()):
            before = requests[after]
            answer = Part(answer_text(after), 0, draw(st.integers(1, before.max_tokens)))
            request = request._replace(parts=(*before.parts, answer, *request.parts))
        requests.append(request)
    return requests


def prompts(number):
    lengths = st.sampled_from([1, 511, 512, 513, 1024]) | st.integers(1, 5000)
    part = st.builds(
        Part, st.integers(0, 5) | st.integers(0, LARGE), st.integers(0, 3) | st.integers(0, LARGE), lengths
    )
    blocks = st.lists(st.integers(0, 5), max_size=4)
    return (
        st.lists(part, min_size=1, max_size=4).map(tuple)
        | lengths.map(lambda length: private_prompt(number, length))
        | st.builds(
            lambda ids, rest: (*(Part(text, 0, 512) for text in ids), Part(9, 0, rest)), blocks, st.integers(1, 512)
        )
    )


def round_trip(requests, *formats, epoch_ns=None):
    with TemporaryDirectory() as folder:
        for number, format in enumerate(formats):
            path = Path(folder) / f"{number}.gz"
            write_trace(path, requests, {}, format=format, epoch_ns=epoch_ns)
            trace = read_trace(path)
            assert trace.format == format
            requests, epoch_ns = trace.requests, trace.epoch_ns
    return requests, epoch_ns


@settings(deadline=None, max_examples=150)
@given(traces(), st.sampled_from(FORMATS), st.none() | st.integers(1, LARGE))
@example([Request(0, 5, private_prompt(0, 3), 1), Request(1, 5, private_prompt(1, 3), 1)], "azure", None)
@example([Request(0, 10**6, (Part(1, 0, 512),), 1)], "mooncake", 10**18 + 1)
@example([Request(0, 0, private_prompt(0, 600), 1)], "azure", 10**18 + 1)
def test_a_round_trip_loses_nothing(requests, format, epoch_ns):
    assert round_trip(requests, format, epoch_ns=epoch_ns) == (requests, epoch_ns)


@settings(deadline=None, max_examples=30)
@given(traces(), st.lists(st.sampled_from(FORMATS), min_size=2, max_size=4), st.none() | st.integers(1, LARGE))
def test_nor_does_a_longer_way(requests, formats, epoch_ns):
    assert round_trip(requests, *formats, epoch_ns=epoch_ns) == (requests, epoch_ns)


@settings(deadline=None, max_examples=50)
@given(traces())
def test_ids_in_mooncakes_format_are_equal_where_the_prefixes_are(requests):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        write_trace(path, [*requests, Request(len(requests), 10**14, (Part(0, 7, 9),), 1)], {}, format="mooncake")
        rows = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    prefixes = {}
    for request, row in zip(requests, rows, strict=True):
        assert len(row["hash_ids"]) == -(-row["input_length"] // 512)
        keys = PrefixKeys(request.parts, answer_text(request.id))
        for number, text in enumerate(row["hash_ids"], 1):
            prefix = keys(min(512 * number, row["input_length"]))
            assert prefixes.setdefault(text, prefix) == prefix
    assert len(set(prefixes.values())) == len(prefixes)


# --- what others see ---

PLAIN = [Request(0, 0, private_prompt(0, 374), 44), Request(1, 4_314_579_100, private_prompt(1, 396), 109)]
EPOCH_NS = 1_700_158_546_680_590_000


def test_what_azures_columns_can_say_is_written_as_azure_does(tmp_path):
    assert write_trace(tmp_path / "trace", PLAIN, {}, format="azure", epoch_ns=EPOCH_NS) == {}
    assert (tmp_path / "trace").read_bytes() == (
        b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:15:46.6805900,374,44\r\n"
        b"2023-11-16 18:15:50.9951691,396,109"
    )


def test_what_azures_columns_cannot_say_stands_in_one_more(tmp_path):
    requests = [PLAIN[0], Request(1, 4_314_579_137, (Part(3, 0, 9),), 5, session=2)]
    beside = write_trace(tmp_path / "trace", requests, {}, format="azure")
    assert beside == {"arrival_ns": 1, "prompt": 1, "session": 1}
    with (tmp_path / "trace").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["ContextTokens"], first["twinserve"]) == ("374", "")
    assert (second["TIMESTAMP"], second["ContextTokens"]) == ("1970-01-01 00:00:04.3145791", "9")
    assert json.loads(second["twinserve"]) == {"arrival_ns": 4_314_579_137, "prompt": [[3, 0, 9]], "session": 2}


def test_what_mooncakes_fields_cannot_say_stands_in_one_more(tmp_path):
    requests = [Request(0, 0, (Part(7, 0, 512), Part(8, 0, 4)), 5), Request(1, 2_500_000, (Part(7, 0, 2),), 5)]
    assert write_trace(tmp_path / "trace", requests, {}, format="mooncake") == {"arrival_ns": 1}
    assert [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()] == [
        {"timestamp": 0, "input_length": 516, "output_length": 5, "hash_ids": [7, 8]},
        {
            "timestamp": 2,
            "input_length": 2,
            "output_length": 5,
            "hash_ids": [7],
            "twinserve": {"arrival_ns": 2_500_000},
        },
    ]


def test_prompts_of_a_part_of_a_trace_get_their_own_private_texts_again():
    cut = [Request(0, 0, private_prompt(40, 9), 1), Request(1, 3, private_prompt(41, 9), 1)]
    shared = [Request(2, 4, private_prompt(50, 9), 1), Request(3, 5, (*private_prompt(50, 9), Part(1, 0, 2)), 1)]
    again = with_own_private_prompts([*cut, *shared])
    assert [request.parts for request in again[:2]] == [private_prompt(0, 9), private_prompt(1, 9)]
    assert again[2:] == shared


MOONCAKE_ROW = {"timestamp": 2, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (3, "trace:1: twinserve is 3, expected an object"),
        ({"arrival": 1}, "trace:1: twinserve.arrival is 1, expected only arrival_ns, prompt"),
        ({"arrival_ns": 3_000_000}, "trace:1: twinserve.arrival_ns is 3000000, expected a time within millisecond 2"),
        ({"prompt": [[1, 0, 599]]}, "trace:1: twinserve.prompt is '599 tokens', expected a prompt of 600 tokens"),
        ({"after": 0}, "trace:1: twinserve.after is 0, expected the number of an earlier request"),
        ({"think_ns": 5}, "trace:1: twinserve.think_ns is 5, expected `after` beside it"),
    ],
)
def test_a_field_that_contradicts_its_row_is_refused(tmp_path, beside, message):
    (tmp_path / "trace").write_text(json.dumps(MOONCAKE_ROW | {"twinserve": beside}) + "\n")
    with pytest.raises(InputError) as error:
        read_trace(tmp_path / "trace")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("no", "trace:2: expected JSON"),
        ("[]", "trace:2: twinserve is '[]', expected a JSON object"),
        ('"{""arrival_ns"":200}"', "trace:2: twinserve.arrival_ns is 200, expected the time of the row"),
        ('"{""prompt"":[[1,0,3]]}"', "trace:2: twinserve.prompt is '3 tokens', expected a prompt of 374 tokens"),
    ],
)
def test_a_column_that_contradicts_its_row_is_refused(tmp_path, beside, message):
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens,twinserve\n2023-11-16 18:15:46.6805900,374,44,{beside}\n"
    (tmp_path / "trace").write_text(text)
    with pytest.raises(InputError) as error:
        read_trace(tmp_path / "trace")
    assert message in str(error.value)


# --- files ---


@pytest.mark.parametrize("format", FORMATS)
def test_writing_twice_gives_the_same_bytes_and_overwrites_nothing(tmp_path, some_requests, format):
    paths = [tmp_path / "first.gz", tmp_path / "second.gz"]
    for path in paths:
        write_trace(path, some_requests, {}, format=format)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(InputError, match="exists already"):
        write_trace(paths[0], [], {}, format=format)


def test_requests_out_of_number_are_a_bug():
    with pytest.raises(ValueError, match="request 0 has id 1"):
        write_trace(Path("nowhere"), PLAIN[1:], {})


# --- the public traces, whole ---


@pytest.mark.parametrize("way", [("azure",), ("twinserve", "azure"), ("mooncake", "azure")])
def test_azures_trace_comes_back_byte_for_byte(public_traces, tmp_path, way):
    path = public_traces / "azure" / "AzureLLMInferenceTrace_conv.csv"
    assert come_back(path, way, tmp_path) == path.read_bytes()


@pytest.mark.parametrize("way", [("mooncake",), ("twinserve", "mooncake")])
def test_mooncakes_trace_comes_back_byte_for_byte(public_traces, tmp_path, way):
    path = public_traces / "mooncake" / "conversation_trace.jsonl.gz"
    assert come_back(path, way, tmp_path) == gzip.decompress(path.read_bytes())


def come_back(path, way, folder):
    for number, format in enumerate(way):
        trace = read_trace(path)
        path = folder / str(number)
        write_trace(path, trace.requests, {}, format=format, epoch_ns=trace.epoch_ns)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["weka", "llmservingsim/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz"])
@pytest.mark.parametrize("format", FORMATS)
def test_traces_with_shared_prompts_come_back(public_traces, tmp_path, name, format):
    requests = read_trace(public_traces / name).requests
    write_trace(tmp_path / "trace", requests, {}, format=format)
    assert read_trace(tmp_path / "trace").requests == requests
