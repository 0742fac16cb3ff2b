"""Models of real shapes with random weights."""

from __future__ import annotations

import json

import pytest
import torch
from engine_judge import GREEDY

from twinserve.engine.llm import LLM
from twinserve.engine.models import Decoder, ModelConfig
from twinserve.engine.models.dummy import SHAPES, dummy_model, shape_names
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.model_configs import SHAPES as simulated_shapes
from twinserve.sim.shapes import Attention, FeedForward, Layers

FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "parameters", "heads"),
    [
        ("qwen3-0.6b", 596_128_768, (16, 8, 128)),
        ("smollm2-135m-shape", 134_515_008, (9, 3, 64)),
        ("llama-3-8b", 8_030_261_248, (32, 8, 128)),
    ],
)
def test_the_shapes_that_ship(name, parameters, heads):
    config = ModelConfig.load(SHAPES / name)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == heads
    with torch.device("meta"):
        model = Decoder(config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert name in shape_names()


@pytest.mark.parametrize("name", shape_names())
def test_the_engine_and_the_simulator_have_the_same_shapes(name):
    config, shape = ModelConfig.load(SHAPES / name), simulated_shapes[name.removesuffix("-shape")]
    attention = Attention(config.num_heads, config.num_kv_heads, config.head_dim)
    assert shape.layers == (Layers(config.num_layers, attention, FeedForward(config.intermediate_size)),)
    assert (config.vocab_size, config.hidden_size) == (shape.vocab_size, shape.hidden_size)
    assert config.tie_word_embeddings == shape.tied


def test_a_folder_without_weights_serves(folder):
    llm = LLM(folder, load_format="dummy", settings=Settings.load({"num_gpu_blocks": 8}))
    assert llm.facts()["load_format"] == "dummy"
    assert len(llm.generate([[5, 6, 7]], GREEDY)[0].token_ids) == GREEDY.max_tokens
    llm.close()


def test_the_seed_makes_the_weights(folder):
    first, again, other = (dummy_model(folder, seed=seed).embedding.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("model", "load_format", "message"),
    [
        ("qwen3-7b", "dummy", "model is 'qwen3-7b', expected .*qwen3-0.6b, .*smollm2-135m-shape, or a folder"),
        ("qwen3-0.6b", "empty", "load_format is 'empty', expected: Input should be 'auto' or 'dummy'"),
    ],
)
def test_what_has_no_shape_is_refused(model, load_format, message):
    with pytest.raises(InputError, match=message):
        LLM(model, load_format=load_format)


def test_a_model_with_weights_keeps_them(llama):
    with pytest.raises(InputError, match="expected auto: the model has its weights"):
        LLM(llama.model, load_format="dummy")
