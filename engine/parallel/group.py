"""Group: the ranks that share a model, and what they do together. Every rank calls the same in the same order."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions

from twinserve.engine.parallel.shards import Shard

if TYPE_CHECKING:
    from twinserve.engine.parallel.peer_memory import PeerSums

MEETING_LIMIT = timedelta(minutes=10)
"""How long ranks wait for one another, as one may compile kernels that another finds compiled."""


class Group:
    """Collective operations of the ranks of one model, over gloo on CPUs and NCCL on CUDA devices.

    On CUDA each is enqueued on the current stream, and the host waits for none, so they can be captured in graphs.

    Args:
        shard: this rank.
        store: by which the ranks find each other.
        device: of the tensors.

    Attributes:
        shard, device: as given.
    """

    def __init__(self, shard: Shard, store: dist.Store, device: torch.device):
        self.shard = shard
        self.device, self._store = device, store
        self._is_on_cuda, self._ending = device.type == "cuda", threading.Lock()
        self._peer_sums: PeerSums | None = None
        self._processes: Any
        options: Any
        if self._is_on_cuda:
            nccl: Any = dist.ProcessGroupNCCL
            options = nccl.Options()
            options._timeout = MEETING_LIMIT
            self._processes = nccl(store, shard.rank, shard.size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            options._timeout = MEETING_LIMIT
            self._processes = gloo(store, shard.rank, shard.size, options)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in its place."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """The largest of all ranks' numbers, one by one, in place of `x`."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def least(self, number: int, device: torch.device) -> int:
        """The least of all ranks' numbers; the host waits for it."""
        return -int(self.max(torch.tensor([-number], device=device)).item())

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' `x`, one behind another: [ranks, *x.shape]."""
        gathered = x.new_empty(self.shard.size, *x.shape)
        if x.numel():
            options = AllgatherOptions()
            options.asyncOp = False
            _wait(self._processes._allgather_base(gathered.view(-1), x.contiguous().view(-1), options))
        return gathered

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, in place of every other rank's."""
        options = BroadcastOptions()
        options.asyncOp = False
        options.rootRank = 0
        if x.numel():
            _wait(self._processes.broadcast([x], options))
        return x

    def peer_sums(self, dtype: torch.dtype, rows: int, size: int, sums: int) -> PeerSums | None:
        """The sums of a step by the ranks' memory, the same for all who ask; None where a device cannot read another's.

        Args:
            rows: of the largest sum.
            size: numbers of a row.
            sums: of a step.
        """
        ranks = range(self.shard.size)
        reads = all(one == self.shard.rank or torch.cuda.can_device_access_peer(self.shard.rank, one) for one in ranks)
        if self._peer_sums is None and self.least(reads, self.device):
            from twinserve.engine.parallel.peer_memory import PeerSums

            store = dist.PrefixStore("sums", self._store)
            self._peer_sums = PeerSums(self.shard, store, self.device, dtype, rows, size, sums)
        return self._peer_sums

    def abort(self) -> None:
        """End what is under way on a CUDA device, whoever will never come; nothing works any more.

        This waits until the graphs are gone that hold something of it, but for whoever calls it a second time.
        """
        if self._ending.acquire(blocking=False) and self._is_on_cuda:
            if self._peer_sums is not None:
                self._peer_sums.abort()
            self._processes.abort()

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        options = AllreduceOptions()
        options.asyncOp = False
        options.reduceOp = operation
        if x.numel():
            _wait(self._processes.allreduce([x], options))
        return x


def _wait(work: Any) -> None:
    """Wait for what was begun; newer NCCL groups of torch give nothing to wait for, as it is on the current stream."""
    if work is not None:
        work.wait()
