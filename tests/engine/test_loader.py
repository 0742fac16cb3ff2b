"""Models from folders and from transformers: the same numbers, and a clear refusal of what is not honoured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_judge import GREEDY, MODELS, judge_of
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from twinserve.engine.llm import LLM
from twinserve.engine.models import Decoder, ModelConfig, adopt_model, load_model, random_model
from twinserve.settings.errors import InputError


def logits_of(model: Decoder, token_ids: list[int]) -> torch.Tensor:
    windows = model.config.windows

    def attend_alone(layer, query, key, value):
        """Causal attention of one sequence to itself, without any cache."""
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril_()
        if windows[layer] is not None:
            seen.triu_(1 - windows[layer])
        return F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)[0].transpose(0, 1)

    with torch.inference_mode():
        return model.logits(model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend_alone))


TEXT = [3, 77, 500, 12, 12, 4, 256, 311, 98, 5] * 6


@pytest.fixture
def folder(tmp_path):
    """A folder of the tiny Llama as transformers saves it."""
    judge_of("llama").model.save_pretrained(tmp_path)
    return tmp_path


def edit(path, **fields):
    """Set fields of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = judge_of(name).model
    expected = theirs(torch.tensor([TEXT])).logits[0]
    theirs.save_pretrained(tmp_path)
    for model in (adopt_model(theirs), load_model(tmp_path)):
        torch.testing.assert_close(logits_of(model, TEXT), expected, rtol=1e-4, atol=1e-4)
    assert load_model(tmp_path).config == adopt_model(theirs).config


def test_bfloat16_is_near_float32(folder):
    exact, rounded = (logits_of(load_model(folder, dtype=d), TEXT).float() for d in (torch.float32, torch.bfloat16))
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.1


def test_shards_load_as_one_file_does(tmp_path):
    model = judge_of("qwen3").model
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_model(tmp_path / "one"), load_model(tmp_path / "many")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_a_model_loads_without_transformers(folder):
    code = (
        "import sys\n"
        "from twinserve.engine.llm import LLM\n"
        "from twinserve.policies import SamplingParams\n"
        f"llm = LLM({str(folder)!r})\n"
        "llm.generate([[5, 6]], SamplingParams())\n"
        "llm.close()\n"
        "sys.exit('transformers' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_old_rope_fields_mean_the_same(folder):
    expected = logits_of(load_model(folder), TEXT)
    edit(folder / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    torch.testing.assert_close(logits_of(load_model(folder), TEXT), expected, rtol=0, atol=0)
    edit(folder / "config.json", rope_theta=500.0)
    assert not torch.allclose(logits_of(load_model(folder), TEXT), expected)


def test_all_ids_that_end_a_text_are_found(folder):
    edit(folder / "generation_config.json", eos_token_id=[2, 9])
    edit(folder / "config.json", eos_token_id=[7, 2])
    assert load_model(folder).config.eos_token_ids == (7, 2, 9)


def test_random_weights_are_made_by_their_seed():
    config = ModelConfig(64, 32, 48, 2, 4, 2, 8, 128, qk_norm=True, attention_bias=True)
    one, same, other = (random_model(config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(logits_of(one, [1, 2, 3]), logits_of(same, [1, 2, 3]))
    assert not torch.equal(logits_of(one, [1, 2, 3]), logits_of(other, [1, 2, 3]))


REFUSED_FIELDS = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures is 'GPT2LMHeadModel', expected one of LlamaForCausalLM"),
    ({"architectures": None}, "architectures is None"),
    ({"sliding_window": 512}, "sliding_window is 512, expected null, or at least the longest context (1024)"),
    ({"sliding_window": 512, "use_sliding_window": True}, "sliding_window is 512"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is "),
    (
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config.quant_method is 'awq', expected fp8 or compressed-tensors",
    ),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected \"silu\""),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of num_attention_heads (4)"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures is ['LlamaForCausalLM'], expected one of"),
    ({"hidden_size": "64"}, "hidden_size is '64', expected an integer >= 1"),
    ({"vocab_size": None}, "vocab_size is None, expected an integer >= 1"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number > 0"),
    ({"head_dim": 31}, "head_dim is 31, expected an even number"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
    ({"eos_token_id": "end"}, "eos_token_id is 'end', expected a token id"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_FIELDS, ids=[str(fields) for fields, _ in REFUSED_FIELDS])
def test_what_the_config_asks_for_and_is_not_honoured_is_refused(folder, fields, message):
    edit(folder / "config.json", **fields)
    with pytest.raises(InputError, match=re.escape(f"{folder / 'config.json'}: {message}")):
        load_model(folder)


@pytest.mark.parametrize("fields", [{"sliding_window": 512, "use_sliding_window": False}, {"sliding_window": 1024}])
def test_a_window_that_is_not_in_use_is_honoured(folder, fields):
    plain = load_model(folder).config
    edit(folder / "config.json", **fields)
    assert load_model(folder).config == plain


def test_a_mistral_that_says_no_window_has_its_default_one(tmp_path):
    judge_of("mistral").model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", sliding_window=None, max_position_embeddings=8192)
    assert load_model(tmp_path).config.windows == (4096,) * 4


def test_a_folder_must_be_there(tmp_path):
    with pytest.raises(InputError, match="nowhere: expected a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json: cannot be read: No such file"):
        load_model(tmp_path)


def test_weights_must_be_there(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(InputError, match="no weights: expected model.safetensors or model.safetensors.index.json"):
        load_model(folder)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="model.safetensors: expected safetensors: "):
        load_model(folder)
    weights.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    with pytest.raises(InputError, match="model-1.safetensors: is missing, but model.safetensors.index.json names it"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(InputError, match="index.json: weight_map is None, expected the file of each tensor"):
        load_model(folder)
    index.write_text("{")
    with pytest.raises(InputError, match="index.json:1: expected JSON"):
        load_model(folder)


@pytest.fixture
def shards(folder):
    """The folder with its weights in two files and their index; writes them changed."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{1 + (name > names[9])}.safetensors" for name in names}

    def write(weight_map: dict[str, object], more: dict[str, str] | None = None) -> Path:
        for file in set(files.values()):
            own = {name: tensors[name] for name in names if file in (files[name], (more or {}).get(name))}
            save_file(own, folder / file)
        text = json.dumps({"weight_map": files | weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
        return folder

    return write


def test_an_index_says_where_each_tensor_is(shards):
    assert load_model(shards({})).config.vocab_size == 512


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("weight_map", "more", "message"),
    [
        ({NORM: "../model-2.safetensors"}, {}, f"index.json: weight_map.{NORM} is '../model-2.safetensors', expected"),
        ({NORM: "/etc/passwd"}, {}, f"weight_map.{NORM} is '/etc/passwd', expected the name of a file beside it"),
        ({NORM: ".."}, {}, f"weight_map.{NORM} is '..', expected the name of a file beside it"),
        ({NORM: 5}, {}, f"weight_map.{NORM} is 5, expected the name of a file beside it"),
        ({NORM: "model-1.safetensors"}, {}, f"weight_map.{NORM} is 'model-1.safetensors', expected model-2.safetens"),
        ({"model.more": "model-1.safetensors"}, {}, "weight_map.model.more is 'model-1.safetensors', expected a file"),
        ({}, {NORM: "model-1.safetensors"}, f".safetensors: {NORM}, expected each tensor in one file, another has it"),
    ],
)  # fmt: skip
def test_an_index_that_says_something_else_is_refused(shards, weight_map, more, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_model(shards(weight_map, more))


def test_every_tensor_must_be_there_with_its_shape_and_no_other(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    query, norm = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
    cases = [
        (tensors | {query: torch.zeros(64, 64)}, f"{query} is 'float32 [64, 64]', expected floating point numbers of"),
        (tensors | {norm: torch.zeros(64, dtype=torch.int8)}, f"{norm} is 'int8 [64]', expected floating point"),
        ({k: v for k, v in tensors.items() if k != norm}, f"{norm}, expected a tensor of shape [64], found none"),
        (tensors | {"model.extra": torch.zeros(1)}, "model.extra, not a tensor of this architecture"),
    ]
    for changed, message in cases:
        save_file(changed, weights)
        with pytest.raises(InputError, match=re.escape(f"{folder}: {message}")):
            load_model(folder)


def test_only_causal_language_models_are_adopted():
    with pytest.raises(InputError, match="model is 'Linear', expected a Decoder or a causal language model"):
        adopt_model(torch.nn.Linear(2, 2))


def test_a_text_needs_a_tokenizer(folder):
    llm = LLM(folder)
    assert llm.tokenizer is None
    with pytest.raises(InputError, match=re.escape("prompts[0] is 'Hello', expected token ids")):
        llm.generate(["Hello"], GREEDY)
    llm.close()
