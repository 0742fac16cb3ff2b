"""DecodeGroup: the running sequences that get one token in every step, counted by shared clocks."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections import deque

from twinserve.policies.sequence import Sequence, by_admission

_MOST_TOKENS = 1 << 20


class View:
    """The members from one change of the membership to the next, and the tokens that came for them meanwhile.

    Attributes:
        seqs, orders, bases: of each member, in running order; they stay as they are once a batch has the view.
        tokens: a token a member for each step, one step behind the other.
        places: by the clock at which blocks begin, the places of the members of which one begins, once asked for.
        first: what the group's clock `known` was when the first of them had come.
    """

    __slots__ = ("bases", "first", "is_taken", "orders", "places", "seqs", "tokens")

    def __init__(self, seqs: list[Sequence], orders: list[int], bases: list[int]) -> None:
        self.seqs, self.orders, self.bases = seqs, orders, bases
        self.tokens = array("I")
        self.places: dict[int, list[int]] = {}
        self.first, self.is_taken = 0, False


class DecodeGroup:
    """Decodes that go on in step: a step costs what happens to them, not how many they are.

    Two clocks count steps: `planned` the decided ones, `known` those whose tokens have come. A member has computed
    `base + planned` tokens and knows `base + known + 1`; its base never changes. A third, `registered`, says how far
    the prefix cache has been shown full blocks: to `base + registered` tokens of each member.

    Members lie in buckets: by the clock at which a block of theirs begins (modulo the block size, so a member never
    changes its bucket), and by the clock at which they end. Tokens lie where they came in, a row a step, until they
    fill a block or somebody reads them; a member's are one strided slice.

    Attributes:
        view: the members now.
        ends: members by the value of `known` at which they end, in running order.
        num_with_tokens: members that have token ids.
        stops: tokens that may end a member (and some that might have ended one that has gone).
    """

    def __init__(self, block_size: int) -> None:
        self.planned = self.known = self.registered = 0
        self.view = View([], [], [])
        self.ends: dict[int, list[Sequence]] = {}
        self.num_with_tokens = 0
        self.stops: set[int] = set()
        self._block_size = block_size
        self._begins: dict[int, list[Sequence]] = {}
        self._sum_of_bases = 0
        self._views: deque[View] = deque()

    @property
    def num_kv_tokens(self) -> int:
        """Sum of the members' computed tokens."""
        return self._sum_of_bases + len(self.view.seqs) * self.planned

    def join(self, seq: Sequence) -> None:
        """Let in a sequence that has all but its latest token computed, and as many in flight as the members."""
        seq.group, seq.since = self, self.planned
        seq.base = seq.computed - self.planned
        view = self._changed()
        place = bisect_left(view.orders, seq.admission_index)
        view.seqs.insert(place, seq)
        view.orders.insert(place, seq.admission_index)
        view.bases.insert(place, seq.base)
        for bucket in self._buckets(seq):
            insort(bucket, seq, key=by_admission)
        self._sum_of_bases += seq.base
        self.num_with_tokens += seq.has_token_ids
        if not seq.sampling_params.ignore_eos:
            self.stops.update(seq.sampling_params.stop_token_ids)

    def leave(self, seq: Sequence) -> None:
        """Let a member go; it counts by itself again."""
        self.hand_over(seq, seq.base + self.known + 1)
        seq.computed, seq.in_flight, seq.scheduled = seq.base + self.planned, self.planned - self.known, 1
        seq.group = None
        view = self._changed()
        place = bisect_left(view.orders, seq.admission_index)
        del view.seqs[place], view.orders[place], view.bases[place]
        begins, ends = self._buckets(seq)
        begins.remove(seq)
        ends.remove(seq)
        if not ends:
            del self.ends[seq.end]
        self._sum_of_bases -= seq.base
        self.num_with_tokens -= seq.has_token_ids
        if not view.seqs:
            self.stops.clear()

    def behind(self, order: int) -> list[Sequence]:
        """The members that were admitted after the sequence with this admission index."""
        return self.view.seqs[bisect_right(self.view.orders, order) :]

    def beginning(self, clock: int) -> list[Sequence]:
        """Members whose token at that clock begins a block, all blocks before being full; in running order."""
        return self._begins.get(clock % self._block_size, [])

    @property
    def phases(self) -> dict[int, list[Sequence]]:
        """The members by the clock, modulo the block size, at which they begin blocks."""
        return {phase: seqs for phase, seqs in self._begins.items() if seqs}

    def num_beginning(self, num_steps: int) -> int:
        """Blocks that the next `num_steps` steps begin."""
        size, last = self._block_size, num_steps - 1
        buckets = self._begins.items()
        return sum(len(seqs) * ((last - (phase - self.planned) % size) // size + 1) for phase, seqs in buckets)

    @property
    def next_registered(self) -> int:
        """What `registered` is once the next step is decided: the lesser of what is planned and known by then."""
        return min(self.planned, self.known) + 1

    def plan(self) -> View:
        """A step is decided in which each member gets a token; who they are. Full blocks have been registered."""
        self.registered = self.next_registered
        self.planned += 1
        self.view.is_taken = True
        return self.view

    def skip(self, num_steps: int) -> None:
        """So many steps have been decided, and one fewer than now are in flight, in which members got no token ids."""
        self.planned += num_steps
        self.known += num_steps
        self.registered += num_steps

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
        if seq.has_token_ids:
            for view in self._views:
                width, first = len(view.seqs), seq.base + view.first
                begin, stop = seq.known - first, min(num_tokens - first, len(view.tokens) // width)
                if begin < stop:
                    place = bisect_left(view.orders, seq.admission_index)
                    seq.unread.append(view.tokens[begin * width + place : stop * width : width].tobytes())
                    seq.known += stop - begin
            assert seq.known >= num_tokens, f"{seq} has {seq.known} tokens, expected {num_tokens}"
        else:
            seq.known = max(seq.known, num_tokens)

    def full_blocks(self, clock: int) -> list[tuple[Sequence, int, bytes]]:
        """The blocks that are full when the members know `base + clock` tokens: the sequence, the number of its tokens
        with which the block ends, and the block's tokens, packed; nothing where the sequence has to be asked for them.
        """
        size, phase = self._block_size, clock % self._block_size
        seqs, blocks = self._begins.get(phase), list[tuple[Sequence, int, bytes]]()
        if not seqs or not self.num_with_tokens:
            return [(seq, seq.base + clock, b"") for seq in seqs or ()]
        view = self._views[-1] if self._views else self.view
        width, tokens = len(view.seqs), view.tokens
        begin, stop = (clock - size - view.first) * width, (clock - view.first) * width
        places = view.places.get(phase)
        if places is None or view is not self.view:
            places = view.places[phase] = [bisect_left(view.orders, seq.admission_index) for seq in seqs]
        is_whole = begin >= 0 and stop <= len(tokens)
        for seq, place in zip(seqs, places, strict=True):
            end, packed = seq.base + clock, b""
            if is_whole and seq.known == end - size and seq.has_token_ids:
                packed = tokens[begin + place : stop : width].tobytes()
                seq.unread.append(packed)
                seq.known = end
            else:
                self.hand_over(seq, end)
            blocks.append((seq, end, packed))
        return blocks

    def _changed(self) -> View:
        """The members now, in a view that can be changed."""
        view = self.view
        if view.is_taken:
            self.view = view = View(view.seqs.copy(), view.orders.copy(), view.bases.copy())
        view.places.clear()
        return view

    def _buckets(self, seq: Sequence) -> tuple[list[Sequence], list[Sequence]]:
        """The buckets that a member lies in."""
        begins = self._begins.setdefault(-seq.base % self._block_size, [])
        return begins, self.ends.setdefault(seq.end, [])

    def check_integrity(self) -> None:
        """Raise AssertionError, with the values, if the group's sums, buckets or clocks are not its members'."""
        view = self.view
        assert view.orders == sorted(view.orders), f"not in running order: {view.orders}"
        assert self.known <= self.planned, f"known {self.known}, planned {self.planned}"
        assert self._sum_of_bases == sum(view.bases), f"sum of bases {self._sum_of_bases}, not of {view.bases}"
        for seq, order, base in zip(view.seqs, view.orders, view.bases, strict=True):
            assert seq.group is self and (seq.admission_index, seq.base) == (order, base), f"in the group: {seq}"
            assert all(seq in bucket for bucket in self._buckets(seq)), f"not in its buckets: {seq}"
            assert seq.end > self.known, f"{seq} has ended at {seq.end}, {self.known} is known"
        for buckets in (self._begins, self.ends):
            held = sum(map(len, buckets.values()))
            assert held == len(view.seqs), f"{held} in buckets, {len(view.seqs)} in the group"
