"""Attainment and goodput: each request by itself, all limits at once."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from twinserve.planning.attainment import Attainment, Limits
from twinserve.planning.objectives import Objective
from twinserve.planning.point import Job, compute
from twinserve.planning.sweep import load_plan
from twinserve.settings.errors import InputError
from twinserve.traces.runs.record import load_record

MS = 10**6


def answer(ttft_ms: int, tpot_ms: int, tokens: int = 11, reason: str = "length") -> SimpleNamespace:
    first_ns = 5 * MS + ttft_ms * MS
    return SimpleNamespace(
        arrival_ns=5 * MS, first_scheduled_ns=6 * MS, first_token_ns=first_ns,
        finish_ns=first_ns + (tokens - 1) * tpot_ms * MS,
        num_completion_tokens=tokens, finish_reason=reason,
    )  # fmt: skip


def test_a_request_keeps_all_limits_or_does_not_count():
    """Of these, 80% keep each limit and 60% both."""
    attainment = Attainment(Limits.parse("TTFT <= 100 ms and tpot<=20ms"))
    for ttft_ms, tpot_ms in ((100, 20), (101, 20), (100, 21), (5, 5), (1, 1)):
        attainment.ended(answer(ttft_ms, tpot_ms))
    found = attainment.of({"requests": 5, "duration_s": 2.0})
    turned_away = attainment.of({"requests": 5, "rejected": 3, "duration_s": 2.0})
    assert turned_away["share"] == pytest.approx(found["share"] * 5 / 8), "who is turned away came, too"
    assert found == {
        "limits": "TTFT <= 100 ms and TPOT <= 20 ms", "share": 0.6, "goodput_req_s": 1.5, "goodput_tok_s": 16.5,
    }  # fmt: skip


def test_what_is_not_served_keeps_nothing_and_one_token_has_no_time_per_token():
    limits = Limits.parse("TPOT <= 1 ms and E2E <= 1 s")
    assert not limits.kept(answer(1, 1, reason="abort"))
    assert not limits.kept(SimpleNamespace(finish_reason="refused", first_token_ns=None, finish_ns=None))
    assert limits.kept(answer(1000, 50, tokens=1)) and not limits.kept(answer(1001, 50, tokens=1))
    assert Limits.parse("queue <= 1 ms").kept(answer(9, 9)) and not Limits.parse("queue <= 0.999 ms").kept(answer(9, 9))
    assert Attainment(limits).of({"requests": 0, "duration_s": None})["share"] is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("p99 TTFT <= 1 s", "limits is 'p99 TTFT <= 1 s', expected limits such as"),
        ("ITL <= 1 s", "limits is 'ITL', expected each of ttft, tpot, e2e, queue once at most"),
        ("TTFT <= 1 s and TTFT <= 2 s", "limits is 'TTFT', expected each of"),
        ("TTFT <= 1.2.3 s", "expected limits such as"),
    ],
)
def test_limits_that_cannot_be_are_refused(text, problem):
    with pytest.raises(InputError, match=problem):
        Limits.parse(text)


def test_an_objective_may_ask_for_a_share_of_requests():
    objective = Objective.parse("99.5% of requests with TTFT <= 1 s and TPOT <= 50 ms")
    assert (objective.share, objective.terms) == (0.995, ())
    assert str(objective) == "99.5% of requests with TTFT <= 1 s and TPOT <= 50 ms"
    assert Objective.parse(str(objective)) == objective
    kept, missed = ({"requests": 1000, "attainment": {"share": share}} for share in (0.995, 0.99))
    assert objective.missed(kept) == [] and objective.missed(missed) == [str(objective)]
    assert objective.load_of(kept) == pytest.approx(1) and objective.load_of(missed) == pytest.approx(2)
    for text in ("100% of requests with TTFT <= 1 s", "0% of requests with TTFT <= 1 s", "1.2.3% of requests with x"):
        with pytest.raises(InputError, match="expected above 0% and below 100%"):
            Objective.parse(text)


def test_a_capacity_is_found_for_a_share_of_requests(twinserve, trace, latency):
    objective = "90% of requests with TTFT <= 15 ms and TPOT <= 5 ms"
    common = (trace, "--latency", latency, "--max-num-seqs", 4, "--jobs", 1, "--json")
    result = twinserve("capacity", *common, "--objective", objective, "--tolerance", 0.05)
    assert result.code == 0, result.err
    (row,) = map(json.loads, result.out.splitlines())
    shares = []
    for rate in (row["value"], row["failed"]):
        plan = load_plan(None, {"trace": str(trace), "latency": str(latency), "max_num_seqs": 4, "rate": rate,
                                "objective": objective})  # fmt: skip
        shares.append(compute(Job.of(plan.points[0]))["summary"]["attainment"]["share"])
    assert shares[0] >= 0.9 > shares[1]
    assert row["results"][0]["summary"]["attainment"]["share"] == shares[0]


def test_a_simulation_says_its_attainment_as_its_record_has_it(twinserve, trace, latency, tmp_path):
    run = tmp_path / "run"
    common = (trace, "--latency", latency, "--all-at-zero", "--max-num-seqs", 4, "--within", "TTFT <= 12 ms")
    result = twinserve("sim", *common, "--out", run, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)["attainment"]
    rows = load_record(run).requests
    kept = [row for row in rows if row["first_token_ns"] - row["arrival_ns"] <= 12 * MS]
    assert 0 < len(kept) < len(rows)
    assert found["share"] == len(kept) / len(rows)
    table = twinserve("sim", *common)
    assert f"TTFT <= 12 ms: {found['share']:.2%} of requests; goodput" in table.out
