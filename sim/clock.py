"""The simulated clock: events at given nanoseconds, those of one instant in the order of their priorities."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import simpy


def now_ns(env: simpy.Environment) -> int:
    """The simulated time in nanoseconds; all delays are integers, so it is one."""
    return cast(int, env._now)


def skip_to(env: simpy.Environment, at_ns: int, priority: int) -> bool:
    """Go on to a time at once, where an alarm at that time would be the next event; False if another comes before."""
    if env._queue:
        following = env._queue[0]
        if following[0] < at_ns or (following[0] == at_ns and following[1] <= priority):
            return False
    env._now = at_ns
    return True


def alarm(env: simpy.Environment, at_ns: int, priority: int, *callbacks: Callable[[simpy.Event], None]) -> simpy.Event:
    """An event at a given time; of those at the same time, smaller priorities come first."""
    event = simpy.Event(env)
    event._ok, event._value = True, None
    event.callbacks.extend(callbacks)
    env.schedule(event, priority, at_ns - now_ns(env))  # type: ignore[arg-type]
    return event
