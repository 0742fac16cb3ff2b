"""Batch: one decision, as totals and deltas that cost what changed, and as rows for who asks."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import repeat
from typing import NamedTuple

from twinserve.policies.decode_group import View
from twinserve.policies.sequence import Sequence


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


class Batch:
    """One decision: the rows of a step, and what changed since the decision before it.

    Unpacks as the pair `seqs, is_prefill`. `is_prefill`: some sequence computes more than one token, or samples for the
    first time since it was admitted. `rows`, `seqs` and `sampled`, in running order, are made when they are read: from
    `explicit`, the rows of sequences on their own, and from the group's `view`, whose rows are all alike.

    The deltas say the decision in terms of the one before: `admitted` rows (their `start` is the prefix hit),
    sequences that `left` (finished or aborted) and were `preempted`, and `grown` block tables. A running sequence gets
    `usual_tokens` (1, or 0 in a step for prompts alone), unless it is in `alone`, the sequences on their own.

    Totals: `num_tokens` = `num_prompt_tokens` + `num_decode_tokens`; `num_kv_tokens` is the sum of the rows' context
    lengths; `num_attention_pairs` counts each query against each key it attends. From `decision` on, the facts are
    written by Core and by the executor.
    """

    view: View | None = None
    is_prefill = False
    num_tokens = num_prompt_tokens = num_kv_tokens = num_attention_pairs = num_sampled = num_members = clock = 0
    num_waiting = num_running = num_used_blocks = 0
    decision = committed = -1
    seen = decided_ns = 0
    start_ns: int | None = None
    end_ns: int | None = None
    _rows: list[Row] | None = None
    _seqs: list[Sequence] | None = None

    def __init__(self, usual_tokens: int) -> None:
        self.usual_tokens = usual_tokens
        self.explicit: list[Row] = []
        self.orders: list[int] = []
        self.admitted: list[Row] = []
        self.alone: list[Sequence] = []
        self.left: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.aborted: list[Sequence] = []
        self.grown: list[tuple[Sequence, list[int]]] = []

    @property
    def num_decode_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_new_pairs(self) -> int:
        """By how much `num_attention_pairs` is larger when the decision is repeated."""
        return self.num_decode_tokens + sum(row.num_tokens**2 for row in self.explicit if row.is_prompt)

    def remove(self, seq: Sequence) -> Row | None:
        """Take back what was decided for a sequence; its row, if it had one on its own."""
        self.grown = [(other, block_ids) for other, block_ids in self.grown if other is not seq]
        for index, row in enumerate(self.explicit):
            if row.seq is seq:
                del self.explicit[index], self.orders[index]
                self.num_tokens -= row.num_tokens
                return row
        return None

    def count(self, num_kv_tokens: int) -> None:
        """Work out the totals, once every row is there; the members' contexts are `num_kv_tokens` in all."""
        if self.view is not None:
            self.num_members = self.num_sampled = len(self.view.seqs)
            self.num_tokens += self.num_members
            self.num_kv_tokens = self.num_attention_pairs = num_kv_tokens
        for _, start, num_tokens, samples, is_prompt in self.explicit:
            self.num_kv_tokens += start + num_tokens
            self.num_attention_pairs += start * num_tokens + num_tokens * (num_tokens + 1) // 2
            self.num_sampled += samples
            if is_prompt:
                self.num_prompt_tokens += num_tokens
                self.is_prefill = self.is_prefill or samples or num_tokens > 1

    def repeated(self, num_steps: int) -> Batch:
        """The decision that comes so many steps later and is the same, but for the lengths that have grown."""
        batch = Batch.__new__(Batch)
        batch.__dict__.update(self.__dict__)
        batch.explicit = [row._replace(start=row.start + num_steps * row.num_tokens) for row in self.explicit]
        batch.left, batch.preempted, batch.aborted, batch.grown = [], [], [], []
        batch._rows = batch._seqs = None
        batch.clock += num_steps
        batch.decision += num_steps
        batch.committed += num_steps
        batch.num_kv_tokens += num_steps * self.num_tokens
        batch.num_attention_pairs += num_steps * self.num_new_pairs
        return batch

    @property
    def rows(self) -> list[Row]:
        """The rows, in running order."""
        if self._rows is None:
            rows, view = list(self.explicit), self.view
            if view is not None and view.seqs:
                members = zip(view.seqs, view.bases, strict=True)
                rows = [Row(seq, base + self.clock, 1, True, False) for seq, base in members] + rows
                if self.orders and self.orders[0] < view.orders[-1]:
                    orders = view.orders + self.orders
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

    def split(self, token_ids: Seq[int] | None) -> tuple[Seq[int] | None, Iterator[int | None]]:
        """Of the tokens for `sampled`: those of the members, and those of the sequences on their own."""
        members = self.num_members
        if token_ids is None or not self.explicit:
            return token_ids, repeat(None)
        if self.view is None or not members or self.view.orders[-1] < self.orders[0]:
            return token_ids[:members], iter(token_ids[members:])
        of = dict(zip(self.sampled, token_ids, strict=True))
        return [of[seq] for seq in self.view.seqs], iter([of[row.seq] for row in self.explicit if row.samples])

    def __iter__(self) -> Iterator:
        yield self.seqs
        yield self.is_prefill

    def __len__(self) -> int:
        return self.num_members + len(self.explicit)
