"""Scenarios that tests/record_vllm.py drew from seeds and recorded from vLLM's own schedulers are decided as there."""

import gzip
import json
from pathlib import Path

import oracle_vllm
import pytest

from twinserve.policies import Batch
from twinserve.settings.speculative import VllmDraftLength

FOLDER = Path(__file__).resolve().parents[1] / "data" / "vllm_scenarios"
TAKEN_BACK = FOLDER / "0.24-seed_0109.jsonl.gz"
PATHS = sorted(set(FOLDER.glob("*.jsonl.gz")) - {TAKEN_BACK})


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name[:-9])
def test_every_step_is_decided_as_vllm_decided_it(path):
    steps, difference, _ = oracle_vllm.decide_again(path)
    assert difference is None and steps > 100


def test_the_scenarios_have_every_rule_in_them():
    """Else they would hold less than they seem to."""
    headers = [oracle_vllm.load(path)[0] for path in PATHS]
    configs = [header["config"] for header in headers]
    assert {header["vllm"] for header in headers} == {"0.24.0", "0.33.0"}
    assert {(config["policy"], config["async_scheduling"]) for config in configs} == {
        (policy, is_async) for policy in ("fcfs", "priority") for is_async in (True, False)
    }
    for name in ("long_prefill_token_threshold_adaptive", "prefill_schedule_interval", "max_num_active_seqs"):
        assert any(config.get(name) for config in configs), name
    assert {config.get("pipeline_parallel_size", 1) for config in configs} == {1, 3}
    assert all(sum(header["totals"][name] for header in headers) > 30 for name in ("preemptions", "aborts", "hits"))
    drafting = [config for config in configs if "speculative_method" in config]
    assert {(one["speculative_method"], "num_speculative_tokens_per_batch_size" in one) for one in drafting} == {
        ("ngram", False), ("ngram_gpu", False), ("ngram_gpu", True), ("eagle3", False), ("eagle3", True),
        ("draft_model", False), ("draft_model", True),
    }  # fmt: skip
    assert sum(header["totals"].get("accepted", 0) for header in headers) > 1000


def test_a_table_of_drafts_that_asks_for_as_many_as_there_may_be_between_its_rows_parts(monkeypatch):
    """As vLLM's goes on with the number of the row before; seen where the scheduler alone knows how many there are."""
    monkeypatch.setattr(oracle_vllm, "VllmDraftLength", AsManyAsMayBe)
    paths = [path for path in PATHS if "per_batch_size" in str(oracle_vllm.load(path)[0])]
    parted = [path.name for path in paths if oracle_vllm.decide_again(path)[1] is not None]
    assert parted == ["0.33-drafts_seed_0129.jsonl.gz", "0.33-drafts_seed_0138.jsonl.gz"]


class AsManyAsMayBe(VllmDraftLength):
    """Asks for the most where the table has no row."""

    def choose(self, batch: Batch) -> int:
        rows = [drafts for first, last, drafts in self.table if first <= len(batch) <= last]
        return min(self.most, rows[0]) if rows else self.most


def test_a_block_that_no_step_filled_is_given_out_before_cached_ones_though_vllm_has_it_among_them():
    """Request 5 was given the token that fills block 28, and then preempted for request 10 in the same step."""
    steps, difference, _ = oracle_vllm.decide_again(TAKEN_BACK)
    assert difference is not None and difference.is_right
    assert (steps, difference.field) == (23, "blk")
    assert (difference.ours, difference.recorded) == ([[10, [28, 57, 58]]], [[10, [57, 58, 28]]])


def test_another_block_in_another_place_is_no_right_difference(tmp_path):
    with gzip.open(TAKEN_BACK, "rt") as file:
        rows = [json.loads(line) for line in file]
    (step,) = (row for row in rows[1 + rows[0]["requests"] :] if row["step"] == 23)
    step["blk"] = [[10, [28, 58, 57]]]
    with gzip.open(tmp_path / "changed.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    _, difference, _ = oracle_vllm.decide_again(tmp_path / "changed.jsonl.gz")
    assert difference is not None and not difference.is_right
