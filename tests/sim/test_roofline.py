"""RooflineLatency: worked out by hand, and never less than what must be read or computed."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinserve.settings.errors import InputError
from twinserve.sim.devices import DEVICES, GIB, MIB, NVLINK_HOP_NS, PEAKS, Collectives, Device
from twinserve.sim.latency import StepFeatures
from twinserve.sim.model_configs import SHAPES, load_shape
from twinserve.sim.quantized_configs import with_float8
from twinserve.sim.roofline import MEMORY_SHARE, RESERVED_BYTES, RooflineLatency
from twinserve.sim.shapes import (
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layers,
    LinearAttention,
    Matrix,
    ModelShape,
)
from twinserve.sim.splits import ALL_REDUCE_NS, Split

TINY = ModelShape.dense("tiny", 1000, 64, 128, 2, 4, 2, 16)
ROUND = Device(
    name="round", bandwidth=1e9, flops=1e12, memory_mib=9_537, link=1e9, source="made up", host_ns=500, host_seq_ns=10,
    shares=PEAKS,
)  # fmt: skip
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def changed(device: Device, **values) -> Device:
    return device.model_copy(update=values)


def decode(rows: int, context: int) -> StepFeatures:
    return StepFeatures(0, rows, 0, rows, rows * context, rows * context, rows, longest_decode=context)


def prefill(tokens: int, start: int = 0) -> StepFeatures:
    pairs = tokens * start + tokens * (tokens + 1) // 2
    return StepFeatures(0, 1, tokens, 0, start + tokens, pairs, 1, prompts=((start, tokens),))


def together(one: StepFeatures, other: StepFeatures) -> StepFeatures:
    """Both steps in one."""
    summed = {
        name: getattr(one, name) + getattr(other, name)
        for name in ("seqs", "prompt_tokens", "decode_tokens", "kv_tokens", "attention_pairs", "sampled", "prompts")
    }
    return one._replace(longest_decode=max(one.longest_decode, other.longest_decode), **summed)


def attention_ns(latency: RooflineLatency, features: StepFeatures) -> int:
    """What attention adds to a step."""
    without = features._replace(kv_tokens=features.decode_tokens, prompts=())
    return latency.step_cost(features)[1] - latency.step_cost(without._replace(kv_tokens=0))[1]


def test_a_step_bound_by_bandwidth_takes_its_bytes_over_the_bandwidth():
    layer_values = 64 * 128 + 64 * 64 + 64 * 256 + 128 * 64
    activations = 128 + 64 + 64 + 64 + 64 + 256 + 128 + 64
    layer = 2 * (layer_values + activations) + 100 * 2 * 2 * 16 * 2
    output = 2 * (64 * 1000 + 64 + 1000)
    assert RooflineLatency(TINY, ROUND).step_cost(decode(1, 100)) == (510, 2 * layer + output)


def test_a_step_bound_by_arithmetic_takes_its_operations_over_the_flops():
    slow = changed(ROUND, bandwidth=1e15, flops=1e9)
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
    shape = ModelShape.dense("tiny", 1000, 64, 128, 2, 8, 2, 16)
    shares = [RooflineLatency(shape, ROUND, tp).num_blocks(16) for tp in (1, 2, 4, 8)]
    assert shares[1] == pytest.approx(2 * shares[0], rel=0.01)
    assert shares[2] == pytest.approx(shares[1], rel=0.01) == pytest.approx(shares[3], rel=0.01)


def test_the_pool_of_a_real_vllm_is_met():
    """vLLM 0.24 makes 40,361 blocks of 16 for this shape in 0.9 of an H100."""
    blocks = RooflineLatency(SHAPES["qwen3-0.6b"], DEVICES["h100"]).num_blocks(16)
    assert blocks == pytest.approx(40_361, rel=0.01)


def test_a_model_that_does_not_fit_is_refused_with_the_sizes():
    with pytest.raises(ValueError, match="141.1 GB of weights a device, which leaves no room for KV"):
        RooflineLatency(SHAPES["llama-3-70b"], DEVICES["h100"]).num_blocks(16)
    assert RooflineLatency(SHAPES["llama-3-70b"], DEVICES["h100"], 4).num_blocks(16) > 1000


def test_measured_is_said_of_the_model_whose_steps_were_measured_on_the_device_and_of_no_other():
    basis = {
        "llama-3-8b@h200": "measured",
        "llama-3-8b@h200:tp=2": "shares measured",
        "llama-3-8b@h200:quantization=fp8": "shares measured",
        "llama-3-8b@h200:kv_cache_dtype=fp8": "shares measured",
        "qwen3-0.6b@h200": "shares measured",
        "llama-3-8b@h100": "shares measured",
        "llama-3-8b@a100": "datasheet",
    }
    assert {text: RooflineLatency.parse(text).basis for text in basis} == basis
    assert RooflineLatency.parse("llama-3-8b@H200:tp=2").name == "roofline of llama-3-8b on 2 x H200, shares measured"


def test_the_identity_changes_with_a_figure():
    latency = RooflineLatency.parse("llama-3-8b@H100:tp=2")
    others = [
        RooflineLatency.parse("llama-3-8b@a100"),
        RooflineLatency(latency.shape, changed(latency.device, bandwidth=3e12), 2),
        RooflineLatency.parse("llama-3-8b@H100:tp=2:kv_cache_dtype=fp8"),
    ]
    assert len({latency.identity, *(other.identity for other in others)}) == 4
    assert RooflineLatency.parse("llama-3-8b@h100:tp=2").identity == latency.identity


def test_decode_steps_that_were_timed_on_an_h100_are_met_within_five_percent():
    """Its roofline with one share of the bandwidth for all was 18 to 21% below them."""
    latency = RooflineLatency.parse("llama-3-8b@h100")
    steps = json.loads((RESULTS / "h100" / "decode-llama-3-8b.json").read_text())["steps"]
    assert [step["decodes"] for step in steps] == [1, 32, 131]
    for step in steps:
        modelled = latency.step_cost(decode(step["decodes"], step["context"]))[1] / 1000
        assert modelled == pytest.approx(step["us"], rel=0.05)


def test_the_shares_are_those_that_were_fitted():
    fits = json.loads((RESULTS / "roofline-shares.json").read_text())
    for name in ("h100", "h200"):
        shares = DEVICES[name].shares
        assert shares.device.lower() == name
        assert {field: getattr(shares, field) for field in fits[name]["shares"]} == fits[name]["shares"]
    assert DEVICES["h200"].shares.shapes == (fits["shape"],)
    errors = fits["h200"]["errors_of_unseen_halves"]
    assert all(kind["mean_size"] < 0.06 and abs(kind["bias"]) < 0.02 for kind in errors.values())


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


def test_every_device_has_a_source():
    assert set(DEVICES) == {
        "a100", "h100", "h200", "h20", "b200", "gb200", "b300", "a10", "l4", "l20", "l40s", "rtx4090", "rtxpro6000",
        "mi300x", "mi355x",
    }  # fmt: skip
    for device in DEVICES.values():
        assert device.source and device.shares.source
        assert 0 < device.shares.bandwidth <= 1 and 0 < device.shares.flops <= 1


def test_memory_is_what_the_parts_have():
    """A data sheet's GB are GiB of chips: 141, 24 and 192 times 10^9 would leave pools 14 to 31% short."""
    expected = {"h200": 143_771 * MIB, "rtx4090": 24_564 * MIB, "mi300x": 192 * GIB, "h100": 81_559 * MIB}
    assert {name: DEVICES[name].memory_bytes for name in expected} == expected
    short = changed(DEVICES["h200"], memory_mib=141 * 10**9 // MIB)
    blocks, fewer = (
        RooflineLatency(SHAPES["llama-3-70b"], device, 2).num_blocks(16) for device in (DEVICES["h200"], short)
    )
    assert blocks > 1.1 * fewer


OWN = """
name = "Own"
bandwidth = 2e12
flops = 300e12
memory_mib = 40960
link = 64e9
source = "its vendor"
"""


def test_a_device_of_ones_own_is_read_from_toml(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    latency = RooflineLatency.parse(f"llama-3-8b@{path}:tp=2")
    assert latency.name == "roofline of llama-3-8b on 2 x Own, datasheet, all-reduces by NCCL's own model"
    assert latency.device.memory_bytes == 40 * GIB and latency.device.shares == DEVICES["h200"].shares
    path.write_text(
        OWN + '[shares]\ndevice = "Own"\nbandwidth = 0.5\nflops = 0.5\nattention_bandwidth = 0.5\n'
        'attention_flops = 0.5\nlayer_ns = 0\nsource = "mine"\nshapes = ["llama-3-8b"]\n'
    )
    assert RooflineLatency.parse(f"llama-3-8b@{path}").basis == "measured"


def test_a_file_with_a_base_says_what_differs_from_a_device_that_ships(tmp_path):
    path = tmp_path / "slow.toml"
    path.write_text('base = "h200"\nlink = 64e9\nhop_ns = 1000\nsource = "the same without NVLink"\n')
    device = RooflineLatency.parse(f"llama-3-8b@{path}:tp=2").device
    known = DEVICES["h200"]
    assert known.collectives is not None and device.collectives is None
    others = {"collectives": None, "nvlink": None}
    assert device == changed(known, link=64e9, hop_ns=1000, source="the same without NVLink", **others)
    path.write_text('base = "h200"\nnetwork = 25e9\n')
    assert RooflineLatency.parse(f"llama-3-8b@{path}").device == changed(known, network=25e9)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('base = "tpu"', "base is 'tpu', expected a device: a100, h100"),
        ('base = "h200"\nlinked = 0', "linked is 0, expected: Input should be greater than or equal to 1"),
        (OWN.replace("2e12", "-1"), "bandwidth is -1, expected: Input should be greater than or equal to 1000000"),
        (OWN + "speed = 3", "speed is 3, there is no such field"),
        (OWN.replace('source = "its vendor"', ""), "source is .*, expected: Field required"),
        ("name = ", "expected TOML: "),
    ],
    ids=["no base", "linked", "negative", "unknown", "no source", "no TOML"],
)
def test_a_device_that_cannot_be_is_refused_by_its_field(tmp_path, text, problem):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=problem) as refused:
        RooflineLatency.parse(f"llama-3-8b@{path}")
    assert "own.toml" in str(refused.value)


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
    assert replace(load_shape(tmp_path), name="mistral-7b") == SHAPES["mistral-7b"]
    assert RooflineLatency.parse(f"{tmp_path}@l4").shape.name == tmp_path.name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("llama-3-8b", "expected roofline:MODEL@DEVICE"),
        ("llama-3-8b@h100:cp=2", "expected roofline:MODEL@DEVICE"),
        ("llama-3-8b@tpu", "device is 'tpu', expected a TOML file or a device: a100, h100"),
        ("llama-9@h100", "latency is 'llama-9', expected a config.json"),
        ("llama-3-8b@h100:tp=3", "expected a divisor of the 32 query heads"),
        ("llama-3-8b@h100:tp=0", "tensor_parallel is 0, expected >= 1"),
        ("llama-3-8b@h100:tp=2:tp=2", "expected roofline:MODEL@DEVICE"),
        ("llama-3-8b@h100:kv_cache_dtype=int8", "kv_cache_dtype is int8, expected fp8"),
        ("deepseek-v3@h200:tp=8:quantization=fp8", "expected none: deepseek-v3 is quantised already"),
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
        ({"moe_num_experts": 64}, "moe_num_experts is 64, expected none: this kind of model is priced without experts"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is 512, expected none: this kind of model is priced without latent"),
        ({"model_type": "jamba"}, "model_type is 'jamba', expected a model that is known: "),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "expected 8 of full_attention, sliding_attention"),
        ({"layer_types": ["chunked_attention"] * 8}, "expected 8 of full_attention, sliding_attention"),
        ({"sliding_window": 4096}, "sliding_window is 4096, expected layer_types beside it"),
        ({"text_config": {}}, "is None, expected an integer from 1 to"),
        ({"torch_dtype": "float32"}, "torch_dtype is 'float32', expected bfloat16 or float16"),
        ({"quantization_config": {"quant_method": "quip"}}, "quant_method is 'quip', expected one that is known: fp8"),
        (
            {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}},
            "modules_to_not_convert is 'model.layers.0.mlp.up_proj', expected no large matrix",
        ),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2', expected an integer from 1 to"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers is 1000000000000000000, expected an integer from 1 to"),
        (
            {"num_local_experts": 8},
            "num_local_experts is 8, expected none: this kind of model is priced without experts",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 8}, "expected at most the 4 experts"),
    ],
)
def test_a_config_that_lacks_a_size_or_has_experts_is_refused(tmp_path, change, words):
    config = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 8
    )
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError) as error:
        load_shape(tmp_path)
    assert words in str(error.value)


def test_devices_pay_for_two_all_reduces_a_layer_their_hops_and_what_they_move():
    tokens, shape = 7, ModelShape.dense("tiny", 1000, 64, 128, 2, 8, 8, 16)

    def cost(degree: int, **values: float) -> int:
        return RooflineLatency(shape, changed(ROUND, **values), degree).step_cost(decode(tokens, 100))[1]

    for degree in (2, 4, 8):
        moved_ns = 2 * (degree - 1) / degree * tokens * 64 * 2 / (ROUND.link / 1e9)
        free = cost(degree, link=float("inf"), hop_ns=0)
        assert cost(degree, hop_ns=0) - free == pytest.approx(shape.num_layers * 2 * moved_ns, abs=1)
        hops_ns = 2 * (degree - 1) * NVLINK_HOP_NS
        assert cost(degree) - cost(degree, hop_ns=0) == pytest.approx(shape.num_layers * 2 * hops_ns, abs=1)
    alone = changed(ROUND, link=float("inf"), hop_ns=0, bandwidth=1e18, flops=1e21)
    two = RooflineLatency(shape, alone, 2).step_cost(decode(tokens, 100))[1]
    assert two == pytest.approx(shape.num_layers * 2 * ALL_REDUCE_NS, abs=1)


def test_measured_all_reduces_take_the_place_of_nccls_own_model():
    """Of as many ranks as were measured they take the line's time; each rank more is two hops more."""
    tokens, shape = 7, ModelShape.dense("tiny", 1000, 64, 128, 2, 8, 8, 16)
    measured = Collectives(ranks=2, all_reduce_ns=9_000, link=5e8, source="measured here")

    def sums_ns(degree: int, device: Device) -> float:
        free = device.model_copy(
            update={"collectives": Collectives(ranks=degree, all_reduce_ns=0, link=1e30, source="-")}
        )
        costs = [RooflineLatency(shape, one, degree).step_cost(decode(tokens, 100))[1] for one in (device, free)]
        return (costs[0] - costs[1]) / shape.num_sums

    device = ROUND.model_copy(update={"collectives": measured})
    for degree in (2, 4):
        moved_ns = 2 * (degree - 1) / degree * tokens * 64 * 2 / (5e8 / 1e9)
        expected = 9_000 + 2 * (degree - 2) * NVLINK_HOP_NS + moved_ns
        assert sums_ns(degree, device) == pytest.approx(expected, abs=1)
    assert RooflineLatency(shape, device, 2).identity != RooflineLatency(shape, ROUND, 2).identity
    assert "collectives" not in RooflineLatency(shape, ROUND, 2).about["device"]
    assert sums_ns(2, ROUND.at_peak) == pytest.approx(7 * 64 * 2 / (ROUND.link / 1e9), abs=1)


def test_all_reduces_that_nobody_has_measured_are_held_to_those_that_were_over_any_nvlink_and_it_is_said():
    """Else the device that was measured would come out behind those whose links are taken to reach their whole rate."""
    measured, link = DEVICES["h200"].collectives, DEVICES["h200"].link
    for name in ("h100", "h20", "a100", "b200", "gb200", "b300"):
        device = DEVICES[name]
        assert device.collectives is None and device.all_reduces.link == pytest.approx(
            measured.link / link * device.link
        )
        assert device.all_reduces.all_reduce_ns == measured.all_reduce_ns
        said = f"all-reduces assumed to reach the H200's share of its link, {measured.link / link:.0%}, and its latency"
        assert RooflineLatency(SHAPES["llama-3-8b"], device, 2).name.endswith(said)
        assert "all-reduces" not in RooflineLatency(SHAPES["llama-3-8b"], device).name
    for name in ("l40s", "mi300x"):
        assert DEVICES[name].all_reduces is None
        assert RooflineLatency(SHAPES["llama-3-8b"], DEVICES[name], 2).name.endswith("by NCCL's own model")
    h100, h200 = (RooflineLatency(SHAPES["llama-3-70b"], DEVICES[name], 8) for name in ("h100", "h200"))
    for step in (decode(64, 64_000), prefill(8192)):
        assert h200.step_cost(step)[1] <= h100.step_cost(step)[1]


@pytest.mark.parametrize(
    ("model", "degree", "words"),
    [
        ("qwen3-14b", 5, "expected a divisor or a multiple of the 8 key-value heads"),
        ("llama-3.1-405b", 64, "expected at most 8, as many as share a link of the RTX 4090"),
        ("deepseek-v3", 3, "expected a divisor of the 128 query heads"),
        ("qwen3-next-80b-a3b", 3, "expected a divisor of the 16"),
    ],
)
def test_degrees_that_heads_or_links_do_not_allow_are_refused(model, degree, words):
    with pytest.raises(ValueError, match=f"tensor_parallel is {degree}, {words}"):
        RooflineLatency(SHAPES[model], DEVICES["rtx4090"], degree)


def test_attention_of_a_mixed_step_takes_what_chunks_and_decodes_take():
    """Not the greater of all arithmetic and all reading: they are different kernels on different rows."""
    latency = RooflineLatency(SHAPES["llama-3-8b"], DEVICES["h100"])
    chunk, decodes, other = prefill(8000, 4000), decode(64, 9000), prefill(100, 7000)
    apart = [attention_ns(latency, step) for step in (chunk, decodes, other)]
    assert min(apart) > 10**5
    assert attention_ns(latency, together(together(chunk, decodes), other)) == pytest.approx(sum(apart), abs=3)


def test_repetitions_cost_what_single_steps_do_whatever_the_attention():
    for model in ("llama-3-8b", "gpt-oss-20b", "deepseek-v2-lite", "qwen3-next-80b-a3b", "gemma-3-1b"):
        latency = RooflineLatency(SHAPES[model], DEVICES["h200"])
        for step in (
            decode(1, 100),
            decode(7, 100),
            decode(7, 900),
            prefill(300, 100),
            together(decode(3, 500), prefill(64, 128)),
        ):
            many = latency.repeated_costs(step, 40)[1].tolist()
            assert many == [latency.step_cost(step.repeated(number, 0))[1] for number in range(1, 41)]


def windowed(window: int | None) -> RooflineLatency:
    shape = replace(TINY, layers=(Layers(2, Attention(4, 2, 16, window), FeedForward(128)),))
    return RooflineLatency(shape, changed(ROUND, bandwidth=1e6, flops=1e6))


@given(start=st.integers(0, 200), length=st.integers(1, 200), window=st.integers(1, 250))
def test_a_prompt_in_a_window_costs_the_pairs_within_it_one_by_one(start, length, window):
    """Arithmetic is made to bind: 4 x 16 x 4 operations a pair and a layer, at 1 a microsecond."""
    latency = windowed(window)
    slow = RooflineLatency(latency.shape, changed(latency.device, bandwidth=1e18))
    pairs = sum(min(position, window) for position in range(start + 1, start + length + 1))
    assert attention_ns(slow, prefill(length, start)) == pytest.approx(2 * 256 * pairs * 1000, rel=1e-9)


def test_decodes_in_a_window_read_no_more_than_it():
    free, narrow = windowed(None), windowed(64)
    assert attention_ns(narrow, decode(3, 1000)) == attention_ns(free, decode(3, 64))
    assert attention_ns(narrow, decode(3, 50)) == attention_ns(free, decode(3, 50))
    assert narrow.kv_token_ns == 0 < free.kv_token_ns, "of a token however far back"


def test_latent_attention_reads_the_latent_and_computes_by_heads():
    mixer = LatentAttention(8, None, 32, 16, 8, 16)
    shape = replace(TINY, layers=(Layers(2, mixer, FeedForward(128)),))
    reads = RooflineLatency(shape, changed(ROUND, flops=1e18))
    assert attention_ns(reads, decode(3, 100)) == 2 * 3 * 100 * (32 + 8) * 2
    computes = RooflineLatency(shape, changed(ROUND, flops=1e9, bandwidth=1e18))
    assert attention_ns(computes, decode(3, 100)) == 2 * 3 * 100 * 2 * 8 * (32 + 8 + 32)
    expanded = 60 * 2 * 32 * 8 * (16 + 16)
    pairs = 10 * 60 + 10 * 11 // 2
    assert attention_ns(computes, prefill(10, 60)) == 2 * (expanded + pairs * 2 * 8 * (16 + 8 + 16))
    halves = [RooflineLatency(shape, ROUND, degree).shape.kv_bytes_per_token(degree) for degree in (1, 2)]
    assert halves[0] == halves[1] == 2 * 40 * 2, "each device keeps the whole latent"


def test_linear_attention_moves_a_state_a_row_however_long_the_context_and_takes_memory_a_sequence():
    mixer = LinearAttention(2, 4, 8, 8, 4)
    shape = replace(TINY, layers=(Layers(3, mixer, FeedForward(128)), Layers(1, Attention(4, 2, 16), FeedForward(128))))
    state = 4 * 4 * 8 * 8 + 2 * (2 * 2 * 8 + 4 * 8) * 3
    assert shape.state_bytes == 3 * state
    latency = RooflineLatency(shape, changed(ROUND, flops=1e18))
    kv_ns = 100 * 2 * 2 * 16 * 2
    assert attention_ns(latency, decode(5, 100)) == 5 * kv_ns
    only = replace(shape, layers=shape.layers[:1])
    one, five = (RooflineLatency(only, latency.device)._attention(decode(rows, 100)) for rows in (1, 5))
    assert (one, five) == (3 * 2 * state, 5 * 3 * 2 * state)
    assert latency.num_blocks(16, 100) == pytest.approx(
        latency.num_blocks(16) - 100 * shape.state_bytes / (16 * 2 * 2 * 16 * 2), abs=1
    )


def test_experts_are_read_as_far_as_tokens_choose_them():
    experts = Experts(8, 2, 32)
    assert experts.distinct(1) == 2
    assert experts.distinct(2) == pytest.approx(2 + 2 * 6 / 8)
    assert experts.distinct(10_000) == pytest.approx(8)
    shape = replace(TINY, layers=(Layers(1, Attention(4, 2, 16), experts),))
    dense = replace(TINY, layers=(Layers(1, Attention(4, 2, 16), FeedForward(64)),))
    read, whole = (RooflineLatency(one, changed(ROUND, flops=1e18)) for one in (shape, dense))
    router = 2 * (64 * 8 + 64 + 8)
    activations = 2 * (2 * (64 + 64 + 32 + 64)) - 2 * (64 + 128 + 64 + 64)
    difference = read.step_cost(decode(1, 10))[1] - whole.step_cost(decode(1, 10))[1]
    assert difference == router + activations, "a token reads its two experts, which are a network of twice the size"


def test_weights_of_fewer_bits_are_read_sooner_and_float8_computes_sooner_where_the_device_can():
    shape = SHAPES["llama-3-8b"]
    few, many = decode(1, 10), prefill(8000)

    def costs(text: str) -> tuple[int, int]:
        latency = RooflineLatency.parse(text)
        return latency.step_cost(few)[1], latency.step_cost(many)[1]

    plain, float8 = costs("llama-3-8b@h200"), costs("llama-3-8b@h200:quantization=fp8")
    assert 0.5 < float8[0] / plain[0] < 0.65 and 0.5 < float8[1] / plain[1] < 0.65
    plain, float8 = costs("llama-3-8b@a100"), costs("llama-3-8b@a100:quantization=fp8")
    assert 0.5 < float8[0] / plain[0] < 0.65 and float8[1] == pytest.approx(plain[1], rel=0.001)
    narrow = RooflineLatency.parse("llama-3-8b@h200:kv_cache_dtype=fp8")
    assert narrow.kv_token_ns == RooflineLatency(shape, DEVICES["h200"]).kv_token_ns / 2


LINEAR = LinearAttention(2, 4, 8, 8, 4)


def test_all_reduces_move_what_all_tokens_have_and_not_only_those_that_sample():
    shape = ModelShape.dense("tiny", 1000, 64, 128, 2, 8, 8, 16)
    near, far = (RooflineLatency(shape, changed(ROUND, link=link), 2) for link in (float("inf"), ROUND.link))
    moved_ns = 9 * 64 * 2 / (ROUND.link / 1e9)
    difference = far.step_cost(prefill(9))[1] - near.step_cost(prefill(9))[1]
    assert difference == pytest.approx(shape.num_layers * 2 * moved_ns, abs=1)


def test_devices_share_states_and_each_reads_all_that_goes_into_its_part_of_a_matrix():
    shape = replace(
        TINY, layers=(Layers(3, LINEAR, FeedForward(128)), Layers(1, Attention(4, 2, 16), FeedForward(128)))
    )
    two = RooflineLatency(shape, changed(ROUND, flops=1e18), 2)
    a_block = shape.kv_bytes_per_token(2) * 16
    assert two.num_blocks(16) - two.num_blocks(16, 100) == pytest.approx(50 * shape.state_bytes / a_block, abs=1)
    halves = RooflineLatency(shape, changed(ROUND, flops=1e18), split=Split(pipeline=2))
    taken = halves.num_blocks(16) - halves.num_blocks(16, 10_000)
    half_a_block = shape.kv_bytes_per_token(1) * 16 / 2
    assert taken == pytest.approx(5_000 * shape.state_bytes / half_a_block, abs=1), "half of the layers, half a state"
    held = f"{50 * shape.state_bytes / 1e3:.1f} GB of states"
    with pytest.raises(ValueError, match=f"GB of weights and {held} a device, which leaves no room for KV"):
        two.num_blocks(16, 10**8)
    far = changed(ROUND, flops=1e18, link=float("inf"), hop_ns=0)
    one, two = (RooflineLatency(TINY, far, degree)._layer(TINY.layers[0], 10) for degree in (1, 2))
    matrices = TINY.layers[0].matrices(64)
    assert all(matrix.is_split for matrix in matrices)
    inputs = sum(matrix.inputs for matrix in matrices)
    assert two == one / 2 + 10 * inputs * 2 / 2, "half of the weights and of what comes out, and all that goes in"


def test_a_prompt_moves_a_state_once_and_reads_a_window_before_each_of_its_ends():
    shape = replace(TINY, layers=(Layers(3, LINEAR, FeedForward(128)),))
    latency = RooflineLatency(shape, changed(ROUND, flops=1e18))
    assert latency._attention(prefill(40)) == 2 * shape.state_bytes
    narrow = replace(TINY, layers=(Layers(2, Attention(4, 2, 16, 64), FeedForward(128)),))
    read = RooflineLatency(narrow, changed(ROUND, flops=1e18))
    assert attention_ns(read, prefill(10, 1000)) == 2 * (64 + 9) * 2 * 2 * 16 * 2


def test_a_prompts_arithmetic_and_its_reading_go_on_at_once():
    """The one that takes longer is what attention takes, by itself."""
    computing, reading = changed(ROUND, bandwidth=1e18, flops=1e9), changed(ROUND, bandwidth=1e9, flops=1e18)
    both = changed(ROUND, bandwidth=1e9, flops=1e9)
    costs = [attention_ns(RooflineLatency(TINY, device), prefill(50, 200)) for device in (computing, reading, both)]
    assert min(costs) > 0 and costs[2] == pytest.approx(max(costs[:2]), abs=1) and abs(costs[0] - costs[1]) > 1


def test_arithmetic_on_states_is_paid_for_where_it_takes_longer_than_moving_them():
    mixer = LinearAttention(2, 4, 8, 8, 4)
    shape = replace(TINY, layers=(Layers(3, mixer, FeedForward(128)),))
    slow = RooflineLatency(shape, changed(ROUND, bandwidth=1e18, flops=1e9))
    assert slow._attention(decode(5, 100)) == pytest.approx(5 * 3 * mixer.state_operations)
    assert slow._attention(prefill(40)) == pytest.approx(40 * 3 * mixer.state_operations)


def test_what_is_not_split_each_device_computes_whole():
    matrix = Matrix(64, 32, is_split=False)
    one, two = (RooflineLatency(TINY, changed(ROUND, linked=2), degree) for degree in (1, 2))
    assert one._projection(4, matrix, 1.0, 16.0, 1e3) == two._projection(4, matrix, 1.0, 16.0, 1e3) > 0
    assert two._projection(4, matrix._replace(is_split=True), 1.0, 16.0, 1e3) < two._projection(
        4, matrix, 1.0, 16.0, 1e3
    )


def test_many_tokens_read_every_expert_and_one_reads_those_that_it_chooses():
    layers = Layers(1, Attention(4, 2, 16), Experts(8, 2, 32))
    latency = RooflineLatency(replace(TINY, layers=(layers,)), changed(ROUND, flops=1e18))
    weights = sum(matrix.size for matrix in layers.network.of_each(64)) * 2
    plain = [sum(m.size * 2 + tokens * (m.inputs + m.outputs) * 2 for m in layers.matrices(64)) for tokens in (1, 1000)]
    moved = sum((matrix.inputs + matrix.outputs) * 2 * 2 for matrix in layers.network.of_each(64))
    assert latency._layer(layers, 1) == pytest.approx(plain[0] + 2 * weights + moved)
    assert latency._layer(layers, 1000) == pytest.approx(plain[1] + 8 * weights + 1000 * moved)


def test_one_device_more_than_share_a_link_is_refused_and_each_reads_its_part_of_the_heads():
    device = changed(ROUND, linked=3)
    assert RooflineLatency(TINY, device, 2).kv_token_ns == RooflineLatency(TINY, device).kv_token_ns / 2 > 0
    with pytest.raises(ValueError, match="tensor_parallel is 4, expected at most 3, as many as share a link"):
        RooflineLatency(TINY, device, 4)


def test_as_many_blocks_fit_as_their_bytes_do_and_not_one_more():
    latency = RooflineLatency(TINY, ROUND)
    room, block = MEMORY_SHARE * ROUND.memory_bytes - RESERVED_BYTES - TINY.weight_bytes(), 16 * 2 * 2 * 2 * 16 * 2
    assert latency.num_blocks(16) * block <= room < (latency.num_blocks(16) + 1) * block


def test_the_host_pays_for_each_sequence_of_a_step_whether_it_decodes_or_not():
    latency = RooflineLatency(TINY, ROUND)
    steps = prefill(5), prefill(5)._replace(sampled=0), decode(3, 10), together(prefill(5), decode(3, 10))
    assert [latency.step_cost(step)[0] for step in steps] == [510, 510, 530, 540]


def test_the_output_projection_is_computed_in_sixteen_bits_whatever_the_weights_of_layers_are():
    device = changed(ROUND, bandwidth=1e18, flops=1e9, float8_flops=2e9)
    latency, step = RooflineLatency(with_float8(TINY), device), prefill(50)
    costs = [latency.step_cost(step._replace(sampled=count))[1] for count in (0, 50)]
    assert costs[1] - costs[0] == 2 * 50 * 64 * 1000


def test_fewer_devices_than_were_measured_have_fewer_hops_and_never_less_than_none():
    shape = ModelShape.dense("tiny", 1000, 64, 128, 2, 8, 8, 16)

    def sum_ns(all_reduce_ns: float) -> float:
        measured = Collectives(ranks=4, all_reduce_ns=all_reduce_ns, link=1e30, source="made up")
        latency = RooflineLatency(shape, ROUND.model_copy(update={"collectives": measured}), 2)
        return latency._links.all_reduce_ns(7)

    assert sum_ns(100_000) == pytest.approx(100_000 - 4 * NVLINK_HOP_NS)
    assert sum_ns(NVLINK_HOP_NS) == pytest.approx(0)


@pytest.mark.parametrize(("bandwidth", "flops"), [(1e9, 1e18), (1e18, 1e9)])
def test_attention_reaches_its_own_shares_of_the_peaks_and_is_shared_by_devices(bandwidth, flops):
    """Reading its context, or computing on it; the products beside it reach other shares."""
    half = PEAKS.model_copy(update={"attention_bandwidth": 0.5, "attention_flops": 0.25})
    whole, less = (changed(ROUND, bandwidth=bandwidth, flops=flops, linked=2, shares=s) for s in (PEAKS, half))
    for step in (decode(4, 100), prefill(20, 100)):
        alone = RooflineLatency(TINY, whole)._attention(step)
        assert RooflineLatency(TINY, less)._attention(step) == pytest.approx(alone * (2 if bandwidth < flops else 4))
        assert RooflineLatency(TINY, whole, 2)._attention(step) == pytest.approx(alone / 2)
