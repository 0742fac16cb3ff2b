"""Ranks that are threads of one process: what they do together is done over a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from twinserve.engine.parallel.shards import Shard

Made = TypeVar("Made")


class ThreadGroup:
    """A stand-in for `twinserve.engine.parallel.group.Group`."""

    def __init__(self, shard: Shard, barrier: threading.Barrier, given: list[Any]):
        self.shard, self._barrier, self._given = shard, barrier, given

    def gather(self, x: Tensor) -> Tensor:
        self._given[self.shard.rank] = x.clone()
        self._barrier.wait(60)
        gathered = torch.stack(list(self._given))
        self._barrier.wait(60)
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(self.gather(x).sum(dim=0))

    def max(self, x: Tensor) -> Tensor:
        return x.copy_(self.gather(x).amax(dim=0))

    def from_first(self, x: Tensor) -> Tensor:
        return x.copy_(self.gather(x)[0])


def on_ranks(size: int, work: Callable[[ThreadGroup], Made]) -> list[Made]:
    """What `work` gives on each of so many ranks."""
    barrier, given = threading.Barrier(size), [None] * size

    def on_rank(rank: int) -> Made:
        try:
            with torch.inference_mode():
                return work(ThreadGroup(Shard(rank, size), barrier, given))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(on_rank, range(size)))
