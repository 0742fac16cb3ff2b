"""What a decode step costs in vLLM's own scheduler: `schedule` and `update_from_output` of 256 requests that decode.

    python benchmarks/vllm_steps.py SITE [--repeats 5]

SITE is a vLLM wheel unpacked without its binaries, of 0.24 or 0.33, as tests/vllm_world.py takes it. Prefix caching is
on, blocks hold 16 tokens, and nothing but these two calls is measured. Prints JSON: for its scheduler with a step's
output known before the next is decided, and for its asynchronous one a step ahead, the least and the median of the
repeats of 64 steps, microseconds of CPU time a step. benchmarks/policies.py runs this in turns with what is measured
there.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from environment import ROOT

RUNNING, STEPS, BLOCK_SIZE = 256, 64, 16
WORLD = ROOT / "tests" / "vllm_world.py"


class Timed:
    """Adds up the CPU time that calls take, with the garbage collector off."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            gc.disable()
            begun = time.process_time()
            try:
                return call(*arguments)
            finally:
                self.seconds += time.process_time() - begun
                gc.enable()

        return timed


def world_module() -> ModuleType:
    """The module that walks vLLM's scheduler in the tests."""
    spec = importlib.util.spec_from_file_location("vllm_world", WORLD)
    assert spec is not None and spec.loader is not None
    module = sys.modules["vllm_world"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step_us(world: ModuleType, kind: type, steps_ahead: int, repeats: int) -> dict[str, float]:
    """Microseconds a step, the least and the median."""
    length = STEPS * (repeats + 1) + 8
    prompts = [[(number << 16) + at for at in range(64 + number % BLOCK_SIZE)] for number in range(RUNNING)]
    arrivals = [world.Arrival(0, number, prompt, length, "") for number, prompt in enumerate(prompts)]
    pool = RUNNING * ((80 + length) // BLOCK_SIZE + 2)
    workload = world.Workload("decodes", arrivals, pool, RUNNING, 1 << 15)
    scheduler, timed = world.build_vllm(workload, kind, {}), Timed()
    for name in ("schedule", "update_from_output"):
        setattr(scheduler, name, timed(getattr(scheduler, name)))
    run = world.VllmWorld(workload, scheduler, steps_ahead)
    taken = []
    for number in range(repeats + 1):
        gc.collect()
        timed.seconds = 0.0
        for _ in range(STEPS if number else 4):
            run.step()
        taken.append(timed.seconds / STEPS * 1e6)
    assert all(len(step["scheduled"]) == RUNNING for step in run.steps[4:]), "not all of them decode in every step"
    return {"min": min(taken[1:]), "median": statistics.median(taken[1:])}


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("site", type=Path)
    parsing.add_argument("--repeats", type=int, default=5)
    arguments = parsing.parse_args()
    world = world_module()
    world.import_vllm(arguments.site)
    import vllm
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    kinds = (("synchronous", Scheduler, 0), ("asynchronous", AsyncScheduler, 1))
    costs = {name: step_us(world, kind, ahead, arguments.repeats) for name, kind, ahead in kinds}
    print(json.dumps({"version": vllm.__version__, "step_us": costs}))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    raise SystemExit(main())
