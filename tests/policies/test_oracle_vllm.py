"""The Scheduler decides what vLLM's own scheduler decided, step by step, on recorded scenarios."""

import os
from pathlib import Path

import oracle_vllm
import pytest

ORACLES = os.environ.get("TWINSERVE_ORACLES")
# Scenarios under the priority policy are left to the scheduler's priority order.
NAMES = sorted(p.name for p in Path(ORACLES).glob("*.jsonl.gz") if not p.name.startswith("g_")) if ORACLES else []


@pytest.mark.skipif(not NAMES, reason="TWINSERVE_ORACLES does not name a folder of recorded vLLM scenarios")
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_every_step_of_a_recorded_scenario_is_decided_as_vllm_decided_it(name):
    steps, difference = oracle_vllm.decide_again(Path(ORACLES or "") / name)
    assert difference is None, f"{name}: {difference}"
    assert steps > 10
