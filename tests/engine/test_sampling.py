"""What requests ask of sampling, through the whole engine: against transformers, and whatever runs beside them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest
import torch
from engine_judge import GREEDY, NEAR_TIE, Judge
from transformers import RepetitionPenaltyLogitsProcessor

from twinserve.engine.online import StepError
from twinserve.policies import Batch, SamplingParams, Sequence
from twinserve.traces.request import Part, Request

every_depth = pytest.mark.parametrize("pipeline_depth", [0, 1])
PROMPTS = [[5 + number] * 3 + [7 * place % 400 for place in range(17 + 3 * number)] for number in range(5)]
TIGHT = {"num_gpu_blocks": 8, "max_num_batched_tokens": 30, "max_num_seqs": 6}
"""Settings under which these prompts are computed in chunks and some of them are preempted."""


def assert_greedy(judge: Judge, prompt: list[int], tokens: list[int], penalty: float) -> None:
    """Assert that each of `tokens` is the best by transformers' penalised logits, near ties aside."""
    ids = torch.tensor([prompt + tokens])
    logits = judge.model(ids).logits[0]
    for place in range(len(prompt), ids.shape[1]):
        before = ids[:, :place]
        processed = RepetitionPenaltyLogitsProcessor(penalty)(before, logits[place - 1 : place].clone())[0]
        assert processed.max() - processed[ids[0, place]] < NEAR_TIE, f"token {place - len(prompt)} of {tokens}"


@every_depth
def test_penalised_tokens_are_those_of_transformers(llama, serving, monkeypatch, pipeline_depth):
    params = [
        SamplingParams(0.0, max_tokens=40, ignore_eos=True, repetition_penalty=penalty)
        for penalty in (1.3, 1.0, 2.0, 0.7, 5.0)
    ]
    llm = serving(llama, pipeline_depth=pipeline_depth, **TIGHT)
    batches, launch = list[Batch](), llm.runner.launch
    monkeypatch.setattr(llm.runner, "launch", lambda batch: batches.append(batch) or launch(batch))
    completions = llm.generate(PROMPTS, params)
    assert any(batch.preempted for batch in batches)
    assert any(row.is_prompt and not row.samples for batch in batches for row in batch.rows)
    for prompt, param, completion in zip(PROMPTS, params, completions, strict=True):
        assert len(completion.token_ids) == 40
        assert_greedy(llama, prompt, completion.token_ids, param.repetition_penalty)
    assert completions[4].token_ids != serving(llama).generate([PROMPTS[4]], params[1])[0].token_ids


@every_depth
def test_seeded_requests_with_all_settings_repeat_whatever_runs_beside_them(llama, serving, pipeline_depth):
    def params(seed: int) -> SamplingParams:
        return SamplingParams(
            1.5,
            40,
            top_k=60 * (seed % 2),
            top_p=(1.0, 0.9, 0.6, 1.0, 0.8)[seed],
            seed=seed,
            ignore_eos=True,
            min_p=0.02,
            repetition_penalty=1.2,
        )

    roomy = serving(llama)
    alone = [roomy.generate([prompt], params(seed))[0].token_ids for seed, prompt in enumerate(PROMPTS)]
    for seed, prompt in enumerate(PROMPTS):
        [all_kept] = roomy.generate([prompt], replace(params(seed), top_p=1.0))
        assert (all_kept.token_ids == alone[seed]) == (params(seed).top_p == 1.0)
    tight = serving(llama, pipeline_depth=pipeline_depth, **TIGHT)
    beside = tight.generate([*PROMPTS, [9, 9]], [*map(params, range(5)), GREEDY])
    assert tokens_of(beside[:5]) == alone
    assert tokens_of(beside[5:]) == tokens_of(roomy.generate([[9, 9]], GREEDY))


def tokens_of(completions: Seq) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@every_depth
def test_logprobs_are_those_of_the_models_own_distribution(llama, serving, pipeline_depth):
    """Whatever the penalty and the temperature; also of tokens that were generated before a preemption."""
    asked = [None, 0, 1, 5, 10_000]
    params = [
        SamplingParams(0.9 * (number % 2), 30, seed=number, ignore_eos=True, repetition_penalty=1.4, logprobs=logprobs)
        for number, logprobs in enumerate(asked)
    ]
    llm = serving(llama, pipeline_depth=pipeline_depth, **TIGHT)
    completions = llm.generate(PROMPTS, params)
    assert completions[0].logprobs is None
    for prompt, count, completion in zip(PROMPTS[1:], asked[1:], completions[1:], strict=True):
        assert completion.logprobs is not None and len(completion.logprobs) == 30
        logits = llama.model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for row, token, logprobs in zip(expected, completion.token_ids, completion.logprobs, strict=True):
            assert logprobs.logprob == pytest.approx(row[token].item(), abs=1e-3)
            values = [value for _, value in logprobs.top]
            assert values == pytest.approx(row.sort(descending=True).values[:count].tolist(), abs=1e-3)
            assert values == pytest.approx([row[token_id].item() for token_id, _ in logprobs.top], abs=1e-3)
            assert len({token_id for token_id, _ in logprobs.top}) == min(count, 512)


@every_depth
def test_logprobs_end_with_the_tokens(llama, serving, monkeypatch, pipeline_depth):
    """What a step that ran ahead of a stop sampled is in neither; and a request asks for itself alone."""
    llm = serving(llama, pipeline_depth=pipeline_depth)
    tokens = llm.generate([PROMPTS[0]], GREEDY)[0].token_ids
    stop = next(token for place, token in enumerate(tokens) if place >= 5 and token not in tokens[:place])
    params = SamplingParams(0.0, stop_token_ids=(stop,), logprobs=2)
    held, launch = list[int](), llm.runner.launch
    monkeypatch.setattr(llm.runner, "launch", lambda batch: held.append(len(llm.runner.logprobs)) or launch(batch))
    stopped, other = llm.generate([PROMPTS[0], PROMPTS[1]], [params, GREEDY])
    assert stopped.token_ids == tokens[: tokens.index(stop) + 1]
    assert [one.top[0][0] for one in stopped.logprobs] == stopped.token_ids
    assert other.logprobs is None and max(held) == 1 and not llm.runner.logprobs
    refused = llm.generate([[5] * 5000], params)[0]
    assert (refused.finish_reason, refused.logprobs) == ("refused", [])


@every_depth
def test_the_logprobs_of_a_trace_go_as_its_requests_end(llama, serving, pipeline_depth):
    """Also where a step ran ahead of a stop."""
    llm = serving(llama, pipeline_depth=pipeline_depth, num_gpu_blocks=64, max_num_seqs=2)
    requests = [Request(number, 0, (Part(number, 0, 9),), 30) for number in range(6)]
    served = llm.run_trace(requests, params=SamplingParams(0.0))
    stop = served[0].completion_token_ids[5]
    kept: list[tuple[Sequence, list[Sequence]]] = []

    def progress(seq: Sequence) -> None:
        assert list(llm.runner.logprobs[seq]) == list(range(seq.num_prompt_tokens, seq.num_tokens))
        kept.append((seq, list(llm.runner.logprobs)))

    served = llm.run_trace(requests, params=SamplingParams(0.0, stop_token_ids=(stop,), logprobs=1), progress=progress)
    assert "stop" in {seq.finish_reason for seq in served}
    for number, (_, held) in enumerate(kept):
        assert len(held) <= 2 and not set(held) & {seq for seq, _ in kept[:number]}
    assert not llm.runner.logprobs


@every_depth
def test_the_logprobs_of_a_run_that_fails_go_with_it(llama, serving, monkeypatch, pipeline_depth):
    llm = serving(llama, pipeline_depth=pipeline_depth)
    launch = llm.runner.launch

    def fail_late(batch: Batch):
        if batch.decision == 5:
            assert llm.runner.logprobs
            raise OSError("the card is gone")
        return launch(batch)

    monkeypatch.setattr(llm.runner, "launch", fail_late)
    params = SamplingParams(0.0, logprobs=1)
    with pytest.raises(StepError):
        llm.run_trace([Request(0, 0, (Part(0, 0, 9),), 30)], params=params)
    assert not llm.runner.logprobs
    with pytest.raises(StepError):
        llm.generate([[5, 6, 7]], params)
    assert not llm.runner.logprobs


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_a_frequency_penalty_counts_what_was_generated_the_token_in_flight_too(llama, serving, pipeline_depth):
    """Against the model alone, token by token; prompts do not count, preemptions change nothing."""
    llm = serving(llama, pipeline_depth=pipeline_depth, num_gpu_blocks=7, max_num_seqs=4)
    prompts = [[5 + number] * (12 + number) for number in range(4)]
    params = SamplingParams(0.0, 25, ignore_eos=True, frequency_penalty=1.5, presence_penalty=0.5)
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        tokens = list(prompt)
        for token in completion.token_ids:
            logits = llama.model(torch.tensor([tokens])).logits[0, -1]
            counts = torch.bincount(torch.tensor(tokens[len(prompt) :], dtype=torch.int64), minlength=512)
            lowered = logits - 1.5 * counts - 0.5 * (counts > 0)
            assert lowered[token] > lowered.max() - 1e-3
            tokens.append(token)
    plain = llm.generate(prompts, SamplingParams(0.0, 25, ignore_eos=True))
    assert len({*plain[0].token_ids}) < len({*llm.generate(prompts, params)[0].token_ids})
