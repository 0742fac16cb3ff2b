"""Ranks: the processes of a model over several devices, as rank 0 holds them."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from twinserve.engine.checks import RunnerConfig
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.online import Inbox
from twinserve.engine.parallel.group import Group
from twinserve.engine.parallel.ring import Ring
from twinserve.engine.parallel.shards import Shard
from twinserve.settings.errors import InputError, RunError

HOST = "127.0.0.1"
GRACE_S = 2.0
"""How long a process that is to end has, before it is killed."""
SETTLING_S = 0.2
"""How long one waits, when a rank has ended, for those that it took with it."""
EAGER_S = 0.005
"""How long ranks with a device each look for the next step before the first nap; on a CPU others need the time."""


class RankError(RunError):
    """A rank has ended, and with it what all of them serve."""


@dataclass(frozen=True)
class Place:
    """What a process has to know to be a rank.

    Attributes:
        shard: which one.
        port: where the ranks meet.
        ring: the file of the messages of rank 0.
        parent: the process of rank 0.
        threads: of torch on a CPU.
    """

    shard: Shard
    port: int
    ring: Path
    parent: int
    threads: int

    def device(self, config: RunnerConfig) -> torch.device:
        """Its own."""
        return rank_device(config, self.shard.rank)

    def open_ring(self, device: torch.device, check: Callable[[], None]) -> Ring:
        """Its end of the ring."""
        reader = self.shard.rank - 1 if self.shard.rank else None
        eager_s = EAGER_S if device.type == "cuda" else 0.0
        return Ring(self.ring, self.shard.size - 1, reader, eager_s=eager_s, check=check)

    def meet(self, device: torch.device, store: dist.Store) -> Group:
        """The group of all ranks."""
        return Group(self.shard, dist.PrefixStore("group", store), device)


Work = Callable[[Place, RunnerConfig, Callable[..., Decoder]], None]
"""What a process does that is a rank: `twinserve.engine.parallel.worker.work`."""


def rank_device(config: RunnerConfig, rank: int) -> torch.device:
    """The device of a rank."""
    return torch.device("cuda", rank) if config.device.type == "cuda" else config.device


class Ranks:
    """The ranks of a model beside rank 0, which is this process: they are started, told of steps, watched and ended.

    Whatever ends one of them ends all, and says why: who waits for a step gets a RankError, and so does whoever waits
    for requests to come in.

    Args:
        work: what each of their processes does.
        config: what the runner of each is made from.
        load: loads the weights of a rank's part: `load(device=..., group=...)`.
        threads: of torch on a CPU, of each rank.

    Attributes:
        group: what they do together.

    Raises:
        InputError: the ranks cannot meet at MASTER_PORT.
        RankError: one has ended before it was there.
    """

    def __init__(self, work: Work, config: RunnerConfig, load: Callable[..., Decoder], threads: int):
        size = config.options.tensor_parallel_size
        self._store = _listening()
        self._reason: str | None = None
        self._inboxes: weakref.WeakSet[Inbox] = weakref.WeakSet()
        self._lock, self._is_over = threading.Lock(), False
        self._processes: list[Any] = []
        ring = Ring.make(size - 1)
        try:
            places = [Place(Shard(rank, size), self._store.port, ring, os.getpid(), threads) for rank in range(size)]
            self._processes = _started(work, places[1:], config, load)
            # What is to be ended is ended when nobody holds this any more, or the interpreter ends.
            self._end = weakref.finalize(self, _end, self._processes)
            device = rank_device(config, 0)
            self._ring = places[0].open_ring(device, self.check)
            self._wait_for("here")
            self.group = places[0].meet(device, self._store)
            threading.Thread(target=self._watch, args=(weakref.ref(self),), name="ranks", daemon=True).start()
        except BaseException:
            self.close()
            raise
        finally:
            ring.unlink(missing_ok=True)

    def wait_until_ready(self) -> None:
        """Wait until every rank can run steps."""
        self._wait_for("ready")

    def tell(self, name: str, *arguments: Any) -> None:
        """Have every other rank call a method of its runner.

        Raises:
            RankError: one has ended.
        """
        self.check()
        self._ring.send(pickle.dumps((name, arguments), protocol=pickle.HIGHEST_PROTOCOL))

    def check(self) -> None:
        """Raise a RankError if one has ended."""
        if self._reason is not None:
            raise RankError(self._reason)

    def _look(self) -> None:
        """Look whether one has ended, and raise a RankError then."""
        if self._reason is None and any(process.exitcode is not None for process in self._processes):
            time.sleep(SETTLING_S)
            self._reason = self._why()
        self.check()

    def tells(self, inbox: Inbox) -> None:
        """Have an inbox fail, by which somebody waits for requests, when a rank ends."""
        self._inboxes.add(inbox)
        if self._reason is not None:
            inbox.fail(RankError(self._reason))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What goes wrong inside, in rank 0's part of a step, ends all ranks, which wait for it; if it did because one
        of them has ended, a RankError says so."""
        try:
            yield
        except Exception as error:
            limit = time.monotonic() + GRACE_S  # a process that breaks off is gone a moment later
            while self._reason is None and time.monotonic() < limit:
                if any(process.exitcode is not None for process in self._processes):
                    break
                time.sleep(0.01)
            try:
                self._look()
            except RankError as ended:
                raise ended from error
            self._reason = f"rank 0 has failed: {type(error).__name__}: {error}"
            self._end()
            raise

    def close(self) -> None:
        """End the other ranks, which have done by then what they were told. The runner has been closed before."""
        with self._lock:
            is_over, self._is_over = self._is_over, True
        if not is_over and self._reason is None and hasattr(self, "group"):
            try:
                self.tell("close")
                limit = time.monotonic() + GRACE_S
                for process in self._processes:
                    process.join(max(0.0, limit - time.monotonic()))
            except RankError:
                pass
        if hasattr(self, "_end"):
            self._end()
        if hasattr(self, "group"):
            self.group.abort()

    def _wait_for(self, word: str) -> None:
        """Wait until every other rank has said a word."""
        for rank in range(1, len(self._processes) + 1):
            while not self._store.check([f"{word}/{rank}"]):
                self._look()
                time.sleep(0.01)

    def _why(self) -> str:
        """Why the first of those ranks has ended that have, in words: one takes others with it, and so it is one that
        was killed, or that said first what had failed."""
        ended = []
        for rank, process in enumerate(self._processes, start=1):
            if (code := process.exitcode) is None:
                continue
            how, said_ns = f"killed by signal {-code}" if code < 0 else f"exit status {code}", 0
            if self._store.check([f"error/{rank}"]):
                said, _, how = self._store.get(f"error/{rank}").decode().partition(" ")
                said_ns = int(said)
            ended.append((said_ns, rank, how))
        _, rank, how = min(ended)
        return f"rank {rank} has ended: {how}"

    @staticmethod
    def _watch(of: weakref.ref[Ranks]) -> None:
        """Wait until a rank has ended, and unless it was to end, end all."""
        ranks = of()
        if ranks is None:
            return
        processes = {process.sentinel: process for process in ranks._processes}
        del ranks
        ended: list[Any] = connection.wait(list(processes))
        for sentinel in ended:
            processes[sentinel].join()  # its end is seen a moment before its status is
        ranks = of()
        if ranks is not None:
            ranks._one_has_ended()

    def _one_has_ended(self) -> None:
        with self._lock:
            if self._is_over:
                return
        try:
            self._look()
        except RankError as error:
            self._end()
            for inbox in list(self._inboxes):
                inbox.fail(error)
            self.group.abort()  # what waits on the device for the rank would wait for ever


def _listening() -> dist.TCPStore:
    """A store at which the ranks meet, at MASTER_PORT if that is set, else at a free one.

    Raises:
        InputError: it cannot be listened at.
    """
    text = os.environ.get("MASTER_PORT", "0")
    if not text.isdecimal() or int(text) > 65535:
        raise InputError("expected a port from 0 to 65535", field="MASTER_PORT", value=text)
    try:
        return dist.TCPStore(HOST, int(text), is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        problem = "cannot be listened at, expected a port that nobody uses; unset, a free one is taken"
        raise InputError(problem, field="MASTER_PORT", value=int(text)) from error


def _started(work: Work, places: list[Place], config: RunnerConfig, load: Callable[..., Decoder]) -> list[Any]:
    """The processes of ranks. They end with this one, and Ctrl-C is left to it."""
    from torch import multiprocessing

    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work, args=(place, config, load), name=f"rank {place.shard.rank}", daemon=True)
        for place in places
    ]
    is_main = threading.current_thread() is threading.main_thread()
    # A process begins with those signals ignored that were when it was made.
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        for process in processes:
            process.start()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, usual)
    return processes


def _end(processes: list[Any]) -> None:
    """End processes, and wait until they are gone."""
    for process in processes:
        process.terminate()
    limit = time.monotonic() + GRACE_S
    for process in processes:
        process.join(max(0.0, limit - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def words(error: BaseException) -> str:
    """What went wrong in a rank, and when, in a line; with the place in the code where it is no refusal."""
    said = f"{time.monotonic_ns()} "
    if isinstance(error, InputError):
        return f"{said}{error}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{said}{type(error).__name__}: {' '.join(str(error).split())}{where}"
