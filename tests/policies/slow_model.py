"""A slow model of the policies: what must be decided, worked out again from plain lists at every call.

Written from the rules, not from the code that it checks. It shares nothing with `twinserve.policies`: requests, blocks
and batches are its own, blocks are told apart by what they hold rather than by a hash, and no result is kept that can
be counted again. Names of requests (`key`) and of blocks (numbers from 0) are those of the code it runs beside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"


@dataclass(frozen=True)
class Rules:
    """Every setting of the policies. `num_blocks` None: a pool without end. `budget` None: no token budget.

    `order` is "fcfs", "priority", "shortest" or "cache-aware"; `ageing`, `window` and `patience` are the orders' own.
    `max_partial_prefills` None: no limit. The rules that vLLM changed are 0.33's by default: `self_ends`,
    `victim_skips` and `binds_alone` are 0.24's. `ranks` are those of a pipeline. With `most_drafts` requests may carry
    drafts; `lookahead` and `draft_slots` are what their proposer needs in blocks and budget, and `is_async` says that
    nobody tells how many there are. `key_lookahead` are the tokens behind a block that tell it apart, too.
    """

    num_blocks: int | None = None
    block_size: int = 16
    max_num_seqs: int = 256
    composition: str = "mixed"
    budget: int | None = None
    chunked: bool = True
    threshold: int = 0
    max_partial_prefills: int | None = None
    max_model_len: int | None = None
    caching: bool = True
    reserve_full_prompt: bool = True
    watermark_blocks: int = 0
    order: str = "fcfs"
    ageing: int = 0
    window: int = 0
    patience: int = 0
    self_ends: bool = False
    victim_skips: bool = False
    binds_alone: bool = False
    adaptive: bool = False
    interval: int = 1
    ranks: int = 1
    most_drafts: int = 0
    lookahead: int = 0
    draft_slots: int = 0
    key_lookahead: int = 0
    is_async: bool = False
    eos: int | None = None


@dataclass(eq=False)
class Request:
    """A request and all that is known of it. `prefix_key` stands for the tokens of one that has none."""

    key: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    ignore_eos: bool = False
    stop_tokens: tuple[int, ...] = ()
    prefix_key: Callable[[int], int] | None = None
    priority: int = 0
    salt: str = ""
    arrival: int = -1
    status: str = WAITING
    reason: str | None = None
    known: int = 0
    computed: int = 0
    in_flight: int = 0
    drafts: int = 0
    cached: int = 0
    registered: int = 0
    has_sampled: bool = False
    preemptions: int = 0
    passed_over: int = 0
    length_when_queued: int = 0
    num_before: int = 0
    table: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """`num_tokens` tokens of a request from `start` on; `new_blocks` are the blocks it got for them."""

    request: Request
    start: int
    num_tokens: int
    samples: bool
    is_prompt: bool
    new_blocks: list[int]
    num_drafts: int = 0


@dataclass
class Step:
    """One decision."""

    rows: list[Row] = field(default_factory=list)
    admitted: list[Row] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    left: list[Request] = field(default_factory=list)
    taken_back: int = 0
    is_held: bool = False
    turns_lost: int = 0
    padded: int = 0
    served_behind: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def sampled(self) -> list[Request]:
        return [row.request for row in self.rows if row.samples]


class SlowModel:
    """The whole scheduler: queue, running requests, blocks and prefix cache.

    Attributes:
        waiting: in the order in which requests came (back); the order's head is `head()`.
        running: in the order of admission.
        free: free blocks in the order of use.
        holds: what each block that can be hit holds: a number for the prefix that ends with it.
        holders_of: the blocks that hold a prefix, the one registered first in front.
        evictions: blocks that lost what they held because they were used again.
        decided: every decision, whether it gave anybody tokens or not.
        kept_waiting: did the last decision that was not held, and preempted nobody, leave somebody waiting?
        set_aside: waiting requests that an admission passed over, as a pipeline was computing tokens of them.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        self.requests: list[Request] = []
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.in_flight: list[Step] = []
        self.free: list[int] = list(range(rules.num_blocks or 0))
        self.num_blocks_made = rules.num_blocks or 0
        self.holds: dict[int, int] = {}
        self.holders_of: dict[int, list[int]] = {}
        self.evictions = 0
        self._prefix_numbers: dict[tuple, int] = {}
        self._left: list[Request] = []
        self.decided: list[Step] = []
        self.kept_waiting = False
        self.set_aside: list[Request] = []
        self.since_prompt_work: int | None = None
        self.threshold: float = math.inf

    # --- requests ---

    def add(self, request: Request) -> bool:
        """Queue a request; False if it can never be served."""
        request.known = request.num_prompt
        if self.is_impossible(request):
            request.status, request.reason = FINISHED, "refused"
            return False
        request.arrival = len(self.requests)
        self.requests.append(request)
        self._queue(request, preempted=False)
        return True

    def is_impossible(self, request: Request) -> bool:
        """Would it never fit the model, the pool or, where prompts are not chunked, the budget?"""
        rules = self.rules
        most = self.final_length(request) - 1  # The last token that is generated is never computed.
        if rules.most_drafts:
            most = self._within_model(most + rules.most_drafts + rules.lookahead)
        return (
            request.num_prompt == 0
            or (rules.max_model_len is not None and request.num_prompt >= rules.max_model_len)
            or (rules.num_blocks is not None and self.blocks_for(most) > rules.num_blocks)
            or (not rules.chunked and most > self._budget())
        )

    def abort(self, request: Request) -> None:
        """End a request at once."""
        if request in self.running:
            self.running.remove(request)
            self._give_up_blocks(request)
            self._left.append(request)
        else:
            self.waiting.remove(request)
        request.status, request.reason = FINISHED, "abort"

    def final_length(self, request: Request) -> int:
        """Tokens at which generation ends."""
        length = request.num_prompt + request.max_tokens
        return length if self.rules.max_model_len is None else min(length, self.rules.max_model_len)

    # --- the queue ---

    def _queue(self, request: Request, preempted: bool) -> None:
        request.length_when_queued = request.known
        request.passed_over = 0
        if preempted and self.rules.order in ("fcfs", "cache-aware"):
            self.waiting.insert(0, request)
        else:
            self.waiting.append(request)

    def rank(self, request: Request) -> tuple[int, int]:
        """Under an order with a measure: the smaller, the sooner. Ageing weighs the measure against arrivals."""
        measure = request.priority if self.rules.order == "priority" else request.length_when_queued
        return measure * self.rules.ageing + request.arrival if self.rules.ageing else measure, request.arrival

    def queue(self) -> list[Request]:
        """The waiting requests in the order in which they would be admitted, if nothing changed but that."""
        return sorted(self.waiting, key=self.rank) if self.rules.order in ("priority", "shortest") else self.waiting

    def head(self) -> Request:
        """The waiting request that is to be admitted next."""
        queue, rules = self.queue(), self.rules
        if rules.order != "cache-aware":
            return queue[0]
        front = queue[: rules.window]
        for request in front:
            if request.passed_over >= rules.patience:
                return request
        return max(front, key=lambda request: len(self.hits(request)))

    def victim(self) -> Request:
        """The running request that makes room."""
        return max(self.running, key=self.rank) if self.rules.order == "priority" else self.running[-1]

    # --- a decision ---

    def decide(self) -> Step:
        """What the next step computes. It counts as launched."""
        step, rules = Step(is_held=self.is_next_held()), self.rules
        self.threshold = self.threshold_in_force()
        prompts = [request for request in self.running if not request.has_sampled]
        self._worked_on: set[Request] = set()
        if rules.composition == "mixed":
            self._running_pass(step, lambda request: True)
            self._admit(step)
        else:
            self._running_pass(step, lambda request: not request.has_sampled)
            self._admit(step)
            if not step.rows:
                self._running_pass(step, lambda request: request.has_sampled)
        self._count_interval(step, prompts)
        if rules.is_async:
            for request in step.sampled:
                request.drafts = rules.most_drafts
        self.decided.append(step)
        step.left, self._left = self._left, []
        if step.rows:
            self.in_flight.append(step)
        return step

    def threshold_in_force(self) -> float:
        """The most tokens of one request, by how many run or wait as the decision begins."""
        rules, many = self.rules, len(self.running) + len(self.waiting)
        if not rules.threshold or (many < 2 and not rules.binds_alone):
            return math.inf
        if not rules.adaptive:
            return rules.threshold
        return math.inf if rules.budget is None else max(rules.threshold, rules.budget // max(many, 1))

    def is_next_held(self) -> bool:
        """Is the next decision for decodes alone?"""
        since = self.since_prompt_work
        is_early = since is not None and since + 1 < self.rules.interval
        return is_early and not self.kept_waiting and any(request.has_sampled for request in self.running)

    def _count_interval(self, step: Step, prompts: list[Request]) -> None:
        """What the prefill interval remembers of a decision; `prompts` ran before it, with prompt tokens left."""
        if not step.is_held and not step.preempted:
            self.kept_waiting = any(request not in self.set_aside for request in self.waiting)
        if step.rows and self.since_prompt_work is not None:
            self.since_prompt_work += 1
        admitted = any(row.request.cached + 1 < row.request.num_before for row in step.admitted)
        if admitted or any(request in self._worked_on for request in prompts):
            self.since_prompt_work = 0

    def _budget(self) -> float:
        return math.inf if self.rules.budget is None else self.rules.budget

    def _budget_for_one_more(self, step: Step) -> float:
        """What is left of the budget, when each row costs its tokens and the slots of its proposer."""
        return self._budget() - step.num_tokens - self.rules.draft_slots * (len(step.rows) + 1)

    def _within_model(self, num_tokens: int) -> int:
        most = self.rules.max_model_len
        return num_tokens if most is None else min(num_tokens, most)

    def _cut(self, num_tokens: int, budget: float) -> int:
        return int(min(num_tokens, self.threshold, budget))

    def _running_pass(self, step: Step, takes_part: Callable[[Request], bool]) -> None:
        """Requests that run, in the order of their admission; with 0.24's rules one may lose its turn, and the pass
        ends with one that must preempt itself."""
        turn_lost: list[Request] = []
        has_lost_itself = False
        for request in list(self.running):
            if request.status != RUNNING or not takes_part(request) or self._rests(request):
                continue
            if request in turn_lost or (step.is_held and not request.has_sampled):
                continue
            wanted = request.known + request.drafts + request.in_flight - request.computed
            if request.in_flight and request.known + 1 >= self.final_length(request):
                wanted = 0  # its last token is in flight, even if none of the drafts is right
            if self.rules.max_model_len is not None:
                wanted = min(wanted, self.rules.max_model_len - 1 - request.computed)
            num_tokens = self._cut(wanted, self._budget_for_one_more(step))
            if num_tokens <= 0:
                continue
            order = list(self.running)
            idle_before = 0
            while request.status == RUNNING and self.missing_blocks(request, num_tokens) > self.num_free():
                victim = self.victim()
                is_idle = not any(row.request is victim for row in step.rows)
                idle_before += is_idle and order.index(victim) < order.index(request)
                self._preempt(victim, step)
            if self.rules.victim_skips and idle_before:
                behind = [other for other in order[order.index(request) + 1 :] if other.status == RUNNING]
                turn_lost += behind[:idle_before]
                step.turns_lost += bool(behind)
            if request.status != RUNNING:
                has_lost_itself = True
                if self.rules.self_ends:
                    return
                continue
            step.served_behind += has_lost_itself
            new_blocks = [self._take_block() for _ in range(self.missing_blocks(request, num_tokens))]
            request.table += new_blocks
            self._launch(request, num_tokens, new_blocks, step)

    def _rests(self, request: Request) -> bool:
        """Has it sampled in so late a step that the last rank of the pipeline is not done with it?"""
        latest = self.decided[-(self.rules.ranks - 1) :] if self.rules.ranks > 1 else []
        return any(request in step.sampled for step in latest)

    def _admit(self, step: Step) -> None:
        """From the head of the queue while it fits; nobody in a step with a preemption.

        In a pipeline, one that was preempted while tokens of it were in flight keeps its place and is passed over.
        """
        rules = self.rules
        passed_over: list[Request] = []
        beside_prompts, beside_rows = any(row.is_prompt for row in step.rows), bool(step.rows)
        while len(self.waiting) > len(passed_over) and not step.preempted:
            hidden = [(self.waiting.index(request), request) for request in passed_over]
            for _, request in hidden:
                self.waiting.remove(request)
            request = self.head()
            for place, other in sorted(hidden, key=lambda one: one[0]):
                self.waiting.insert(place, other)
            budget = self._budget_for_one_more(step)
            if len(self.running) >= rules.max_num_seqs or budget <= 0:
                return
            if rules.ranks > 1 and any(row.request is request for before in self.in_flight for row in before.rows):
                passed_over.append(request)
                self.set_aside.append(request)
                continue
            if request.in_flight:
                return
            hits = self.hits(request)
            num_hit_tokens = len(hits) * rules.block_size
            if step.is_held and request.known - num_hit_tokens > 1:
                return
            is_padded = rules.most_drafts > 0 and request.known - num_hit_tokens == 1
            is_padded = is_padded and not beside_prompts and (num_hit_tokens > 0 or beside_rows)
            if rules.max_model_len is not None and num_hit_tokens + rules.most_drafts + 2 > rules.max_model_len:
                is_padded = False
            request.drafts = rules.most_drafts if is_padded else 0
            wanted = self._cut(request.known + request.drafts - num_hit_tokens, math.inf)
            if wanted > budget and (is_padded or not rules.chunked):
                return
            num_tokens = self._cut(wanted, budget)
            if not self._fits(request, hits, num_tokens):
                return
            if not self._may_begin(request, num_hit_tokens + num_tokens):
                return
            request.num_before = request.known
            self.set_aside = [other for other in self.set_aside if other is not request]
            for passed in self.waiting[: self.waiting.index(request)]:
                passed.passed_over += 1
            self.waiting.remove(request)
            for block in hits:
                if block in self.free:
                    self.free.remove(block)
            step.padded += is_padded
            num_new = self._blocks_in_step(num_hit_tokens + num_tokens) - len(hits)
            request.table = hits + [self._take_block() for _ in range(num_new)]
            request.status = RUNNING
            request.computed = request.cached = num_hit_tokens
            request.registered = len(hits)
            self.running.append(request)
            step.admitted.append(self._launch(request, num_tokens, request.table, step))

    def _may_begin(self, request: Request, computed: int) -> bool:
        """Do few enough running requests have prompt tokens left to compute, if this one has too?"""
        limit = self.rules.max_partial_prefills
        partial = sum(not other.has_sampled for other in self.running)
        return limit is None or computed >= request.known or partial < limit

    def _fits(self, request: Request, hits: list[int], num_tokens: int) -> bool:
        rules = self.rules
        whole = request.known if rules.reserve_full_prompt else 0
        num_blocks = max(self.blocks_for(whole), self._blocks_in_step(len(hits) * rules.block_size + num_tokens))
        needed = num_blocks - len(hits) + sum(block in self.free for block in hits)
        return needed + (rules.watermark_blocks if self.running else 0) <= self.num_free()

    def _launch(self, request: Request, num_tokens: int, new_blocks: list[int], step: Step) -> Row:
        num_drafts = max(0, request.computed + num_tokens - request.known - request.in_flight)
        samples = request.computed + num_tokens >= request.known + request.in_flight
        row = Row(request, request.computed, num_tokens, samples, not request.has_sampled, new_blocks, num_drafts)
        request.drafts = 0
        step.rows.append(row)
        self._worked_on.add(request)
        request.computed += num_tokens
        if samples:
            request.in_flight += 1 + num_drafts
            request.has_sampled = True
        self._register(request, min(request.computed, request.known))
        return row

    def _preempt(self, victim: Request, step: Step) -> None:
        """Its blocks go, its tokens stay; a row that it had in this step is taken back, with what that would fill."""
        for row in step.rows:
            if row.request is victim:
                step.rows.remove(row)
                step.taken_back += 1
                victim.in_flight -= (1 + row.num_drafts) * row.samples
                for block in victim.table[row.start // self.rules.block_size :]:
                    self._forget(block)
                break
        self.running.remove(victim)
        self._give_up_blocks(victim)
        victim.status = WAITING
        victim.computed = victim.drafts = 0
        victim.has_sampled = False
        victim.preemptions += 1
        self._queue(victim, preempted=True)
        step.preempted.append(victim)

    # --- its result ---

    def commit(
        self, tokens: list[int] | None, lengths: list[int] | None = None, proposed: list[int] | None = None
    ) -> list[Request]:
        """The output of the oldest step in flight, for each that samples a token, or a run of so many; and how many
        drafts wait for its next step. The requests that end."""
        finished = []
        rows = [row for row in self.in_flight.pop(0).rows if row.samples]
        coming = None if tokens is None else list(tokens)
        for index, row in enumerate(rows):
            request = row.request
            length = 1 if lengths is None else lengths[index]
            run: list[int | None] = [None if coming is None else coming.pop(0) for _ in range(length)]
            if request.status == FINISHED:
                continue
            request.in_flight -= 1 + row.num_drafts
            kept = 0
            for token in run:
                kept += 1
                request.known += 1
                if token is not None:
                    request.tokens.append(token)
                is_eos = token == self.rules.eos and not request.ignore_eos
                if token is not None and (is_eos or token in request.stop_tokens):
                    request.reason = "stop"
                elif request.known >= self.final_length(request):
                    request.reason = "length"
                if request.reason is not None:
                    break
            if request.status == RUNNING:
                request.computed -= 1 + row.num_drafts - kept
                if proposed is not None:
                    request.drafts = proposed[index]
                self._register(request, request.computed - request.in_flight)
            if request.reason is None:
                continue
            if request.status == RUNNING:
                self.running.remove(request)
                self._give_up_blocks(request)
                self._left.append(request)
            else:
                self.waiting.remove(request)
            request.status = FINISHED
            finished.append(request)
        return finished

    # --- blocks ---

    def num_free(self) -> float:
        return math.inf if self.rules.num_blocks is None else len(self.free)

    def used(self) -> set[int]:
        return set(range(self.num_blocks_made)) - set(self.free)

    def blocks_for(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.rules.block_size)

    def _blocks_in_step(self, end: int) -> int:
        """Blocks that a request holds in a step which computes it up to there."""
        return self.blocks_for(max(end, self._within_model(end + self.rules.lookahead)))

    def missing_blocks(self, request: Request, num_tokens: int) -> int:
        return max(0, self._blocks_in_step(request.computed + num_tokens) - len(request.table))

    def hits(self, request: Request) -> list[int]:
        """The longest chain of held blocks; one known token at least is left to compute."""
        hits: list[int] = []
        if self.rules.caching:
            for number in self.prefixes(request, (request.known - 1) // self.rules.block_size):
                if number not in self.holders_of:
                    break
                hits.append(self.holders_of[number][0])
        return hits

    def prefixes(self, request: Request, num_blocks: int) -> list[int]:
        """A number for each of the prefixes that end with the first blocks; equal prefixes have equal numbers."""
        size, numbers, ahead = self.rules.block_size, [-1], self.rules.key_lookahead
        for index in range(num_blocks):
            if request.prefix_key is not None:
                what: tuple = (request.salt, request.prefix_key((index + 1) * size + ahead))
            else:
                what = (request.salt, numbers[-1], *request.tokens[index * size : (index + 1) * size + ahead])
            numbers.append(self._prefix_numbers.setdefault(what, len(self._prefix_numbers)))
        return numbers[1:]

    def reset(self) -> bool:
        """Forget what the blocks hold; refused while one is in use."""
        if self.used():
            return False
        self.holds.clear()
        self.holders_of.clear()
        return True

    def _register(self, request: Request, num_tokens: int) -> None:
        """From now on the full blocks of the first `num_tokens` tokens can be hit."""
        end = min(num_tokens, request.known - self.rules.key_lookahead) // self.rules.block_size
        if not self.rules.caching or end <= request.registered:
            return
        numbers = self.prefixes(request, end)
        for index in range(request.registered, end):
            self.holds[request.table[index]] = numbers[index]
            self.holders_of.setdefault(numbers[index], []).append(request.table[index])
        request.registered = end

    def _forget(self, block: int) -> None:
        number = self.holds.pop(block, None)
        if number is not None:
            self.holders_of[number].remove(block)
            if not self.holders_of[number]:
                del self.holders_of[number]

    def _take_block(self) -> int:
        if self.rules.num_blocks is None and not (self.free and self.free[0] not in self.holds):
            self.num_blocks_made += 1
            return self.num_blocks_made - 1
        block = self.free.pop(0)
        self.evictions += block in self.holds
        self._forget(block)
        return block

    def _give_up_blocks(self, request: Request) -> None:
        """From the last to the first: blank blocks to the front of the free ones, the last foremost; others behind."""
        others = Counter(block for other in self.running if other is not request for block in other.table)
        given_up = [block for block in reversed(request.table) if not others[block]]
        blank = [block for block in given_up if block not in self.holds]
        self.free = blank + self.free + [block for block in given_up if block in self.holds]
        request.table = []
        request.registered = 0
