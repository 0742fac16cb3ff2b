"""Continuous batching as the learning guide has it: prompts in, texts out, the batch changing at every step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from twinserve.policies import Core, SamplingParams, Scheduler, Sequence


def run_continuous_batching(
    scheduler: Scheduler,
    model_runner: Any,
    prompts: Seq[str],
    tokenizer: Any,
    *,
    sampling_params: SamplingParams | None = None,
) -> dict[int, str]:
    """Complete prompts, as many of them at once as the scheduler lets in.

    The loop is the guide's, walked by `Core` like every other one: decide (`schedule`), run, commit (`postprocess`).

    Args:
        scheduler: decides each step; its blocks are those of the runner's pool.
        model_runner: a ModelRunner, or anything with its `run`.
        prompts: the texts to complete.
        tokenizer: the model's.
        sampling_params: of all prompts; None is the guide's, at most 50 tokens at temperature 1.

    Returns:
        By `seq_id`, in the order in which they end, each prompt and its completion decoded together, special tokens
        included. The ids rise in the order of the prompts. A prompt that the scheduler refuses has no text.
    """
    params = sampling_params or SamplingParams(max_tokens=50)
    core = Core(scheduler, eos_token_id=tokenizer.eos_token_id)
    for prompt in prompts:
        # Nobody reads the times here, so none are kept.
        core.ingest(Sequence(tokenizer.encode(prompt), params), now_ns=0)

    results = {}
    while not core.is_idle:
        seqs, is_prefill = core.decide(now_ns=0)
        next_tokens = model_runner.run(seqs, is_prefill) if seqs else []
        for seq in core.commit(next_tokens, now_ns=0):
            results[seq.seq_id] = tokenizer.decode(seq.token_ids)
    return results
