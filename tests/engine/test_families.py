"""Llama, Mistral, Qwen2 and Qwen3 from folders of transformers: its greedy tokens, and a refusal of what is beyond."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from engine_judge import GREEDY, LINEAR, LLAMA3, MODELS, YARN, Judge, judge_of, tiny
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from twinserve.engine.llm import LLM
from twinserve.engine.models import ModelConfig, adopt_model, load_model
from twinserve.engine.models.rope import LinearScaling, Llama3Scaling, YarnScaling, rotary_frequencies
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.request import Part, Request

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
SCALED = {
    "llama-llama3": LLAMA3,
    "llama-linear": LINEAR,
    "mistral-linear": LINEAR,
    "qwen3-llama3": LLAMA3,
    "llama-yarn": YARN,
}
YARNS = ["llama-yarn", "qwen2-yarn", "qwen3-yarn"]


@pytest.fixture
def opened():
    """Opens a folder to serve in chunks of up to 48 tokens, and closes it."""
    made = []

    def make(folder, device="cpu") -> LLM:
        settings = Settings.load({"max_num_seqs": 6, "max_num_batched_tokens": 48, "num_gpu_blocks": 128})
        made.append(LLM(folder, device=device, settings=settings))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model as transformers does, with fields of its config.json changed; None removes one."""

    def save(name, **fields):
        judge_of(name).model.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        values = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({field: value for field, value in values.items() if value is not None}))
        return tmp_path

    return save


def mixed_requests(max_tokens: int = 16) -> list[Request]:
    """Prompts of many lengths, some of which share a beginning."""
    alone = [Request(i, 0, (Part(i, 0, length),), max_tokens) for i, length in enumerate([1, 90, 17, 130])]
    shared = Part(100, 0, 70)
    return alone + [Request(i, 0, (shared, Part(i, 0, length)), max_tokens) for i, length in enumerate([5, 40, 1], 4)]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_in_shards_gets_the_greedy_tokens_of_transformers(name, opened, watcher, tmp_path, device):
    judge = judge_of(name)
    judge.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sequences = opened(tmp_path, device).run_trace(mixed_requests(), params=GREEDY, recorder=watcher)
    assert watcher.chunks and watcher.mixed_steps and watcher.hit_tokens
    judge.check_all(sequences)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bfloat16_folder_is_served_in_float32(name, opened, tmp_path):
    copy.deepcopy(judge_of(name).model).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval().requires_grad_(False)
    judge = Judge(theirs)
    assert not torch.equal(theirs.lm_head.weight, judge_of(name).model.lm_head.weight)
    judge.check_all(opened(tmp_path).run_trace(mixed_requests(), params=GREEDY))


def test_a_window_over_every_position_is_full_attention_to_the_last_of_them(opened, tmp_path):
    judge = Judge(tiny(MistralForCausalLM, MistralConfig, max_position_embeddings=96, sliding_window=96))
    judge.model.save_pretrained(tmp_path)
    prompt = list(range(3, 73))
    (completion,) = opened(tmp_path).generate([prompt], SamplingParams(temperature=0.0, max_tokens=99, ignore_eos=True))
    assert len(completion.token_ids) == 96 - 70
    judge.check(prompt, completion.token_ids)


def test_a_window_larger_than_what_is_served_hides_nothing(tmp_path):
    """Mistral-7B-v0.1 has a window of 4,096 of 32,768 positions."""
    judge_of("mistral-window").model.save_pretrained(tmp_path)
    llm = LLM(tmp_path, settings=Settings.load({"max_model_len": 30, "num_gpu_blocks": 8}))
    prompt = list(range(3, 23))
    (completion,) = llm.generate([prompt], GREEDY)
    llm.close()
    assert len(completion.token_ids) == 10
    judge_of("mistral-window").check(prompt, completion.token_ids)


@pytest.mark.parametrize(
    ("name", "fields", "windows"),
    [
        ("mistral-window", {}, [37] * 4),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 4097}, [4096] * 4),
        ("mistral", {"sliding_window": 512, "use_sliding_window": False}, [512] * 4),
        ("mistral", {"sliding_window": 1024}, [None] * 4),
        ("mistral-linear", {"sliding_window": 1024}, [1024] * 4),
        ("qwen2-windows", {"layer_types": None}, [None, None, 20, 20]),
        ("qwen2-windows", {"layer_types": None, "max_window_layers": 0}, [20] * 4),
        ("qwen2-windows", {"layer_types": ["full_attention"] * 4, "use_sliding_window": False}, [None] * 4),
        ("qwen3-windows", {}, [48, None, 48, None]),
        ("qwen3", {"use_sliding_window": True, "max_position_embeddings": 4097, "layer_types": None}, [None] * 4),
        ("llama", {"sliding_window": 512, "use_sliding_window": False}, [None] * 4),
    ],
)
def test_the_windows_of_layers_are_those_of_transformers(name, fields, windows, saved):
    assert list(ModelConfig.load(saved(name, **fields)).windows) == windows


@pytest.mark.parametrize(
    ("name", "fields", "longest"),
    [
        ("llama", {}, 1024),
        ("llama-linear", {}, 3 * 1024),
        ("llama-llama3", {}, 1024),
        ("llama-yarn", {}, 4 * 256),
        ("llama-yarn", {"max_position_embeddings": 256}, 4 * 256),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 4 * 1024),
    ],
)
def test_the_longest_context_is_as_the_scaling_makes_it(name, fields, longest, saved):
    assert ModelConfig.load(saved(name, **fields)).max_model_len == longest


def test_a_context_beyond_the_positions_of_a_scaled_rope_is_served(opened, tmp_path):
    """vicuna-7b-v1.5-16k: 4,096 positions, and a factor of 4."""
    judge = Judge(tiny(LlamaForCausalLM, LlamaConfig, max_position_embeddings=48, rope_scaling=dict(LINEAR)))
    judge.model.save_pretrained(tmp_path)
    prompt = list(range(3, 103))
    (completion,) = opened(tmp_path).generate([prompt], SamplingParams(temperature=0.0, max_tokens=99, ignore_eos=True))
    assert len(completion.token_ids) == 3 * 48 - 100
    judge.check(prompt, completion.token_ids)


@pytest.mark.parametrize("name", ["llama", *SCALED, *YARNS])
def test_frequencies_are_those_of_transformers(name):
    config = adopt_model(judge_of(name).model).config
    ours = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, torch.device("cpu"))
    theirs = judge_of(name).model.model.rotary_emb
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)
    amplitude = 1.0 if config.rope_scaling is None else config.rope_scaling.amplitude
    assert amplitude == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert (amplitude != 1.0) == (name in YARNS)


def test_llama3_keeps_high_frequencies_divides_low_ones_and_blends_those_between():
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    plain = rotary_frequencies(128, 500000.0, None, torch.device("cpu"))
    shares = rotary_frequencies(128, 500000.0, scaling, torch.device("cpu")) / plain
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(shares[turns >= 4], torch.ones(29))
    assert torch.equal(shares[turns <= 1], torch.full((29,), 0.125))
    blended = shares[(turns > 1) & (turns < 4)]
    assert len(blended) == 6 and (blended.diff() < 0).all() and 0.125 < blended.min() < blended.max() < 1


@pytest.mark.parametrize("name", SCALED)
def test_both_spellings_of_the_rope_mean_the_same(name, saved):
    scaling = SCALED[name]
    new = ModelConfig.load(saved(name, rope_parameters=scaling | {"rope_theta": 700.0}, rope_scaling=None))
    old = {field: value for field, value in scaling.items() if field != "rope_type"} | {"type": scaling["rope_type"]}
    assert ModelConfig.load(saved(name, rope_parameters=None, rope_scaling=old, rope_theta=700.0)) == new
    assert ModelConfig.load(saved(name, rope_scaling=scaling, rope_theta=700.0)) == new
    assert new.rope_theta == 700.0
    expected = {
        "linear": LinearScaling(3.0),
        "llama3": Llama3Scaling(8.0, 1.0, 4.0, 256),
        "yarn": YarnScaling(4.0, 256, 0.1 * math.log(4.0) + 1.0),
    }
    assert new.rope_scaling == expected[scaling["rope_type"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_without_scaling_has_none(name, saved):
    for rope in ({"rope_type": "default", "partial_rotary_factor": 1.0}, {}, None):
        config = ModelConfig.load(saved(name, rope_parameters=rope, rope_scaling=None))
        assert config.rope_scaling is None and config.rope_theta == 10000.0


REFUSED_EVERYWHERE = [
    ({"rope_parameters": YARN | {"factor": None}}, "rope_parameters.factor is None, expected a number > 0"),
    (
        {"rope_parameters": YARN | {"beta_fast": 0.5}},
        "rope_parameters.beta_fast is 0.5, expected at least beta_slow (1",
    ),
    ({"rope_parameters": YARN | {"truncate": "no"}}, "rope_parameters.truncate is 'no', expected true or false"),
    ({"rope_parameters": YARN | {"finetuned": True}}, "rope_parameters.finetuned is True, expected none beside"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type is 'dynamic', expected one of default"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type is 'longrope', expected one of default, lin"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type is ['linear'], expected one of default"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object with a rope_type"),
    ({"rope_parameters": LINEAR | {"factor": "2"}}, "rope_parameters.factor is '2', expected a number > 0"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is None, expected a number > 0"),
    (
        {"rope_parameters": LINEAR | {"beta_fast": 32}},
        "rope_parameters.beta_fast is 32, expected none beside",
    ),
    ({"rope_parameters": LINEAR | {"rope_theta": -1}}, "rope_parameters.rope_theta is -1, expected a number > 0"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5, expected 1.0"),
    ({"rope_parameters": {"full_attention": LINEAR}}, "rope_parameters.full_attention is {'rope_type': 'linear'"),
    (
        {"rope_parameters": LLAMA3 | {"high_freq_factor": 1}},
        "rope_parameters.high_freq_factor is 1, expected more",
    ),
    ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": None}}, "rope_parameters.original_max_position"),
    (
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
        "original_max_position_embeddings is 64",
    ),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25, expected 1.0"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected \"silu\""),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config.quant_method is 'gptq', expected",
    ),
    ({"num_local_experts": 8}, "num_local_experts is 8, expected none: mixtures of experts are not supported"),
    ({"num_experts": 128, "moe_intermediate_size": 64}, "num_experts is 128, expected none: mixtures of experts"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is ['full_attention', 'sliding"),
    (
        {"layer_types": ["full_attention"] * 3},
        "layer_types is ['full_attention', 'full_attention', 'full_attention'], ex",
    ),
    ({"layer_types": 4}, 'layer_types is 4, expected "full_attention"'),
    ({"sliding_window": "long", "use_sliding_window": True}, "sliding_window is 'long', expected an integer >= 1"),
]
REFUSED = [
    ("llama", {"sliding_window": 512}, "sliding_window is 512, expected null, or at least the longest context (1024)"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types is ['sliding_attention', 'sliding_attention'"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types is ['sliding_attention', 'sliding_attention'"),
    ("mistral", {"layer_types": ["sliding_attention"] * 4}, "layer_types is ['sliding_attention', 'sliding_attention'"),
    (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": -1, "layer_types": None, "sliding_window": 20},
        "max_window_layers is -1, expected an integer >= 0",
    ),
    ("qwen2", {"attention_bias": True}, "attention_bias is True, expected false: this architecture has no such bias"),
    ("mistral", {"attention_bias": True}, "attention_bias is True, expected false: this architecture has no such bias"),
    ("mistral", {"mlp_bias": True}, "mlp_bias is True, expected false: this architecture has no such bias"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias is True, expected false: this architecture has no such bias"),
] + [(name, fields, message) for fields, message in REFUSED_EVERYWHERE for name in FAMILIES]


@pytest.mark.parametrize(
    ("name", "fields", "message"), REFUSED, ids=[f"{name}-{fields}" for name, fields, _ in REFUSED]
)
def test_what_is_not_honoured_is_refused_by_file_field_and_value(name, fields, message, saved):
    folder = saved(name, **fields)
    with pytest.raises(InputError, match=re.escape(f"{folder / 'config.json'}: {message}")):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("mistral", "num_key_value_heads", 8), ("qwen3", "num_key_value_heads", 32), ("qwen3", "head_dim", 128)],
)
def test_a_field_that_is_left_out_means_what_it_means_to_transformers(name, field, value, saved):
    folder = saved(name, num_attention_heads=32, **{field: None})
    assert type(judge_of(name).model.config).from_pretrained(folder).to_dict()[field] == value
    config = ModelConfig.load(folder)
    assert {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}[field] == value


def test_an_output_projection_beside_a_tied_embedding_must_be_the_same(saved):
    folder = saved("llama", tie_word_embeddings=True)
    with pytest.raises(
        InputError, match=re.escape("lm_head.weight, expected the numbers of model.embed_tokens.weight")
    ):
        load_model(folder)
