"""Queues that run a device's steps one after another, while the host goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """A step handed to a queue; a `twinserve.engine.online.StepHandle`.

    Attributes:
        start_ns, end_ns: readings of time.perf_counter_ns, valid after `result`.
        tokens: what the step computed, on the device; to be read by later steps of the same queue alone.
    """

    start_ns: int
    end_ns: int
    tokens: Tensor

    def result(self) -> list[int]:
        """Wait for the step; its tokens."""


class CpuQueue:
    """Runs steps in a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model-runner")

    def submit(self, compute: Callable[[], Tensor]) -> CpuStep:
        """Run `compute` after all that was submitted before it."""
        step = CpuStep()
        step.future = self._pool.submit(step.run, compute)
        return step

    def close(self) -> None:
        self._pool.shutdown()


class CpuStep:
    """A step of a CpuQueue."""

    start_ns = 0
    end_ns = 0
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


class CudaQueue:
    """Puts steps on the current CUDA stream, and reads the device's clock in the host's time.

    Whenever the host waits for a step, it sees its end as it happens; times of events are told from the latest end so
    seen, by the device's own measure of the time between.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        event = self._event()
        event.synchronize()
        self._seen = event, time.perf_counter_ns()

    @torch.inference_mode()
    def submit(self, compute: Callable[[], Tensor]) -> CudaStep:
        """Enqueue what `compute` does on the device behind all that was submitted before it."""
        start = self._event()
        tokens = compute()
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        return CudaStep(self, tokens, host, start, self._event())

    def host_ns(self, event: Any) -> int:
        """When `event`, which has happened, did."""
        seen, seen_ns = self._seen
        return seen_ns + round(seen.elapsed_time(event) * 1e6)

    def wait(self, event: Any) -> None:
        """Wait for `event`."""
        if not event.query():
            event.synchronize()
            self._seen = event, time.perf_counter_ns()

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def close(self) -> None:
        torch.cuda.synchronize(self._device)


class CudaStep:
    """A step of a CudaQueue."""

    def __init__(self, queue: CudaQueue, tokens: Tensor, host: Tensor, start: Any, end: Any) -> None:
        self.tokens = tokens
        self.start_ns = 0
        self.end_ns = 0
        self._queue, self._host, self._start, self._end = queue, host, start, end

    def result(self) -> list[int]:
        self._queue.wait(self._end)
        self.start_ns, self.end_ns = self._queue.host_ns(self._start), self._queue.host_ns(self._end)
        return self._host.tolist()
