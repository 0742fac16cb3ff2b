"""DecodeGroup: the running sequences that get one token in every step, counted by shared clocks."""

from __future__ import annotations

import math
from array import array
from bisect import insort

from twinserve.policies.sequence import IS_LITTLE_ENDIAN, Sequence, token_bytes


class Member:
    """A sequence in the group. Its lengths are `base` plus a clock of the group; `base` never changes."""

    __slots__ = ("base", "copied", "end", "group", "order", "seq", "since", "slot")

    def __init__(self, seq: Sequence, group: DecodeGroup, final_length: float):
        self.seq = seq
        self.group = group
        self.base = seq.num_computed_tokens - group.planned
        self.order = seq.admission_index
        self.since = group.planned
        self.end = final_length - self.base - 1
        self.copied = seq.num_tokens
        self.slot = -1

    @property
    def num_tokens(self) -> int:
        return self.base + self.group.known + 1

    @property
    def num_computed_tokens(self) -> int:
        return self.base + self.group.planned

    @property
    def num_in_flight(self) -> int:
        return self.group.planned - self.group.known

    def hand_over(self, num_tokens: int | None = None) -> None:
        """Give the sequence its first `num_tokens` tokens (None: all known), as far as it has not got them."""
        end = self.num_tokens if num_tokens is None else num_tokens
        first, self.copied = self.copied, max(self.copied, end)
        if first >= end or not self.seq.has_token_ids:
            return
        tokens = self.group.tokens_of(self, first - self.base, end - self.base)
        self.seq.unread.append(token_bytes(tokens))


class View:
    """Who is in the group, from one change of its membership to the next; shared by the batches of that time.

    `members` (in running order) and `segments` (see `DecodeGroup.segments`) are None while they can be read from the
    group, and filled in just before it changes.
    """

    __slots__ = ("epoch", "is_taken", "members", "segments")

    def __init__(self, epoch: int) -> None:
        self.members: list[Member] | None = None
        self.segments: list[tuple[int, int, int]] | None = None
        self.epoch = epoch
        self.is_taken = False


class DecodeGroup:
    """Decodes that go on in step: a step costs what happens to them, not how many they are.

    Two clocks count steps: `planned` the decided ones, `known` those whose tokens have come. A member has computed
    `base + planned` tokens and knows `base + known + 1`. A third, `registered`, says how far the prefix cache has been
    shown full blocks: to `base + registered` tokens of each member.

    Members are kept in buckets, by the clock at which a block of theirs begins (modulo the block size; a member never
    changes its bucket) and by the clock at which they end. Generated tokens lie in one array, a row a step and a column
    a member, which holds a block of steps and a little more; what fills a block is one strided slice of it.

    Args:
        registers: full blocks are shown to a prefix cache.

    Attributes:
        last_order: no member's admission index is above it.
        num_with_tokens: members that have token ids.
    """

    def __init__(self, block_size: int, *, registers: bool):
        self.registers = registers
        self.planned = 0
        self.known = 0
        self.registered = 0
        self.last_order = -1
        self.num_with_tokens = 0
        self._block_size = block_size
        self._members: dict[Member, None] = {}
        self._sum_of_bases = 0
        self._begins: dict[int, dict[Member, None]] = {}
        self._ends: dict[float, dict[Member, None]] = {}
        self._stops: dict[tuple[int, ...], int] = {}
        self._stop_set: tuple[int | None, frozenset[int]] | None = None
        self._num_rows = block_size + 2
        self._width = 0
        self._ring = array("I")
        self._next_slot = 0
        self._holes: list[int] = []
        self._epoch = 0
        self._view = View(0)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def num_kv_tokens(self) -> int:
        """Sum of the members' computed tokens."""
        return self._sum_of_bases + len(self._members) * self.planned

    # --- who is in it ---

    def fits(self, seq: Sequence) -> bool:
        """Is `seq` as far ahead of its tokens as the members are of theirs, and registered as far as they are?"""
        if seq.num_in_flight != self.planned - self.known:
            return False
        full = (seq.num_computed_tokens - self.planned + self.registered) // self._block_size
        return not self.registers or seq.num_registered_blocks >= full

    def join(self, seq: Sequence, final_length: float) -> None:
        """Let in a sequence that `fits`, has all but its latest token computed, and ends with `final_length` tokens."""
        self._changing()
        member = Member(seq, self, final_length)
        self._count(seq, 1)
        self._members[member] = None
        self._sum_of_bases += member.base
        self._begins.setdefault(-member.base % self._block_size, {})[member] = None
        self._ends.setdefault(member.end, {})[member] = None
        if member.order < self.last_order:
            self._sort(member)
        else:
            self.last_order = member.order
            self._give_slot(member)
        seq.member = member

    def leave(self, seq: Sequence) -> Member:
        """Let a member go; it counts by itself again."""
        member = seq.member
        assert member is not None, f"{seq} is in no group"
        self._changing()
        seq.leave_group()
        del self._members[member]
        self._sum_of_bases -= member.base
        del self._begins[-member.base % self._block_size][member]
        ending = self._ends[member.end]
        del ending[member]
        if not ending:
            del self._ends[member.end]
        self._count(seq, -1)
        if not self._members:
            self.last_order = -1
            self._renumber()
        elif member.slot >= 0:
            insort(self._holes, member.slot)
        return member

    def view(self) -> View:
        """The members as they are now, for a batch."""
        if len(self._holes) > 8 + len(self._members) // 8:
            self._changing()
            self._renumber()
        self._view.is_taken = True
        return self._view

    def members_of(self, view: View) -> list[Member]:
        """The members of that time, in running order."""
        return list(self._members) if view.members is None else view.members

    def behind(self, order: int) -> list[Member]:
        """The members that were admitted after the sequence with this admission index."""
        return [member for member in self._members if member.order > order]

    def _changing(self) -> None:
        """Keep what batches may still ask of the members as they were."""
        view = self._view
        if view.is_taken:
            view.members = list(self._members)
            if self.num_with_tokens and view.segments is None:
                view.segments = self._segments()
            self._view = View(self._epoch)

    # --- what is due ---

    def beginning(self) -> list[Member]:
        """Members whose next token begins a block, in running order."""
        return list(self._begins.get(self.planned % self._block_size, ()))

    def completing(self) -> list[Member]:
        """Members with a block that is full of known tokens once the next step has run, in running order."""
        clock = self.next_registered
        return list(self._begins.get(clock % self._block_size, ())) if clock > self.registered else []

    def completes(self, member: Member) -> bool:
        """Is the member one of those `completing`?"""
        clock = self.next_registered
        return clock > self.registered and (member.base + clock) % self._block_size == 0

    @property
    def next_registered(self) -> int:
        """What `registered` is once the next step is decided."""
        clock = min(self.planned, self.known) + 1
        assert clock <= self.registered + 1, f"registered {self.registered}, but {clock - 1} is computed and known"
        return clock

    def plan(self) -> None:
        """A step is decided in which each member gets a token. Full blocks of known tokens have been registered."""
        self.planned += 1
        self.registered = min(self.planned, self.known + 1)

    def catch_up(self) -> list[Member]:
        """Members with a block that the steps ended so far have filled and nobody has registered; call until empty."""
        while self.registered < self.known:
            self.registered += 1
            if members := self._begins.get(self.registered % self._block_size):
                return list(members)
        return []

    def next_end(self) -> float:
        """The value of `known` at which the next member ends."""
        return min(self._ends, default=math.inf)

    def ending_at(self, clock: int) -> list[Member]:
        """Members that end when `known` has this value, in running order."""
        return list(self._ends.get(clock, ()))

    def num_beginning(self, num_steps: int) -> int:
        """Blocks that the next `num_steps` steps begin."""
        cycles, rest = divmod(num_steps, self._block_size)
        begun = cycles * len(self._members)
        if rest:
            first = self.planned
            for phase, members in self._begins.items():
                if (phase - first) % self._block_size < rest:
                    begun += len(members)
        return begun

    def quiet_steps(self) -> int:
        """How many of the next steps neither begin nor complete a block for sure; looked up where members are few."""
        size, clocks = self._block_size, (self.planned, self.registered + 1)
        if not self._members or len(self._members) > size:
            return 0 if self._members else size
        return min((phase - clock) % size for phase, members in self._begins.items() if members for clock in clocks)

    def skip(self, num_steps: int) -> None:
        """Take the tokens of so many quiet steps of members without token ids, and decide as many."""
        self.planned += num_steps
        self.known += num_steps
        self.registered = min(self.planned, self.known + 1)

    # --- tokens ---

    def receive(self, view: View, tokens: array[int] | None) -> None:
        """Take the tokens of a step, one for each member of `view` in running order; None in a simulation."""
        self.known += 1
        if tokens is None or not self.num_with_tokens:
            return
        row = self.known % self._num_rows * self._width
        ring = self._ring
        if view.epoch == self._epoch:
            if view.segments is None:
                view.segments = self._segments()
            for begin, end, slot in view.segments:
                ring[row + slot : row + slot + end - begin] = tokens[begin:end]
            return
        for member, token_id in zip(self.members_of(view), tokens, strict=True):
            if member.seq.member is member:
                ring[row + member.slot] = token_id

    def receive_late(self, member: Member, token_id: int) -> None:
        """Take the token of a member that was not in the group yet when the step that has just ended was decided."""
        self._ring[self.known % self._num_rows * self._width + member.slot] = token_id

    def tokens_of(self, member: Member, first: int, end: int) -> array[int]:
        """The tokens that a member got when `known` became `first`, ..., `end - 1`."""
        ring, width, size = self._ring, self._width, self._num_rows
        begin, count = first % size, end - first
        assert 0 < count <= size, f"{count} tokens were asked for, {size} are kept"
        if begin + count <= size:
            return ring[begin * width + member.slot : (begin + count) * width : width]
        return ring[begin * width + member.slot :: width] + ring[member.slot : (begin + count - size) * width : width]

    def full_blocks(self, members: list[Member], clock: int) -> list[tuple[Sequence, int, bytes | None]]:
        """For each member, the block that it has filled when `clock` says how many tokens there are.

        Returns:
            The sequence, the number of tokens with which the block ends, and its tokens, packed; None for these if the
            sequence has to be asked for them.
        """
        size, width, ring = self._block_size, self._width, self._ring
        first = clock - size
        begin = first % self._num_rows
        is_whole = begin + size <= self._num_rows
        blocks: list[tuple[Sequence, int, bytes | None]] = []
        for member in members:
            seq, base = member.seq, member.base
            if member.copied != base + first or not seq.has_token_ids:
                member.hand_over(base + clock)
                blocks.append((seq, base + clock, None))
                continue
            slot = member.slot
            if is_whole:
                tokens = ring[begin * width + slot : (begin + size) * width : width]
            else:
                tokens = self.tokens_of(member, first, clock)
            member.copied += size
            content = tokens.tobytes() if IS_LITTLE_ENDIAN else token_bytes(tokens)
            seq.unread.append(content)
            blocks.append((seq, base + clock, content))
        return blocks

    def stop_set(self, eos_token_id: int | None) -> frozenset[int]:
        """The tokens that may end a member."""
        if self._stop_set is None or self._stop_set[0] != eos_token_id:
            stops = {token_id for token_ids in self._stops for token_id in token_ids}
            if self._stops and eos_token_id is not None:
                stops.add(eos_token_id)
            self._stop_set = eos_token_id, frozenset(stops)
        return self._stop_set[1]

    def _count(self, seq: Sequence, change: int) -> None:
        """Count a sequence and what may stop it, in or out."""
        self.num_with_tokens += change * seq.has_token_ids
        if seq.sampling_params.ignore_eos:
            return
        stops = seq.sampling_params.stop_token_ids
        count = self._stops.get(stops, 0)
        if count + change:
            self._stops[stops] = count + change
        else:
            del self._stops[stops]
        if not count or not count + change:
            self._stop_set = None

    def _segments(self) -> list[tuple[int, int, int]]:
        """(begin, end, slot): the columns from `slot` on belong to the members numbered `begin` ... `end - 1`."""
        segments = []
        begin = slot = 0
        for hole in (*self._holes, self._next_slot):
            if hole > slot:
                segments.append((begin, begin + hole - slot, slot))
                begin += hole - slot
            slot = hole + 1
        return segments

    def _sort(self, member: Member) -> None:
        """Put a new member, which others were admitted after, in its place."""
        self._members = dict.fromkeys(sorted(self._members, key=_by_order))
        phase = -member.base % self._block_size
        self._begins[phase] = dict.fromkeys(sorted(self._begins[phase], key=_by_order))
        self._ends[member.end] = dict.fromkeys(sorted(self._ends[member.end], key=_by_order))
        self._renumber()

    def _give_slot(self, member: Member) -> None:
        """Give a new member, the last in running order, a column into which no batch in flight writes."""
        if not self.num_with_tokens:
            return
        if self._next_slot == self._width or self._next_slot + 1 != len(self._members) + len(self._holes):
            self._renumber()
        else:
            member.slot = self._next_slot
            self._next_slot += 1

    def _renumber(self) -> None:
        """Give the members new columns, in running order and without holes."""
        self._epoch += 1
        self._view = View(self._epoch)
        self._holes = []
        self._next_slot = 0
        if not self.num_with_tokens:
            return
        old, old_width = self._ring, self._width
        self._width = max(64, len(self._members) * 3 // 2)
        self._ring = ring = array("I", bytes(4 * self._num_rows * self._width))
        for slot, member in enumerate(self._members):
            if member.slot >= 0:
                ring[slot :: self._width] = old[member.slot :: old_width]
            member.slot = slot
        self._next_slot = len(self._members)

    def check_integrity(self) -> None:
        """Raise AssertionError, with the values, if the group's sums, buckets or columns are not its members'."""
        members = list(self._members)
        orders = [member.order for member in members]
        assert orders == sorted(orders), f"not in running order: {orders}"
        assert self.known <= self.planned, f"known {self.known}, planned {self.planned}"
        for member in members:
            assert member.seq.member is member and member.seq.has_sampled, f"in the group: {member.seq}"
            begins = self._begins.get(-member.base % self._block_size, {})
            assert member in begins, f"{member.seq} is in no bucket of its block's beginning"
            assert member.end > self.known, f"{member.seq} has ended at {member.end}, {self.known} is known"
            assert member in self._ends[member.end], f"{member.seq} is in no bucket of its end"
            full = (member.base + self.registered) // self._block_size
            registered = member.seq.num_registered_blocks
            right = full <= registered <= full + 1 if self.registers else not registered
            assert right, f"{member.seq} has {registered} blocks registered, not {full}"
        for buckets in (self._begins, self._ends):
            held = sum(map(len, buckets.values()))
            assert held <= len(members), f"{held} members in buckets, {len(members)} in the group"
        bases = sum(member.base for member in members)
        assert self._sum_of_bases == bases, f"sum of bases {self._sum_of_bases}, not {bases}"
        if self.num_with_tokens:
            slots = [member.slot for member in members]
            free = sorted(set(range(self._next_slot)) - set(slots))
            assert slots == sorted(slots) and free == self._holes, f"columns {slots}, holes {self._holes}"


def _by_order(member: Member) -> int:
    return member.order
