"""DecodeGroup: the running sequences that get one token in every step, counted by shared clocks."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import deque

from twinserve.policies.sequence import IS_LITTLE_ENDIAN, Sequence, token_bytes

_MOST_TOKENS = 1 << 20


class View:
    """The members from one change of the membership to the next, and the tokens that came for them meanwhile.

    Attributes:
        seqs, orders, bases: of each member, in running order; they stay as they are once a batch has the view.
        tokens: a token a member for each step, one step behind the other.
        first: what the group's clock `known` was when the first of them had come.
    """

    __slots__ = ("bases", "first", "is_taken", "orders", "seqs", "tokens")

    def __init__(self, seqs: list[Sequence], orders: list[int], bases: list[int]) -> None:
        self.seqs, self.orders, self.bases = seqs, orders, bases
        self.tokens = array("I")
        self.first = 0
        self.is_taken = False

    def place(self, seq: Sequence) -> int:
        """Where a member stands, or would."""
        return bisect_left(self.orders, seq.admission_index)

    def holds(self, seq: Sequence) -> bool:
        """Was a running sequence a member then?"""
        return seq in self.seqs[self.place(seq) : self.place(seq) + 1]


class DecodeGroup:
    """Decodes that go on in step: a step costs what happens to them, not how many they are.

    Two clocks count steps: `planned` the decided ones, `known` those whose tokens have come. A member has computed
    `base + planned` tokens and knows `base + known + 1`; its base never changes. A third, `registered`, says how far
    the prefix cache has been shown full blocks: to `base + registered` tokens of each member.

    Members lie in buckets: by the clock at which a block of theirs begins (modulo the block size, so a member never
    changes its bucket), and by the clock at which they end. Tokens lie where they came in, a row a step, until they
    fill a block or somebody reads them; a member's are one strided slice.

    Args:
        registers: full blocks are shown to a prefix cache.

    Attributes:
        view: the members now.
        num_with_tokens: members that have token ids.
        stops: tokens that may end a member (and some that might have ended one that has gone).
        heeds_eos: may the end-of-sequence token end one?
    """

    def __init__(self, block_size: int, *, registers: bool):
        self.registers = registers
        self.planned = 0
        self.known = 0
        self.registered = 0
        self.view = View([], [], [])
        self.num_with_tokens = 0
        self.stops: set[int] = set()
        self.heeds_eos = False
        self._block_size = block_size
        self._sum_of_bases = 0
        self._begins: dict[int, list[Sequence]] = {}
        self._ends: dict[int, list[Sequence]] = {}
        self._views: deque[View] = deque()

    def __len__(self) -> int:
        return len(self.view.seqs)

    # --- who is in it ---

    def fits(self, seq: Sequence) -> bool:
        """Is `seq` as far ahead of its tokens as the members are of theirs, and registered as far as they are?"""
        if seq.in_flight != self.planned - self.known:
            return False
        full = (seq.computed - self.planned + self.registered) // self._block_size
        return not self.registers or seq.num_registered_blocks >= full

    def join(self, seq: Sequence) -> None:
        """Let in a sequence that `fits` and has all but its latest token computed."""
        seq.group = self
        seq.base = seq.computed - self.planned
        view = self._changed()
        place = view.place(seq)
        view.seqs.insert(place, seq)
        view.orders.insert(place, seq.admission_index)
        view.bases.insert(place, seq.base)
        for bucket in self._buckets(seq):
            insort(bucket, seq, key=_order)
        self._sum_of_bases += seq.base
        self.num_with_tokens += seq.has_token_ids
        if not seq.sampling_params.ignore_eos:
            self.heeds_eos = True
            self.stops.update(seq.sampling_params.stop_token_ids)

    def leave(self, seq: Sequence) -> None:
        """Let a member go; it counts by itself again."""
        self.hand_over(seq, seq.num_tokens)
        seq.computed, seq.in_flight, seq.scheduled = seq.num_computed_tokens, seq.num_in_flight, 1
        seq.group = None
        view = self._changed()
        place = view.place(seq)
        del view.seqs[place], view.orders[place], view.bases[place]
        for bucket in self._buckets(seq):
            bucket.remove(seq)
        if not self._ends[end := _end(seq)]:
            del self._ends[end]
        self._sum_of_bases -= seq.base
        self.num_with_tokens -= seq.has_token_ids
        if not view.seqs:
            self.stops.clear()
            self.heeds_eos = False

    def behind(self, order: int) -> list[Sequence]:
        """The members that were admitted after the sequence with this admission index."""
        return self.view.seqs[bisect_right(self.view.orders, order) :]

    def _buckets(self, seq: Sequence) -> tuple[list[Sequence], list[Sequence]]:
        """The buckets that a member lies in."""
        begins = self._begins.setdefault(-seq.base % self._block_size, [])
        return begins, self._ends.setdefault(_end(seq), [])

    def _changed(self) -> View:
        """The members now, in a view that can be changed."""
        view = self.view
        if view.is_taken:
            self.view = view = View(view.seqs.copy(), view.orders.copy(), view.bases.copy())
        return view

    # --- what is due ---

    def beginning(self) -> list[Sequence]:
        """Members whose next token begins a block, in running order."""
        return self._begins.get(self.planned % self._block_size, [])

    def completing(self) -> list[Sequence]:
        """Members with a block that is full of known tokens once the next step has run, in running order."""
        clock = self.next_registered
        if clock == self.registered or not (self.registers or self.num_with_tokens):
            return []
        return self._begins.get(clock % self._block_size, [])

    @property
    def next_registered(self) -> int:
        """What `registered` is once the next step is decided."""
        return min(self.planned, self.known) + 1

    def plan(self) -> View:
        """A step is decided in which each member gets a token; who they are. Full blocks have been registered."""
        self.registered = self.next_registered
        self.planned += 1
        self.view.is_taken = True
        return self.view

    def catch_up(self) -> list[Sequence]:
        """Members with a block that the steps ended so far have filled and nobody has registered; call until empty."""
        while self.registered < self.known:
            self.registered += 1
            if seqs := self._begins.get(self.registered % self._block_size):
                return seqs
        return []

    @property
    def num_kv_tokens(self) -> int:
        """Sum of the members' computed tokens."""
        return self._sum_of_bases + len(self.view.seqs) * self.planned

    @property
    def next_end(self) -> float:
        """The value of `known` at which the next member ends."""
        return min(self._ends, default=math.inf)

    def ending_at(self, clock: int) -> list[Sequence]:
        """Members that end when `known` has this value, in running order."""
        return self._ends.get(clock, [])

    def num_beginning(self, num_steps: int) -> int:
        """Blocks that the next `num_steps` steps begin."""
        cycles, rest = divmod(num_steps, self._block_size)
        begun = cycles * len(self.view.seqs)
        for phase, seqs in self._begins.items():
            if (phase - self.planned) % self._block_size < rest:
                begun += len(seqs)
        return begun

    # --- tokens ---

    def receive(self, view: View, tokens: array[int] | None) -> None:
        """Take the tokens of a step, one for each member of `view` in running order; None in a simulation."""
        self.known += 1
        if tokens:
            if not view.tokens:
                view.first = self.known
                self._views.append(view)
                # A block of steps is enough, as every full block is handed over.
                while len(self._views) > 1 and self._views[1].first + self._block_size < self.known:
                    self._views.popleft()
            view.tokens.extend(tokens)
            if len(view.tokens) > _MOST_TOKENS and view is self.view:
                self._changed()

    def hand_over(self, seq: Sequence, num_tokens: int) -> None:
        """Give a member its first `num_tokens` tokens, as far as it has not got them."""
        if seq.known < num_tokens:
            if seq.has_token_ids:
                seq.unread.append(token_bytes(self._tokens(seq, seq.known - seq.base, num_tokens - seq.base)))
            seq.known = num_tokens

    def _tokens(self, seq: Sequence, first: int, end: int) -> array[int]:
        """The tokens that a member got when `known` became `first`, ..., `end - 1`."""
        tokens = array("I")
        for view in self._views:
            width = len(view.seqs)
            begin, stop = first - view.first, min(end - view.first, len(view.tokens) // width)
            if begin < stop:
                place = view.place(seq)
                tokens += view.tokens[begin * width + place : stop * width : width]
                first += stop - begin
        assert first == end, f"{seq}: no tokens from {first} to {end}"
        return tokens

    def full_blocks(self, seqs: list[Sequence], clock: int) -> list[tuple[Sequence, int, bytes | None]]:
        """For each member, the block that it has filled when `clock` says how many tokens there are.

        Returns:
            The sequence, the number of tokens with which the block ends, and its tokens, packed; None for these if the
            sequence has to be asked for them.
        """
        size = self._block_size
        blocks: list[tuple[Sequence, int, bytes | None]] = []
        for seq in seqs:
            end = seq.base + clock
            content = None
            if seq.has_token_ids and seq.known == end - size:
                tokens = self._tokens(seq, clock - size, clock)
                content = tokens.tobytes() if IS_LITTLE_ENDIAN else token_bytes(tokens)
                seq.unread.append(content)
                seq.known = end
            else:
                self.hand_over(seq, end)
            blocks.append((seq, end, content))
        return blocks

    def check_integrity(self) -> None:
        """Raise AssertionError, with the values, if the group's sums, buckets or clocks are not its members'."""
        view = self.view
        assert view.orders == sorted(view.orders), f"not in running order: {view.orders}"
        assert self.known <= self.planned, f"known {self.known}, planned {self.planned}"
        assert self._sum_of_bases == sum(view.bases), f"sum of bases {self._sum_of_bases}, not of {view.bases}"
        for seq, order, base in zip(view.seqs, view.orders, view.bases, strict=True):
            assert seq.group is self and (seq.admission_index, seq.base) == (order, base), f"in the group: {seq}"
            assert all(seq in bucket for bucket in self._buckets(seq)), f"not in its buckets: {seq}"
            assert _end(seq) > self.known, f"{seq} has ended at {_end(seq)}, {self.known} is known"
            full, registered = (seq.base + self.registered) // self._block_size, seq.num_registered_blocks
            right = full <= registered <= full + 1 if self.registers else not registered
            assert right, f"{seq} has {registered} blocks registered, not {full}"
        for buckets in (self._begins, self._ends):
            held = sum(map(len, buckets.values()))
            assert held == len(view.seqs), f"{held} in buckets, {len(view.seqs)} in the group"


def _order(seq: Sequence) -> int:
    return seq.admission_index


def _end(seq: Sequence) -> int:
    """The clock at which a member ends."""
    return seq.final_length - seq.base - 1
