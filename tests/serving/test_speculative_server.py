"""A server whose engine drafts: a stop string inside an accepted run ends an answer where it ends without drafts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_servers import Running, TinyModel, byte_tokenizer

from twinserve.engine.speculation.proposers import ForcedProposer
from twinserve.engine.speculation.runner import SpeculativeRunner
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay

K = 4
BIASES = {str(token): 30 for token in byte_tokenizer().encode("abcdefgh ")}
"""Has a model that knows nothing answer in letters."""


def drafting(serving, depth: int, tokens: list[int], record: Path) -> Running:
    """A server whose drafts are these tokens of an answer."""
    config = {"method": "ngram_gpu" if depth else "ngram", "num_speculative_tokens": K}
    model = TinyModel({"pipeline_depth": depth, "speculative_config": config})
    running = serving(model, record)
    assert model.llm is not None and isinstance(model.llm.runner, SpeculativeRunner)
    model.llm.runner._proposer = ForcedProposer(lambda seq: seq.token_ids[: seq.num_prompt_tokens] + tokens, 1.0, 512)
    return running


def answer(client, stream: bool, **asked: Any) -> tuple:
    """Text, tokens, reasons, log-probabilities' number and usage of a greedy answer."""
    extra = {"return_token_ids": True, "ignore_eos": True} | asked.pop("extra_body", {})
    how: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 24, "temperature": 0, "logprobs": 0}
    how |= {"logit_bias": BIASES, "extra_body": extra} | asked
    if not stream:
        done = client.completions.create(**how)
        choice = done.choices[0]
        reasons = choice.finish_reason, choice.stop_reason
        return choice.text, choice.token_ids, reasons, len(choice.logprobs.tokens), done.usage.completion_tokens
    text, tokens, logprobs, reasons, usage = "", list[int](), 0, (None, None), None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **how):
        for choice in chunk.choices:
            text += choice.text
            tokens += choice.token_ids or []
            logprobs += len(choice.logprobs.tokens) if choice.logprobs else 0
            if choice.finish_reason:
                reasons = choice.finish_reason, choice.stop_reason
        usage = chunk.usage or usage
    assert usage is not None
    return text, tokens, reasons, logprobs, usage.completion_tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_stop_strings_end_answers_where_they_end_them_without_drafts(serving, tmp_path, depth):
    plain = serving(TinyModel({"pipeline_depth": depth}))
    whole, tokens, *_ = answer(plain.client(), False)
    running = drafting(serving, depth, tokens, tmp_path / "run")
    asked: list[dict] = [{"stop": whole[place - 2 : place]} for place in range(3, 13)]
    asked += [{"stop": whole[2], "extra_body": {"min_tokens": 6}}]
    asked += [{"stop": whole[5:8], "extra_body": {"include_stop_str_in_output": True}}]
    ends = set()
    for one in asked:
        for stream in (False, True):
            expected, found = (answer(server.client(), stream, **one) for server in (plain, running))
            assert found == expected, (one, stream)
            ends.add(len(found[1]))
    assert {place % (K + 1) for place in ends} >= {2, 3}, "inside runs, of which the first ends with the second token"
    running.settle()
    page = httpx.get(f"{running.url}/metrics", timeout=60).text
    running.stop()
    record = load_record(tmp_path / "run")
    runs = [(made, kept) for step in record.steps for _, made, kept in step.get("runs", ())]
    assert max(made for made, _ in runs) == K + 1
    counted = dict(re.findall(r"^vllm:spec_decode_num_(\w+?)_total{.*} (.+)$", page, re.MULTILINE))
    assert float(counted["drafts"]) == sum(kept > 0 for _, kept in runs) > 50
    assert float(counted["accepted_tokens"]) == sum(made - 1 for made, kept in runs if kept) > 100
    assert "spec_decode" not in httpx.get(f"{plain.url}/metrics", timeout=60).text
    result = replay(record)
    assert result.is_exact, result.difference
