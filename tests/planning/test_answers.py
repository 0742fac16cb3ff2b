"""A capacity in sentences: the same figures as its row, what binds, and what each limit alone would allow."""

from __future__ import annotations

import json
import re

import pytest

from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.readers import write_trace

OBJECTIVE = "p99 TTFT <= 90 ms and p99 E2E <= 700 ms"


@pytest.fixture
def asked(twinserve, tmp_path, latency):
    trace = tmp_path / "trace.jsonl"
    prompts, answers = LengthSpec.parse("fixed:64"), LengthSpec.parse("lognormal:40:1")
    requests = generate(seed=1, num_requests=80, rate=8.0, prompt_tokens=prompts, output_tokens=answers)
    write_trace(trace, requests, {})

    def ask(*more, objective=OBJECTIVE):
        shared = ("capacity", trace, "--latency", latency, "--objective", objective, "--max-num-seqs", 4, "--jobs", 1)
        return twinserve(*shared, *more)

    return ask


def test_the_sentences_have_the_figures_of_the_row(asked):
    result = asked("--json")
    assert result.code == 0, result.err
    row, lines = json.loads(result.out), result.err.splitlines()
    found = next(line for line in lines if f" keep {OBJECTIVE}" in line)
    assert found == (
        f"{row['value']:.4g} requests/s on 1 replica keep {OBJECTIVE}; {row['failed']:.4g} requests/s would miss "
        f"{'; '.join(row['missed'])}."
    )
    used = next(line for line in lines if line.startswith("Of the limits is used: "))
    summary = row["results"][0]["summary"]
    shares = {"p99 TTFT": summary["ttft_s"]["p99"] / 0.09, "p99 E2E": summary["e2e_s"]["p99"] / 0.7}
    assert {name: int(share) for name, share in re.findall(r"(p99 \w+) [\d.]+ m?s \((\d+)%\)", used)} == {
        name: round(100 * share) for name, share in shares.items()
    }
    assert used.endswith(f"; {max(shares, key=shares.get)} binds.")
    assert any(line.startswith(f"Simulated load: {summary['requests']} requests, ") for line in lines)
    assert any(line.startswith("Assumed: round numbers on no device") and "4 sequences" in line for line in lines)


def test_each_limit_alone_is_a_search_of_its_own_and_the_least_of_them_binds(asked):
    both = asked("--json")
    line = next(line for line in both.err.splitlines() if line.startswith("Each limit alone: "))
    alone = {limit: value for value, limit in re.findall(r"(\S+) requests/s by (p99 \w+ <= \d+ ms)", line)}
    assert alone.keys() == set(OBJECTIVE.split(" and "))
    for limit, value in alone.items():
        result = asked("--json", objective=limit)
        assert f"{json.loads(result.out)['value']:.4g}" == value
        assert "Each limit alone" not in result.err
    least = min(float(value.replace(",", "")) for value in alone.values())
    assert least == pytest.approx(json.loads(both.out)["value"], rel=0.03)


def test_what_cannot_be_kept_is_said_in_words(asked):
    result = asked(objective="p99 TTFT <= 1 ms")
    assert "Nothing that was tried keeps p99 TTFT <= 1 ms; what is missed: p99 TTFT <= 1 ms." in result.err
    assert "Latency: ." not in result.err


def test_a_share_of_requests_is_said_with_the_share_that_keeps(asked):
    result = asked("--find", "replicas", objective="90% of requests with TTFT <= 90 ms")
    assert re.search(r"^(100\.00|9\d\.\d\d)% of requests keep TTFT <= 90 ms\.$", result.err, re.MULTILINE), result.err
