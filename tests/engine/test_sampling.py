"""What requests ask of sampling, through the whole engine: against transformers, and whatever runs beside them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest
import torch
from engine_judge import GREEDY, NEAR_TIE, Judge
from transformers import RepetitionPenaltyLogitsProcessor

from twinserve.policies import Batch, SamplingParams

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
            1.5, 40, top_k=60 * (seed % 2), seed=seed, ignore_eos=True, min_p=0.02, repetition_penalty=1.2
        )

    roomy = serving(llama)
    alone = [roomy.generate([prompt], params(seed))[0].token_ids for seed, prompt in enumerate(PROMPTS)]
    tight = serving(llama, pipeline_depth=pipeline_depth, **TIGHT)
    beside = tight.generate([*PROMPTS, [9, 9]], [*map(params, range(5)), GREEDY])
    assert tokens_of(beside[:5]) == alone
    assert tokens_of(beside[5:]) == tokens_of(roomy.generate([[9, 9]], GREEDY))


def tokens_of(completions: Seq) -> list[list[int]]:
    return [completion.token_ids for completion in completions]
