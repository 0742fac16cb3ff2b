"""A table of one's own, its columns named by who hands it in."""

from __future__ import annotations

import json

import pytest
from shell import twinserve

from twinserve.settings.errors import InputError
from twinserve.traces.readers import read_trace

__all__ = ["twinserve"]

COLUMNS = "time=started_at,prompt=in,output=out"
LOG = """id,in,out,started_at
a,30,4,2026-11-29T10:00:02Z
b,20,5,2026-11-29T10:00:00.5Z
c,0,5,2026-11-29T10:00:01Z
d,9,0,x
"""


def read(tmp_path, text, columns=COLUMNS):
    (tmp_path / "log.csv").write_text(text, encoding="utf-8")
    return read_trace(tmp_path / "log.csv", columns=columns)


def test_rows_are_sorted_and_those_that_were_not_served_are_dropped(tmp_path):
    trace = read(tmp_path, LOG)
    told = [(r.id, r.arrival_ns, r.prompt_tokens, r.max_tokens) for r in trace.requests]
    assert told == [(0, 0, 20, 5), (1, 1_500_000_000, 30, 4)]
    assert trace.handled == {
        "dropped": {"empty_prompt": 1, "failed": 1}, "clipped": {}, "repaired": {"out_of_time_order": 1}
    }  # fmt: skip
    assert trace.format == "csv" and trace.epoch_ns == 1_795_946_400_500_000_000
    assert trace.notes["private_prompt"] == 2, "nothing is known of the prompts"


@pytest.mark.parametrize(
    ("columns", "times", "arrivals"),
    [
        ("time=started_at,prompt=in,output=out", ("7.5", "9"), [0, 1_500_000_000]),
        ("output=out,time_ms=started_at,prompt=in", ("7.5", "9"), [0, 1_500_000]),
        ("time=started_at,prompt=in,output=out", ("2026-01-01 00:00:00+02:00", "2025-12-31 22:00:03"), [0, 3 * 10**9]),
    ],
)
def test_times_are_numbers_or_instants(tmp_path, columns, times, arrivals):
    text = "in,out,started_at\n" + "".join(f"5,5,{time}\n" for time in times)
    assert [request.arrival_ns for request in read(tmp_path, text, columns).requests] == arrivals


def test_a_name_may_have_commas_in_it(tmp_path):
    trace = read(tmp_path, '"time, UTC",p=,o\n1,2,3\n', "time=time, UTC,prompt=p=,output=o")
    assert (trace.requests[0].prompt_tokens, trace.requests[0].max_tokens) == (2, 3)


@pytest.mark.parametrize(
    ("columns", "text", "words"),
    [
        ("time=a,prompt=b", LOG, "columns is 'time=a,prompt=b', expected time=COLUMN"),
        ("time=a,time=b,prompt=c", LOG, "expected time=COLUMN"),
        ("x,time=a,prompt=b,output=c", LOG, "expected time=COLUMN"),
        ("time=,prompt=b,output=c", LOG, "expected time=COLUMN"),
        ("time=started_at,prompt=in,output=tokens", LOG, "log.csv:1: tokens is missing"),
        (COLUMNS, LOG.replace("30", "many"), "log.csv:2: in is 'many', expected an integer >= 0"),
        (COLUMNS, LOG.replace("2026-11-29T10:00:02Z", "2026-13-29T10:00:02Z"), "log.csv:2: started_at is '2026-13"),
        (COLUMNS, "in,out,started_at\n1,1,soon\n", "log.csv:2: started_at is 'soon', expected seconds >= 0"),
        (COLUMNS, "in,out,started_at\n", "has no requests"),
        (COLUMNS, "", "is empty"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, columns, text, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, text, columns)
    assert words in str(error.value)


def test_a_folder_has_no_columns(tmp_path):
    with pytest.raises(InputError, match="expected a CSV file"):
        read_trace(tmp_path, columns=COLUMNS)


def test_an_unknown_table_says_that_columns_may_be_named(tmp_path, twinserve):
    (tmp_path / "log.csv").write_text(LOG)
    refused = twinserve("trace", "stat", tmp_path / "log.csv")
    assert refused.code == 2 and "or a table of your own by columns, such as --columns time=COLUMN," in refused.err


def test_commands_take_it_and_a_record_says_its_columns(tmp_path, twinserve):
    (tmp_path / "log.csv").write_text(LOG)
    how = ("--columns", COLUMNS, "--latency", "roofline:llama-3-8b@h100")
    assert twinserve("sim", tmp_path / "log.csv", *how, "--out", tmp_path / "sim").code == 0
    facts = json.loads((tmp_path / "sim" / "run.json").read_text())["facts"]["trace"]
    assert facts["format"] == "csv" and facts["columns"] == COLUMNS
    objective = ("--objective", "mean TTFT <= 1 s", "--tolerance", 0.5, "--jobs", 1, "--json")
    found = twinserve("capacity", tmp_path / "log.csv", *how, *objective)
    assert found.code == 0, found.err
