"""Power: what steps move and compute, worked out by hand, and the joules of whole runs."""

import json
from pathlib import Path

import pytest
from shell import twinserve

from twinserve.planning.fleets import FleetOptions
from twinserve.settings.errors import InputError
from twinserve.sim.devices import DEVICES, IDLE_SHARE, PEAKS, Device, Power
from twinserve.sim.latency import StepFeatures
from twinserve.sim.power import Metered, MeteredLatency, Use, Work, energy_of
from twinserve.sim.roofline import RooflineLatency
from twinserve.sim.shapes import ModelShape
from twinserve.sim.splits import Split
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import load_record
from twinserve.worlds.run import metered
from twinserve.worlds.workload import Workload

__all__ = ["twinserve"]
ROOT = Path(__file__).resolve().parents[2]
TINY = ModelShape.dense("tiny", 1000, 64, 128, 2, 4, 4, 16)
POWER = Power(idle_w=100, active_w=50, joules_per_byte=1e-9, joules_per_operation=1e-12, source="made up")
OWN = Device(
    name="own", bandwidth=1e12, flops=1e14, memory_mib=9_537, link=1e9, source="made up", shares=PEAKS,
    measured_power=POWER,
)  # fmt: skip
VALUES = 64 * 192 + 64 * 64 + 64 * 256 + 128 * 64
"""Weights of a layer."""


def decode(rows: int, context: int) -> StepFeatures:
    return StepFeatures(0, rows, 0, rows, rows * context, rows * context, rows, longest_decode=context)


def work_by_hand(rows: int, context: int) -> tuple[int, int]:
    """Bytes and operations of a step of decodes."""
    activations = rows * (64 + 192 + 64 + 64 + 64 + 256 + 128 + 64)
    moved = 2 * (2 * (VALUES + activations) + rows * context * 2 * 64 * 2) + 2 * (64_000 + rows * (64 + 1000))
    computed = 2 * (2 * rows * VALUES + 4 * rows * context * 64) + 2 * rows * 64_000
    return moved, computed


def test_a_step_moves_and_computes_what_its_shape_says_whatever_the_device():
    for device in (OWN, DEVICES["h200"], DEVICES["l4"]):
        use = Work(RooflineLatency(TINY, device)).of(decode(3, 100), busy_ns=5_000)
        assert (round(use.bytes), round(use.operations)) == work_by_hand(3, 100)
        assert use.busy_s == 5e-6


def test_all_devices_of_a_step_are_counted():
    alone = Work(RooflineLatency(TINY, OWN)).of(decode(3, 100), busy_ns=5_000)
    pair = Work(RooflineLatency(TINY, OWN, 2)).of(decode(3, 100), busy_ns=5_000)
    assert pair.busy_s == 2 * alone.busy_s and pair.operations == pytest.approx(alone.operations)
    assert alone.bytes < pair.bytes < 1.2 * alone.bytes  # the inputs of shared products are read by both
    own = OWN.model_copy(update={"network": 1e9})
    stages = Work(RooflineLatency(TINY, own, split=Split(pipeline=2))).of(decode(3, 100), busy_ns=5_000)
    assert stages.busy_s == alone.busy_s and stages.operations == pytest.approx(alone.operations, rel=0.01)


def test_hops_between_devices_move_no_bytes():
    far = OWN.model_copy(update={"hop_ns": 5_000})
    uses = [Work(RooflineLatency(TINY, device, 4)).of(decode(3, 100), busy_ns=5_000) for device in (OWN, far)]
    assert uses[0] == uses[1]


def test_steps_that_repeat_one_another_are_metered_as_one_by_one():
    latency = RooflineLatency(TINY, OWN)
    at_once, singly = (MeteredLatency(latency, Work(latency)) for _ in range(2))
    at_once.watch(decode(3, 100), 20)
    for number in range(20):
        singly.watch(decode(3, 100 + number))
    assert at_once.use.bytes == singly.use.bytes == sum(work_by_hand(3, 100 + number)[0] for number in range(20))
    assert at_once.use.operations == singly.use.operations
    assert at_once.use.busy_s == pytest.approx(singly.use.busy_s) and singly.use.busy_s > 0


def test_a_model_whose_steps_are_metered_hears_of_them_all_the_same():
    class Watching(RooflineLatency):
        def watch(self, features: StepFeatures, count: int = 1) -> None:
            told.append((features, count))

    told: list[tuple[StepFeatures, int]] = []
    MeteredLatency(Watching(TINY, OWN), Work(RooflineLatency(TINY, OWN))).watch(decode(3, 100), 20)
    assert told == [(decode(3, 100), 20)]


def test_joules_are_those_of_time_of_busy_time_of_bytes_and_of_operations():
    assert Use(2.0, 3e9, 4e12).joules(POWER, 10.0) == pytest.approx(100 * 10 + 50 * 2 + 3 + 4)


def test_a_device_that_nobody_measured_draws_its_limit_while_it_computes_and_says_so():
    power = DEVICES["h100"].power
    assert power is not None and power.idle_w == IDLE_SHARE * 700 and power.idle_w + power.active_w == 700
    assert power.source.startswith("assumed: its limit of 700 W (NVIDIA H100 data sheet")
    assert DEVICES["b300"].power is None, "no limit is known"
    assert OWN.power is POWER


def test_all_devices_draw_what_idle_ones_do_from_the_first_arrival_to_the_last_finish():
    latency = MeteredLatency(RooflineLatency(TINY, OWN), Work(RooflineLatency(TINY, OWN)))
    latency.use = Use(2.0, 3e9, 4e12)
    summary = {"duration_s": 10.0, "output_tokens": 50, "finished": 5}
    energy = energy_of([Metered(latency, 4, "own", POWER)], summary)
    assert energy["joules"] == pytest.approx(4 * 100 * 10 + 50 * 2 + 3 + 4) == 10 * energy["watts"]


def test_what_nobody_got_has_no_energy_of_its_own():
    latency = MeteredLatency(RooflineLatency(TINY, OWN), Work(RooflineLatency(TINY, OWN)))
    energy = energy_of([Metered(latency, 1, "own", POWER)], {"duration_s": 2.0, "output_tokens": 0, "finished": 0})
    assert (energy["joules"], energy["watts"]) == (200, 100)
    assert energy["joules_per_output_token"] is energy["joules_per_request"] is None
    nothing = energy_of([Metered(latency, 1, "own", POWER)], {"duration_s": 0.0, "output_tokens": 0, "finished": 3})
    assert nothing["joules"] is nothing["joules_per_request"] is nothing["watts"] is None


def test_repeated_steps_are_busy_as_each_of_them_is_where_a_model_does_not_say_all_at_once():
    class Growing:
        def step_cost(self, features):
            return 0, features.kv_tokens

    metered = MeteredLatency(Growing(), Work(RooflineLatency(TINY, OWN)))
    metered.watch(decode(3, 100), 3)
    assert metered.use.busy_s == pytest.approx((300 + 303 + 306) / 1e9)


def requests(count: int) -> Workload:
    return Workload([Request(number, number * 20_000_000, (Part(number, 0, 300),), 20) for number in range(count)])


def test_a_runs_joules_lie_between_those_of_idle_and_of_busy_devices_and_are_on_its_record(tmp_path):
    for options, devices in ((FleetOptions(), 2), (FleetOptions(replicas=3), 6)):
        specs, _ = options.build_replicas({}, latency="roofline:llama-3-8b@h100:tp=2")
        told, derived = metered(specs)
        out = tmp_path / str(devices)
        summary = options.serve(requests(30), told, out=out, derived=derived)
        energy = summary["energy"]
        assert 70 * devices < energy["watts"] < 700 * devices
        assert energy["joules"] == pytest.approx(energy["watts"] * summary["duration_s"])
        assert energy["joules_per_request"] == pytest.approx(energy["joules"] / 30)
        assert energy["joules_per_output_token"] == pytest.approx(energy["joules"] / (30 * 20))
        plain = options.serve(requests(30), specs)
        assert {name: plain[name] for name in ("ttft_s", "steps", "duration_s")} == {
            name: summary[name] for name in ("ttft_s", "steps", "duration_s")
        }
    assert json.loads((tmp_path / "2" / "run.json").read_text())["summary"]["energy"]["joules"] > 0
    basis = load_record(tmp_path / "2").run["summary"]["energy"]["basis"]
    assert basis.startswith("H100: assumed: its limit of 700 W (NVIDIA H100 data sheet")


def test_energy_of_what_is_not_known_is_refused():
    for latency in ("roofline:llama-3-8b@b300", "smollm2-135m-cpu-2-threads"):
        specs, _ = FleetOptions().build_replicas({"num_gpu_blocks": 1000}, latency=latency)
        with pytest.raises(InputError, match="energy is .*expected a latency of a model whose shape is known"):
            metered(specs)


def test_the_command_says_joules_and_the_page_of_the_run_too(twinserve, tmp_path):
    trace = tmp_path / "trace.jsonl"
    made = twinserve("trace", "make", "--out", trace, "--requests", 20, "--rate", 5)
    assert made.code == 0, made.err
    for device, basis in (
        ("h100", "H100: assumed: its limit of 700 W"),
        ("h200", "H200: benchmarks/results/h200/energy.json"),
    ):
        out, page = tmp_path / device, tmp_path / f"{device}.html"
        result = twinserve("sim", trace, "--latency", f"roofline:llama-3-8b@{device}", "--energy", "--out", out)
        assert result.code == 0, result.err
        assert "J an output token" in result.out and basis in " ".join(result.out.split())
        assert twinserve("report", out, "--out", page).code == 0
        assert "J an output token" in page.read_text() and basis in page.read_text()


def test_the_table_of_a_measured_card_is_what_its_file_says():
    measured = json.loads((ROOT / "benchmarks" / "results" / "h200" / "energy.json").read_text())
    assert DEVICES["h200"].measured_power == Power(**measured["power"])
    assert max(map(abs, measured["errors_of_held_out"].values())) < 0.1
