"""The one thread that computes on a CPU; the times that a CUDA queue tells, on a device whose clock runs wrong."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

import pytest
import torch

from twinserve.engine import device_queue
from twinserve.engine.device_queue import CpuQueue, CudaQueue, compute_on, usable_device
from twinserve.settings.errors import InputError


class World:
    """A host and a device. The device's clock gains `drift` on the host's; `now_ms` is the host's."""

    def __init__(self, drift: float):
        self.drift = drift
        self.now_ms = 1000.0


class Event:
    """An event that happens on the device at a moment of the host's clock."""

    def __init__(self, world: World, at_ms: float):
        self.world, self.at_ms = world, at_ms

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return self.at_ms <= self.world.now_ms

    def synchronize(self) -> None:
        self.world.now_ms = max(self.world.now_ms, self.at_ms)

    def elapsed_time(self, other: Event) -> float:
        return (other.at_ms - self.at_ms) * (1.0 + self.world.drift)


@pytest.fixture(params=[0.0, 1e-3, -1e-3])
def world(request, monkeypatch):
    world = World(request.param)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: round(world.now_ms * 1e6))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(world, world.now_ms))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return world


def steps(
    world: World, queue: CudaQueue, lengths_ms: list[float], host_ms: float
) -> list[tuple[float, float, int, int]]:
    """True start and end in ms, told start and end in ns, of steps launched one ahead, `host_ms` of work for each."""
    told: list[tuple[float, float, int, int]] = []
    waiting: list[tuple[int, Event, Event]] = []
    free_ms = 0.0
    for length in lengths_ms:
        launched_ns = time.perf_counter_ns()
        world.now_ms += host_ms
        start = max(world.now_ms - host_ms / 2, free_ms)
        free_ms = start + length
        waiting.append((launched_ns, Event(world, start), Event(world, free_ms)))
        if len(waiting) > 1:
            launched_ns, began, ended = waiting.pop(0)
            told.append((began.at_ms, ended.at_ms, *queue.wait(launched_ns, began, ended)))
    return told


@pytest.mark.parametrize("host_ms", [1.0, 30.0])
def test_times_follow_one_another_and_never_run_away(world, host_ms):
    told = steps(world, CudaQueue(torch.device("cuda")), [5.0, 20.0, 9.0, 7.0] * 500, host_ms)
    before_ns = 0
    for true_start, true_end, start_ns, end_ns in told:
        assert before_ns <= start_ns <= end_ns <= world.now_ms * 1e6
        assert start_ns == pytest.approx(true_start * 1e6, abs=host_ms * 1e6)
        assert end_ns == pytest.approx(true_end * 1e6, abs=host_ms * 1e6)
        before_ns = end_ns


class InParts:
    """A step of which the host has to know something before the next one is laid out, or not."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits

    def lay_out(self) -> None: ...

    def compute(self) -> torch.Tensor:
        return torch.tensor([3])

    def go_on(self) -> None: ...

    def conclude(self, numbers: list[int]) -> list[int]:
        return numbers


def test_what_a_launch_waits_for_is_not_the_hosts_work(world, monkeypatch):
    """The device takes 20 ms a step; a step that needs the one before it is launched when that has ended."""
    monkeypatch.setattr(device_queue, "on_device", lambda device: nullcontext())
    queue, ends = CudaQueue(torch.device("cuda")), iter(range(20, 2000, 20))
    begun, waited = world.now_ms, []
    for waits in (True, True, False, True):
        computed = [Event(world, world.now_ms), Event(world, begun + next(ends))]  # as it begins, and its numbers
        events = iter([*computed, computed[1]])
        monkeypatch.setattr(queue, "_event", lambda events=events: next(events))
        waited.append(queue.submit_parts(InParts(waits)).waited_ns / 1e6)
    # The third goes on from the second, which still runs; the fourth waits for both.
    assert waited == [0, 20, 0, 40]


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="device is 'cuda:99', but torch finds"):
        usable_device("cuda:99")
    assert usable_device("cpu") == torch.device("cpu")


def test_all_that_a_cpu_computes_is_computed_in_one_thread():
    threads = []

    def compute() -> torch.Tensor:
        threads.append(threading.get_ident())
        return torch.tensor([7])

    one, other = CpuQueue(), CpuQueue()
    results = [queue.submit(compute).result() for queue in (one, other, one)]
    one.close()
    assert compute_on("cpu", compute).item() == other.submit(compute).result()[0] == 7
    assert results == [[7]] * 3
    assert len(threads) == 5 and len(set(threads)) == 1 and threads[0] != threading.get_ident()


def test_what_goes_wrong_there_is_raised_here_and_the_next_step_runs():
    def wrong() -> torch.Tensor:
        raise IndexError("no such row")

    queue = CpuQueue()
    with pytest.raises(IndexError, match="no such row"):
        queue.submit(wrong).result()
    with pytest.raises(IndexError, match="no such row"):
        compute_on("cpu", wrong)
    assert queue.submit(lambda: torch.tensor([1, 2])).result() == [1, 2]
    queue.close()


def test_the_thread_takes_as_many_threads_as_its_caller_has():
    before = torch.get_num_threads()
    try:
        for count in (1, before):
            torch.set_num_threads(count)
            assert compute_on("cpu", torch.get_num_threads) == count
    finally:
        torch.set_num_threads(before)
