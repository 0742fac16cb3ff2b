"""Plans: the fewest replicas of each kind of GPU that keep an objective, the cheapest first."""

from __future__ import annotations

import json

import pytest

from twinserve.planning.capacity import Capacity
from twinserve.planning.deployments import candidates, fewest_apart, find_deployments, plan_of, rows_of
from twinserve.planning.parallel import Workers
from twinserve.planning.sweep import Store
from twinserve.settings.errors import InputError

OBJECTIVE = "p99 TTFT <= 60 ms and p99 TPOT <= 12 ms"


@pytest.fixture
def values(trace):
    prices = {"h100": 2.0, "l40s": 1.0, "l4": 0.5}
    return {"trace": str(trace), "objective": OBJECTIVE, "price_per_gpu_hour": prices, "all_at_zero": True}


def test_what_does_not_fit_or_cannot_be_shared_is_left_out_with_the_reason():
    latencies, left_out = candidates("qwen2.5-7b", ["h100", "l4"])
    assert latencies == [
        "roofline:qwen2.5-7b@h100:tp=1", "roofline:qwen2.5-7b@h100:tp=2", "roofline:qwen2.5-7b@h100:tp=4",
        "roofline:qwen2.5-7b@l4:tp=1", "roofline:qwen2.5-7b@l4:tp=2", "roofline:qwen2.5-7b@l4:tp=4",
    ]  # fmt: skip
    assert len(left_out) == 2 and all("tp=8: tensor_parallel is 8, expected a divisor" in why for why in left_out)
    latencies, left_out = candidates("llama-3-70b", ["h100"])
    assert [text.rpartition("=")[2] for text in latencies] == ["2", "4", "8"]
    assert "141.1 GB of weights" in left_out[0]
    half, _ = candidates("llama-3-70b", ["h100"], ":quantization=fp8")
    assert half == [f"roofline:llama-3-70b@h100:quantization=fp8:tp={degree}" for degree in (1, 2, 4, 8)]
    with pytest.raises(InputError, match="model is 'llama-3.1-405b', fits nowhere: l4, tp=1"):
        candidates("llama-3.1-405b", ["l4"])


def test_devices_share_the_model_as_was_asked():
    latencies, left_out = candidates("llama-3-70b", ["h100", "l40s"], splits=("tp=4", "tp=4:pp=2", "tp=8:pp=4"))
    assert latencies == [
        "roofline:llama-3-70b@h100:tp=4", "roofline:llama-3-70b@h100:tp=4:pp=2", "roofline:llama-3-70b@h100:tp=8:pp=4",
        "roofline:llama-3-70b@l40s:tp=4", "roofline:llama-3-70b@l40s:tp=4:pp=2",
    ]  # fmt: skip
    assert len(left_out) == 1 and "l40s, tp=8:pp=4: 32 devices are more than the 8 that share a link" in left_out[0]
    for texts in (("tp=2:tp=4",), ("cp=2",), ("",), ("tp=x",)):
        with pytest.raises(InputError, match="splits is '") as refused:
            candidates("llama-3-70b", ["h100"], splits=texts)
        assert "\n" not in str(refused.value)


def test_no_more_gpus_are_looked_for_than_may_be(values):
    latencies, left_out = candidates("qwen3-0.6b", ["l4"], splits=("tp=1", "tp=8"), most_gpus=4)
    assert latencies == ["roofline:qwen3-0.6b@l4:tp=1"]
    assert left_out == ["l4, tp=8: 8 GPUs a replica, expected at most 4"]
    plan = plan_of(latencies, values | {"objective": "p99 TTFT <= 10 ms"})
    (deployment,) = find_deployments(plan, Store(), Workers(1), most_gpus=64)
    needed = deployment.capacity.value
    assert needed > 1
    assert find_deployments(plan, Store(), Workers(1), most_gpus=needed - 1) == []
    (again,) = find_deployments(plan, Store(), Workers(1), most_gpus=needed)
    assert again.capacity.value == needed


@pytest.mark.parametrize("least", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("saved", "times"), [(0, 0), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("most", [2, 5, 9, 24])
def test_the_fewest_replicas_for_prefill_and_decode_are_found_without_trying_all(least, saved, times, most):
    """From the least number for prefill that keeps on, each one more saves so many for decode, so often."""

    def needed(prefill: int) -> int | None:
        decode = 8 - saved * min(times, prefill - least)
        return decode if prefill >= least and decode < most else None

    totals = {prefill: prefill + decode for prefill in range(1, most) if (decode := needed(prefill)) is not None}
    totals = {prefill: total for prefill, total in totals.items() if total <= most}
    search = fewest_apart(most)
    number, tried = next(search), []
    with pytest.raises(StopIteration) as end:
        while True:
            tried.append(number)
            number = search.send(needed(number))
    found = end.value.value
    assert (found is None) == (not totals)
    assert found is None or totals[found] == min(totals.values())
    assert len(tried) == len(set(tried)) and all(0 < number < most for number in tried)


def test_a_deployment_of_stages_is_named_and_paid_for_as_a_whole(twinserve, trace):
    common = (trace, "--model", "qwen3-0.6b", "--devices", "h100", "--price", "2", "--jobs", 1, "--all-at-zero")
    result = twinserve("plan", *common, "--objective", "p99 TTFT <= 60 ms", "--splits", "tp=1,tp=2:pp=2")
    assert result.code == 0, result.err
    assert "4 x h100 (tp=2, pp=2)" in " ".join(result.out.split())


def test_the_cheapest_is_first_and_one_replica_fewer_misses_the_objective(values):
    latencies, _ = candidates("qwen3-0.6b", ["h100", "l4"])
    plan = plan_of(latencies, values)
    found = find_deployments(plan, Store(), Workers(1))
    prices = [deployment.price_per_hour for deployment in found]
    assert len(found) > 4 and prices == sorted(prices)
    for deployment in found:
        capacity = deployment.capacity
        assert not plan.objective.missed(capacity.results[0]["summary"])
        assert (capacity.value == 1) == (not capacity.missed)
        ((kind, count),) = deployment.gpus.items()
        degree = int(str(capacity.case.varied["latency"]).rpartition("=")[2])
        assert count == capacity.value * degree
        assert deployment.price_per_hour == count * values["price_per_gpu_hour"][kind]
    assert [row["price_per_hour"] for row in rows_of(plan, found)] == prices


def test_a_plan_needs_a_price_of_every_kind(values):
    latencies, _ = candidates("smollm2-135m", ["a100"])
    with pytest.raises(InputError, match="expected a price of a100 too"):
        plan_of(latencies, values)


def test_the_command_answers_with_the_three_cheapest_and_keeps_all(twinserve, trace, tmp_path):
    common = (trace, "--model", "qwen3-0.6b", "--devices", "h100,l40s", "--price", "h100=2,l40s=1", "--jobs", 1)
    asked = (*common, "--objective", OBJECTIVE, "--all-at-zero", "--out", tmp_path / "out")
    result = twinserve("plan", *asked)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) > 3 and result.out.count(" x ") == 3
    assert "one fewer misses" in " ".join(result.out.split())
    page = (tmp_path / "out" / "page.html").read_text()
    assert "a replica" in page and "price an hour" in page and '<td class="words">–</td>' in page
    again = twinserve("plan", *asked, "--json")
    assert [json.loads(line) for line in again.out.splitlines()] == rows
    refused = twinserve("plan", *common, "--objective", "fast")
    assert refused.code == 2 and "objective is 'fast'" in refused.err


def test_of_equal_prices_fewer_gpus_come_first_and_a_lower_price_before_both(values, monkeypatch):
    latencies, _ = candidates("qwen3-0.6b", ["h100", "l40s", "l4"])
    plan = plan_of([text for text in latencies if text.endswith("tp=1")], values)
    replicas = {"l40s": 2, "h100": 1, "l4": 3}

    def found(plan, sought, *_, **__):
        if sought == "decode_replicas":
            return [Capacity(case, sought, None, None, [], [None], [], 1) for case in plan.cases]
        kinds = [str(case.varied["latency"]).partition("@")[2].partition(":")[0] for case in plan.cases]
        kept = [replicas[kind] for kind in kinds]
        cases = zip(plan.cases, kept, strict=True)
        run = {"summary": {"requests": 1, "finished": 1, "ttft_s": {"p99": 0.01}, "tpot_s": {"p99": 0.001}}}
        return [Capacity(case, "replicas", value, None, [], [value], [run], 1) for case, value in cases][::-1]

    monkeypatch.setattr("twinserve.planning.deployments.find_capacities", found)
    found = find_deployments(plan, Store(), Workers(1))
    assert [(one.gpus, one.price_per_hour) for one in found] == [
        ({"l4": 3}, 1.5),
        ({"h100": 1}, 2.0),
        ({"l40s": 2}, 2.0),
    ]


def test_settings_are_chosen_with_the_gpus_and_what_binds_and_is_assumed_is_said(twinserve, trace, tmp_path):
    common = (trace, "--model", "qwen3-0.6b", "--devices", "l4", "--price", "0.5", "--jobs", 1)
    asked = (*common, "--objective", OBJECTIVE, "--all-at-zero", "--out", tmp_path / "out")
    result = twinserve("plan", *asked, "--try", "max-num-seqs=1,64", "--try", "max_num_batched_tokens=512")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    kinds = {row["varied"]["latency"] for row in rows}
    assert len(rows) > len(kinds) > 1, "a kind has several settings that keep the objective"
    cheapest = rows[0]
    alike = [row for row in rows if row["varied"]["latency"] == cheapest["varied"]["latency"]]
    assert cheapest["varied"]["max_num_seqs"] == 64, "one sequence at a time needs more replicas"
    assert {row["varied"]["max_num_seqs"] for row in alike} == {1, 64}
    said = [line for line in result.err.splitlines() if line.startswith(("plan: 1.", "1. "))]
    assert len(said) == 1 and "binds." in said[0] and "Assumed: roofline of qwen3-0.6b" in said[0]
    assert "No limits are known for a latency that is not fitted." in said[0]
    refused = twinserve("plan", *common, "--objective", OBJECTIVE, "--try", "speed=1")
    assert refused.code == 2 and "try is 'speed=1', expected each setting once at most" in refused.err
