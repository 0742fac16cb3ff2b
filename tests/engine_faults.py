"""Checks of faults: a clear outcome for the request or the run, the others unharmed, the pool whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_judge import GREEDY, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.llm import LLM
from twinserve.engine.online import Abort, Inbox, StepError
from twinserve.policies import SamplingParams
from twinserve.traces.request import Part, Request

PROMPTS = [[5, 6, 7], [8] * 40, [9, 10]]


def check_out_of_memory_ends_its_run_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that has no memory ends its run with an error that names it; the next run is served as ever."""
    before = [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]
    launch = llm.runner.launch
    decisions: list[int] = []

    def launch_four(batch):
        decisions.append(batch.decision)
        if len(decisions) == 5:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return launch(batch)

    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "launch", launch_four)
        with pytest.raises(StepError) as caught:
            llm.generate(PROMPTS, GREEDY)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert str(caught.value).startswith(f"step {decisions[4]} failed (3 rows, 3 tokens, 0 of them of prompts, ")
    named = r"; requests \d+, \d+, \d+\): OutOfMemoryError: tried to allocate 2 GiB$"
    assert re.search(named, str(caught.value))
    assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == before


def check_what_cannot_be_served_is_refused(llm: LLM) -> None:
    """Prompts that are too long or empty are refused; the others get the tokens that they get alone."""
    alone = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]
    limit = llm.settings.max_model_len
    prompts = [PROMPTS[0], [5] * (limit + 1), PROMPTS[1], [], PROMPTS[2], [11, 12]]
    more = SamplingParams(temperature=0.0, max_tokens=2 * limit, ignore_eos=True)
    completions = llm.generate(prompts, [GREEDY] * 5 + [more])
    assert [completion.finish_reason for completion in completions] == [
        "length", "refused", "length", "refused", "length", "length",
    ]  # fmt: skip
    assert [completions[place].token_ids for place in (0, 2, 4)] == alone
    assert completions[1].refusal == f"prompt of {limit + 1} tokens, but max_model_len is {limit}"
    assert completions[3].refusal == "the prompt has no tokens"
    assert len(completions[5].token_ids) == limit - 2


def check_abort_while_its_token_is_in_flight(llm: LLM) -> None:
    """A request that is aborted while its token is in flight ends early; the others get the tokens they get alone."""
    requests = [Request(number, 0, (Part(number, 0, 20),), 40) for number in range(3)]
    alone = {seq.seq_id: seq.completion_token_ids for seq in llm.run_trace(requests, params=GREEDY)}
    launch = llm.runner.launch
    inboxes: list[Inbox] = []
    in_flight: list[int] = []

    def launch_and_abort(batch):
        step = launch(batch)
        if not in_flight and any(seq.seq_id == 1 and seq.num_completion_tokens == 5 for seq in batch.sampled):
            in_flight.extend(seq.seq_id for seq in batch.sampled)
            inboxes[0].put(Abort(1))
        return step

    llm.runner.launch = launch_and_abort  # type: ignore[method-assign]
    served = llm.run_trace(requests, params=GREEDY, on_start=lambda inbox, clock: inboxes.append(inbox))
    assert 1 in in_flight
    assert {seq.seq_id: seq.finish_reason for seq in served} == {0: "length", 1: "abort", 2: "length"}
    tokens = {seq.seq_id: seq.completion_token_ids for seq in served}
    assert tokens[0] == alone[0] and tokens[2] == alone[2]
    assert tokens[1] == alone[1][: len(tokens[1])] and 0 < len(tokens[1]) < 40


def check_logits_that_are_no_numbers_end_their_request_alone(make_llm: Callable[[Any], LLM]) -> None:
    """A request whose logits are no numbers ends with the reason; the others get the tokens that they get without it.

    Args:
        make_llm: an LLM of a model.
    """
    model = tiny(LlamaForCausalLM, LlamaConfig)
    llm = make_llm(model)
    alone = [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]
    model.get_input_embeddings().weight[77] = torch.nan
    llm = make_llm(model)
    drawn = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=9, repetition_penalty=1.1, logprobs=1)
    by_temperature = SamplingParams(temperature=0.7, seed=1, max_tokens=9)
    broken = [[5, 77, 6], [77], [8] * 39 + [77], [77]]
    params = [GREEDY, drawn, by_temperature, replace(GREEDY, max_tokens=1)]
    for _ in range(2):
        *served, a, b, c, d = llm.generate([*PROMPTS, *broken], [GREEDY] * 3 + params)
        assert [completion.token_ids for completion in served] == alone
        assert [completion.finish_reason for completion in (a, b, c)] == ["abort"] * 3
        for completion in (a, b, c, d):
            assert completion.refusal is not None and "logits are no numbers at token 0" in completion.refusal
            assert len(completion.token_ids) <= 2
