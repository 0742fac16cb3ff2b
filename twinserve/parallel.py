"""The same function on many things, in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from twinserve.traces.errors import InputError


class Workers(NamedTuple):
    """Who computes.

    Attributes:
        jobs: processes on this machine; 1 is this process alone, None one a core.
        ray: the address of a Ray cluster, whose machines compute in place of this one's processes.
    """

    jobs: int | None = 1
    ray: str | None = None


def computed(
    function: Callable[[Any], Any], things: Sequence[Any], workers: Workers
) -> Iterator[tuple[int, Any | InputError]]:
    """Each thing's number and what the function makes of it, as it comes; an InputError is such a result, too.

    Args:
        function: importable by name where it runs; no code is sent.

    Raises:
        InputError: the cluster cannot be reached.
    """
    if not things:
        return
    if workers.ray is not None:
        yield from _by_ray(function, things, workers.ray)
    elif workers.jobs == 1 or len(things) == 1:
        yield from (_attempt(function, number, thing) for number, thing in enumerate(things))
    else:
        from joblib import Parallel, cpu_count, delayed

        processes = min(workers.jobs or cpu_count(), len(things))
        parallel = Parallel(n_jobs=processes, return_as="generator_unordered", batch_size=1)
        yield from parallel(delayed(_attempt)(function, number, thing) for number, thing in enumerate(things))


def _attempt(function: Callable[[Any], Any], number: int, thing: Any) -> tuple[int, Any | InputError]:
    try:
        return number, function(thing)
    except InputError as error:
        return number, error


def _by_ray(
    function: Callable[[Any], Any], things: Sequence[Any], address: str
) -> Iterator[tuple[int, Any | InputError]]:
    try:
        import ray
    except ImportError as error:
        raise InputError("expected ray beside it: pip install 'twinserve[ray]'", field="ray", value=address) from error
    _reach(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"expected the address of a Ray cluster: {message}", field="ray", value=address) from error
    try:
        attempt = ray.remote(_attempt)
        pending = [attempt.remote(function, number, thing) for number, thing in enumerate(things)]
        while pending:
            (done,), pending = ray.wait(pending)
            yield ray.get(done)
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Look whether somebody listens there; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"expected auto, or HOST:PORT of a Ray cluster that is up ({error})", field="ray", value=address
        ) from error
