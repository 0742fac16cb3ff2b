"""What a process is that is a rank, but not rank 0: it loads its part of the model, and does what it is told."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.device_queue import compute_on
from twinserve.engine.kv_sizing import with_pool
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.parallel.ranks import HOST, Place, words
from twinserve.engine.parallel.runners import make_runner

if TYPE_CHECKING:
    from twinserve.engine.graphs.graph_runner import GraphRunner
    from twinserve.engine.parallel.runner import ShardedRunner


def work(place: Place, config: RunnerConfig, load: Callable[..., Decoder]) -> None:
    """Be a rank until rank 0 says that it is over, or is gone; the process ends with status 1 if something fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(place.threads)
    rank, store = place.shard.rank, dist.TCPStore(HOST, place.port, is_master=False)
    try:
        device = place.device(config)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        ring = place.open_ring(device, lambda: _end_without(place.parent))
        store.set(f"here/{rank}", "")
        group = place.meet(device, store)
        decoder = compute_on(device, lambda: load(device=str(device), group=group))
        runner = make_runner(decoder, with_pool(config, decoder), None, None)
        store.set(f"ready/{rank}", "")
        while (message := pickle.loads(ring.receive()))[0] != "close":
            _do(runner, *message)
        runner.close()
        group.abort()
    except Exception as error:
        _end_without(place.parent)
        store.set(f"error/{rank}", words(error))
        sys.stderr.flush()
        os._exit(1)


def _do(runner: ShardedRunner | GraphRunner, name: str, arguments: tuple) -> None:
    """Call a method of the runner; on a CPU, what it starts has ended then, so that nothing fails unseen."""
    started = getattr(runner, name)(*arguments)
    if started is not None and runner.device.type == "cpu":
        started.result()


def _end_without(parent: int) -> None:
    """End this process if that of rank 0 is gone."""
    if os.getppid() != parent:
        os._exit(1)
