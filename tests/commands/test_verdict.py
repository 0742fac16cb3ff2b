"""What is said beside the figures of a run: its load, and that they are those of a selection or of an overload."""

from __future__ import annotations

import json

import pytest

from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.readers import write_trace


@pytest.fixture
def steady(tmp_path):
    """400 requests, 8 a second: 40 tokens to answer, which the test latency gives in some 0.4 s."""
    path = tmp_path / "steady.jsonl"
    lengths = LengthSpec.parse("fixed:32"), LengthSpec.parse("fixed:40")
    write_trace(
        path, generate(seed=1, num_requests=400, rate=8.0, prompt_tokens=lengths[0], output_tokens=lengths[1]), {}
    )
    return path


def test_the_load_is_said_with_what_was_left_out(twinserve, steady, latency):
    result = twinserve("sim", steady, "--latency", latency, "--limit", 300)
    assert result.code == 0
    line = next(line for line in result.err.splitlines() if line.startswith("load: "))
    assert line.startswith("load: 300 requests of 400 in the trace, ") and "over " in line
    assert "all at once" in twinserve("sim", steady, "--latency", latency, "--limit", 50, "--all-at-zero").err


def test_a_queue_that_grows_to_the_end_is_said_and_sets_a_status(twinserve, steady, latency):
    served = twinserve("sim", steady, "--latency", latency)
    assert served.code == 0 and "overloaded" not in served.err
    flooded = twinserve("sim", steady, "--latency", latency, "--max-num-seqs", 1, "--rate-scale", 20, "--json")
    assert flooded.code == 3
    assert json.loads(flooded.out)["finished"] == 400, "the figures are there"
    last = flooded.err.splitlines()[-1]
    assert last.startswith("overloaded: when the last request came, ") and "of 400 still waited" in last


def test_few_requests_are_not_called_an_overload(twinserve, steady, latency):
    result = twinserve("sim", steady, "--latency", latency, "--max-num-seqs", 1, "--rate-scale", 20, "--limit", 60)
    assert result.code == 0 and "overloaded" not in result.err


def test_refusals_of_many_are_said_and_set_a_status(twinserve, steady, latency):
    result = twinserve("sim", steady, "--latency", latency, "--max-model-len", 24)
    assert result.code == 3
    assert result.err.splitlines()[-1] == "refused: 400 of 400 requests; latencies are those of the others"
