"""Tiers behind a prefix cache: where blocks go that the pool has no room for, and come from when they are hit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

import simpy

from twinserve.policies import BlockManager, Sequence
from twinserve.sim.clock import alarm, now_ns
from twinserve.sim.links import Link

_ARRIVED = 1_500_000  # once steps have ended at that instant, and before anything is decided


@dataclass(frozen=True)
class Tier:
    """A tier: the memory of a replica's host, its SSD, or a store that all replicas of a fleet share.

    Attributes:
        capacity_bytes: of each replica, or of the shared one.
        link: what loads go over, one after another; stores go the other way, and nobody waits for them.
    """

    name: str
    capacity_bytes: float
    link: Link
    is_shared: bool = False


class Store:
    """What lies in a tier: blocks by their hashes, of which the least recently used gives way."""

    def __init__(self, tier: Tier, block_bytes: float):
        self.tier, self.block_bytes = tier, block_bytes
        self._most = int(tier.capacity_bytes // block_bytes)
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._free_ns = 0

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def put(self, block_hashes: Iterable[int]) -> list[int]:
        """Take blocks in, as those used last, in this order; those that had to give way."""
        blocks, most = self._blocks, self._most
        gone = []
        for block_hash in block_hashes:
            if block_hash in blocks:
                blocks.move_to_end(block_hash)
            else:
                blocks[block_hash] = None
                if len(blocks) > most:
                    gone.append(blocks.popitem(last=False)[0])
        return gone

    def load_ns(self, num_blocks: int, at_ns: int) -> int:
        """When so many blocks are there that are asked for now."""
        begin_ns = max(at_ns, self._free_ns)
        self._free_ns = begin_ns + self.tier.link.duration_ns(num_blocks * self.block_bytes)
        return self._free_ns + self.tier.link.latency_ns


@dataclass
class TierCounts:
    """What came of a tier, over all replicas: loads, blocks and bytes of them, and blocks that were stored."""

    loads: int = 0
    hit_blocks: int = 0
    load_bytes: float = 0.0
    stored_blocks: int = 0


class Tiers:
    """The tiers of a replica, from the nearest on.

    A block that the pool needs for another goes into the first; one that this has no room for into the next. What was
    loaded stays there as well. Loads are asynchronous, as those of vLLM's offloading connector: a sequence that hits
    has blocks and is admitted when all is there; the others go on.

    Args:
        stores: one a tier; a shared one is that of all replicas.
        counts: one a tier.
        before: called before a shared store is looked at, so that all that others have put there is there.
    """

    def __init__(
        self,
        env: simpy.Environment,
        manager: BlockManager,
        stores: Seq[Store],
        counts: Seq[TierCounts],
        before: Callable[[], None],
    ):
        self._env, self._manager, self._stores, self._counts, self._before = env, manager, stores, counts, before
        self._is_shared = any(store.tier.is_shared for store in stores)
        self._found: dict[Sequence, list[int]] = {}
        manager.evicts = self._evict

    def _evict(self, block_ids: list[int]) -> None:
        cache = self._manager.prefix_cache
        assert cache is not None, "blocks without a cache have no content to keep"
        hashes: list[Any] = [cache._known[block_id].hash for block_id in block_ids]
        for store, counts in zip(self._stores, self._counts, strict=True):
            before = len(store)
            gone = store.put(hashes)
            counts.stored_blocks += len(store) + len(gone) - before
            hashes = gone

    def _places(self, seq: Sequence, num_tokens: int) -> list[int]:
        """The tier of each block that lies in one, behind so many tokens that are in the pool."""
        size, places = self._manager.block_size, []
        for block_hash in seq.block_hashes[num_tokens // size : (seq.num_tokens - 1) // size]:
            place = next((place for place, store in enumerate(self._stores) if block_hash in store), None)
            if place is None:
                break
            places.append(place)
        return places

    def find(self, seq: Sequence, num_tokens: int) -> int:
        """See `twinserve.orders.loading.Source`."""
        if self._is_shared:
            self._before()
        places = self._places(seq, num_tokens)
        if not places:
            return 0
        self._found[seq] = places  # read, whatever gives way to what the pool gives up for them
        size = self._manager.block_size
        first = num_tokens // size
        for block_hash, place in zip(seq.block_hashes[first : first + len(places)], places, strict=True):
            self._stores[place].put((block_hash,))
        return num_tokens + len(places) * size

    def load(self, seq: Sequence, loaded: Callable[[Sequence], None]) -> None:
        """Load what `find` found; `loaded` is called when all is there."""
        places, there_ns = self._found.pop(seq), now_ns(self._env)
        for place, (store, counts) in enumerate(zip(self._stores, self._counts, strict=True)):
            if count := places.count(place):
                counts.loads += 1
                counts.hit_blocks += count
                counts.load_bytes += count * store.block_bytes
                there_ns = max(there_ns, store.load_ns(count, now_ns(self._env)))
        alarm(self._env, there_ns, _ARRIVED, lambda _: loaded(seq))


@dataclass(frozen=True)
class TierPlan:
    """The tiers of a fleet, and how large a block is on each replica."""

    tiers: tuple[Tier, ...]
    block_bytes: tuple[float, ...]

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What a record says of them."""
        return [
            {"name": tier.name, "capacity_bytes": tier.capacity_bytes, "bytes_per_s": tier.link.bytes_per_s,
             "latency_ns": tier.link.latency_ns, "is_shared": tier.is_shared}
            for tier in self.tiers
        ]  # fmt: skip


class FleetTiers:
    """The tiers of all replicas.

    Attributes:
        counts: one a tier.
    """

    def __init__(self, env: simpy.Environment, plan: TierPlan, before: Callable[[], None]):
        self._env, self._plan, self._before = env, plan, before
        self.counts = [TierCounts() for _ in plan.tiers]
        least = min(plan.block_bytes)
        self._shared = {tier: Store(tier, least) for tier in plan.tiers if tier.is_shared}

    def of(self, index: int, manager: BlockManager) -> Tiers:
        """Those of a replica that is up; its own are empty."""
        stores = [
            self._shared[tier] if tier.is_shared else Store(tier, self._plan.block_bytes[index])
            for tier in self._plan.tiers
        ]
        return Tiers(self._env, manager, stores, self.counts, self._before)

    @property
    def summary(self) -> list[dict[str, Any]]:
        """What came of each tier."""
        return [
            {"name": tier.name} | asdict(counts) for tier, counts in zip(self._plan.tiers, self.counts, strict=True)
        ]
