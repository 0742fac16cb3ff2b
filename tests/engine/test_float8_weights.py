"""Weights in float8: the numbers of their rounding, models and checkpoints made of them, and what is refused."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_judge import GREEDY, MODELS, judge_of
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_numbers import TEXT, error, logits_of, some
from safetensors.torch import load_file, save_file
from thread_group import on_ranks
from torch import nn
from torch.nn import functional as F

from twinserve.engine.float8 import FLOAT8
from twinserve.engine.llm import LLM
from twinserve.engine.models import Decoder, ModelConfig, adopt_model, load_model, random_model, source
from twinserve.engine.models.dummy import SHAPES
from twinserve.engine.models.source import ModelSource
from twinserve.engine.options import EngineOptions
from twinserve.engine.quantization import AbsMaxQuantizer, Float8Linear, measure_memory, quantize_decoder
from twinserve.engine.quantization.float8_product import float8_product, float8_rows
from twinserve.engine.verify import verify
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError

ROUNDING = 1 + 1e-4
"""Float32 divides and multiplies to some 1e-7 of the number, not exactly."""


def rounding(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """By how much float8 may move each number of rows that have `scale`: a sixteenth of it (three bits of mantissa,
    rounded to the nearest), and half a step of the smallest exponent, 2**-9, where it is below 2**-6 steps."""
    return torch.maximum(values.double().abs() / 16, scale.double() / 1024) * ROUNDING


def float8_weight(num_in: int, num_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    return AbsMaxQuantizer.quantize(some(num_out, num_in, seed=1), dtype=FLOAT8)


def check_reconstruction(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quantized, scale = AbsMaxQuantizer.quantize(weight, dtype=FLOAT8)
    assert quantized.dtype == FLOAT8 and quantized.shape == weight.shape
    assert scale.shape == (*weight.shape[:-1], 1) and scale.dtype == torch.float32 and scale.min() > 0
    restored = AbsMaxQuantizer.dequantize(quantized, scale)
    assert restored.dtype == torch.float32
    assert ((restored.double() - weight.double()).abs() <= rounding(weight, scale)).all()
    return quantized, scale


def test_every_number_is_restored_to_a_sixteenth_and_a_row_uses_the_whole_range():
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 40)[:, None]
    weight[3] = 0.0
    weight[5, 17] = -400.0
    for dtype in (torch.float32, torch.bfloat16):
        quantized, _ = check_reconstruction(weight.to(dtype))
        largest = quantized.float().abs().amax(dim=1)
        assert largest[3] == 0 and (largest[largest > 0] == 448).all() and quantized[5, 17].float() == -448
    check_reconstruction(weight.view(4, 10, 96))


@given(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_row_of_numbers_is_restored(row):
    check_reconstruction(torch.tensor([row]))


@pytest.mark.parametrize(("num_in", "num_out"), [(576, 960), (1536, 576), (64, 7), (33, 130), (1, 5)])
def test_the_product_is_near_the_exact_one_as_far_as_float8_rounds(num_in, num_out):
    exact = some(num_out, num_in, seed=1)
    weight, scale = AbsMaxQuantizer.quantize(exact, dtype=FLOAT8)
    weight_error = rounding(exact, scale)
    for rows in (1, 5, 33):
        x = some(rows, num_in)
        values, steps, dtype = float8_rows(x)
        assert dtype == torch.float32
        output = float8_product(x, weight, scale)
        assert output.shape == (rows, num_out) and output.dtype == torch.float32
        # Both factors are rounded, and nothing beside.
        both = AbsMaxQuantizer.dequantize(values, steps)
        assert error(output, both, weight.double(), scale) < 1e-6
        x_error = rounding(x, steps)
        bound = x.double().abs() @ weight_error.T + x_error @ exact.double().abs().T + x_error @ weight_error.T
        assert ((output.double() - x.double() @ exact.double().T).abs() <= bound * ROUNDING).all()
        narrow = float8_product(x.bfloat16(), weight, scale)
        assert narrow.dtype == torch.bfloat16
        assert error(narrow, AbsMaxQuantizer.dequantize(*float8_rows(x.bfloat16())[:2]), weight.double(), scale) < 4e-3


def test_no_rows_zeros_and_what_is_not_finite_or_large_beside_others():
    weight, scale = float8_weight(32, 10)
    assert float8_product(torch.empty(0, 32), weight, scale).shape == (0, 10)
    x = some(4, 32)
    alone = float8_product(x[3:], weight, scale)
    x[0] = 0.0
    x[1, 4] = torch.nan
    x[2] *= 1e30
    output = float8_product(x, weight, scale)
    assert (output[0] == 0).all() and output[1].isnan().all() and output[2].isfinite().all()
    torch.testing.assert_close(output[3:], alone)


def test_a_linear_layer_keeps_its_bias_and_its_leading_dimensions_and_takes_rows_in_float8():
    linear = nn.Linear(48, 20).requires_grad_(False)
    layer = Float8Linear(*AbsMaxQuantizer.quantize(linear.weight, dtype=FLOAT8), linear.bias)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    rows = float8_rows(x.view(-1, 48))
    expected = F.linear(AbsMaxQuantizer.dequantize(*rows[:2]), dequantised(layer), linear.bias)
    torch.testing.assert_close(layer(x), expected.view(2, 3, 20))
    torch.testing.assert_close(layer(rows), expected)
    assert layer(x[0, 0]).shape == (20,)
    assert set(layer.state_dict()) == {"weight", "scale", "bias"}


# --- models ---


def dequantised(layer: Any) -> torch.Tensor:
    return AbsMaxQuantizer.dequantize(layer.weight, layer.scale)


def round_input(layer: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
    return AbsMaxQuantizer.dequantize(*AbsMaxQuantizer.quantize(given[0], dtype=FLOAT8))


@torch.no_grad()
def rounded(decoder: Decoder, weights: dict[str, torch.Tensor] | None = None) -> Decoder:
    """A Decoder with the weights that its own are in float8, or others, whose layers round what they are given."""
    for name, module in decoder.layers.named_modules():
        if isinstance(module, nn.Linear):
            rows = dequantised(Float8Linear(*AbsMaxQuantizer.quantize(module.weight, dtype=FLOAT8)))
            module.weight.copy_(rows if weights is None else weights[f"layers.{name}.weight"])
            module.register_forward_pre_hook(round_input)
    return decoder


def distances(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row, relative to its length."""
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied", "qwen2", "qwen3", "mistral"])
def test_a_model_in_float8_has_the_logits_of_its_rounded_numbers_and_is_near_the_exact_one(name):
    """With weights of a usual size; those of the judges' models are so large that any noise grows."""
    config = adopt_model(judge_of(name).model).config
    exact = logits_of(random_model(config, std=0.08), TEXT)
    model = random_model(config, std=0.08, quantization="fp8")
    assert model.quantization == "fp8"
    found = logits_of(model, TEXT)
    whole = distances(found, exact).mean()
    assert 0.02 < whole < 0.2
    # Here and there a last bit decides to which of two numbers of float8 something is rounded.
    assert distances(found, logits_of(rounded(random_model(config, std=0.08)), TEXT)).mean() < 0.3 * whole
    narrow = logits_of(random_model(config, std=0.08, quantization="fp8", dtype=torch.bfloat16), TEXT)
    assert narrow.dtype == torch.bfloat16
    assert 0.02 < distances(narrow.float(), exact).mean() < 0.2


def test_the_linear_layers_of_the_decoders_layers_are_in_float8_and_no_others():
    decoder = random_model(adopt_model(judge_of("llama").model).config, seed=3)
    kept = {name: tensor for name, tensor in decoder.state_dict().items() if "layers." not in name or "norm" in name}
    assert quantize_decoder(decoder, quantization="fp8") is decoder
    state = decoder.state_dict()
    assert {name for name, tensor in state.items() if tensor.dtype == FLOAT8} == {
        f"layers.{layer}.{name}.weight"
        for layer in range(4)
        for name in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    }
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert quantize_decoder(decoder, quantization="fp8").state_dict().keys() == state.keys(), "twice is once"


def test_float8_halves_the_memory_of_the_layers():
    config = ModelConfig.load(SHAPES / "llama-3-8b")
    with torch.device("meta"):
        model = Decoder(config, torch.bfloat16)
    before = measure_memory(model)
    after = measure_memory(quantize_decoder(model, quantization="fp8"))
    saved = (before - after) * 1e6 / config.num_layer_parameters
    assert 0.99 < saved < 1, "a byte less a weight, and four bytes more a row"


@pytest.mark.parametrize("name", ["llama-bias", "qwen3-tied"])
def test_a_folder_loads_into_float8_as_its_model_is_quantized(tmp_path, name):
    judge_of(name).model.save_pretrained(tmp_path)
    expected = quantize_decoder(load_model(tmp_path), quantization="fp8").state_dict()
    loaded = load_model(tmp_path, quantization="fp8").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(equal(tensor, expected[name]) for name, tensor in loaded.items())
    # Quantized from what the file holds, not from what bfloat16 leaves of it.
    for name, tensor in load_model(tmp_path, dtype=torch.bfloat16, quantization="fp8").state_dict().items():
        assert equal(tensor, expected[name].to(tensor.dtype))
        assert tensor.dtype in (FLOAT8, torch.float32 if name.endswith("scale") else torch.bfloat16)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.float(), b.float())


def test_a_ranks_float8_weights_are_the_whole_models_own(tmp_path):
    MODELS["llama-biases"]().save_pretrained(tmp_path)
    whole = load_model(tmp_path, quantization="fp8")
    parts = on_ranks(2, lambda group: load_model(tmp_path, quantization="fp8", group=group))
    check_parts(whole, parts)


def check_parts(whole: Decoder, parts: list[Decoder]) -> None:
    """What two ranks have of a layer is what the whole model has."""
    for name in ("layers.1.mlp.down", "layers.1.attention.output"):
        linears: list[Any] = [part.get_submodule(name).linear for part in parts]
        layer: Any = whole.get_submodule(name)
        assert equal(torch.cat([linear.weight for linear in linears], dim=1), layer.weight)
        assert all(torch.equal(linear.scale, layer.scale) for linear in linears)
    gates = [part.layers[1].mlp.gate_up for part in parts]
    gate_up = whole.layers[1].mlp.gate_up
    for of in (lambda layer: layer.weight.float(), lambda layer: layer.scale):
        both = [of(gate).chunk(2) for gate in gates]
        assert torch.equal(torch.cat([gate for gate, _ in both] + [up for _, up in both]), of(gate_up))


# --- checkpoints ---


COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "global_compression_ratio": 1.5,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False,
                "group_size": None, "block_structure": None, "observer": "minmax",
            },
            "input_activations": {
                "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True,
                "group_size": None, "block_structure": None, "observer": "memoryless",
            },
            "output_activations": None,
        }
    },
}  # fmt: skip
PLAIN = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}


def changed(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with another value at a path of names."""
    copy = json.loads(json.dumps(config))
    *parents, last = path.split(".")
    place = copy
    for name in parents:
        place = place[name]
    place[last] = value
    return copy


@pytest.fixture
def checkpoint(tmp_path):
    """Writes the folder of a tiny model in float8: the folder, and its dequantised weights by our names."""

    def write(said: dict[str, Any], scales: str = "rows", name: str = "llama-biases") -> Path:
        judge_of(name).model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            weight = tensors[name] if scales == "rows" else tensors[name].view(1, -1)
            quantized, scale = AbsMaxQuantizer.quantize(weight, dtype=FLOAT8)
            tensors[name] = quantized.view(tensors[name].shape)
            tensors[f"{name}_scale"] = {"rows": scale, "one": scale[0], "scalar": scale[0, 0]}[scales]
            if said.get("activation_scheme") == "static":
                tensors[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.05)
        save_file(tensors, tmp_path / "model.safetensors")
        edit(tmp_path, quantization_config=said)
        return tmp_path

    return write


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CHECKPOINTS = [
    (COMPRESSED, "rows"),
    (changed(COMPRESSED, "config_groups.group_0.weights.strategy", "tensor"), "one"),
    (PLAIN, "scalar"),
    (PLAIN | {"activation_scheme": "dynamic"}, "one"),
]


@pytest.mark.parametrize(("said", "scales"), CHECKPOINTS, ids=["channel", "tensor", "static", "dynamic"])
def test_a_checkpoint_in_float8_is_loaded_as_it_is(checkpoint, said, scales):
    folder = checkpoint(said, scales)
    tensors, model = load_file(folder / "model.safetensors"), load_model(folder)
    assert model.quantization == "fp8" and ModelSource.of(folder, EngineOptions()).quantization == "fp8"
    for layer in range(4):
        theirs = f"model.layers.{layer}."
        for ours, names in {
            "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention.output": ("self_attn.o_proj",),
            "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down": ("mlp.down_proj",),
        }.items():
            linear: Any = model.get_submodule(f"layers.{layer}.{ours}")
            stack = [tensors[f"{theirs}{name}.weight"] for name in names]
            assert equal(linear.weight, torch.cat([one.float() for one in stack]).to(FLOAT8))
            stood_for = [
                tensors[f"{theirs}{name}.weight"].float() * tensors[f"{theirs}{name}.weight_scale"] for name in names
            ]
            assert torch.equal(dequantised(linear), torch.cat(stood_for))
    weights = {
        f"{name}.weight": dequantised(layer) for name, layer in model.named_modules() if isinstance(layer, Float8Linear)
    }
    expected = logits_of(rounded(adopt_model(judge_of("llama-biases").model), weights), TEXT)
    # The first token attends to itself alone; behind it noise grows, as these weights are large.
    assert distances(logits_of(model, TEXT), expected)[0] < 0.1
    check_parts(model, on_ranks(2, lambda group: load_model(folder, group=group)))


def test_a_checkpoint_in_float8_is_what_quantizing_makes_of_its_model(checkpoint):
    """Its scales being those of the rows, as quantizing the plain model makes them."""
    folder = checkpoint(COMPRESSED)
    loaded = load_model(folder, quantization="fp8").state_dict()
    expected = adopt_model(judge_of("llama-biases").model, quantization="fp8").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_a_checkpoint_in_float8_is_served_and_says_so(checkpoint):
    """What each request is answered is, up to float8's noise, what the model says of it alone."""
    folder = checkpoint(COMPRESSED, name="qwen3")
    settings = Settings(block_size=4, num_gpu_blocks=40, max_num_seqs=4, max_num_batched_tokens=20)
    prompts = [[5, 9, 300, 17] * 5 + [20 + i] * (3 + i) for i in range(6)]
    with closing(LLM(folder, settings=settings)) as llm:
        assert llm.facts()["quantization"] == "fp8"
        completions = llm.generate(prompts, GREEDY)
        model = llm.runner.model
    below = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = logits_of(model, torch.tensor(prompt + completion.token_ids[:-1]))[len(prompt) - 1 :]
        below += (logits.amax(dim=1) - logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]).tolist()
    assert len(below) == 6 * GREEDY.max_tokens
    assert sum(one > 1e-3 for one in below) < 0.1 * len(below) and max(below) < 3


REFUSED = [
    ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq', expected fp8 or compressed-tensors"),
    ("fp8", "quantization_config is 'fp8', expected an object"),
    (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "quantization_config.weight_block_size is [128, 128], expected none",
    ),
    (PLAIN | {"activation_scheme": "block"}, "quantization_config.activation_scheme is 'block', expected dynamic or"),
    (COMPRESSED | {"format": "pack-quantized"}, "quantization_config.format is 'pack-quantized', expected float-quan"),
    (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "quantization_config.kv_cache_scheme is {'num_bits': 8}, exp"),
    (COMPRESSED | {"config_groups": {}}, "quantization_config.config_groups is [], expected one group, for Linear"),
    (COMPRESSED | {"config_groups": None}, "quantization_config.config_groups is None, expected an object"),
    *(
        (
            changed(COMPRESSED, f"config_groups.group_0.{path}", value),
            f"quantization_config.config_groups.group_0.{path} is {value!r}, expected {expected}",
        )
        for path, value, expected in (
            ("weights.num_bits", 4, "8"),
            ("weights.type", "int", "float"),
            ("weights.strategy", "block", "channel or tensor"),
            ("weights.group_size", 128, "none"),
            ("weights", None, "an object"),
            ("input_activations", None, "an object"),
            ("input_activations.strategy", "group", "token or tensor"),
            ("targets", ["re:.*down_proj"], "['Linear']"),
        )
    ),
]


@pytest.mark.parametrize(("said", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_another_scheme_is_refused_by_name_before_weights_are_read(tmp_path, said, message):
    judge_of("llama").model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    edit(tmp_path, quantization_config=said)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'config.json'}: {message}")):
        LLM(tmp_path)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (DOWN, torch.zeros(64, 128), "is 'F32', expected F8_E4M3, as the config has a quantization_config"),
        (DOWN, torch.zeros(64, 128).to(torch.float8_e5m2), "is 'F8_E5M2', expected F8_E4M3"),
        ("lm_head.weight", torch.zeros(512, 64).to(FLOAT8), "is 'F8_E4M3', expected 16 or 32 bits a number"),
        (f"{DOWN}_scale", None, "is None, expected scales of shape [1] or [64, 1]"),
        (f"{DOWN}_scale", torch.ones(64), "is [64], expected scales of shape [1] or [64, 1]"),
        (f"{DOWN}_scale", torch.ones(1, 128), "is [1, 128], expected scales of shape [1] or [64, 1]"),
        (f"{DOWN}_scale", torch.full((64, 1), torch.nan), "expected finite numbers >= 0"),
        (f"{DOWN}_scale_inv", torch.ones(1, 1), "not a tensor of this architecture"),
    ],
)
def test_a_tensor_that_is_not_what_the_config_says_is_refused(checkpoint, name, tensor, message):
    folder = checkpoint(COMPRESSED)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")
    with pytest.raises(InputError, match=re.escape(f"{folder}: {name}")) as refusal:
        load_model(folder)
    assert message in str(refusal.value)


def test_a_checkpoint_in_float8_is_verified_against_the_numbers_that_it_stands_for(
    checkpoint, monkeypatch, tmp_path_factory
):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("A few words alone, so that this is not long. " * 8)
    monkeypatch.setattr("twinserve.engine.verify.TEXT", text)
    folder, given = checkpoint(*CHECKPOINTS[1], name="qwen3-tied"), {"prompts": [[5, 9, 300] * 9], "max_tokens": 4}
    report = verify(folder, dtype="bfloat16", **given)
    assert report.agrees and (report.quantization, report.beside) == ("fp8", "bfloat16"), report
    load = source.load_model

    def load_wrong(*args: Any, **kwargs: Any) -> Decoder:
        decoder = load(*args, **kwargs)
        decoder.layers[2].mlp.down.scale.mul_(1.5)
        return decoder

    monkeypatch.setattr(source, "load_model", load_wrong)
    assert not verify(folder, dtype="bfloat16", **given).agrees


def test_float8_without_a_word_of_it_in_the_config_is_refused(checkpoint):
    folder = checkpoint({})
    with pytest.raises(InputError, match="proj.weight is 'F8_E4M3', expected 16 or 32 bits a number, as its scale"):
        load_model(folder)


def test_a_checkpoint_in_float8_is_not_quantized_again_nor_one_of_transformers_adopted(checkpoint):
    folder = checkpoint(COMPRESSED)
    with pytest.raises(InputError, match="quantization is 'int8', expected none or fp8: the checkpoint is in float8"):
        LLM(folder, quantization="int8")
    model = MODELS["llama"]()
    model.config.quantization_config = PLAIN
    with pytest.raises(InputError, match="expected a folder: quantized models are not adopted"):
        adopt_model(model)
