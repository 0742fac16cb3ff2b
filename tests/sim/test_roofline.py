"""RooflineLatency: worked out by hand, and never less than what must be read or computed."""

import json
import pickle
from dataclasses import replace

import pytest

from twinserve.settings.errors import InputError
from twinserve.sim.latency import StepFeatures
from twinserve.sim.roofline import DEVICES, Device, RooflineLatency
from twinserve.sim.shapes import SHAPES, ModelShape

TINY = ModelShape("tiny", 1000, 64, 128, 2, 4, 2, 16)
ROUND = Device("round", 1e9, 1e12, 10**10, 1e9, 8, "datasheet", "made up", 1.0, 1.0, host_ns=500, host_seq_ns=10)


def decode(rows: int, context: int) -> StepFeatures:
    return StepFeatures(0, rows, 0, rows, rows * context, rows * context, rows)


def prefill(tokens: int) -> StepFeatures:
    return StepFeatures(0, 1, tokens, 0, tokens, tokens * (tokens + 1) // 2, 1)


def test_a_step_bound_by_bandwidth_takes_its_bytes_over_the_bandwidth():
    layer_values = 64 * 128 + 64 * 64 + 64 * 256 + 128 * 64
    activations = 128 + 64 + 64 + 64 + 64 + 256 + 128 + 64
    layer = 2 * (layer_values + activations) + 100 * 2 * 2 * 16 * 2
    output = 2 * (64 * 1000 + 64 + 1000)
    assert RooflineLatency(TINY, ROUND).step_cost(decode(1, 100)) == (510, 2 * layer + output)


def test_a_step_bound_by_arithmetic_takes_its_operations_over_the_flops():
    slow = replace(ROUND, bandwidth=1e15, flops=1e9)
    tokens, layer_values = 50, 64 * 128 + 64 * 64 + 64 * 256 + 128 * 64
    layer = 2 * tokens * layer_values + 4 * (tokens * (tokens + 1) // 2) * 4 * 16
    assert RooflineLatency(TINY, slow).step_cost(prefill(tokens))[1] == 2 * layer + 2 * 64 * 1000


def test_uneven_contexts_cost_what_they_sum_to():
    model = RooflineLatency(SHAPES["llama-3-8b"], DEVICES["h100"])
    even, uneven = decode(8, 1000), decode(8, 1000)._replace(kv_tokens=7 * 100 + 7300)
    assert even.kv_tokens == uneven.kv_tokens
    assert model.step_cost(even) == model.step_cost(uneven)
    assert model.step_cost(decode(8, 2000))[1] > model.step_cost(even)[1]


def test_parts_of_a_model_on_more_devices_take_less_but_no_less_than_the_share():
    shape = SHAPES["llama-3-70b"]
    one, four = (RooflineLatency(shape, DEVICES["h100"], tp).step_cost(decode(16, 2000))[1] for tp in (1, 4))
    assert one / 4 < four < one / 2
    with pytest.raises(ValueError, match="expected a divisor of the 64 query heads"):
        RooflineLatency(shape, DEVICES["h100"], 3)


def test_key_value_heads_that_cannot_be_shared_further_are_held_by_each_device():
    shape = replace(TINY, num_heads=8, num_kv_heads=2)
    shares = [RooflineLatency(shape, ROUND, tp).num_blocks(16) for tp in (1, 2, 4, 8)]
    assert shares[1] == pytest.approx(2 * shares[0], rel=0.01)
    assert shares[2] == pytest.approx(shares[1], rel=0.01) == pytest.approx(shares[3], rel=0.01)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("qwen3-0.6b", 0.596),
        ("qwen3-1.7b", 1.72),
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("qwen3-14b", 14.77),
        ("qwen3-32b", 32.76),
        ("mistral-7b", 7.25),
        ("smollm2-135m", 0.1345),
    ],
)
def test_shipped_shapes_have_the_parameters_that_their_models_are_known_for(name, billions):
    assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_pool_of_a_real_vllm_is_met():
    """vLLM 0.24 makes 40,361 blocks of 16 for this shape in 0.9 of an H100."""
    blocks = RooflineLatency(SHAPES["qwen3-0.6b"], DEVICES["h100"]).num_blocks(16)
    assert blocks == pytest.approx(40_361, rel=0.01)


def test_a_model_that_does_not_fit_is_refused_with_the_sizes():
    with pytest.raises(ValueError, match="141.1 GB of weights a device, which leaves no room for KV"):
        RooflineLatency(SHAPES["llama-3-70b"], DEVICES["h100"]).num_blocks(16)
    assert RooflineLatency(SHAPES["llama-3-70b"], DEVICES["h100"], 4).num_blocks(16) > 1000


def test_the_name_says_whether_the_device_was_measured_and_the_identity_changes_with_a_figure():
    measured = RooflineLatency.parse("llama-3-8b@H100:tp=2")
    datasheet = RooflineLatency.parse("llama-3-8b@a100")
    assert measured.name == "roofline of llama-3-8b on 2 x H100, measured"
    assert datasheet.name == "roofline of llama-3-8b on A100, datasheet"
    other = RooflineLatency(measured.shape, replace(measured.device, bandwidth=3e12), 2)
    assert len({measured.identity, datasheet.identity, other.identity}) == 3
    assert RooflineLatency.parse("llama-3-8b@h100:tp=2").identity == measured.identity


class FreeHost(RooflineLatency):
    """A roofline of one's own, whose host takes no time."""

    def step_cost(self, features):
        return 0, super().step_cost(features)[1]


def test_a_roofline_can_be_built_upon_and_pickled_compiled_or_not():
    latency = FreeHost(SHAPES["llama-3-8b"], DEVICES["h100"])
    features = StepFeatures(0, 2, 0, 2, 20, 20, 2)
    host_ns, device_ns = RooflineLatency(SHAPES["llama-3-8b"], DEVICES["h100"]).step_cost(features)
    assert host_ns > 0 and latency.step_cost(features) == (0, device_ns)
    assert pickle.loads(pickle.dumps(latency)).step_cost(features) == (0, device_ns)


def test_every_device_has_a_source_and_a_basis():
    assert set(DEVICES) == {"a100", "h100", "h200", "l4", "l40s", "rtx4090", "mi300x"}
    for device in DEVICES.values():
        assert device.source and device.basis in ("measured", "datasheet")
        assert 0 < device.bandwidth_share <= 1 and 0 < device.flops_share <= 1


def test_a_config_of_ones_own_is_read(tmp_path):
    config = {
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert replace(ModelShape.load(tmp_path), name="mistral-7b") == SHAPES["mistral-7b"]
    assert RooflineLatency.parse(f"{tmp_path}@l4").shape.name == tmp_path.name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("llama-3-8b", "expected roofline:MODEL@DEVICE"),
        ("llama-3-8b@h100:dp=2", "expected roofline:MODEL@DEVICE"),
        ("llama-3-8b@tpu", "latency is 'tpu', expected a device: h100"),
        ("llama-9@h100", "latency is 'llama-9', expected a config.json"),
        ("llama-3-8b@h100:tp=3", "expected a divisor of the 32 query heads"),
        ("llama-3-8b@h100:tp=x", "invalid literal"),
    ],
)
def test_what_is_no_roofline_is_refused_in_one_line(text, words):
    with pytest.raises(InputError) as error:
        RooflineLatency.parse(text)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size is None, expected an integer from 1 to"),
        ({"moe_num_experts": 64}, "moe_num_experts is 64, expected none: mixtures of experts"),
        ({"model_type": "bamba"}, "model_type is 'bamba', expected a dense decoder: llama,"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "expected full_attention in every layer"),
        ({"text_config": {}}, "its sizes lie in text_config"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2', expected an integer from 1 to"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers is 1000000000000000000, expected an integer from 1 to"),
        ({"num_local_experts": 8}, "num_local_experts is 8, expected none: mixtures of experts"),
    ],
)
def test_a_config_that_lacks_a_size_or_has_experts_is_refused(tmp_path, change, words):
    config = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 8
    )
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError) as error:
        ModelShape.load(tmp_path)
    assert words in str(error.value)


def test_two_devices_pay_for_two_all_reduces_a_layer_and_what_they_move(monkeypatch):
    tokens = 7

    def cost(link: float, all_reduce_ns: int) -> int:
        monkeypatch.setattr("twinserve.sim.roofline.ALL_REDUCE_NS", all_reduce_ns)
        return RooflineLatency(TINY, replace(ROUND, link=link), 2).step_cost(decode(tokens, 100))[1]

    moved_ns = tokens * 64 * 2 / (ROUND.link / 1e9)
    assert cost(ROUND.link, 0) - cost(float("inf"), 0) == TINY.num_layers * 2 * moved_ns
    assert cost(ROUND.link, 10_000) - cost(ROUND.link, 0) == TINY.num_layers * 2 * 10_000
