"""The simulated clock: events at given nanoseconds, those of one instant in the order of their priorities."""

from __future__ import annotations

from collections.abc import Callable

import simpy


def now_ns(env: simpy.Environment) -> int:
    """The simulated time in nanoseconds; all delays are integers, so it is one."""
    return int(env.now)


def alarm(env: simpy.Environment, at_ns: int, priority: int, *callbacks: Callable[[simpy.Event], None]) -> simpy.Event:
    """An event at a given time; of those at the same time, smaller priorities come first."""
    event = simpy.Event(env)
    event._ok, event._value = True, None
    event.callbacks.extend(callbacks)
    env.schedule(event, priority, at_ns - now_ns(env))  # type: ignore[arg-type]
    return event
