"""Whatever is batched, chunked, cached or preempted: every request gets the tokens that transformers generates."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_judge import GREEDY

from twinserve.engine.online import Abort
from twinserve.policies import SamplingParams
from twinserve.traces.request import Part, Request, answer_text

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
every_composition = pytest.mark.parametrize("composition", ["mixed", "prefill-first"])
every_depth = pytest.mark.parametrize("pipeline_depth", [0, 1])
every_block_size = pytest.mark.parametrize("block_size", [1, 16, 256])
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])


def prompts_of(lengths: list[int], max_tokens: int = 20) -> list[Request]:
    """Requests that come at once, each with a text of its own."""
    return [Request(i, 0, (Part(i, 0, length),), max_tokens) for i, length in enumerate(lengths)]


@every_device
@every_composition
@every_depth
@every_block_size
def test_chunked_prompts_beside_decodes(judge, serving, watcher, composition, pipeline_depth, block_size, device):
    llm = serving(
        judge,
        device=device,
        composition=composition,
        pipeline_depth=pipeline_depth,
        block_size=block_size,
        max_num_seqs=8,
        max_num_batched_tokens=48,
    )
    requests = prompts_of([1, 90, 7, 16, 33, 130, 2, 48, 17, 64], max_tokens=14)
    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    assert watcher.chunks and watcher.largest_batch == 8
    assert watcher.mixed_steps or composition == "prefill-first"
    assert sorted(watcher.expected) == [request.id for request in requests]
    judge.check_all(sequences)


@every_device
@every_composition
@every_depth
@every_block_size
def test_shared_prefixes(judge, serving, watcher, composition, pipeline_depth, block_size, device):
    llm = serving(
        judge,
        device=device,
        composition=composition,
        pipeline_depth=pipeline_depth,
        block_size=block_size,
        num_gpu_blocks=8192 // block_size,
        max_num_seqs=4,
        max_num_batched_tokens=600,
    )
    shared = Part(100, 0, 300)
    requests = [Request(i, 0, (shared, Part(i, 0, length)), 10) for i, length in enumerate([5, 30, 1, 77, 12, 3])]
    requests.append(Request(6, 0, requests[1].parts, 10))
    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    assert watcher.hit_tokens >= 6 * (300 // block_size) * block_size
    judge.check_all(sequences)


@every_depth
def test_sessions_hit_their_own_answers(judge, serving, watcher, pipeline_depth):
    llm = serving(judge, pipeline_depth=pipeline_depth, block_size=4, num_gpu_blocks=1024)
    requests = []
    for session in range(3):
        parts: tuple[Part, ...] = ()
        for turn in range(4):
            number = len(requests)
            parts = (*parts, Part(number, 0, 20 + session))
            requests.append(Request(number, 0, parts, 11, session, after=number - 1 if turn else None))
            parts = (*parts, Part(answer_text(number), 0, 11))
    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    for seq in sequences:
        if seq.seq_id % 4:
            previous = next(other for other in sequences if other.seq_id == seq.seq_id - 1)
            assert seq.num_cached_tokens > previous.num_prompt_tokens, f"{seq} did not hit the answer before it"
    judge.check_all(sequences)


TINY_POOLS = {
    # block size: (blocks, prompt lengths, tokens generated)
    1: (150, [30, 41, 38, 29, 33], 40),
    16: (9, [30, 41, 38, 29, 33], 40),
    256: (3, [245, 240, 250], 30),
}


@every_device
@every_composition
@every_depth
@every_block_size
def test_preemptions(judge, serving, watcher, composition, pipeline_depth, block_size, device):
    blocks, lengths, max_tokens = TINY_POOLS[block_size]
    llm = serving(
        judge,
        device=device,
        composition=composition,
        pipeline_depth=pipeline_depth,
        block_size=block_size,
        num_gpu_blocks=blocks,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    )
    sequences = llm.run_trace(prompts_of(lengths, max_tokens), params=GREEDY, recorder=watcher)
    assert watcher.preemptions
    assert sum(seq.num_preemptions for seq in sequences) == watcher.preemptions
    judge.check_all(sequences)


@every_depth
def test_a_hit_within_the_same_step_reads_what_the_step_writes(judge, serving, watcher, pipeline_depth):
    llm = serving(judge, pipeline_depth=pipeline_depth, block_size=16)
    prompt = (Part(0, 0, 100),)
    sequences = llm.generate([llm.token_maker.token_ids(Request(0, 0, prompt, 1), {})] * 3, GREEDY)
    assert [completion.num_cached_tokens for completion in sequences] == [0, 96, 96]
    requests = [Request(i, 0, prompt, 12) for i in range(3)]
    served = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    judge.check_all(served)


@every_block_size
def test_caching_changes_no_token(llama, serving, watcher, block_size):
    shared = Part(100, 0, 280)
    requests = [Request(i, 0, (shared, Part(i, 0, 10 + i)), 12) for i in range(5)]
    tokens = {}
    for caching in (True, False):
        llm = serving(llama, block_size=block_size, enable_prefix_caching=caching, max_num_batched_tokens=512)
        sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher if caching else None)
        tokens[caching] = {seq.seq_id: seq.completion_token_ids for seq in sequences}
        assert caching or not any(seq.num_cached_tokens for seq in sequences)
    assert watcher.hit_tokens
    assert tokens[True] == tokens[False]


@every_depth
def test_a_stop_in_the_middle_discards_what_ran_ahead(judge, serving, pipeline_depth):
    prompts = [[5 + i, 9, 300 - i] * 4 for i in range(6)]
    full = [judge.generate(prompt, 30) for prompt in prompts]
    stop = full[0][12]
    llm = serving(judge, pipeline_depth=pipeline_depth, block_size=4, max_num_seqs=4)
    params = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(stop,))
    completions = llm.generate(prompts, params)
    assert completions[0].finish_reason == "stop"
    for prompt, completion, tokens in zip(prompts, completions, full, strict=True):
        ends = [tokens.index(token) + 1 for token in (stop, llm.eos_token_id) if token in tokens]
        assert len(completion.token_ids) == min([30, *ends])
        judge.check(prompt, completion.token_ids)


@every_depth
def test_a_stop_token_of_ones_own_ends_an_answer_that_ignores_the_end_of_the_text(judge, serving, pipeline_depth):
    """The model's further ends of a text are ignored, the request's own stop token is not."""
    prompt = [5, 9, 300] * 4
    full = judge.generate(prompt, 30)
    end, stop = full[5], next(token for token in full[12:] if token not in full[:12])
    llm = serving(judge, pipeline_depth=pipeline_depth, block_size=4)
    llm.eos_token_ids = (end, end)
    params = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(stop,), ignore_eos=True)
    (completion,) = llm.generate([prompt], params)
    assert (completion.finish_reason, completion.token_ids) == ("stop", full[: full.index(stop) + 1])


@every_depth
def test_aborts_from_another_thread_leave_the_others_alone(llama, serving, watcher, pipeline_depth):
    llm = serving(llama, pipeline_depth=pipeline_depth, max_num_seqs=4)
    requests = prompts_of([20] * 6, max_tokens=300)
    aborters = []

    def on_start(inbox, clock):
        def abort():
            assert watcher.ten_decided.wait(60)
            inbox.put(Abort(1))
            inbox.put(Abort(5))

        aborters.append(threading.Thread(target=abort))
        aborters[0].start()

    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher, on_start=on_start)
    aborters[0].join()
    reasons = {seq.seq_id: seq.finish_reason for seq in sequences}
    assert reasons == {0: "length", 1: "abort", 2: "length", 3: "length", 4: "length", 5: "abort"}
    for seq in sequences:
        llama.check(seq.token_ids[: seq.num_prompt_tokens], seq.completion_token_ids[:40])
