"""Checks of faults: a clear outcome for the request or the run, the others unharmed, the pool whole."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from engine_judge import GREEDY

from twinserve.engine.llm import LLM
from twinserve.engine.online import Abort, Inbox, StepError
from twinserve.policies import SamplingParams
from twinserve.settings.errors import InputError
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


def check_logits_that_are_no_numbers_end_their_request_alone(llm: LLM) -> None:
    """A request whose logits are no numbers ends with the reason; the others get the tokens that they get alone."""
    drawn = SamplingParams(temperature=0.8, seed=3, max_tokens=20, ignore_eos=True)
    special = replace(drawn, top_k=40, repetition_penalty=1.2, logprobs=2)
    ways = [GREEDY, drawn, special]
    alone = [llm.generate([prompt], way)[0] for prompt in PROMPTS for way in ways]
    used = {token_id for completion in alone for token_id in completion.token_ids}
    bad = max(set(range(512)) - used.union(*PROMPTS))
    weight = llm.runner.model.embedding.weight.data
    kept = weight[bad].clone()
    for poison in (torch.nan, torch.inf):
        weight[bad] = poison
        prompts = [prompt for prompt in PROMPTS for _ in ways]
        failing = [[bad], [7] * 30 + [bad], [9, bad, 8]]
        found = llm.generate(prompts + failing, ways * len(PROMPTS) + ways)
        assert [completion.token_ids for completion in found[: len(prompts)]] == [one.token_ids for one in alone]
        for completion in found[len(prompts) :]:
            assert (completion.finish_reason, completion.token_ids, completion.text) == ("abort", [], "")
            assert completion.refusal == "the model's logits for it are no finite numbers, so no token can be sampled"
            assert not completion.logprobs
    weight[bad] = kept
    assert llm.generate([PROMPTS[0]], GREEDY)[0].token_ids == alone[0].token_ids


def check_ids_beyond_the_vocabulary_are_refused(llm: LLM) -> None:
    """Of prompts, of stop tokens and of biases; nothing is computed for them."""
    for token_id in (512, -1):
        for prompt, more, field in (
            ([token_id], {}, r"a token of prompts\[1\]"),
            ([5], {"stop_token_ids": (3, token_id), "min_tokens": 4}, "a token of stop_token_ids"),
            ([5], {"logit_bias": ((token_id, 1.0),)}, "a token of logit_bias"),
        ):
            with pytest.raises(InputError, match=f"{field} is {token_id}, expected an id from 0 to 511"):
                llm.generate([[5], prompt], [GREEDY, replace(GREEDY, **more)])
    for name, value, words in (
        ("stop_token_ids", "ab", "expected a tuple of tokens"),
        ("stop_token_ids", (1.0,), "a token of stop_token_ids is 1.0, expected an id"),
        ("stop_token_ids", (True,), "a token of stop_token_ids is True, expected an id"),
        ("logit_bias", 5, "expected pairs of a token and a number"),
        ("logit_bias", ((5,),), "expected pairs of a token and a number"),
        ("logit_bias", ((5, float("nan")),), "expected pairs of a token and a number"),
        ("logit_bias", (("5", 1.0),), "a token of logit_bias is '5', expected an id"),
    ):
        with pytest.raises(InputError, match=words):
            llm.generate([[5], [6]], [GREEDY, replace(GREEDY, **{name: value})])
    llm.eos_token_ids = (2, 3, 700)  # as of a tokenizer with tokens that were added
    ends = replace(GREEDY, ignore_eos=False, min_tokens=2, max_tokens=4)
    assert len(llm.generate([[5]], ends)[0].token_ids) >= 2


def check_every_temperature_draws(llm: LLM) -> None:
    """The least temperature that draws, and the largest: near the most probable token, and evenly."""
    prompts = [[5, 6, 7]] * 40
    best = llm.generate(prompts[:1], replace(GREEDY, max_tokens=1))[0].token_ids
    for temperature, least, most in ((1e-5, 1, 1), (1e30, 30, 40)):
        params = [SamplingParams(temperature, 1, seed=seed, ignore_eos=True) for seed in range(40)]
        tokens = [completion.token_ids[0] for completion in llm.generate(prompts, params)]
        assert least <= len(set(tokens)) <= most and all(0 <= token < 512 for token in tokens)
        assert temperature > 1 or tokens[:1] == best
        assert temperature < 1 or min(tokens) < 100 and max(tokens) > 412


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
