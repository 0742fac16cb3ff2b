"""Queues that run a device's steps one after another, while the host goes on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from twinserve.settings.errors import InputError

Made = TypeVar("Made")


def usable_device(name: str) -> torch.device:
    """The device that an option of the engine names; of CUDA devices always one with its number.

    Raises:
        InputError: it is a CUDA device that is not there.
    """
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        problem = f"but torch finds {torch.cuda.device_count()} CUDA devices"
        raise InputError(problem, field="device", value=name)
    # The current device is a thread's own, and a model is not served by the thread that made it.
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Inside it, a CUDA device is the current one of the thread: Triton launches there, and graphs are captured there,
    whatever device their tensors are of."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """`values`, which nobody changes any more, on `device`.

    The copy takes its place in the device's queue: the host waits neither for it nor for what was queued before. From
    memory that is not pinned it would wait for all of that, and no step could be launched while another runs. Of
    nothing there is nothing to copy.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if not tensor.numel():
        return torch.empty_like(tensor, device=device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def all_to_device(lists: Seq[Seq[int] | np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Lists of numbers on `device` as int64, by one copy: each takes as long as some thousands of them."""
    arrays = [np.asarray(numbers, np.int64).reshape(-1) for numbers in lists]
    return to_device(np.concatenate(arrays), device).split(list(map(len, arrays)))


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` in the host's memory, to be read once what is queued on its device has run; nothing waits for it."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def device_name(device: torch.device | str) -> str:
    """What computes there, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


class HasTokens(Protocol):
    """What was computed on a device; to be read by later steps of the same queue alone."""

    @property
    def tokens(self) -> Tensor: ...


class Step(HasTokens, Protocol):
    """A step handed to a queue; a `twinserve.engine.online.StepHandle`.

    Attributes:
        start_ns, end_ns: readings of time.perf_counter_ns, valid after `result`.
        waited_ns: for how long the host waited for steps before it, while it was put into the queue.
    """

    start_ns: int
    end_ns: int
    waited_ns: int

    def result(self) -> list[int]:
        """Wait for the step; its tokens."""


class Parts(Protocol):
    """A step that the host has a part in while it runs; its parts are gone through in this order."""

    @property
    def waits(self) -> bool:
        """Can it not be laid out before the step before it is concluded?"""

    def lay_out(self) -> None:
        """What the host does before anything is computed."""

    def compute(self) -> Tensor:
        """Enqueue on the device what gives numbers that the host has to know."""

    def go_on(self) -> None:
        """Enqueue what follows on the device, before the host knows them."""

    def conclude(self, numbers: list[int]) -> list[int]:
        """What the host makes of the numbers: the step's tokens."""


@cache
def _cpu_thread() -> ThreadPoolExecutor:
    """The one thread that computes on a CPU, for all models of the process.

    OpenMP keeps a team of threads for each thread that has run a parallel loop. Two teams are more threads than there
    are cores, and libgomp then lets a team sleep after every loop: on two cores a step of SmolLM2 takes half as long
    again, one in int8, which has more loops, up to three times as long.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="cpu")


def _submit(work: Callable[[], Made]) -> Future[Made]:
    """Have `work` done in the thread that computes on a CPU, with as many threads as torch has in this one."""
    threads = torch.get_num_threads()

    def with_threads() -> Made:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return work()

    return _cpu_thread().submit(with_threads)


def compute_on(device: torch.device | str, work: Callable[[], Made]) -> Made:
    """What `work` gives, done where the steps of a device are computed: on a CPU in a thread that all share."""
    return _submit(work).result() if torch.device(device).type == "cpu" else work()


class CpuQueue:
    """Runs steps in the thread that computes on a CPU."""

    def __init__(self) -> None:
        self._last: Future[list[int]] | None = None

    def submit(self, compute: Callable[[], Tensor]) -> CpuStep:
        """Run `compute` after all that was submitted before it."""
        step = CpuStep()
        self._last = step.future = _submit(lambda: step.run(compute))
        return step

    def submit_parts(self, parts: Parts) -> CpuStep:
        """The same of a step in parts."""

        def compute() -> Tensor:
            parts.lay_out()
            numbers = parts.compute()
            parts.go_on()
            return torch.tensor(parts.conclude(numbers.tolist()), dtype=torch.int64)

        return self.submit(compute)

    def close(self) -> None:
        if self._last is not None:
            wait([self._last])


class CpuStep:
    """A step of a CpuQueue."""

    start_ns = end_ns = waited_ns = 0
    tokens: Tensor
    future: Future[list[int]]

    @torch.inference_mode()
    def run(self, compute: Callable[[], Tensor]) -> list[int]:
        self.start_ns = time.perf_counter_ns()
        self.tokens = compute()
        token_ids = self.tokens.tolist()
        self.end_ns = time.perf_counter_ns()
        return token_ids

    def result(self) -> list[int]:
        return self.future.result()


class OpenStep(Protocol):
    """A step in parts that is not concluded."""

    def conclude(self) -> None:
        """Have it concluded."""


class OpenSteps:
    """Steps in parts that are not concluded, in their order: each is when it is waited for, or before a later step that
    needs it, or the one behind it; until then the host is free, as it runs."""

    def __init__(self) -> None:
        self._steps: deque[OpenStep] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def make_way(self, parts: Parts) -> None:
        """Conclude what has to be before a step can be laid out."""
        while len(self._steps) > (0 if parts.waits else 1):
            self._steps.popleft().conclude()

    def add(self, step: OpenStep) -> None:
        self._steps.append(step)

    def conclude(self, step: OpenStep) -> None:
        """Conclude a step, if it is open, and those before it."""
        while step in self._steps:
            self._steps.popleft().conclude()

    def clear(self) -> None:
        self._steps.clear()


class CudaQueue:
    """Puts steps on the current stream of a CUDA device, and tells their times by the host's clock.

    Where the host waits for a step, it sees its end as it happens, and the device's own measure says how long before
    that it began. A step that has ended before anybody waits is told from the end of the step before it.

    Args:
        check: called again and again while the host waits; it raises where a step will never end. None: it will.
    """

    def __init__(self, device: torch.device, check: Callable[[], None] | None = None) -> None:
        self._device, self._check = device, check
        self._ended = self._event()
        self._ended.synchronize()
        self._ended_ns = time.perf_counter_ns()
        self._open = OpenSteps()
        self._waited_ns = 0  # for numbers of steps in parts, all together

    @torch.inference_mode()
    def submit(self, compute: Callable[[], Tensor]) -> CudaStep:
        """Enqueue what `compute` does on the device behind all that was submitted before it."""
        launched_ns = time.perf_counter_ns()
        with on_device(self._device):
            start = self._event()
            tokens = compute()
            return CudaStep(self, tokens, to_host(tokens), launched_ns, start, self._event())

    @torch.inference_mode()
    def submit_parts(self, parts: Parts) -> CudaStep:
        """Enqueue a step in parts."""
        waited_ns = self._waited_ns
        self._open.make_way(parts)
        parts.lay_out()
        step = self.submit(parts.compute)
        step.waited_ns = self._waited_ns - waited_ns
        with on_device(self._device):
            parts.go_on()
            step.goes_on(parts, self._event())
        self._open.add(step)
        return step

    def conclude(self, step: CudaStep) -> None:
        """Conclude a step in parts, if it is one, and those before it."""
        self._open.conclude(step)

    def await_numbers(self, computed: Any) -> None:
        """Wait until a step in parts has what the host has to know of it."""
        begun_ns = time.perf_counter_ns()
        computed.synchronize()
        self._waited_ns += time.perf_counter_ns() - begun_ns

    def wait(self, launched_ns: int, start: Any, end: Any) -> tuple[int, int]:
        """Wait for the oldest step not yet waited for; when it started and ended.

        Neither clock is trusted against the order of things: a step starts after its launch and after the end of the
        step before it, and has ended by now.
        """
        seen = not end.query()
        while self._check is not None and not end.query():
            self._check()
        end.synchronize()
        now_ns = time.perf_counter_ns()
        device_ns = _between_ns(start, end)
        start_ns = now_ns - device_ns if seen else self._ended_ns + _between_ns(self._ended, start)
        start_ns = min(max(start_ns, launched_ns, self._ended_ns), now_ns)
        self._ended, self._ended_ns = end, min(start_ns + device_ns, now_ns)
        return start_ns, self._ended_ns

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def close(self) -> None:
        self._open.clear()
        torch.cuda.synchronize(self._device)


class CudaStep:
    """A step of a CudaQueue."""

    def __init__(self, queue: CudaQueue, tokens: Tensor, host: Tensor, launched_ns: int, start: Any, end: Any) -> None:
        self.tokens = tokens
        self.start_ns = self.end_ns = self.waited_ns = 0
        self._queue, self._host, self._events = queue, host, (launched_ns, start, end)
        self._parts: tuple[Parts, Any] | None = None
        self._concluded: list[int] | None = None

    def goes_on(self, parts: Parts, end: Any) -> None:
        """Say that this was not all of it, and the event of its end."""
        launched_ns, start, computed = self._events
        self._parts, self._events = (parts, computed), (launched_ns, start, end)

    def conclude(self) -> None:
        """Wait for the numbers of a step in parts, and have it concluded."""
        assert self._parts is not None
        parts, computed = self._parts
        self._queue.await_numbers(computed)
        self._concluded = parts.conclude(self._host.tolist())

    def result(self) -> list[int]:
        if not self.end_ns:
            self._queue.conclude(self)
            self.start_ns, self.end_ns = self._queue.wait(*self._events)
        return self._host.tolist() if self._concluded is None else self._concluded


def _between_ns(first: Any, second: Any) -> int:
    return round(first.elapsed_time(second) * 1e6)
