"""A model over several devices: pipelines, data and expert parallelism, and the links between them, by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest

from twinserve.planning.fleets import FleetOptions
from twinserve.planning.point import Point
from twinserve.policies import CoreListener
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.devices import DEVICES, NETWORK_HOP_NS, NVLINK_HOP_NS, PEAKS, Device
from twinserve.sim.latency import StepCost, StepFeatures
from twinserve.sim.model_configs import SHAPES
from twinserve.sim.replica import simulate
from twinserve.sim.roofline import RooflineLatency
from twinserve.sim.shapes import Attention, Experts, Layers, ModelShape
from twinserve.sim.splits import ALL_REDUCE_NS, Split
from twinserve.sim.stages import Stages
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.waits import waits_of
from twinserve.worlds.workload import Workload

ROUND = Device(
    name="round", bandwidth=1e9, flops=1e12, memory_mib=9_537, link=1e9, network=1e8, source="made up", host_ns=500,
    host_seq_ns=10, shares=PEAKS,
)  # fmt: skip
"""Reads a byte a nanosecond, and sends one over its link, and a tenth of one over the network."""
TINY = ModelShape.dense("tiny", 1000, 64, 128, 3, 4, 2, 16)
SPARSE = ModelShape("sparse", 1000, 64, (Layers(2, Attention(4, 4, 16), Experts(8, 2, 32)),))


def decode(rows: int, context: int) -> StepFeatures:
    return StepFeatures(0, rows, 0, rows, rows * context, rows * context, rows, longest_decode=context)


def changed(**values) -> Device:
    return ROUND.model_copy(update=values)


@pytest.mark.parametrize(
    ("num_layers", "stages", "expected"),
    [
        (32, 4, [8, 8, 8, 8]),
        (61, 2, [31, 30]),
        (61, 4, [15, 15, 16, 15]),
        (62, 4, [15, 16, 16, 15]),
        (63, 4, [16, 16, 16, 15]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_layers_are_dealt_out_as_vllm_deals_them(num_layers, stages, expected):
    assert Split(pipeline=stages).layers_of_stages(num_layers) == expected


def test_each_stage_takes_its_layers_and_what_is_sent_to_it_and_the_last_one_the_output():
    layer_values = 64 * 128 + 64 * 64 + 64 * 256 + 128 * 64
    activations = 128 + 64 + 64 + 64 + 64 + 256 + 128 + 64
    layer = 2 * (layer_values + activations) + 100 * 2 * 2 * 16 * 2
    output = 2 * (64 * 1000 + 64 + 1000)
    send = ALL_REDUCE_NS + NVLINK_HOP_NS + 2 * 64 * 2
    cost = RooflineLatency(TINY, ROUND, split=Split(pipeline=2)).step_cost(decode(1, 100))
    assert cost == StepCost(510, 3 * layer + output + send, stages=(2 * layer, layer + output + send))


def test_sends_between_nodes_go_over_the_network_and_the_devices_of_a_stage_gather_them():
    """Two devices a stage, two a node: each sends half of both tensors to its like, which gathers the other half."""
    tokens, shape = 5, ModelShape.dense("tiny", 1000, 64, 128, 2, 4, 4, 16)
    near, far = changed(linked=4), changed(linked=2)
    send = {}
    for name, device in (("near", near), ("far", far)):
        stages = RooflineLatency(shape, device, split=Split(2, 2)).step_cost(decode(tokens, 100))[3]
        alone = RooflineLatency(shape, device, 2).step_cost(decode(tokens, 100))[1]
        send[name] = sum(stages) - alone
    moved = 2 * tokens * 64 * 2
    gathered = (ALL_REDUCE_NS + 2 * NVLINK_HOP_NS + moved) / 2
    assert send["near"] == pytest.approx(ALL_REDUCE_NS + NVLINK_HOP_NS + moved / 2 + gathered, abs=2)
    assert send["far"] == pytest.approx(ALL_REDUCE_NS + NETWORK_HOP_NS + 10 * moved / 2 + gathered, abs=2)


def test_stages_hold_their_layers_and_the_embeddings_at_the_ends():
    shape, layer = SHAPES["llama-3-70b"], 2 * (70_553_706_496 - 2 * 128_256 * 8192) / 80
    embedding = 2 * 128_256 * 8192
    weights = [
        stage.weight_bytes(shape, Split(pipeline=3))
        for stage in RooflineLatency(shape, DEVICES["h200"], split=Split(pipeline=3)).stages
    ]
    expected = [27 * layer + embedding, 27 * layer, 26 * layer + embedding]
    assert weights == pytest.approx(expected, rel=1e-3)


def test_an_embedding_that_is_the_output_projection_too_lies_on_both_ends():
    tied = replace(TINY, tied=True)
    (whole,), (first, _, last) = (
        [stage.weight_bytes(tied, split) for stage in RooflineLatency(tied, ROUND, split=split).stages]
        for split in (Split(), Split(pipeline=3))
    )
    assert first == last == 2 * 64 * 1000 + (whole - 2 * 64 * 1000) / 3


def test_the_pool_is_that_of_the_stage_with_the_least_room():
    """Halves of the layers have half of a token's KV each, so twice the blocks beside the same weights."""
    device = changed(memory_mib=2_300)
    one, two = (RooflineLatency(TINY, device, split=Split(pipeline=stages)).num_blocks(16) for stages in (1, 3))
    left = 0.9 * device.memory_bytes - 2 * 10**9
    layer = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)
    assert one == int((left - 3 * layer - 4 * 64_000) // (3 * 128 * 16))
    assert two == int((left - layer - 2 * 64_000) // (128 * 16))
    uneven = RooflineLatency(SHAPES["llama-3-8b"], DEVICES["h100"], split=Split(pipeline=5))
    rooms = [uneven._blocks_of(stage, 16, 0)[0] for stage in uneven.stages]
    assert rooms[0] > min(rooms) == uneven.num_blocks(16), "of 32 layers the first of five stages has six"


def test_experts_that_lie_whole_on_devices_are_read_by_all_ranks_tokens_and_compute_their_share():
    """Two ranks of 3 tokens: 12 pairs of a token and an expert, 6 on each device, which has 4 of 8 experts."""
    free = changed(link=1e21, hop_ns=0)
    step, split = decode(3, 100), Split(data=2, expert=2)
    cost = RooflineLatency(SPARSE, free, split=split).step_cost(step)[1]
    matrices = 2 * (64 * 192 + 64 * 64) + 3 * 2 * (64 + 192 + 64 + 64)
    router = 2 * 64 * 8 + 3 * 2 * (64 + 8)
    attention = 300 * 2 * 64 * 2
    distinct = 8 * (1 - (1 - 2 / 8) ** 6) / 2
    experts = distinct * 2 * (64 * 64 + 32 * 64) + 6 * 2 * (64 + 64 + 32 + 64)
    output = 2 * 64_000 + 3 * 2 * (64 + 1000)
    exchanges = 2 * ALL_REDUCE_NS
    assert cost == pytest.approx(2 * (matrices + router + attention + experts + exchanges) + output, abs=1)


def exchange_ns(device: Device, split: Split, tokens: int) -> float:
    """Of one all-to-all: what links that take time add to a step of three layers, over its exchanges."""
    free = device.model_copy(update={"link": 1e21, "network": 1e21, "hop_ns": 0, "network_hop_ns": 0})
    deep = replace(SPARSE, layers=(replace(SPARSE.layers[0], count=3),))
    costs = [RooflineLatency(deep, one, split=split).step_cost(decode(tokens, 100))[1] for one in (device, free)]
    return (costs[0] - costs[1]) / (3 * 2)


def test_an_all_to_all_sends_each_token_once_to_each_device_with_experts_of_its():
    tokens, hidden_bytes = 16, 64 * 2
    chance = 1 - (3 / 4) ** 2
    within = exchange_ns(ROUND, Split(data=4, expert=4), tokens)
    assert within == pytest.approx(NVLINK_HOP_NS + 3 * tokens * chance * hidden_bytes, abs=1)
    over_nodes = exchange_ns(changed(linked=2), Split(data=4, expert=4), tokens)
    assert over_nodes == pytest.approx(NETWORK_HOP_NS + 2 * tokens * chance * hidden_bytes * 10, abs=1)


def test_devices_of_a_rank_share_what_is_exchanged_and_the_sums_of_a_layer_are_one():
    tokens, hidden_bytes = 16, 64 * 2
    cost = {}
    for name, device in (("with", ROUND), ("free", changed(link=1e21, hop_ns=0))):
        cost[name] = RooflineLatency(SPARSE, device, split=Split(2, 1, 2, 4)).step_cost(decode(tokens, 100))[1]
    exchange = NVLINK_HOP_NS + 3 * tokens / 2 * (1 - (3 / 4) ** 2) * hidden_bytes
    total = 2 * NVLINK_HOP_NS + tokens * hidden_bytes
    assert cost["with"] - cost["free"] == pytest.approx(2 * (2 * exchange + total), abs=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("llama-3-8b@h100:pp=33", "pipeline_parallel is 33, expected at most the 32 layers"),
        ("llama-3-8b@h100:pp=0", "pipeline_parallel is 0, expected >= 1"),
        ("llama-3-8b@h100:ep=8", "expert_parallel is 8, expected 1: llama-3-8b has no experts"),
        ("llama-3-8b@h100:tp=64", "tensor_parallel is 64, expected a divisor of the 32 query heads"),
        ("mixtral-8x7b@h100:tp=2:ep=4", "expert_parallel is 4, expected 2, tp x dp, or 1"),
        ("mixtral-8x7b@h100:tp=4:ep=2", "expert_parallel is 2, expected 4, tp x dp, or 1"),
        ("mixtral-8x7b@h100:dp=2", "data_parallel is 2, expected ep=2 beside it: its ranks share the experts"),
        ("mixtral-8x7b@h100:dp=16:ep=16", "expert_parallel is 16, expected a divisor of the 8 experts"),
        (
            "llama-3-8b@l40s:tp=8:pp=2",
            "16 devices are more than the 8 that share a link of the L40S, expected a device",
        ),
    ],
)
def test_splits_that_cannot_be_are_refused_in_one_line(text, words):
    with pytest.raises(InputError) as error:
        RooflineLatency.parse(text)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_as_many_devices_as_share_a_link_need_no_network():
    for text in ("llama-3-8b@l40s:tp=8", "mixtral-8x7b@l40s:tp=8:ep=8", "llama-3-8b@l40s:tp=2:pp=4"):
        assert RooflineLatency.parse(text).split.num_devices == 8


def test_a_split_is_named_and_identified_and_one_device_is_as_before():
    both = RooflineLatency.parse("deepseek-v3@h200:tp=2:dp=8:ep=16")
    assert both.name == "roofline of deepseek-v3 on 16 x H200 (tp=2, dp=8, ep=16), shares measured"
    assert {name: both.about[name] for name in ("tensor_parallel", "data_parallel", "expert_parallel")} == {
        "tensor_parallel": 2, "data_parallel": 8, "expert_parallel": 16,
    }  # fmt: skip
    plain = RooflineLatency.parse("llama-3-8b@h200")
    assert RooflineLatency.parse("llama-3-8b@h200:pp=1:dp=1:ep=1").identity == plain.identity
    assert "pipeline_parallel" not in plain.about
    assert RooflineLatency.parse("llama-3-8b@h200:pp=2").name.endswith("2 x H200 (pp=2), shares measured")


def test_a_stage_waits_for_the_one_before_for_itself_and_for_the_tokens_that_it_is_fed_with():
    """Stages of 10 and 30: the second is always busy, and the first stands idle for 20 of each 30."""
    stages, cost = Stages(2), StepCost(1, 40, stages=(10, 30))
    assert stages.times(cost, 0, samples=True) == (1, 1, 41)
    assert stages.times(cost, 1, samples=True) == (2, 11, 71)
    assert stages.times(cost, 2, samples=True) == (3, 41, 101)  # fed with what the first step sampled
    assert stages.times(cost, 3, samples=False) == (4, 71, 131)
    stages.pass_by()
    assert stages.times(cost, 200, samples=True) == (201, 201, 241)


def test_chunks_that_sample_nothing_hold_nobody_up():
    stages, cost = Stages(2), StepCost(0, 40, stages=(10, 30))
    starts = [stages.times(cost, 0, samples=False)[1] for _ in range(4)]
    assert starts == [0, 10, 20, 30]


class Even:
    """Each of its stages takes 100 ns, the host none."""

    def __init__(self, stages: int):
        self.stages = stages

    def step_cost(self, features: StepFeatures) -> StepCost:
        return StepCost(0, 100 * self.stages, stages=(100,) * self.stages)


class Journal(CoreListener):
    """Keeps which requests each step had, and when it was decided, started and ended."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], int, int]] = []

    def committed(self, batch) -> None:
        if batch:
            self.steps.append(([seq.seq_id for seq in batch.seqs], batch.start_ns, batch.end_ns))


def served(arrivals: list[int], stages: int) -> list[tuple[list[int], int, int]]:
    settings = Settings(pipeline_parallel_size=stages, pipeline_depth=1, num_gpu_blocks=1000)
    requests = [Request(number, at_ns, (Part(number, 0, 8),), 3) for number, at_ns in enumerate(arrivals)]
    journal = Journal()
    simulate(requests, settings.build_core(listener=journal), Even(stages))
    return journal.steps


def test_one_request_leaves_all_stages_but_one_idle():
    assert served([0], 3) == [([0], 0, 300), ([0], 300, 600), ([0], 600, 900)]


def test_requests_of_other_steps_fill_the_stages_and_delay_nobody():
    """The one that comes at 50 finds four steps decided, two of them empty, and is in the next, behind one stage."""
    assert served([0, 50], 3) == [
        ([0], 0, 300), ([0], 300, 600), ([1], 400, 700), ([0], 600, 900), ([1], 700, 1000), ([1], 1000, 1300),
    ]  # fmt: skip


def test_requests_that_share_their_steps_leave_the_other_stages_idle():
    together = served([0, 0, 0], 3)
    assert together == [([0, 1, 2], start, start + 300) for start in (0, 300, 600)]


def test_a_pipelines_run_is_decided_again_from_its_record_and_its_waits_add_up(tmp_path):
    options = FleetOptions()
    specs, words = options.build_replicas({"num_gpu_blocks": 60}, latency="roofline:llama-3-8b@h100:pp=4")
    requests = [Request(number, number * 3_000_000, (Part(number, 0, 300),), 40) for number in range(30)]
    summary = options.serve(Workload(requests), specs, out=tmp_path / "run")
    assert specs[0].settings.pipeline_parallel_size == 4 and summary["preemptions"] > 0
    record = load_record(tmp_path / "run")
    assert replay(record).is_exact and record.run["settings"]["pipeline_parallel_size"] == 4
    overlaps = sum(later["start_ns"] < before["end_ns"] for before, later in pairwise(record.steps))
    assert overlaps > len(record.steps) / 3
    waits = waits_of([record])
    assert len(waits) == 30 and sum(one.e2e_ns["pipeline"] for one in waits) > 0
    for one in waits:
        assert one.e2e_ns.total() == one.row["finish_ns"] - one.row["arrival_ns"]


def test_stages_that_settings_and_latency_do_not_agree_on_are_refused():
    for values, words in (
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size is 4, expected 2, as the latency has"),
        ({"pipeline_depth": 0}, "pipeline_parallel_size is 2, expected pipeline_depth 1"),
        ({"composition": "prefill-first"}, "expected pipeline_depth 1, composition 'mixed'"),
        ({"scheduling_policy": "shortest"}, "and scheduling_policy fcfs or priority beside it"),
    ):
        with pytest.raises(InputError, match=words):
            FleetOptions().build_replicas({"pipeline_depth": 1} | values, latency="roofline:llama-3-8b@h100:pp=2")


def test_data_parallel_ranks_are_replicas_with_schedulers_of_their_own(tmp_path):
    options = FleetOptions(replicas=2, router="round-robin")
    specs, _ = options.build_replicas({}, latency="roofline:mixtral-8x7b@h200:tp=2:dp=2:ep=4")
    assert len(specs) == 4
    requests = [Request(number, number * 3_000_000, (Part(number, 0, 300),), 5) for number in range(8)]
    assert options.serve(Workload(requests), specs)["finished"] == 8
    alone = FleetOptions()
    specs, _ = alone.build_replicas({}, latency="roofline:mixtral-8x7b@h200:tp=2:dp=2:ep=4")
    assert len(specs) == 2 and alone.serve(Workload(requests), specs)["finished"] == 8
    with pytest.raises(InputError, match="expected none of die, restart and slow with dp"):
        FleetOptions.load({"replicas": 2, "die": ["0:1:2"]}).build_replicas(
            {}, latency="roofline:mixtral-8x7b@h200:tp=2:dp=2:ep=4"
        )


def test_the_gpus_of_a_deployment_are_those_of_all_ranks_and_stages():
    for text, expected in (("llama-3-8b@h100:tp=2:pp=2", 4), ("mixtral-8x7b@h100:tp=2:dp=2:ep=4", 4)):
        point = Point.of({"trace": "none", "latency": f"roofline:{text}", "replicas": 3})
        assert point.gpus() == {"h100": 3 * expected}
