"""Shapes from configurations: as many parameters as transformers makes and the field publishes, or refused by name."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from twinserve.settings.errors import InputError
from twinserve.sim.model_configs import KINDS, SHAPES, SHAPES_FOLDER, load_shape, shape_of, shipped_models
from twinserve.sim.shapes import (
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layers,
    LinearAttention,
    Mamba,
    ModelShape,
)

TRANSFORMERS_CANNOT_MAKE = {"hunyuan_v1_dense", "nemotron"}
"""Their default configurations lack a size that their models need."""
NO_DEFAULTS = {"kimi_k2", "deepseek_v2"}
"""No kind of transformers', a DeepSeek-V3 by another name; and one whose default has no number of chosen experts."""


WITH_ATTENTION = {
    "bamba": {"attn_layer_indices": [3, 11, 30]},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4},
}
"""Their default configurations attend to no tokens anywhere, and so have no pool."""


def default_config(model_type: str) -> dict:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **WITH_ATTENTION.get(model_type, {}))
    return json.loads(config.to_json_string(use_diff=False))


def parameters_in_transformers(model_type: str) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **WITH_ATTENTION.get(model_type, {})))
    return sum(parameter.numel() for parameter in model.parameters())


def causal_model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", sorted(set(KINDS) - TRANSFORMERS_CANNOT_MAKE - NO_DEFAULTS))
def test_every_kind_has_the_parameters_that_transformers_makes(model_type, tmp_path):
    pytest.importorskip("transformers")
    if model_type not in causal_model_types():
        pytest.skip(f"this transformers has no {model_type}")
    (tmp_path / "config.json").write_text(json.dumps(default_config(model_type)))
    assert load_shape(tmp_path).num_parameters == pytest.approx(parameters_in_transformers(model_type), rel=0.001)


@pytest.mark.parametrize("model_type", sorted(set(KINDS) - TRANSFORMERS_CANNOT_MAKE - NO_DEFAULTS))
def test_a_field_that_is_left_out_is_what_transformers_takes_for_it_or_is_asked_for(model_type):
    pytest.importorskip("transformers")
    if model_type not in causal_model_types():
        pytest.skip(f"this transformers has no {model_type}")
    config = default_config(model_type)
    whole, num_refused = shape_of(config, model_type, Path("config.json")), 0
    for name in set(config) - {"model_type"}:
        fewer = {field: value for field, value in config.items() if field != name}
        try:
            assert shape_of(fewer, model_type, Path("config.json")) == whole, name
        except InputError as error:
            num_refused += 1
            assert "config.json: " in str(error) and "expected" in str(error)
    assert num_refused >= 4


JUNK = (None, True, -1, 1.5, 10**30, "x", [], [{}], {}, {"a": 1})
NAMES_OF_LAYERS = ("quantization_config", "layers_block_type", "hybrid_override_pattern", "layer_types", "text_config")


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3", "nemotron_h", "ernie4_5_moe"]
)
def test_a_field_of_another_kind_is_refused_by_name_or_means_what_its_absence_does(model_type):
    pytest.importorskip("transformers")
    if model_type not in causal_model_types():
        pytest.skip(f"this transformers has no {model_type}")
    config, num_refused = dict.fromkeys(NAMES_OF_LAYERS) | default_config(model_type), 0
    for name, value in product(config, JUNK):
        try:
            shape_of(config | {name: value}, model_type, Path("config.json"))
        except InputError as error:
            num_refused += 1
            assert str(error).startswith("config.json: ") and "\n" not in str(error)
    assert num_refused >= 40


QUANTIZED = {
    "modules_to_not_convert": ["lm_head"], "bits": 4, "group_size": 128, "weight_block_size": [128, 128],
    "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "group_size": None}}},
    "ignore": ["lm_head"], "kv_cache_scheme": {"num_bits": 8, "type": "float"},
}  # fmt: skip


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "mxfp4", "compressed-tensors"])
def test_a_quantization_of_another_kind_is_refused_by_name(method):
    config = json.loads((SHAPES_FOLDER / "qwen3-0.6b" / "config.json").read_text())
    config["quantization_config"] = said = QUANTIZED | {"quant_method": method}
    assert shape_of(config, "x", Path("config.json")).num_parameters > 0
    num_refused = 0
    for name, value in product(said, (*JUNK, [0, 0], [1], {"a": []}, {"a": {"weights": {"num_bits": {}}}})):
        try:
            shape_of(config | {"quantization_config": said | {name: value}}, "x", Path("config.json"))
        except InputError as error:
            num_refused += 1
            assert str(error).startswith("config.json: ") and "\n" not in str(error)
    assert num_refused >= 20
    with pytest.raises(InputError, match=r"config.json: quantization_config.quant_method is \[\], expected"):
        shape_of(config | {"quantization_config": said | {"quant_method": []}}, "x", Path("config.json"))


def test_ernies_configuration_without_the_layers_that_have_experts_is_priced_with_a_dense_first_one():
    config = {
        "model_type": "ernie4_5_moe", "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288,
        "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "moe_num_experts": 64, "moe_k": 6,
        "moe_intermediate_size": 1536, "moe_num_shared_experts": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    assert shape_of(config, "ernie", Path("config.json")).num_parameters == pytest.approx(21.83e9, rel=0.001)


def test_every_default_of_transformers_is_of_a_known_kind_or_refused_by_name():
    """ERNIE 4.5 MoE was priced as a dense model of 3.35 G parameters in silence, instead of 21.8."""
    pytest.importorskip("transformers")
    refused, priced = set(), set()
    for model_type in causal_model_types():
        try:
            config = default_config(model_type)
        except Exception:  # what transformers itself cannot make is nothing to be priced
            continue
        text = config.get("text_config")
        kind = text["model_type"] if isinstance(text, dict) else model_type
        try:
            shape_of(config, model_type, Path("config.json"))
            priced.add(kind)
        except InputError as error:
            assert "config.json: " in str(error) and "expected" in str(error)
            refused.add(model_type)
    assert priced <= set(KINDS) and "ernie4_5_moe" in priced
    assert {"mamba2", "jamba", "falcon_h1", "gpt2", "deepseek_v32", "zamba2"} <= refused


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_shapes_have_the_parameters_that_their_models_are_published_with(name):
    model, shape = shipped_models()[name], SHAPES[name]
    assert model["source"].startswith("https://huggingface.co/")
    assert shape.num_parameters / 1e9 == pytest.approx(model["billions"], rel=0.01)
    if "active_billions" in model:
        assert shape.num_active_parameters / 1e9 == pytest.approx(model["active_billions"], rel=0.03)


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
def test_shapes_of_the_engine_have_the_parameters_that_their_models_are_known_for(name, billions):
    assert SHAPES[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_what_a_token_keeps_is_what_is_published():
    """DeepSeek-V2's paper: 576 values a layer, in place of 2 x 8 x 128 of grouped heads."""
    assert SHAPES["deepseek-v3"].kv_bytes_per_token() == 61 * (512 + 64) * 2
    assert SHAPES["llama-3-70b"].kv_bytes_per_token() == 2 * 80 * 8 * 128 * 2
    assert SHAPES["qwen3-next-80b-a3b"].kv_bytes_per_token() == 12 * 2 * 2 * 256 * 2, "a quarter of its layers"


def test_layers_of_all_kinds_are_counted_and_mixers_without_a_pool_and_networks_without_experts_have_none():
    assert [SHAPES[name].num_layers for name in ("gemma-3-1b", "qwen3-next-80b-a3b", "deepseek-v3")] == [26, 48, 61]
    linear, mamba = LinearAttention(2, 4, 8, 8, 4), Mamba(4, 8, 16, 1, 4)
    assert linear.kv_values() == linear.kv_values(2) == mamba.kv_values() == FeedForward(64).distinct(9) == 0
    assert [(one.inputs, one.outputs) for one in linear.matrices(64)] == [(64, 64 + 32), (64, 2 * 4), (32, 64)]


def test_what_compresses_queries_and_keys_lies_whole_on_every_device():
    split = [one.is_split for one in LatentAttention(8, 32, 16, 8, 4, 8).matrices(64)]
    assert split == [False, True, False, True, True]


def test_layers_are_of_the_kinds_that_the_models_have():
    assert SHAPES["gemma-3-1b"].layers == (
        Layers(22, Attention(4, 1, 256, 512), FeedForward(6912)),
        Layers(4, Attention(4, 1, 256), FeedForward(6912)),
    )
    assert SHAPES["gpt-oss-20b"].layers == (
        Layers(12, Attention(64, 8, 64, 128), Experts(32, 4, 2880)),
        Layers(12, Attention(64, 8, 64), Experts(32, 4, 2880)),
    )
    mixer = LatentAttention(128, 1536, 512, 128, 64, 128)
    assert SHAPES["deepseek-v3"].layers == (
        Layers(3, mixer, FeedForward(18432)),
        Layers(58, mixer, Experts(256, 8, 2048, 2048)),
    )
    assert SHAPES["starcoder2-3b"].layers == (Layers(30, Attention(24, 2, 128, 4096), FeedForward(12288, False)),)
    experts = Experts(512, 10, 512, 512, has_shared_gate=True)
    assert SHAPES["qwen3-next-80b-a3b"].layers == (
        Layers(36, LinearAttention(16, 32, 128, 128, 4), experts),
        Layers(12, Attention(16, 2, 256, is_gated=True), experts),
    )


def test_layers_of_llama_4_attend_to_their_chunk_and_every_fourth_to_all():
    experts, dense = Experts(128, 1, 8192, 8192), FeedForward(16384)
    chunked, full = Attention(40, 8, 128, 8192), Attention(40, 8, 128)
    assert SHAPES["llama-4-maverick"].layers == (
        Layers(24, chunked, dense),
        Layers(12, chunked, experts),
        Layers(12, full, experts),
    )


def test_blocks_of_nemotron_h_are_mixers_with_the_network_behind_them():
    mamba = Mamba(64, 64, 128, 8, 4, 32)
    experts = Experts(128, 6, 1856, 3712, is_gated=False)
    shape = SHAPES["nemotron-3-nano-30b-a3b"]
    assert shape.layers == (
        Layers(17, mamba, experts),
        Layers(6, mamba, FeedForward(0)),
        Layers(6, Attention(32, 2, 128), experts),
    )
    assert shape.num_sums == 52, "one behind each block"
    assert shape.state_bytes == 23 * (4 * 64 * 64 * 128 + 2 * 3 * (64 * 64 + 2 * 8 * 128))


@pytest.mark.parametrize("pattern", ["-M", "M--", "MX", "", 3])
def test_patterns_of_blocks_that_cannot_be_are_refused(pattern):
    config = shipped_models()["nemotron-3-nano-30b-a3b"]["config"] | {"hybrid_override_pattern": pattern}
    with pytest.raises(InputError, match="hybrid_override_pattern is .*expected"):
        shape_of(config | {"intermediate_size": 8}, "a", Path("x"))


LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def quantized(**said) -> ModelShape:
    return shape_of(LLAMA | {"quantization_config": said}, "llama", Path("config.json"))


def test_quantised_weights_take_the_bits_that_the_configuration_says():
    plain = shape_of(LLAMA, "llama", Path("config.json"))
    float8 = quantized(quant_method="fp8", activation_scheme="dynamic", modules_to_not_convert=["lm_head"])
    assert (float8.weight_bits, float8.arithmetic, float8.kv_bits) == (8, "float8", 16)
    assert quantized(quant_method="awq", bits=4, group_size=128).weight_bits == 4 + 20 / 128
    assert quantized(quant_method="gptq", bits=8, group_size=-1).weight_bits == 8
    weights, inputs = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    compressed = quantized(
        quant_method="compressed-tensors", config_groups={"group_0": group}, kv_cache_scheme={"num_bits": 8}
    )
    assert (compressed.weight_bits, compressed.arithmetic, compressed.kv_bits) == (8, "float8", 8)
    embeddings = 2 * 128256 * 4096
    assert float8.weight_bytes() == plain.weight_bytes() - (plain.num_parameters - embeddings)
    assert SHAPES["gpt-oss-120b"].weight_bytes() / 1e9 == pytest.approx(65.2, rel=0.005), "its checkpoint"


def test_a_model_of_text_and_images_is_priced_by_its_text():
    text = {"model_type": "qwen2", **LLAMA}
    whole = {"model_type": "qwen2_vl", "text_config": text, "vision_config": {"hidden_size": 1}}
    assert shape_of(whole, "a", Path("x")) == shape_of(text, "a", Path("x"))


def test_what_the_text_of_text_and_images_says_of_its_weights_holds():
    """Kimi K2.5 says it there; its experts of 4 bits were priced with 16 in silence."""
    said = {"quant_method": "awq", "bits": 4, "group_size": 128}
    whole = {"text_config": {"model_type": "qwen2", **LLAMA, "quantization_config": said}}
    assert shape_of(whole, "a", Path("x")).weight_bits == 4 + 20 / 128
    with pytest.raises(InputError, match="dtype is 'float32', expected bfloat16 or float16"):
        shape_of({"text_config": {"model_type": "qwen2", **LLAMA, "dtype": "float32"}}, "a", Path("x"))


def test_a_quantisation_in_a_file_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load_shape(tmp_path).weight_bits == 16
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(InputError, match=r"hf_quant_config\.json: expected none beside config\.json"):
        load_shape(tmp_path)
