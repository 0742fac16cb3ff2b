"""What went wrong in other engines and simulators, each with a test of what is right here.

`PITFALLS` holds them all: what broke, where it was reported, and the tests that fail when it is put back.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from side_by_side import WeakHash

from twinserve.orders import Priority
from twinserve.policies import (
    IS_COMPILED,
    BlockManager,
    Core,
    PrefixCache,
    SamplingParams,
    Scheduler,
    Sequence,
    VllmAdmission,
)
from twinserve.settings.vllm_versions import build_rules

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests/policies/test_pitfalls.py"
MANAGER = "tests/policies/test_block_manager.py"
CACHE = "tests/policies/test_prefix_cache.py"
SCHEDULER = "tests/policies/test_scheduler.py"
CORE = "tests/policies/test_core.py"
MACHINES = "tests/policies/test_machines.py"
LAWS = "tests/policies/test_laws.py"
ENGINE = "tests/engine/test_equality.py"
RUNNER = "tests/engine/test_model_runner.py"
LATENCY = "tests/sim/test_latency.py"
FIT = "tests/sim/test_fit.py"
REPLICA = "tests/sim/test_replica.py"

PITFALLS: list[tuple[str, str, list[str]]] = [
    (
        "of two requests of one batch that share a prefix, the second hits blocks whose KV is not computed yet",
        "nano-vllm 208, 209",
        [
            f"{HERE}::test_a_prompt_in_chunks_is_hit_no_further_than_it_is_scheduled",
            f"{ENGINE}::test_a_hit_within_the_same_step_reads_what_the_step_writes",
        ],
    ),
    (
        "the whole prompt is cached, a multiple of the block size: nothing is left to compute, so no logits",
        "nano-vllm 144; vLLM 11186, 17999",
        [
            f"{HERE}::test_a_prompt_cached_whole_still_samples",
            f"{MANAGER}::test_a_prompt_that_is_cached_whole_leaves_one_block_to_compute",
        ],
    ),
    (
        "a reused block keeps its old hash: later prompts hit wrong KV",
        "nano-vllm 163; vLLM 4764",
        [f"{MANAGER}::test_a_reused_block_loses_what_it_held"],
    ),
    (
        "two sequences compute the same block in one step: the second copy orphans or shadows the first",
        "nano-vllm 243",
        [
            f"{HERE}::test_equal_blocks_computed_in_one_step_outlive_each_other",
            f"{CACHE}::test_of_equal_blocks_the_one_stored_first_serves_and_the_next_takes_over",
        ],
    ),
    (
        "can_append is off by one at a block's boundary",
        "nano-vllm 66",
        [f"{MANAGER}::test_can_append_asks_for_a_block_exactly_at_the_boundary"],
    ),
    (
        "the cached-token count stays stale after an allocation that failed",
        "vLLM 18957",
        [
            f"{HERE}::test_an_admission_that_fails_leaves_no_trace",
            f"{MANAGER}::test_a_failed_allocation_changes_nothing",
        ],
    ),
    (
        "a freed duplicate page is still in a block table; an abort in flight frees twice",
        "mini-sglang PR 111, 142",
        [f"{HERE}::test_an_abort_in_flight_frees_once", f"{HERE}::test_a_shared_block_outlives_an_abort_of_one_holder"],
    ),
    (
        "a request's row is reused while its forward pass still runs",
        "sglang 18803",
        [
            f"{HERE}::test_tokens_in_flight_reach_their_own_sequences_when_others_leave",
            f"{RUNNER}::test_launch_copies_what_it_needs",
        ],
    ),
    (
        "evicting the head of a chain first leaves tails that nothing reaches",
        "llm-d-inference-sim 704",
        [f"{MANAGER}::test_cached_blocks_are_evicted_after_blank_ones_and_a_chains_tail_before_its_head"],
    ),
    (
        "blocks with no hash are not evicted before cached ones",
        "vLLM 42656",
        [f"{HERE}::test_blank_blocks_are_used_before_cached_ones_whatever_was_freed_last"],
    ),
    (
        "sizes in the accounting drift from the truth",
        "sglang 10637, 35270",
        [
            f"{MACHINES}::test_every_call_has_the_effect_it_has_on_the_slow_model",
            f"{MANAGER}::test_integrity_check_notices_a_wrong_reference_count",
        ],
    ),
    (
        "hash collisions give one user another's KV; predictable seeds make them easy",
        "vLLM 12621, 15297, PR 29261, PR 54727",
        [
            f"{HERE}::test_a_collision_never_gives_one_request_the_blocks_of_another",
            f"{CACHE}::test_colliding_hashes_cost_a_miss_and_never_give_a_wrong_block",
            f"{CACHE}::test_salts_and_seeds_keep_caches_apart",
        ],
    ),
    (
        "tail and order of eviction",
        "vLLM's tests of its KV cache manager",
        [
            f"{MANAGER}::test_cached_blocks_are_evicted_after_blank_ones_and_a_chains_tail_before_its_head",
            f"{HERE}::test_the_least_recently_freed_chain_is_evicted_first",
        ],
    ),
    (
        "hits of live and of freed blocks",
        "vLLM's tests of its KV cache manager",
        [
            f"{HERE}::test_live_and_freed_blocks_are_hit",
            f"{MANAGER}::test_a_shared_block_is_free_only_when_its_last_holder_gives_it_up",
        ],
    ),
    (
        "cached blocks are evicted by the very request that hits them",
        "vLLM's tests of its KV cache manager",
        [f"{HERE}::test_what_a_request_hits_is_not_evicted_for_its_new_blocks"],
    ),
    (
        "one hash on several blocks",
        "vLLM's tests of its KV cache manager",
        [f"{CACHE}::test_of_equal_blocks_the_one_stored_first_serves_and_the_next_takes_over"],
    ),
    (
        "a reset while blocks are in use",
        "vLLM's tests of its KV cache manager",
        [f"{MANAGER}::test_the_cache_is_reset_only_when_nothing_is_held"],
    ),
    (
        "tenants see each other's blocks",
        "vLLM's tests of its KV cache manager",
        [f"{HERE}::test_requests_of_other_salts_share_nothing", f"{CACHE}::test_salts_and_seeds_keep_caches_apart"],
    ),
    (
        "token counts go stale between schedule and postprocess",
        "nano-vllm 211, 233",
        [f"{HERE}::test_counts_hold_between_schedule_and_postprocess"],
    ),
    (
        "the KV length that attention sees runs past the chunk being computed",
        "nano-vllm 212",
        [
            f"{HERE}::test_a_chunk_attends_to_no_more_than_is_computed_with_it",
            f"{ENGINE}::test_chunked_prompts_beside_decodes",
        ],
    ),
    (
        "decoding with no KV left, or a prompt larger than the pool, hits an assertion instead of a clear refusal",
        "nano-vllm 274",
        [
            f"{HERE}::test_a_full_pool_preempts_and_everything_is_served",
            f"{SCHEDULER}::test_a_request_that_can_never_fit_is_refused_with_the_reason",
        ],
    ),
    (
        "running grows past max_num_seqs and the tail starves",
        "nano-vllm, read in its code",
        [f"{SCHEDULER}::test_max_num_seqs_bounds_what_runs", f"{LAWS}::test_every_request_ends_within_its_bound"],
    ),
    (
        "decodes starve behind a stream of prefills",
        "nano-vllm 73, 276; sglang 32549",
        [f"{HERE}::test_decodes_go_on_beside_a_stream_of_prompts"],
    ),
    (
        "preempt and resume chase each other for ever",
        "vLLM 25538",
        [f"{HERE}::test_two_that_do_not_fit_together_both_end", f"{LAWS}::test_every_request_ends_within_its_bound"],
    ),
    (
        "the victim of a preemption is already in this step's batch",
        "vLLM 23347, 23713",
        [
            f"{HERE}::test_a_victim_loses_its_row_of_the_same_step",
            f"{HERE}::test_what_a_victim_would_have_computed_is_not_hit_and_its_tokens_go_to_others",
        ],
    ),
    (
        "preempted requests come back in another order",
        "vLLM 41951",
        [f"{HERE}::test_preempted_requests_come_back_in_the_order_in_which_they_arrived"],
    ),
    (
        "a captured graph's block table is one column too short",
        "nano-vllm 258",
        [
            f"{HERE}::test_a_block_table_covers_its_tokens_at_a_blocks_boundary",
            "tests/engine/test_attention.py::test_every_kind_of_row_at_once",
        ],
    ),
    (
        "sequences that end in one step cost the square of their number to remove",
        "measured: 574 us for 256 in nano-vllm",
        [f"{HERE}::test_many_ends_in_one_step_compare_no_sequence_with_every_other"],
    ),
    (
        "a hit on freed blocks scans the free queue",
        "measured: 0.04 M tokens/s at block 16 in nano-vllm",
        [f"{HERE}::test_a_hit_on_freed_blocks_takes_as_many_steps_in_a_large_pool_as_in_a_small_one"],
    ),
    (
        "the simulator's scheduler is a copy and drifts from the engine's",
        "Dynamo 9718, 11016, 12643; BLIS 1272; LLMServingSim 40",
        [
            "tests/house/test_architecture.py::test_core_alone_calls_schedule_and_postprocess",
            "tests/equivalence/test_replay_of_real_runs.py::test_everything_at_once_is_decided_again",
        ],
    ),
    (
        "the simulation has more KV blocks than the engine",
        "LLMServingSim PR 59",
        [
            "tests/equivalence/test_replay_of_real_runs.py::test_another_setting_is_noticed",
            "tests/reports/test_page.py::test_settings_that_differ_are_marked_and_named_at_the_top",
            "tests/engine/test_llm.py::test_open_settings_are_resolved",
        ],
    ),
    (
        "a capacity that is overestimated turns a TTFT of 120 s into 64 ms: errors past saturation explode",
        "BLIS PR 480",
        [
            "tests/commands/test_commands.py::test_compare_exits_with_1_beyond_the_limit",
            f"{FIT}::test_a_step_beyond_what_was_measured_is_counted_with_its_excess",
        ],
    ),
    (
        "host time between steps is left out",
        "BLIS 482; Vidur 63",
        [
            f"{FIT}::test_recorded_costs_include_the_host_work_after_a_step_but_no_idling",
            f"{REPLICA}::test_without_overlap_a_step_is_decided_when_the_one_before_has_ended",
        ],
    ),
    (
        "a changed profile is silently served from a cache keyed by its file's name",
        "Vidur, measured",
        [
            f"{FIT}::test_a_changed_coefficient_is_another_model",
            f"{LATENCY}::test_a_file_that_changes_under_its_name_is_read_again",
        ],
    ),
    (
        "batches of unequal context are averaged to one length",
        "Vidur, read in its code",
        [f"{LATENCY}::test_unequal_contexts_are_added_up_and_not_averaged"],
    ),
    (
        "one metric's name, two definitions in simulation and reality",
        "Dynamo PR 12883",
        [
            "tests/traces/runs/test_metrics.py::test_gaps_equal_those_between_the_tokens_that_sequences_got",
            "tests/traces/runs/test_record.py::test_the_summary_is_that_of_the_rows",
        ],
    ),
    (
        "published accuracy that nobody can recompute",
        "Vidur 72; Frontier 9, 22; AIConfigurator 1205, 1396",
        [
            "tests/commands/test_demo.py::test_the_demo_runs_both_worlds_replays_exactly_and_writes_its_page",
            "tests/test_benchmarks.py::test_what_is_committed_is_what_render_makes",
        ],
    ),
    (
        "tables are filled before the first simulated step",
        "Vidur, measured: 69 s and 4.3 GB",
        [
            f"{LATENCY}::test_a_cost_is_asked_for_once_a_step_and_not_before_it",
            "tests/house/test_architecture.py::test_nothing_heavy_is_imported_before_it_is_used",
        ],
    ),
    (
        "events are seen one pass too early",
        "Dynamo 12643",
        [
            f"{REPLICA}::test_a_request_that_arrives_during_a_step_is_seen_by_the_next_decision",
            f"{REPLICA}::test_a_request_that_arrives_at_the_instant_of_a_decision_is_seen_by_it",
        ],
    ),
]


def functions_of(path: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("broke", "source", "tests"), PITFALLS, ids=[row[0][:60] for row in PITFALLS])
def test_each_pitfall_has_tests_and_they_are_there(broke, source, tests):
    assert tests and source
    for test in tests:
        path, name = test.split("::")
        assert name in functions_of(path), f"{broke}: {path} has no {name}"


# --- the behaviours themselves ---


def sequence(prompt: int, max_tokens: int = 4, *, seq_id: int | None = None, first: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Sequence(list(range(first, first + prompt)), params, seq_id=seq_id)


def scheduler(num_blocks: int = 64, block_size: int = 4, budget: int | None = 16, **settings) -> Scheduler:
    defaults = {"max_num_seqs": 8, "composition": "mixed", "prefix_cache": PrefixCache()}
    return Scheduler(
        BlockManager(num_blocks, block_size),
        max_num_batched_tokens=budget,
        enable_chunked_prefill=True,
        **(defaults | settings),
    )


def step(one: Scheduler, token: int = 1000):
    batch = one.schedule()
    if batch:
        one.postprocess(batch, [token + seq.seq_id * 100 + seq.num_completion_tokens for seq in batch.sampled])
    one.check_integrity()
    return batch


def run_out(one: Scheduler, most: int = 1000) -> int:
    """Steps until everything has ended; fails beyond `most`."""
    for number in range(most):
        if one.is_finished():
            return number
        step(one)
    raise AssertionError(f"not finished after {most} steps: {list(one.running)}, {list(one.waiting)}")


def test_a_prompt_in_chunks_is_hit_no_further_than_it_is_scheduled():
    one = scheduler(budget=20)
    first, second = sequence(40, seq_id=0), sequence(40, seq_id=1)
    one.add(first)
    assert [row.num_tokens for row in step(one).rows] == [20]
    one.add(second)
    batch = step(one)
    assert [(row.seq.seq_id, row.start, row.num_tokens) for row in batch.rows] == [(0, 20, 20)]
    batch = step(one)
    assert [(row.seq.seq_id, row.start) for row in batch.rows] == [(0, 40), (1, 36)]
    third = sequence(100, seq_id=2, first=500)
    fourth = sequence(100, seq_id=3, first=500)
    one.add(third)
    one.add(fourth)
    batch = step(one)
    assert [(row.seq.seq_id, row.start, row.num_tokens) for row in batch.admitted] == [(2, 0, 18)]
    batch = step(one)
    assert batch.admitted == [] and third.num_computed_tokens == 36, "the budget went to the prompt in chunks"


def test_two_chunked_prompts_of_one_text_share_what_the_first_has_scheduled():
    one = scheduler(budget=64, long_prefill_token_threshold=10)
    one.add(sequence(40, seq_id=0))
    one.add(sequence(40, seq_id=1))
    batch = step(one)
    assert [(row.seq.seq_id, row.start, row.num_tokens) for row in batch.rows] == [(0, 0, 10), (1, 8, 10)]


def test_a_prompt_cached_whole_still_samples():
    for block_size in (1, 4, 16):
        one = scheduler(block_size=block_size, budget=None)
        one.add(sequence(32, 1, seq_id=0))
        step(one)
        again = sequence(32, 1, seq_id=1)
        one.add(again)
        batch = step(one)
        assert [(row.start, row.num_tokens, row.samples) for row in batch.rows] == [(32 - block_size, block_size, True)]
        assert again.is_finished


def test_equal_blocks_computed_in_one_step_outlive_each_other():
    for leaves_first in (0, 1):
        one = scheduler(num_blocks=6, budget=64)
        seqs = [sequence(8, 9, seq_id=0), sequence(8, 9, seq_id=1)]
        for seq in seqs:
            one.add(seq)
        step(one)
        assert [seq.block_table for seq in seqs] == [[0, 1], [0, 2]], "the last block is computed twice"
        one.abort(seqs[leaves_first])
        other = sequence(9, 1, seq_id=2)
        one.add(other)
        (row,) = step(one).admitted
        assert row.start == 8
        left = seqs[1 - leaves_first]
        cache = one.block_manager.prefix_cache
        assert cache is not None
        one.abort(left)
        one.block_manager.reset_prefix_cache()
        assert len(cache) == 0 and len(one.block_manager.free_block_ids) == 6
        one.check_integrity()


def test_an_admission_that_fails_leaves_no_trace():
    one = scheduler(num_blocks=6, budget=64)
    one.add(sequence(16, 5, seq_id=0))
    step(one)
    late = Sequence([*range(4), *range(70, 86)], SamplingParams(max_tokens=2), seq_id=1)
    one.add(late)
    free = list(one.block_manager.free_block_ids)
    for _ in range(2):
        assert step(one).admitted == []
        assert (late.num_cached_tokens, late.num_computed_tokens, late.block_table) == (0, 0, [])
    assert list(one.block_manager.free_block_ids) == free[1:], "the running one took its next block, nobody else did"
    run_out(one)
    assert late.num_cached_tokens == 4


@pytest.mark.parametrize("depth", [0, 1])
def test_an_abort_in_flight_frees_once(depth):
    one = scheduler(num_blocks=8, budget=64)
    core = Core(one, pipeline_depth=depth)
    for i in range(2):
        core.ingest(sequence(7, 9, seq_id=i, first=50 * i), 0)
    for _ in range(depth + 1):
        core.decide(0)
    core.abort(0, 0)
    core.abort(0, 0)
    while core.in_flight:
        core.commit([1] * len(core.in_flight[0].sampled), 1)
        if core.can_decide:
            batch = core.decide(1)
            assert 0 not in [seq.seq_id for seq in batch.sampled]
        one.check_integrity()
        assert len(one.block_manager.free_block_ids) + len(one.block_manager.used_block_ids) == 8
    assert core.is_idle and len(one.block_manager.free_block_ids) == 8


def test_a_shared_block_outlives_an_abort_of_one_holder():
    one = scheduler(num_blocks=8, budget=64)
    first, second = sequence(9, 9, seq_id=0), sequence(9, 9, seq_id=1)
    one.add(first)
    one.add(second)
    step(one)
    shared = first.block_table[:2]
    assert second.block_table[:2] == shared
    one.abort(first)
    one.check_integrity()
    assert not set(shared) & set(one.block_manager.free_block_ids)
    stranger = sequence(16, 1, seq_id=2, first=500)
    one.add(stranger)
    step(one)
    assert not set(shared) & set(stranger.block_table)


@pytest.mark.parametrize("leaving", [[0], [1], [0, 1], [0, 2], [1, 3], [0, 1, 2, 3], [4]])
def test_tokens_in_flight_reach_their_own_sequences_when_others_leave(leaving):
    """Five decode one step ahead; some stop, so that the rows behind them move while their tokens are in flight."""
    one = scheduler(num_blocks=64, budget=64)
    core = Core(one, pipeline_depth=1, eos_token_id=0)
    for i in range(5):
        core.ingest(Sequence([10 * i + 1, 10 * i + 2, 10 * i + 3], SamplingParams(max_tokens=9), seq_id=i), 0)
    given: dict[int, list[int]] = {i: [] for i in range(5)}
    for _ in range(60):
        if core.can_decide:
            core.decide(0)
        if core.must_commit:
            tokens = []
            for seq in core.in_flight[0].sampled:
                count = seq.num_completion_tokens
                stops = seq.seq_id in leaving and count == 2
                tokens.append(0 if stops else 1000 * (seq.seq_id + 1) + count)
                if not seq.is_finished:
                    given[seq.seq_id].append(tokens[-1])
            for seq in core.commit(tokens, 0):
                assert seq.completion_token_ids == given[seq.seq_id]
                expected = [1000 * (seq.seq_id + 1) + k for k in range(2 if seq.seq_id in leaving else 9)]
                assert seq.completion_token_ids == expected + [0] * (seq.seq_id in leaving)
            one.check_integrity()
        if core.is_idle:
            break
    assert core.is_idle


def test_blank_blocks_are_used_before_cached_ones_whatever_was_freed_last():
    manager, cache = BlockManager(8, 4), PrefixCache()
    with_hash, blank = sequence(8), sequence(7, first=50)
    manager.allocate_with_cache(with_hash, cache)
    manager.allocate_with_cache(blank, cache)
    manager.deallocate(blank)
    manager.deallocate(with_hash)
    order = list(manager.free_block_ids)
    cached = [block for block in order if block in cache]
    assert order[-len(cached) :] == cached and len(cached) == 3
    manager.allocate(sequence(5 * 4, first=200))
    assert len(cache) == 3, "five blank blocks were there"
    manager.allocate(sequence(4, first=300))
    assert len(cache) == 2


@pytest.mark.parametrize("weak", [1, 2, 3])
def test_a_collision_never_gives_one_request_the_blocks_of_another(weak):
    hash = WeakHash(weak)
    one = scheduler(num_blocks=32, budget=None, prefix_cache=PrefixCache(hash=hash))
    for number in range(6):
        seq = sequence(12, 2, seq_id=number, first=20 * number)
        one.add(seq)
        step(one)
        assert seq.num_cached_tokens == 0, f"{number} shares no token with those before it"
    assert hash.num_collisions
    run_out(one)
    again = sequence(12, 2, seq_id=9, first=40)
    one.add(again)
    step(one)
    assert again.num_cached_tokens == 8


@pytest.mark.parametrize("hash", ["xxh64", WeakHash(1)])
def test_requests_of_other_salts_share_nothing(hash):
    one = scheduler(num_blocks=32, budget=None, prefix_cache=PrefixCache(hash=hash))
    hits = []
    for salt in ("", "a", "b", "a", ""):
        seq = Sequence(list(range(12)), SamplingParams(max_tokens=1), salt=salt)
        one.add(seq)
        step(one)
        hits.append(seq.num_cached_tokens)
    assert hits == [0, 0, 0, 8, 8]


def test_the_least_recently_freed_chain_is_evicted_first():
    manager, cache = BlockManager(6, 4), PrefixCache()
    chains = [sequence(8, first=100 * i) for i in range(3)]
    for seq in chains:
        manager.allocate_with_cache(seq, cache)
    for seq in (chains[1], chains[0], chains[2]):
        manager.deallocate(seq)
    again = Sequence([*chains[1].token_ids, 7])
    assert len(manager.find_hits(again)) == 2
    manager.allocate(sequence(8, first=900))
    found = [cache.lookup(seq.token_ids, 4)[1] for seq in chains]
    assert found == [8, 0, 8], "looking at a chain does not make it younger"
    manager.allocate(sequence(4, first=950))
    found = [cache.lookup(seq.token_ids, 4)[1] for seq in chains]
    assert found == [4, 0, 8], "the tail goes before the head"


def test_live_and_freed_blocks_are_hit():
    one = scheduler(num_blocks=16, budget=64)
    live, freed = sequence(13, 9, seq_id=0), sequence(13, 1, seq_id=1, first=100)
    one.add(live)
    one.add(freed)
    step(one)
    assert freed.is_finished and not live.is_finished
    used = len(one.block_manager.used_block_ids)
    one.add(sequence(13, 9, seq_id=2))
    one.add(sequence(13, 9, seq_id=3, first=100))
    batch = step(one)
    assert [row.start for row in batch.admitted] == [12, 12]
    # The live chain gains one block, the freed one comes back with four.
    assert batch.num_used_blocks == used + 1 + 4
    assert [one.block_manager.blocks[row.seq.block_table[0]].ref_count for row in batch.admitted] == [2, 1]


def test_what_a_request_hits_is_not_evicted_for_its_new_blocks():
    manager, cache = BlockManager(4, 4), PrefixCache()
    first = sequence(16)
    manager.allocate_with_cache(first, cache)
    manager.deallocate(first)
    assert list(manager.free_block_ids) == [3, 2, 1, 0], "all of them cached"
    again = Sequence([*first.token_ids[:8], *range(70, 78)])
    manager.allocate_with_cache(again, cache)
    assert (again.num_cached_tokens, again.block_table) == (8, [0, 1, 3, 2])
    manager.check_integrity()


@pytest.mark.parametrize("depth", [0, 1])
def test_counts_hold_between_schedule_and_postprocess(depth):
    one = scheduler(budget=8)
    core = Core(one, pipeline_depth=depth)
    seq = sequence(12, 5, seq_id=0)
    core.ingest(seq, 0)
    assert (seq.num_tokens, seq.num_computed_tokens, seq.num_in_flight) == (12, 0, 0)
    core.decide(0)
    assert (seq.num_tokens, seq.num_computed_tokens, seq.num_in_flight) == (12, 8, 0)
    if depth == 0:
        core.commit([], 0)
    core.decide(0)
    assert (seq.num_tokens, seq.num_computed_tokens, seq.num_in_flight) == (12, 12, 1)
    assert (seq.completion_token_ids, seq.token_ids) == ([], list(range(12)))
    if depth:
        core.commit([], 0)
        core.decide(0)
        assert (seq.num_tokens, seq.num_computed_tokens, seq.num_in_flight) == (12, 13, 2)
    core.commit([77], 0)
    assert (seq.num_tokens, seq.num_computed_tokens, seq.num_in_flight) == (13, 12 + depth, depth)
    assert seq.token_ids == [*range(12), 77]


def test_a_chunk_attends_to_no_more_than_is_computed_with_it():
    one = scheduler(budget=8)
    seq = sequence(20, 2, seq_id=0)
    one.add(seq)
    contexts = []
    while not one.is_finished():
        batch = step(one)
        (row,) = batch.rows
        contexts.append((row.start + row.num_tokens, batch.num_kv_tokens, batch.num_attention_pairs))
    assert contexts == [(8, 8, 36), (16, 16, 100), (20, 20, 74), (21, 21, 21)]


@pytest.mark.parametrize("composition", ["mixed", "prefill-first"])
def test_a_full_pool_preempts_and_everything_is_served(composition):
    one = scheduler(num_blocks=5, budget=64, composition=composition)
    seqs = [sequence(6, 12, seq_id=i, first=50 * i) for i in range(3)]
    for seq in seqs:
        assert one.add(seq)
    run_out(one)
    assert any(seq.num_preemptions for seq in seqs)
    assert [seq.num_completion_tokens for seq in seqs] == [12, 12, 12]


def test_decodes_go_on_beside_a_stream_of_prompts():
    one = scheduler(num_blocks=400, budget=16, max_num_seqs=64)
    decode = sequence(4, 12, seq_id=0)
    one.add(decode)
    step(one)
    for number in range(1, 12):
        one.add(sequence(40, 2, seq_id=number, first=1000 * number))
        assert step(one).rows[0].seq is decode
    assert decode.is_finished


@pytest.mark.parametrize("composition", ["mixed", "prefill-first"])
@pytest.mark.parametrize("reserve", [True, False])
def test_two_that_do_not_fit_together_both_end(composition, reserve):
    one = scheduler(
        num_blocks=6, budget=8, composition=composition, admission=VllmAdmission(reserve_full_prompt=reserve)
    )
    seqs = [sequence(8, 16, seq_id=i, first=50 * i) for i in range(2)]
    for seq in seqs:
        one.add(seq)
    run_out(one, most=400)
    assert sum(seq.num_preemptions for seq in seqs) >= 1
    assert seqs[0].num_preemptions == 0, "the first to come is never the one to go"


def test_a_victim_loses_its_row_of_the_same_step():
    one = scheduler(num_blocks=4, budget=64, order=Priority())
    late = Sequence(list(range(5)), SamplingParams(max_tokens=8, ignore_eos=True), seq_id=0, priority=5)
    urgent = Sequence(list(range(50, 57)), SamplingParams(max_tokens=8, ignore_eos=True), seq_id=1, priority=0)
    one.add(late)
    step(one)
    one.add(urgent)
    step(one)
    step(one)
    batch = step(one)
    assert [seq.seq_id for seq in batch.preempted] == [0], "it was the first of the running ones, and had its row"
    assert [(row.seq.seq_id, row.start, row.num_tokens) for row in batch.rows] == [(1, 8, 1)]
    assert [seq.seq_id for seq in batch.sampled] == [1] and [seq.seq_id for seq, _ in batch.grown] == [1]
    assert (batch.num_tokens, batch.num_kv_tokens, batch.num_running, batch.num_waiting) == (1, 9, 1, 1)
    cache = one.block_manager.prefix_cache
    assert cache is not None
    assert cache.lookup(late.token_ids, 4)[1] == 4, "its second block would have been full, but was never computed"
    assert late.num_in_flight == 0
    run_out(one)
    assert (late.num_completion_tokens, urgent.num_completion_tokens) == (8, 8)


def test_what_a_victim_would_have_computed_is_not_hit_and_its_tokens_go_to_others():
    given = {"long_prefill_token_threshold": 8, "rules": build_rules("0.24")}
    one = scheduler(num_blocks=8, budget=13, order=Priority(), **given)
    late = Sequence(list(range(24)), SamplingParams(max_tokens=1), seq_id=0, priority=5)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    urgent = Sequence(list(range(100, 104)), params, seq_id=1, priority=0)
    last = Sequence([200], params, seq_id=2, priority=1)
    one.add(late)
    assert step(one).num_tokens == 8
    one.add(urgent)
    one.add(last)
    assert step(one).num_tokens == 8 + 4 + 1
    one.max_num_batched_tokens = 9
    batch = step(one)
    assert [seq.seq_id for seq in batch.preempted] == [0], "it had got its last 8 tokens, and the last two blocks"
    assert [(row.seq.seq_id, row.start, row.num_tokens) for row in batch.rows] == [(1, 4, 1), (2, 1, 1)]
    cache = one.block_manager.prefix_cache
    assert cache is not None
    assert cache.lookup(late.token_ids, 4)[1] == 16
    run_out(one)
    assert late.num_completion_tokens == 1


def test_a_block_that_a_victims_row_would_have_filled_from_its_middle_on_is_not_hit():
    class First:
        def choose(self, running, seq):
            return next(iter(running))

    settings = {"long_prefill_token_threshold": 6, "admission": VllmAdmission(reserve_full_prompt=False)}
    one = scheduler(num_blocks=5, budget=64, victim=First(), **settings)
    first, second = sequence(18, 1, seq_id=0), sequence(12, 1, seq_id=1, first=100)
    one.add(first)
    one.add(second)
    assert [row.num_tokens for row in step(one).rows] == [6, 6]
    batch = step(one)
    assert batch.preempted == [first] and batch.seqs == [second], "the first had computed 6 tokens, and got 6 more"
    cache = one.block_manager.prefix_cache
    assert cache is not None and cache.lookup(first.token_ids, 4)[1] == 4


def test_preempted_requests_come_back_in_the_order_in_which_they_arrived():
    one = scheduler(num_blocks=9, block_size=4, budget=64)
    seqs = [sequence(11, 20, seq_id=0), *(sequence(7, 16, seq_id=i, first=50 * i) for i in (1, 2, 3))]
    for seq in seqs:
        one.add(seq)
    preempted: list[int] = []
    while not one.is_finished():
        batch = step(one)
        preempted += [seq.seq_id for seq in batch.preempted]
        waiting = [seq.seq_id for seq in one.waiting]
        assert waiting == sorted(waiting)
        assert [seq.seq_id for seq in one.running] == sorted(seq.seq_id for seq in one.running)
    assert len(set(preempted)) > 1


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_a_block_table_covers_its_tokens_at_a_blocks_boundary(block_size):
    one = scheduler(num_blocks=400, block_size=block_size, budget=None)
    for prompt in range(1, 2 * block_size + 2):
        one.add(sequence(prompt, 2 * block_size + 2, seq_id=prompt, first=100 * prompt))
    one.max_num_seqs = 64
    while not one.is_finished():
        for row in one.schedule().rows:
            assert len(row.seq.block_table) * block_size >= row.start + row.num_tokens
            assert (len(row.seq.block_table) - 1) * block_size < row.start + row.num_tokens
        batch = one.in_flight[0]
        one.postprocess(batch, [7] * len(batch.sampled))


class ComparedSequence(Sequence):
    """Counts how often it is compared with another."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        ComparedSequence.compared += 1
        return self is other

    __hash__ = Sequence.__hash__


@pytest.mark.skipif(IS_COMPILED, reason="comparisons are counted by a subclass, which a compiled Sequence has none of")
def test_many_ends_in_one_step_compare_no_sequence_with_every_other():
    number = 200
    one = scheduler(num_blocks=2000, budget=None, max_num_seqs=number)
    for i in range(number):
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        one.add(ComparedSequence([1000 * i + k for k in range(3)], params, seq_id=i))
    step(one)
    batch = one.schedule()
    ComparedSequence.compared = 0
    assert len(one.postprocess(batch, [5] * number)) == number
    assert ComparedSequence.compared < 2 * number
    one.check_integrity()


def lines_run(call: Callable, *arguments: object) -> int:
    """Lines of Python that a call runs."""
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    previous = sys.gettrace()
    sys.settrace(count)
    try:
        call(*arguments)
    finally:
        sys.settrace(previous)
    return lines


def test_a_hit_on_freed_blocks_takes_as_many_steps_in_a_large_pool_as_in_a_small_one():
    lines = []
    for num_blocks in (100, 5000):
        manager, cache = BlockManager(num_blocks, 4), PrefixCache()
        for first in (0, 10_000):
            filling = sequence(4 * num_blocks // 2, first=first)
            manager.allocate_with_cache(filling, cache)
            manager.deallocate(filling)
        again = sequence(101, first=10_000)
        lines.append(lines_run(manager.allocate_with_cache, again, cache))
        assert again.num_cached_tokens == 100
    assert lines[0] == lines[1]
