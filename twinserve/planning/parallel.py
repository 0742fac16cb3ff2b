"""The same function on many things, in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.settings.limits import plain


class Workers:
    """Who computes; as a context manager, connected to the cluster while it lasts.

    Args:
        jobs: processes on this machine; 1 is this process alone, None one a core.
        ray: the address of a Ray cluster, whose machines compute in place of this one's processes.
    """

    def __init__(self, jobs: int | None = 1, ray: str | None = None):
        self._jobs, self._ray = jobs, ray

    def __enter__(self) -> Workers:
        if self._ray is not None:
            _connect(self._ray)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ray is not None:
            import ray

            ray.shutdown()

    def computed(self, function: Callable[[Any], Any], things: Sequence[Any]) -> Iterator[tuple[int, Any | InputError]]:
        """Each thing's number and what the function makes of it, as it comes; an InputError is such a result, too.

        Args:
            function: importable by name where it runs; no code is sent.
        """
        if self._ray is not None:
            yield from _by_ray(function, things)
        elif self._jobs == 1 or len(things) < 2:
            yield from (_attempt(function, number, thing) for number, thing in enumerate(things))
        else:
            from joblib import Parallel, cpu_count, delayed

            processes = min(self._jobs or cpu_count(), len(things))
            # Workers of a parent that was killed end by themselves once they have been idle for a while.
            parallel = Parallel(processes, return_as="generator_unordered", batch_size=1, idle_worker_timeout=30)
            yield from parallel(delayed(_attempt)(function, number, thing) for number, thing in enumerate(things))


def _attempt(function: Callable[[Any], Any], number: int, thing: Any) -> tuple[int, Any | InputError]:
    try:
        return number, function(thing)
    except InputError as error:
        return number, error


def _by_ray(function: Callable[[Any], Any], things: Sequence[Any]) -> Iterator[tuple[int, Any | InputError]]:
    import ray

    attempt = ray.remote(_attempt)
    pending = [attempt.remote(function, number, thing) for number, thing in enumerate(things)]
    while pending:
        (done,), pending = ray.wait(pending)
        yield ray.get(done)


def _connect(address: str) -> None:
    """Connect to a Ray cluster.

    Raises:
        InputError: Ray is not installed, or no cluster is there.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("expected ray beside it: pip install 'twinserve[ray]'", field="ray", value=address) from error
    try:
        if address != "auto":
            # Ray itself would try for minutes.
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(plain(port))), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise InputError(
            f"expected auto, or HOST:PORT of a Ray cluster that is up ({message})", field="ray", value=address
        ) from error
