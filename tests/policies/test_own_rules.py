"""The order that docs/policies.md shows, that very text, decides in the simulator and in the CPU engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from twinserve.policies import BlockManager, CoreListener, SamplingParams, Scheduler, Sequence
from twinserve.settings.build_core import Settings
from twinserve.sim.latency import StepFeatures
from twinserve.sim.replica import simulate
from twinserve.traces.request import Part, Request

PAGE = Path(__file__).resolve().parents[2] / "docs" / "policies.md"


@pytest.fixture
def fair_share() -> type[Any]:
    """The class that the page shows."""
    [text] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = text[text.index("class FairShare") :].strip().splitlines()
    assert len([line for line in code if line.strip()]) < 30
    names: dict[str, Any] = {}
    exec(compile(text, str(PAGE), "exec"), names)
    return names["FairShare"]


# Tenant "a" floods the queue, "b" comes behind it with as many tokens in half as many requests.
TENANTS = ["a"] * 6 + ["b"] * 3
LENGTHS = [10] * 6 + [20] * 3
FAIR = [0, 6, 1, 2, 7, 3, 4, 8, 5]


class Admissions(CoreListener):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def decided(self, batch) -> None:
        self.ids += [row.seq.seq_id for row in batch.admitted]


class Constant:
    def step_cost(self, features: StepFeatures) -> tuple[int, int]:
        return 1, 10


@pytest.mark.parametrize("step_by_step", [False, True])
def test_tenants_get_equal_shares_in_the_simulator(fair_share, step_by_step):
    requests = [
        Request(number, 0, (Part(number, 0, length),), 4, tenant=tenant)
        for number, (tenant, length) in enumerate(zip(TENANTS, LENGTHS, strict=True))
    ]
    orders = {}
    for name, order in (("fair", fair_share()), ("first come", None)):
        log = Admissions()
        settings = Settings.load({"max_num_seqs": 1, "num_gpu_blocks": 64})
        simulate(requests, settings.build_core(listener=log, order=order), Constant(), step_by_step=step_by_step)
        orders[name] = log.ids
    assert orders == {"fair": FAIR, "first come": list(range(9))}


def test_tenants_get_equal_shares_in_the_engine(fair_share):
    pytest.importorskip("torch")
    from guide_models import subject

    from twinserve.engine.model_runner import ModelRunner
    from twinserve.policies import Core

    of = subject("tiny")
    runner = ModelRunner(of.model, of.tokenizer, "cpu", num_blocks=64, block_size=16)
    log = Admissions()
    scheduler = Scheduler(BlockManager(64, 16), max_num_seqs=1, order=fair_share())
    core = Core(scheduler, listener=log)
    for number, (tenant, length) in enumerate(zip(TENANTS, LENGTHS, strict=True)):
        params = SamplingParams(temperature=0.0, max_tokens=4)
        core.ingest(Sequence([3 + number] * length, params, seq_id=number, tenant=tenant), 0)
    try:
        while not core.is_idle:
            batch = core.decide(0)
            core.commit(runner.execute(batch), 0)
    finally:
        runner.close()
    assert log.ids == FAIR


def test_a_preempted_sequence_comes_back_to_the_front_of_its_tenant_and_aborted_ones_leave(fair_share):
    order = fair_share()
    scheduler = Scheduler(
        BlockManager(6, 4),
        8,
        composition="mixed",
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        order=order,
    )
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    seqs = [Sequence([1] * 7, params, seq_id=number, tenant="ab"[number % 2]) for number in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.abort(seqs[3])
    preemptions = 0
    while not scheduler.is_finished():
        batch = scheduler.schedule()
        preemptions += len(batch.preempted)
        for seq in batch.preempted:
            assert order.queues[seq.tenant][0] is seq
        scheduler.postprocess(batch, [5] * len(batch.sampled))
        scheduler.check_integrity()
    assert preemptions and [seq.finish_reason for seq in seqs] == ["length"] * 3 + ["abort"]
