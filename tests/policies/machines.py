"""The policies beside the slow model as machines: calls of every kind, with settings of every kind."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from side_by_side import EOS, CoreSideBySide, SideBySide, WeakHash
from slow_model import FINISHED, Rules

STOP = 2
SALTS = ["", "", "", "other"]
OUTPUT = [1, 1, 1, 3, 3, 4, 5, STOP, EOS]


def any_rules(rng: random.Random) -> Rules:
    """Settings of every kind; small ones mostly, where room is short."""
    block_size = rng.choice([4, 4, 1, 2, 3, 8, 16, 256])
    chunked = rng.random() < 0.75
    rules = Rules(
        num_blocks=rng.choice([1, 2, 3, 4, 5, 6, 7, 9, 12, None]),
        block_size=block_size,
        max_num_seqs=rng.choice([1, 2, 3, 4, 5, 6]),
        composition=rng.choice(["mixed", "prefill-first"]),
        budget=rng.choice([1, 2, 3, 5, 8, 16, 64, None] if chunked else [12, 30, None]),
        chunked=chunked,
        threshold=rng.choice([0, 0, 1, 3, 6]),
        max_model_len=rng.choice([None, None, None, 3 * block_size + 1]),
        caching=rng.random() < 0.75,
        reserve_full_prompt=rng.random() < 0.5,
        watermark_blocks=rng.choice([0, 0, 0, 1]),
        max_partial_prefills=rng.choice([None, None, 1, 2]),
        order=rng.choice(["fcfs", "priority", "fcfs", "priority", "shortest", "cache-aware"]),
        self_ends=rng.random() < 0.4,
        victim_skips=rng.random() < 0.4,
        binds_alone=rng.random() < 0.4,
        adaptive=rng.random() < 0.4,
        interval=rng.choice([1, 1, 2, 3, 5]),
        ageing=rng.choice([0, 1, 3]),
        window=rng.randint(1, 4),
        patience=rng.randint(1, 3),
        eos=EOS,
    )
    if rng.random() < 0.4:  # Prompts in parts before and between decodes, too many of both for budget and pool.
        rules = replace(
            rules,
            num_blocks=rng.choice([8, 12, 16, 30]),
            block_size=rng.choice([1, 2, 3]),
            max_num_seqs=6,
            budget=rng.choice([4, 5, 6, 8]),
            chunked=True,
            threshold=rng.choice([2, 3, 4]),
            max_model_len=None,
            watermark_blocks=0,
            order=rng.choice([rules.order, "priority"]),
            interval=rng.choice([1, 1, 4]),
        )
    return rules


def with_drafts(rng: random.Random, rules: Rules, is_async: bool) -> Rules:
    """The same settings with speculative decoding, by n-grams, a draft model, or as EAGLE has it."""
    most, kind = rng.choice([1, 2, 3, 5]), rng.choice(["ngram", "draft_model", "eagle"])
    slots = int(kind == "draft_model")
    return replace(
        rules,
        num_blocks=rules.num_blocks and rules.num_blocks + rng.choice([0, 4]),
        composition="mixed",
        budget=rules.budget and max(rules.budget, slots + 1 + most),
        most_drafts=most,
        lookahead=0 if kind == "ngram" else most,
        draft_slots=slots,
        key_lookahead=int(kind == "eagle" and rules.caching),
        is_async=is_async,
    )


def text(which: int, length: int) -> list[int]:
    """The first tokens of a text; two of them differ from their first token on."""
    return [100 + 50 * which + index for index in range(length)]


class Machine(RuleBasedStateMachine):
    """Calls that serve requests; subclasses say of what."""

    seen: Counter[str]
    depth = 0
    simulated = False
    drafting = False

    def any_rules(self, rng: random.Random) -> Rules:
        rules = any_rules(rng)
        return with_drafts(rng, rules, self.depth > 0) if self.drafting else rules

    def make(self, rules: Rules, hash) -> SideBySide:
        raise NotImplementedError

    @initialize(seed=st.integers(0, 2**32 - 1), weak=st.sampled_from([None, 1, 2, 5]))
    def begin(self, seed, weak):
        rules = self.any_rules(random.Random(seed))
        note(f"{rules}, hash of {weak or 'many'} values")
        self.sides = self.make(rules, "xxh64" if weak is None else WeakHash(weak))

    def length(self, blocks: int, more: int) -> int:
        """A number of tokens near the end of a block."""
        return max(1, blocks * self.sides.rules.block_size + more)

    def room(self) -> int:
        """Tokens that one request may compute in all."""
        rules = self.sides.rules
        room = 1000 if rules.num_blocks is None else rules.num_blocks * rules.block_size
        return room if rules.chunked or rules.budget is None else min(room, rules.budget)

    @rule(
        number=st.integers(1, 4),
        which=st.integers(0, 1),
        blocks=st.integers(0, 3),
        more=st.integers(-1, 2),
        own=st.lists(st.integers(1, 4), max_size=3),
        max_tokens=st.integers(1, 14),
        ignore_eos=st.booleans(),
        priority=st.integers(0, 2),
        salt=st.sampled_from(SALTS),
    )
    def add(self, number, which, blocks, more, own, max_tokens, ignore_eos, priority, salt):
        """Requests that begin alike and fit the pool alone."""
        for index in range(number):
            tokens = (text(which, self.length(blocks, more)) + [*own, *[5] * index])[: self.room()]
            most = max(1, min(max_tokens + index, self.room() + 1 - len(tokens)))
            self.sides.add(
                tokens, most, ignore_eos=ignore_eos, stop_tokens=(STOP,), priority=priority + index % 2, salt=salt
            )

    @precondition(lambda self: self.sides.pairs)
    @rule(
        data=st.data(),
        blocks=st.integers(1, 4),
        more=st.integers(-1, 1),
        own=st.lists(st.integers(1, 4), max_size=3),
        max_tokens=st.integers(1, 6),
    )
    def add_next_turn(self, data, blocks, more, own, max_tokens):
        """A request that begins with what another was asked and answered; it may be one that can never fit."""
        text = self.sides.text_of(data.draw(st.integers(0, len(self.sides.pairs) - 1)))
        self.sides.add(text[: self.length(blocks, more)] + own, max_tokens, stop_tokens=(STOP,))

    @precondition(lambda self: len(self.sides.in_flight) <= self.depth)
    @rule()
    def decide(self):
        self.sides.decide()

    @precondition(lambda self: len(self.sides.in_flight) > (self.depth if self.depth > 1 else 0))
    @rule(data=st.data())
    def commit(self, data):
        """The oldest in flight; a pipeline gives nothing before it is full."""
        lengths = [data.draw(st.integers(1, most)) for most in self.sides.most_lengths()]
        tokens = data.draw(st.lists(st.sampled_from(OUTPUT), min_size=sum(lengths), max_size=sum(lengths)))
        asked = st.integers(0, self.sides.rules.most_drafts)
        self.commit_runs(tokens, lengths, [data.draw(asked) for _ in lengths] if self.drafting else [])

    def commit_runs(self, tokens: list[int], lengths: list[int], proposed: list[int]) -> None:
        """As plain tokens without drafts; nobody tells how many were proposed where decisions run ahead."""
        if self.drafting:
            self.sides.commit(tokens, lengths, None if self.depth else proposed)
        else:
            self.sides.commit(tokens)

    @rule(seed=st.integers(0, 2**32 - 1), calls=st.integers(1, 150))
    def storm(self, seed, calls):
        self.random_calls(random.Random(seed), calls)

    def random_calls(self, rng: random.Random, calls: int) -> None:
        """Many calls, so that the pool is short of blocks most of the time."""
        sides = self.sides
        stopping = rng.choice([OUTPUT, OUTPUT[:7]])
        often = rng.choice([1.0, 0.02])
        for _ in range(calls):
            if rng.random() < 0.25 and len(sides.model.waiting) < 6:
                self.add_any(rng)
            elif rng.random() < 0.03 and self.live():
                sides.abort(rng.choice(self.live()))
            elif rng.random() < 0.01:
                sides.reset()
            elif len(sides.in_flight) <= self.depth and self.can_decide():
                sides.decide()
            elif self.can_advance() and rng.random() < 0.4:
                sides.advance(rng.choice([2, 5, 60]), rng.choice([1.0, 1.0, 0.5]))
            elif sides.in_flight:
                lengths = [rng.choice([1, most, rng.randint(1, most)]) for most in sides.most_lengths()]
                proposed = [rng.randint(0, sides.rules.most_drafts) for _ in lengths]
                self.commit_runs([rng.choice(stopping) for _ in range(sum(lengths))], lengths, proposed)
            sides.compare(reads_tokens=rng.random() < often)
        sides.compare()

    def add_any(self, rng: random.Random) -> None:
        room = self.room()
        if self.sides.pairs and rng.random() < 0.3:
            tokens = self.sides.text_of(rng.randrange(len(self.sides.pairs)))
        else:
            tokens = text(rng.randrange(2), room)
        blocks = rng.choice([0, 1, 2, 3, 3 if self.sides.rules.block_size > 3 else 8])
        length = min(self.length(blocks, rng.randint(-1, 2)), max(1, room // 2))
        tokens = tokens[:length] + rng.choices([1, 2, 3, 4, 5], k=rng.choice([0, 0, 1, 2]))
        most = min(room + 1 - len(tokens), 3 * self.sides.rules.block_size + 2, 40)
        if most > 0:
            self.sides.add(
                tokens,
                rng.randint(1, most),
                ignore_eos=rng.random() < 0.5,
                stop_tokens=rng.choice([(STOP,), (STOP,), (), (3, 4)]),
                priority=rng.randrange(3),
                salt=rng.choice(SALTS),
            )

    def live(self) -> list[int]:
        """Requests that have not ended."""
        return [request.key for _, request in self.sides.pairs if request.status != FINISHED]

    def can_decide(self) -> bool:
        return True

    def can_advance(self) -> bool:
        return False

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data):
        self.sides.abort(data.draw(st.sampled_from(self.live())))

    @rule(abort_all=st.booleans())
    def reset(self, abort_all):
        """The cache forgets, at once or when nothing runs any more."""
        for key in self.live() if abort_all else ():
            self.sides.abort(key)
        self.sides.reset()

    @invariant()
    def agree(self):
        if hasattr(self, "sides"):
            self.sides.compare()

    def teardown(self):
        if hasattr(self, "sides"):
            self.sides.live = list(self.sides.pairs)
            self.sides.compare()  # What has ended has stayed as it ended.
            for what, count in self.sides.seen.items():
                self.seen[what] += count


class SchedulerMachine(Machine):
    def make(self, rules, hash):
        return SideBySide(rules, hash, simulated=self.simulated)


class CoreMachine(Machine):
    def make(self, rules, hash):
        if self.depth > 1:  # A pipeline, which vLLM serves in mixed batches and by one of two orders.
            order = "priority" if rules.order in ("priority", "shortest") else "fcfs"
            rules = replace(rules, ranks=self.depth, composition="mixed", order=order)
        return CoreSideBySide(rules, hash, depth=self.depth, simulated=self.simulated)

    def can_decide(self):
        return self.sides.core.can_decide

    def can_advance(self):
        return self.sides.can_advance()

    @precondition(lambda self: self.sides.can_advance())
    @rule(cap=st.integers(1, 60), share=st.sampled_from([1.0, 0.5]))
    def advance(self, cap, share):
        self.sides.advance(cap, share)

    @precondition(lambda self: len(self.sides.in_flight) > self.depth)
    @rule()
    def decide_too_early(self):
        self.sides.decide_too_early()


RARE = {
    "preemption",
    "row taken back",
    "collision",
    "eviction of a cached block",
    "hit of a free block",
    "hit of a live block",
    "one prefix on several blocks",
    "resumed with hits",
    "abort in flight",
    "chunk of one token",
    "refused",
    "reset",
    "reset refused",
    "held back",
    "admitted while held",
    "kept waiting",
    "served behind one that went",
}
RARE_SIMULATED = {
    "horizon of many",
    "horizon that takes blocks",
    "horizon with a prompt in chunks",
    "horizon with a refused head",
}
RARE_AHEAD = {"stopped late", "preempted in flight", "ended while waiting"}
RARE_IN_A_PIPELINE = {"set aside"}


RARE_WITH_DRAFTS = {"draft accepted", "draft rejected", "drafts cut", "end inside a run", "padded admission"}


def kind_of(machine: type[Machine], depth: int, simulated: bool, drafting: bool, seen: Counter[str]) -> type[Machine]:
    attributes = {"seen": seen, "depth": depth, "simulated": simulated, "drafting": drafting}
    return type(machine.__name__, (machine,), attributes)


def kinds(*, drafting: bool) -> list[Any]:
    """Of machines, with or without drafts: each as (machine, depth, simulated, drafting)."""
    return [
        pytest.param(
            machine,
            depth,
            simulated,
            drafting,
            id=f"{machine.__name__}-{depth}{'-simulated' * simulated}{'-drafting' * drafting}",
        )
        for machine, simulated, depths in (
            (SchedulerMachine, False, (0, 1)),
            (CoreMachine, False, (0, 1, 2) if drafting else (0, 1, 2, 3)),
            (CoreMachine, True, (0, 1)),
        )
        for depth in depths
    ]


def check_storms(machine: type[Machine], depth: int, simulated: bool, drafting: bool) -> None:
    """The same calls on every machine; among them everything rare happens."""
    seen: Counter[str] = Counter()
    kind = kind_of(machine, depth, simulated, drafting, seen)
    for seed in range(min(4 * settings().max_examples, 10_000)):
        rng = random.Random(seed)
        one = kind()
        rules, weak = one.any_rules(rng), rng.choice([None, None, 1, 2, 5])
        one.sides = one.make(rules, "xxh64" if weak is None else WeakHash(weak))
        try:
            one.random_calls(rng, 200)
        except Exception as error:
            error.add_note(f"seed {seed}: {rules}, hash of {weak or 'many'} values")
            raise
        one.teardown()
    expected = RARE - {"collision"} if simulated else RARE
    expected = expected | (RARE_AHEAD if depth else set())
    expected |= RARE_WITH_DRAFTS if drafting else RARE_SIMULATED if simulated else set()
    expected |= {"run that comes late"} if drafting and depth else set()
    expected |= RARE_IN_A_PIPELINE if depth > 1 else set()
    missing = expected - {what for what, count in seen.items() if count}
    assert not missing, f"never happened: {sorted(missing)}"


def check_calls(machine: type[Machine], depth: int, simulated: bool, drafting: bool) -> None:
    """Calls that hypothesis draws, and makes simpler where one has another effect."""
    kind = kind_of(machine, depth, simulated, drafting, Counter())
    run_state_machine_as_test(kind, settings=settings(stateful_step_count=30))
