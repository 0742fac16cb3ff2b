"""Tiers behind a prefix cache: where blocks go that the pool has no room for, and come from when they are hit."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

import simpy
from mypy_extensions import mypyc_attr

from twinserve.policies import BlockManager, Sequence
from twinserve.sim.clock import alarm, now_ns
from twinserve.sim.links import Link

_ARRIVED = 1_500_000  # once steps have ended at that instant, and before anything is decided


@mypyc_attr(native_class=False)  # it may be pickled
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
        # The blocks in the order of their uses, from place _oldest on; and of those that are here, how many of these
        # there are: the latest is the one that counts.
        self._uses, self._oldest = list[Any](), 0
        self._num_uses = dict[Any, int]()
        self._free_ns = 0

    def __contains__(self, block_hash: int) -> bool:
        return block_hash in self._num_uses

    def __len__(self) -> int:
        return len(self._num_uses)

    def put(self, block_hashes: list[Any]) -> list[Any]:
        """Take blocks in, as those used last, in this order; those that had to give way."""
        num_uses, gone = self._num_uses, list[Any]()
        for block_hash in block_hashes:
            if (num := num_uses.get(block_hash, 0)) and len(num_uses) > self._most:
                self._give_way(gone)  # what was put before this one comes first, and it may be this one that goes
                num = num_uses.get(block_hash, 0)
            num_uses[block_hash] = num + 1
            self._uses.append(block_hash)
        self._give_way(gone)
        if len(self._uses) > 2 * len(num_uses):
            self._forget_uses()
        return gone

    def _give_way(self, gone: list[Any]) -> None:
        """Let the blocks go for which there is no room."""
        num_uses, uses, place = self._num_uses, self._uses, self._oldest
        while len(num_uses) > self._most:
            block_hash = uses[place]
            place += 1
            if (left := num_uses[block_hash] - 1) > 0:
                num_uses[block_hash] = left
            else:
                del num_uses[block_hash]
                gone.append(block_hash)
        self._oldest = place

    def _forget_uses(self) -> None:
        """Keep the latest use of each block alone."""
        latest: list[Any] = []
        for block_hash in self._uses[self._oldest :]:
            if (left := self._num_uses[block_hash] - 1) > 0:
                self._num_uses[block_hash] = left
            else:
                latest.append(block_hash)
        self._uses, self._oldest = latest, 0

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
        known = cache._known
        hashes: list[Any] = [known[block_id].hash for block_id in block_ids]
        for store, counts in zip(self._stores, self._counts, strict=True):
            before = len(store)
            gone = store.put(hashes)
            counts.stored_blocks += len(store) + len(gone) - before
            hashes = gone

    def _places(self, block_hashes: list[Any]) -> list[int]:
        """The tier of each block of a chain that lies in one, up to the first that does not."""
        places: list[int] = []
        for block_hash in block_hashes:
            for place, store in enumerate(self._stores):
                if block_hash in store._num_uses:
                    places.append(place)
                    break
            else:
                break
        return places

    def find(self, seq: Sequence, num_tokens: int) -> int:
        """See `twinserve.orders.loading.Source`."""
        if self._is_shared:
            self._before()
        size = self._manager.block_size
        block_hashes = seq.block_hashes[num_tokens // size : (seq.num_tokens - 1) // size]
        places = self._places(block_hashes)
        if not places:
            return 0
        self._found[seq] = places  # read, whatever gives way to what the pool gives up for them
        for number, store in enumerate(self._stores):
            store.put([block_hashes[index] for index, place in enumerate(places) if place == number])
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


@mypyc_attr(native_class=False)  # it may be pickled
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
