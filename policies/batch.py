"""Batch: one decision, as totals and deltas that cost what changed, and as rows for who asks."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import xxhash

from twinserve.policies.decode_group import DecodeGroup, Member, View
from twinserve.policies.sequence import Sequence

_MASK = (1 << 64) - 1


class Row(NamedTuple):
    """One sequence's part of a step: `num_tokens` tokens from position `start` on.

    `samples`: the step reaches the sequence's last known token, so it samples the next one. `is_prompt`: the sequence
    has sampled nothing since it was admitted, so its tokens are prompt (or recomputed) tokens, however few.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    is_prompt: bool


class Digest:
    """A 64-bit chain over decisions, equal exactly when all decisions so far were (but for collisions).

    A decision that repeats the one before it adds its number and the blocks that grew, as a sum, so that it does not
    matter whether repeated decisions are digested one by one or together.
    """

    def __init__(self) -> None:
        self.value = 0
        self._chain = 0
        self._grown = 0
        self._steady: tuple | None = None

    def of(self, batch: Batch) -> int:
        """The digest up to `batch`, which follows the batch of the call before."""
        steady = (batch.usual_tokens, *((seq.seq_id, n, samples) for seq, n, samples in batch.exceptions))
        if steady != self._steady or batch.admitted or batch.left or batch.preempted:
            values = [batch.decision, batch.usual_tokens, len(batch.admitted)]
            for seq, start, num_tokens, samples, _ in batch.admitted:
                values += (seq.seq_id, start, num_tokens, samples, len(seq.block_table), *seq.block_table)
            for seqs in (batch.preempted, batch.left):
                values.append(len(seqs))
                values += [seq.seq_id for seq in seqs]
            for seq, num_tokens, samples in batch.exceptions:
                values += (seq.seq_id, num_tokens, samples)
            self._chain = xxhash.xxh64_intdigest(array("q", values).tobytes(), self._chain)
            self._steady = steady
        return self.grow(batch, batch.grown)

    def grow(self, batch: Batch, grown: list[tuple[Sequence, list[int]]]) -> int:
        """The digest after `batch`, which repeats the one before it, with these blocks more."""
        total = self._grown
        for seq, block_ids in grown:
            for block_id in block_ids:
                total += (seq.arrival_index + 1) * 0x9E3779B97F4A7C15 ^ (block_id + 1) * 0xBF58476D1CE4E5B9
        self._grown = total & _MASK
        values = (self._grown, batch.decision, batch.num_used_blocks, batch.num_waiting, batch.num_running)
        self.value = xxhash.xxh64_intdigest(array("Q", values).tobytes(), self._chain)
        return self.value


class Batch:
    """One decision: the rows of a step, and what changed since the decision before it.

    Unpacks as the pair `seqs, is_prefill`. `sampled` lists, in order, the sequences that get a token from this step.
    `is_prefill`: some sequence computes more than one token, or samples for the first time since it was admitted.

    The deltas say the decision in terms of the one before: `admitted` rows (their `start` is the prefix hit),
    sequences that `left` (finished or aborted) and were `preempted`, `grown` block tables, and `exceptions`: rows of
    running sequences that are not the usual `usual_tokens` (1, or 0 in a step for prompts alone).

    Totals: `num_tokens` = `num_prompt_tokens` + `num_decode_tokens`; `num_kv_tokens` is the sum of the rows' context
    lengths; `num_attention_pairs` counts each query against each key it attends.

    Deltas and totals are there at once. `rows`, `seqs` and `sampled`, in running order, are made when they are read:
    from `explicit`, the rows of sequences on their own, and from the members of the group, whose rows are all alike.
    """

    def __init__(self, group: DecodeGroup, usual_tokens: int = 1) -> None:
        self.usual_tokens = usual_tokens
        self.explicit: list[Row] = []
        self.orders: list[int] = []
        self.num_members = 0
        self.clock = 0
        self.late: list[Member] = []
        self._group = group
        self._view: View | None = None
        self._rows: list[Row] | None = None
        self._seqs: list[Sequence] | None = None

        self.admitted: list[Row] = []
        self.left: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.grown: list[tuple[Sequence, list[int]]] = []
        self.exceptions: list[tuple[Sequence, int, bool]] = []

        self.is_prefill = False
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.num_kv_tokens = 0
        self.num_attention_pairs = 0
        self.num_sampled = 0
        self.num_waiting = 0
        self.num_running = 0
        self.num_used_blocks = 0

        # Facts of the decision and of the step, written by Core and by the executor.
        self.decision = -1
        self.seen = 0
        self.aborted: list[Sequence] = []
        self.committed = -1
        self.decided_ns = 0
        self.start_ns: int | None = None
        self.end_ns: int | None = None
        self.digest = 0

    @property
    def num_decode_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_new_pairs(self) -> int:
        """By how much `num_attention_pairs` is larger when the decision is repeated."""
        return self.num_decode_tokens + sum(row.num_tokens**2 for row in self.explicit if row.is_prompt)

    @property
    def has_members(self) -> bool:
        """Does each member of the group, if there are any, get a token?"""
        return self._view is not None

    # --- written by the Scheduler ---

    def add(self, row: Row) -> None:
        """Add the row of a sequence on its own; rows come in running order."""
        self.explicit.append(row)
        self.orders.append(row.seq.admission_index)
        self.num_tokens += row.num_tokens

    def remove(self, seq: Sequence) -> Row | None:
        """Take back what was decided for a sequence on its own; its row, if there was one."""
        self.grown = [(other, block_ids) for other, block_ids in self.grown if other is not seq]
        index = bisect_left(self.orders, seq.admission_index)
        if index == len(self.orders) or self.orders[index] != seq.admission_index:
            return None
        del self.orders[index]
        row = self.explicit.pop(index)
        self.num_tokens -= row.num_tokens
        return row

    def clear(self) -> None:
        """Take back all rows of sequences on their own."""
        self.explicit.clear()
        self.orders.clear()
        self.num_tokens = 0

    def add_members(self) -> None:
        """Add a row for each member of the group, just before its clock goes on."""
        self._view = self._group.view()
        self.clock = self._group.planned
        self.num_members = len(self._group)

    def count(self) -> None:
        """Work out the totals, once every row is there and the group's clock has gone on."""
        members = self.num_members
        context = self._group.num_kv_tokens if members else 0
        self.num_tokens, self.num_prompt_tokens, self.num_sampled = members, 0, members
        self.num_kv_tokens = self.num_attention_pairs = context
        for _, start, num_tokens, samples, is_prompt in self.explicit:
            end = start + num_tokens
            self.num_tokens += num_tokens
            self.num_kv_tokens += end
            if is_prompt:
                self.num_prompt_tokens += num_tokens
                self.num_attention_pairs += start * num_tokens + num_tokens * (num_tokens + 1) // 2
            else:
                self.num_attention_pairs += end
            if samples:
                self.num_sampled += 1
            if num_tokens > 1 or (samples and is_prompt):
                self.is_prefill = True

    def repeated(self, num_steps: int) -> Batch:
        """The decision that comes so many steps later and is the same, but for the lengths that have grown."""
        batch = Batch(self._group, self.usual_tokens)
        batch.explicit = [row._replace(start=row.start + num_steps * row.num_tokens) for row in self.explicit]
        batch.orders = self.orders
        batch.exceptions = self.exceptions
        batch.num_members, batch.clock, batch._view = self.num_members, self.clock + num_steps, self._view
        batch.num_waiting, batch.num_running = self.num_waiting, self.num_running
        batch.decision, batch.seen = self.decision + num_steps, self.seen
        batch.committed = self.committed + num_steps
        for name in ("num_tokens", "num_prompt_tokens", "num_sampled", "is_prefill"):
            setattr(batch, name, getattr(self, name))
        batch.num_kv_tokens = self.num_kv_tokens + num_steps * self.num_tokens
        batch.num_attention_pairs = self.num_attention_pairs + num_steps * self.num_new_pairs
        return batch

    # --- read by executors ---

    @property
    def members(self) -> list[Member]:
        """Those of the group that have a row, in running order, whatever has become of them since."""
        return [] if self._view is None else self._group.members_of(self._view)[: self.num_members]

    @property
    def view(self) -> View:
        """The members as they were when the batch was decided."""
        assert self._view is not None, "this batch has no members"
        return self._view

    @property
    def rows(self) -> list[Row]:
        """The rows, in running order."""
        if self._rows is None:
            members = self.members
            rows = [Row(member.seq, member.base + self.clock, 1, True, False) for member in members]
            rows += self.explicit
            orders = [member.order for member in members] + self.orders
            if members and self.orders and self.orders[0] < members[-1].order:
                rows = [rows[index] for index in sorted(range(len(rows)), key=orders.__getitem__)]
            self._rows = rows
        return self._rows

    @property
    def seqs(self) -> list[Sequence]:
        """The sequence of each row; always the same list."""
        if self._seqs is None:
            self._seqs = [row.seq for row in self.rows]
        return self._seqs

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in order."""
        return [row.seq for row in self.rows if row.samples]

    def is_held_by(self, seqs: Batch | list[Sequence]) -> bool:
        """Is `seqs` this batch, or the list that it holds?"""
        return seqs is self or (seqs is self._seqs and seqs is not None)

    def split(self, token_ids: Seq[int] | None) -> tuple[Seq[int] | None, Seq[int] | None]:
        """Of the tokens for `sampled`: those of the members, and those of the sequences on their own."""
        members = self.num_members
        if token_ids is None or not self.explicit:
            return token_ids, None
        orders = [order for order, row in zip(self.orders, self.explicit, strict=True) if row.samples]
        if not members or not orders or self.members[-1].order < orders[0]:
            return token_ids[:members], token_ids[members:]
        of_members = [member.order for member in self.members]
        places = [number + bisect_left(of_members, order) for number, order in enumerate(orders)]
        own = [token_ids[place] for place in places]
        taken = list(token_ids)
        for place in reversed(places):
            del taken[place]
        return taken, own

    def __iter__(self) -> Iterator:
        yield self.seqs
        yield self.is_prefill

    def __len__(self) -> int:
        return self.num_members + len(self.explicit)
