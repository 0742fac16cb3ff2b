"""Loading: a waiting queue in front of which KV is fetched that lies elsewhere: on another replica, or in a tier.

As with vLLM's KV connectors: who is next and fits is not admitted where more of its KV lies elsewhere than in the pool.
It gets blocks, its KV is loaded, and it is admitted once that is there. Until then it neither waits nor runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from mypy_extensions import mypyc_attr

from twinserve.policies import BlockManager, Sequence
from twinserve.policies.orders import Order, Victim


class Source(Protocol):
    """Says what of a sequence's KV lies elsewhere."""

    def find(self, seq: Sequence, num_tokens: int) -> int:
        """So many of its first tokens, where `num_tokens` are in the pool already; no more than these: nothing."""


@mypyc_attr(native_class=False)
class Nothing:
    """Nothing lies elsewhere."""

    def find(self, seq: Sequence, num_tokens: int) -> int:
        return 0


@mypyc_attr(allow_interpreted_subclasses=True)
class Loading:
    """Another order, in front of which KV is loaded.

    A sequence that loads has blocks for all that it knows, as nothing can lack then once it has loaded; it goes before
    those that wait, in the order of arrival. One that is preempted, or is aborted while it loads, has lost them.

    Attributes:
        loading: the sequences that load, with how many of their tokens will be there.
        without: those whose KV was lost before they had loaded it, until it has been computed again.
        held: ended ones whose blocks are kept, as somebody else loads them.
    """

    def __init__(self, order: Order, source: Source):
        self.order, self.source = order, source
        self.starvation_free = order.starvation_free
        self.victim: Victim = order.victim
        self.loading: dict[Sequence, int] = {}
        self.without: dict[Sequence, None] = {}
        self.held: dict[int, Sequence] = {}
        self._ready: list[Sequence] = []
        self._moves: dict[str, list[Any]] = {}
        self._manager: BlockManager | None = None

    @property
    def is_steady(self) -> bool:
        """See `Order`."""
        return bool(self._ready) or getattr(self.order, "is_steady", False)

    @property
    def manager(self) -> BlockManager:
        """Whose blocks it gives."""
        assert self._manager is not None, "Loading is bound to no BlockManager"
        return self._manager

    def bind(self, manager: BlockManager) -> None:
        """Give this manager's blocks."""
        self._manager = manager
        if hasattr(self.order, "bind"):
            self.order.bind(manager)

    def take_moves(self) -> dict[str, list[Any]]:
        """What was moved since this was asked last: `loads` [request, tokens in the pool, tokens with those elsewhere]
        that begin, requests that have `loaded`, whose KV was `lost`, or `found` again, and that were `released`."""
        moves, self._moves = self._moves, {}
        return moves

    def loads(self, seq: Sequence, hits: list[int]) -> bool:
        """Does a sequence load before it is admitted? It was popped, fits, and has these cached blocks."""
        if seq.block_table:
            return False
        manager = self.manager
        num_tokens = len(hits) * manager.block_size
        found = self.source.find(seq, num_tokens)
        if found <= num_tokens:
            return False
        if found >= seq.num_tokens:
            raise ValueError(f"{found} tokens of {seq} lie elsewhere, expected one at least to be left to compute")
        manager.admit(seq, hits, seq.num_tokens - num_tokens)
        self.loading[seq] = found
        self._moves.setdefault("loads", []).append([seq.seq_id, num_tokens, found])
        return True

    def loaded(self, seq: Sequence) -> None:
        """All KV of a sequence that loads is there; one that was aborted does not mind."""
        num_tokens = self.loading.pop(seq, 0)
        if not num_tokens:
            return
        seq.num_computed_tokens = seq.num_cached_tokens = num_tokens
        # What has nothing left but its latest token goes on as a decode.
        seq.has_sampled = seq.num_completion_tokens > 0 and num_tokens == seq.num_tokens - 1
        if self.manager.prefix_cache is not None:
            self.manager.register(seq, num_tokens)
        place = sum(other.arrival_index < seq.arrival_index for other in self._ready)
        self._ready.insert(place, seq)
        self._moves.setdefault("loaded", []).append(seq.seq_id)

    def lost(self, seq: Sequence) -> None:
        """The KV that a sequence loads, or waits for blocks for, is lost: it gives its blocks back, or its place in the
        queue; one that was aborted does not mind."""
        if seq.is_finished:
            return
        if self.loading.pop(seq, 0):
            self.manager.deallocate(seq)
        else:
            self.order.remove(seq)
        self.without[seq] = None
        self._moves.setdefault("lost", []).append(seq.seq_id)

    def found(self, seq: Sequence) -> None:
        """KV that was lost has been computed again: who loads it waits before the others."""
        if seq in self.without:
            del self.without[seq]
            self.order.push_preempted(seq)
            self._moves.setdefault("found", []).append(seq.seq_id)

    @property
    def news(self) -> tuple[tuple[str, Callable[[Sequence], None]], ...]:
        """What may be said of a sequence whose KV lies elsewhere, in the order in which it is heard before a decision,
        and who hears it."""
        return ("lost", self.lost), ("found", self.found), ("loaded", self.loaded)

    @contextmanager
    def keeping(self, seqs: Iterable[Sequence]) -> Iterator[None]:
        """Within, these sequences end, and keep their blocks; one that was preempted has none."""
        lifted = [(seq, seq.block_table, seq.num_block_tokens, seq.num_registered_tokens) for seq in seqs]
        for seq, *_ in lifted:
            seq.block_table = []
        yield
        for seq, block_table, num_block_tokens, num_registered_tokens in lifted:
            seq.block_table, seq.num_block_tokens = block_table, num_block_tokens
            seq.num_registered_tokens = num_registered_tokens
            self.manager._holders[seq] = None
            self.held[seq.seq_id] = seq

    def release(self, seq_id: int) -> None:
        """Give the blocks of a held sequence back."""
        self.manager.deallocate(self.held.pop(seq_id))
        self._moves.setdefault("released", []).append(seq_id)

    # --- the order ---

    def push(self, seq: Sequence) -> None:
        self.order.push(seq)

    def push_preempted(self, seq: Sequence) -> None:
        self.order.push_preempted(seq)

    def peek(self) -> Sequence:
        return self._ready[0] if self._ready else self.order.peek()

    def pop_next(self) -> Sequence:
        return self._ready.pop(0) if self._ready else self.order.pop_next()

    def remove(self, seq: Sequence) -> None:
        if seq in self.without:
            del self.without[seq]
            return
        if not seq.block_table:
            self.order.remove(seq)
            return
        if self.loading.pop(seq, None) is None:
            self._ready.remove(seq)
        self.manager.deallocate(seq)

    def __len__(self) -> int:
        return len(self._ready) + len(self.order)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._ready
        yield from self.order
