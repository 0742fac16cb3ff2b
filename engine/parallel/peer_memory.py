"""PeerSums: the sums of a step, which ranks of one host work out from each other's memory."""

from __future__ import annotations

import re
import uuid
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twinserve.engine.kernels.peer_sums import PeerSum
from twinserve.engine.parallel.shards import Shard

MOST_BYTES = 256 << 10
"""Bytes that more than two ranks sum by reading all of every other's; NCCL has each move less of more. vLLM reads all
up to as many on eight ranks (csrc/custom_all_reduce.cuh)."""
_ALIGNED = 128


class _CountsItself(dist.Store):
    """A store in which the exchanges of ranks that share memory are counted from its first on.

    torch numbers them through all that a process has ever had, in its keys `name/number/rank`, and a new process would
    wait for others than an old one makes.
    """

    def __init__(self, store: dist.Store):
        super().__init__()
        self._store, self._numbers = store, dict[str, int]()

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._own(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._own(key))

    def wait(self, keys: list[str], *limit: Any) -> None:
        self._store.wait([self._own(key) for key in keys], *limit)

    def _own(self, key: str) -> str:
        return re.sub(r"(?<=/)\d+(?=/)", lambda found: str(self._numbers.setdefault(found[0], len(self._numbers))), key)


class PeerSums:
    """Memory for the parts of which sums are made, of each rank as much, and all of it read by all.

    Sums that follow one another have different memory: the first of a step its own, the others one of two by turns. Who
    writes to some again has seen all others begin the sum that came between, and so end the one that they read it for.

    Args:
        shard: this rank.
        store: by which the ranks find each other.
        rows: of the largest sum.
        size: numbers of a row.
        sums: of a step; an odd number.
    """

    def __init__(
        self, shard: Shard, store: dist.Store, device: torch.device, dtype: torch.dtype, rows: int, size: int, sums: int
    ):
        from torch._C import _distributed_c10d

        c10d: Any = _distributed_c10d
        assert sums % 2 == 1, sums
        self._rank, self._sums, self._most_rows = shard.rank, sums, rows
        if shard.size > 2:
            self._most_rows = min(rows, MOST_BYTES // (size * dtype.itemsize))
        part_bytes = self._most_rows * size * dtype.itemsize
        room = part_bytes + -part_bytes % _ALIGNED
        if not shard.rank:
            store.set("name", uuid.uuid4().hex)
        name = store.get("name").decode()
        with torch.cuda.device(device):
            # Memory is shared within a group that is known by a name; of this one only its store is used.
            self._store = _CountsItself(store)
            self._group = dist.ProcessGroup(self._store, shard.rank, shard.size)
            c10d._register_process_group(name, self._group)
            num_bytes = 3 * room + 8 * shard.size
            own = c10d._SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device, name)
            own.zero_()
            torch.cuda.synchronize(device)
            self._memory: Any = c10d._SymmetricMemory.rendezvous(own, name)
            self._memory.barrier()
            torch.cuda.synchronize(device)
            of_ranks = [self._memory.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(shard.size)]
            self._base = torch.zeros(1, dtype=torch.int64, device=device)
        self._own = own
        self._parts = [
            tuple(one[place : place + part_bytes].view(dtype).view(-1, size) for one in of_ranks)
            for place in (0, room, 2 * room)
        ]
        self._words = [tuple(one.view(-1).view(torch.int32) for one in part) for part in self._parts]
        self._flags = tuple(one[3 * room :].view(torch.int64) for one in of_ranks)
        last = torch.iinfo(torch.int64).max
        self._all_there = torch.full((shard.size,), last, dtype=torch.int64, pin_memory=True)

    def begin(self) -> None:
        """Begin a step, of which all ranks make the same sums."""
        self._base += self._sums

    def has(self, rows: int) -> bool:
        """Are sums of so many rows made here?"""
        return rows <= self._most_rows

    def sum(self, number: int, rows: int) -> PeerSum:
        """That of a step which is the `number`-th of its sums, from 0."""
        return self._one(number, tuple(part[:rows] for part in self._parts[self._place(number)]))

    @staticmethod
    def _place(number: int) -> int:
        """Which memory a sum has."""
        return 1 + number % 2 if number else 0

    def _one(self, number: int, parts: tuple[Tensor, ...]) -> PeerSum:
        return PeerSum(parts, self._flags, self._base, number + 1, self._rank)

    def has_words(self, count: int) -> bool:
        """Is so much gathered here?"""
        return count <= self._words[0][0].numel()

    def words(self, number: int, count: int) -> PeerSum:
        """As `sum`, of parts of so many numbers of int32, of any meaning."""
        return self._one(number, tuple(part[:count] for part in self._words[self._place(number)]))

    def abort(self) -> None:
        """Have every sum that waits for a part wait no longer, whoever will never come; no sum is right any more."""
        flags = self._flags[self._rank]
        with torch.cuda.stream(torch.cuda.Stream(flags.device)):
            flags.copy_(self._all_there, non_blocking=True)
