"""Streams and the loop of Core share an interpreter: neither waits long for the other."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from live_servers import simulated

from twinserve.policies import SamplingParams, Sequence
from twinserve.serving.answers import _Answer
from twinserve.serving.backends import Ask
from twinserve.serving.run import TURN_S


def test_a_stream_says_its_tokens_one_by_one_until_it_is_behind():
    tokens = list(range(100, 108))
    backend = SimpleNamespace(tokens=lambda seq, start: tokens[start:], eos_token_id=None)
    params = SamplingParams(max_tokens=9)
    seq = Sequence([1], params)
    answer = _Answer(backend, 0, Ask([1], params, 9), seq, None)
    assert [answer.take(is_behind=False).token_ids for _ in range(3)] == [[100], [101], [102]]
    assert answer.take(is_behind=True).token_ids == tokens[3:]
    assert answer.take(is_behind=True) is None
    tokens.append(108)
    seq.finish_reason = "length"
    last = answer.take(is_behind=True)
    assert (last.token_ids, last.finish_reason, answer.is_done) == ([108], "length", True)


def test_a_server_lets_its_threads_take_short_turns_for_as_long_as_it_runs(serving):
    before = sys.getswitchinterval()
    running = serving(simulated())
    assert sys.getswitchinterval() == pytest.approx(TURN_S) != before
    running.stop()
    assert sys.getswitchinterval() == before
