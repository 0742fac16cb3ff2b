"""Laws of the policies that hold whatever the load: everything ends in time, and equal calls are answered alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from side_by_side import build_order, build_scheduler
from slow_model import Rules

from twinserve.policies import Core, SamplingParams, Sequence

ROOT = Path(__file__).resolve().parents[2]

# Each request: decisions until it arrives, prompt, tokens to generate, how urgent.
LOADS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3)), min_size=3, max_size=8
)


@st.composite
def tight_rules(draw: st.DrawFn, composition: str) -> Rules:
    """Settings under which every request of `LOADS` fits, and few do together."""
    return Rules(
        num_blocks=draw(st.integers(10, 14)),
        block_size=4,
        max_num_seqs=draw(st.integers(1, 5)),
        composition=composition,
        budget=draw(st.sampled_from([1, 3, 8, 40])),
        threshold=draw(st.sampled_from([0, 2, 5])),
        reserve_full_prompt=draw(st.booleans()),
        watermark_blocks=draw(st.integers(0, 2)),
        caching=draw(st.booleans()),
    )


def decisions_until_the_end(rules: Rules, load: list[tuple[int, int, int, int]], depth: int, most: int) -> list[int]:
    """Serve a load; for each request the decisions from its arrival to its end."""
    core = Core(build_scheduler(rules), pipeline_depth=depth)
    coming = list(reversed([(number, *row) for number, row in enumerate(load)]))
    wait = coming[-1][1] if coming else 0
    arrived: dict[int, int] = {}
    lasted = [0] * len(load)
    decisions = 0
    while coming or not core.is_idle:
        while coming and wait <= 0:
            number, _, prompt, max_tokens, _ = coming.pop()
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            assert core.ingest(Sequence([100 * number + k for k in range(prompt)], params, seq_id=number), 0)
            arrived[number] = decisions
            wait = coming[-1][1] if coming else 0
        wait -= 1
        if core.can_decide:
            core.decide(0)
            decisions += 1
            assert decisions <= most, f"{list(core.sequences)} are not served within {most} decisions"
        if core.must_commit:
            for seq in core.commit([1] * len(core.in_flight[0].sampled), 0):
                lasted[seq.seq_id] = decisions - arrived[seq.seq_id]
    return lasted


@pytest.mark.parametrize("depth", [0, 1])
@given(data=st.data(), load=LOADS)
def test_every_request_ends_within_its_bound(depth, data, load):
    """First come, first served, in mixed batches: whoever came first computes a token at least in every other step.

    So a request takes no more decisions than those before it and itself have tokens, twice that one step ahead.
    """
    rules = data.draw(tight_rules("mixed"))
    work = [prompt + output + 1 for _, prompt, output, _ in load]
    for number, decisions in enumerate(decisions_until_the_end(rules, load, depth, 2000)):
        assert decisions <= (1 + depth) * sum(work[: number + 1]), f"request {number} of {load}"


@pytest.mark.parametrize("depth", [0, 1])
@given(data=st.data(), load=LOADS)
def test_prompts_first_every_request_ends_within_its_bound(depth, data, load):
    """Where prompts come first, between two tokens of a decode all others may compute all that they know again."""
    rules = data.draw(tight_rules("prefill-first"))
    work = sum(prompt + output + 1 for _, prompt, output, _ in load)
    decisions_until_the_end(rules, load, depth, (1 + depth) * work * work + 1)


RIVAL, UNLUCKY = (5, 3, 0), (20, 6, 3)  # Prompt, tokens to generate, priority: shorter, known, more urgent.
SEATS, QUEUE = 3, 5  # More wait than can be admitted at once.
ORDERS = [
    {"order": "fcfs"},
    {"order": "priority", "ageing": 1},
    {"order": "priority", "ageing": 4},
    {"order": "shortest", "ageing": 1},
    {"order": "shortest", "ageing": 3},
    {"order": "cache-aware", "window": 4, "patience": 2},
]


def decisions_among_rivals(order: dict, depth: int, most: int) -> int | None:
    """Decisions until the unlucky request has ended, if rivals never cease to come; None if `most` do not suffice."""
    rules = Rules(num_blocks=9, block_size=4, max_num_seqs=SEATS, budget=8, **order)
    core = Core(build_scheduler(rules), pipeline_depth=depth)
    number = 0

    def arrive(first: int, prompt: int, max_tokens: int, priority: int) -> Sequence:
        nonlocal number
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        seq = Sequence(list(range(first, first + prompt)), params, seq_id=number, priority=priority)
        number += 1
        assert core.ingest(seq, 0)
        return seq

    unlucky = None
    for decisions in range(most):
        while len(core.scheduler.waiting) < QUEUE:
            arrive(100, *RIVAL)
        if decisions == 10:
            unlucky = arrive(500, *UNLUCKY)
        core.decide(0)
        if core.must_commit or len(core.in_flight) > depth:
            core.commit([1] * len(core.in_flight[0].sampled), 0)
        if unlucky is not None and unlucky.is_finished:
            return decisions - 10
    return None


def bound_among_rivals(depth: int, *, order: str, ageing: int = 0, window: int = 0, patience: int = 0) -> int:
    """Those that run or wait already, and those that the order lets pass, each with all its tokens, and its own."""
    ahead = SEATS + QUEUE
    if order == "priority":
        ahead += ageing * (UNLUCKY[2] - RIVAL[2])
    elif order == "shortest":
        ahead += ageing * (sum(UNLUCKY[:2]) - RIVAL[0])
    elif order == "cache-aware":
        ahead += patience * (QUEUE + 1)
    return (1 + depth) * (ahead * (RIVAL[0] + RIVAL[1] + 1) + UNLUCKY[0] + UNLUCKY[1] + 1)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(map(str, order.values())))
def test_nobody_starves_under_an_order_that_says_so(order, depth):
    assert build_order(Rules(**order)).starvation_free
    bound = bound_among_rivals(depth, **order)
    assert decisions_among_rivals(order, depth, bound + 10) is not None, f"not served within {bound} decisions"


@pytest.mark.parametrize("order", ["priority", "shortest"])
def test_an_order_without_ageing_says_that_it_may_starve_and_does(order):
    assert not build_order(Rules(order=order)).starvation_free
    assert decisions_among_rivals({"order": order}, 0, 2000) is None


SCRIPT = """
import random
import sys
from side_by_side import EOS, build_scheduler
from slow_model import Rules
from twinserve.policies import Core, SamplingParams, Sequence
from twinserve.traces.runs.digest import Digest

for seed in range(12):
    rng = random.Random(seed)
    rules = Rules(num_blocks=9, block_size=4, max_num_seqs=5, budget=rng.choice([3, 8, 32]), eos=EOS,
                  composition=rng.choice(["mixed", "prefill-first"]))
    core = Core(build_scheduler(rules), pipeline_depth=seed % 2, eos_token_id=EOS)
    left, digest = 20, Digest()
    while left or not core.is_idle:
        if left and rng.random() < 0.5:
            left -= 1
            tokens = [rng.choice([1, 50]) + k for k in range(rng.randint(1, 16))]
            core.ingest(Sequence(tokens, SamplingParams(max_tokens=rng.randint(1, 12)), seq_id=left), 0)
        if core.sequences and rng.random() < 0.05:
            core.abort(rng.choice(list(core.sequences)), 0)
        if core.can_decide:
            print(digest.of(core.decide(0)))
        if core.must_commit:
            core.commit([rng.choice([EOS, 1, 2, 3, 50, 51]) for _ in core.in_flight[0].sampled], 0)
"""


def test_the_seed_of_pythons_hashes_decides_nothing():
    printed = []
    for seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "policies"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) > 300
