"""A rank's part of a model: its weights, what the ranks give together, and how they draw; the ranks are threads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from engine_judge import MODELS
from safetensors.torch import load_file, save_file
from thread_group import ThreadGroup, on_ranks
from torch import Tensor

from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.loader import adopt_model, load_model, random_model
from twinserve.engine.models.sharded_decoder import check_size, part_of
from twinserve.engine.online import NOT_SAMPLED
from twinserve.engine.parallel.drawing import Drawing
from twinserve.engine.parallel.ring import CAPACITY, Ring
from twinserve.engine.parallel.shards import Shard
from twinserve.engine.sampler import SamplingPlan, draw_uniforms
from twinserve.policies import SamplingParams
from twinserve.settings.errors import InputError

SMALL = ModelConfig(
    vocab_size=33, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=4,
    max_position_embeddings=64, attention_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip


class Remembered:
    """Attention over the tokens of one call: each sees those before it."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        q, k, v = (
            x.transpose(0, 1) for x in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


def logits_of(model, token_ids: list[int]) -> Tensor:
    """Logits behind each token of a text."""
    ids = torch.tensor(token_ids)
    return model.logits(model(ids, torch.arange(len(ids)), Remembered()))


# --- which part a rank has ---


@pytest.mark.parametrize(("kv_heads", "size"), [(4, 2), (4, 4), (2, 4), (1, 8), (3, 3)])
def test_a_rank_has_the_kv_heads_that_its_query_heads_attend_to(kv_heads, size):
    heads = 24
    for rank in range(size):
        shard = Shard(rank, size)
        own, kv = shard.part(heads), shard.kv_heads(kv_heads)
        wanted = {head * kv_heads // heads for head in range(own.start, own.stop)}
        assert wanted == set(range(kv.start, kv.stop))


@pytest.mark.parametrize(("count", "size"), [(512, 4), (33, 4), (5, 4), (9, 8)])
def test_every_token_is_of_one_rank(count, size):
    parts = [Shard(rank, size).tokens(count) for rank in range(size)]
    assert [token for part in parts for token in range(part.start, part.stop)] == list(range(count))
    assert all(part.stop - part.start <= Shard(0, size).vocabulary_size(count) for part in parts)


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (4, "expected a divisor of the model's 6 query heads"),
        (6, "expected a divisor of the model's 24 numbers"),
        (2, "expected a divisor or a multiple of the model's 3 KV heads"),
    ],
)
def test_a_number_of_ranks_that_cannot_share_a_model_is_refused(size, problem):
    shape = SMALL if size != 6 else part_of(SMALL, Shard())
    if size == 6:
        shape = ModelConfig(**{**vars(shape), "intermediate_size": 20})
        problem = "expected a divisor of the model's 20 numbers of the intermediate layer"
    with pytest.raises(InputError, match=f"tensor_parallel_size is {size}, {problem}"):
        check_size(shape, size)


# --- what the ranks give together ---


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bias", "llama-biases", "qwen3-tied", "qwen2-windows"])
def test_the_ranks_give_the_logits_of_the_whole_model(name, size):
    model = MODELS[name]()
    token_ids = random.Random(0).choices(range(3, 512), k=24)
    with torch.inference_mode():
        expected = logits_of(adopt_model(model), token_ids)
    for found in on_ranks(size, lambda group: logits_of(adopt_model(model, group=group), token_ids)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_vocabulary_that_ranks_cannot_share_evenly_is_padded(quantization):
    whole = random_model(SMALL, seed=3, std=0.4, quantization=quantization)
    token_ids = [1, 32, 17, 8, 9, 24, 31]
    with torch.inference_mode():
        expected = logits_of(whole, token_ids)

    def work(group: ThreadGroup) -> Tensor:
        return logits_of(random_model(SMALL, seed=3, std=0.4, quantization=quantization, group=group), token_ids)

    for found in on_ranks(3, work):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_ranks_int8_weights_are_the_whole_models_own(tmp_path):
    MODELS["llama-biases"]().save_pretrained(tmp_path)
    whole = load_model(tmp_path, quantization="int8")
    parts = on_ranks(2, lambda group: load_model(tmp_path, quantization="int8", group=group))
    for name in ("layers.1.mlp.down", "layers.1.attention.output"):
        linears = [part.get_submodule(name).linear for part in parts]
        layer = whole.get_submodule(name)
        assert torch.equal(torch.cat([linear.weight for linear in linears], dim=1), layer.weight)
        assert all(torch.equal(linear.scale, layer.scale) for linear in linears)
        assert torch.equal(sum(linear.bias for linear in linears), layer.bias)


def test_a_rank_reads_its_slices_alone(tmp_path, monkeypatch):
    """Of every tensor that is split it reads its part, and never the whole."""
    MODELS["llama"]().save_pretrained(tmp_path)
    sizes = {name: tensor.numel() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    read: dict[str, int] = {}
    loader = __import__("twinserve.engine.models.loader", fromlist=["_read"])
    plain = loader._read

    def counting(source, part):
        tensor = plain(source, part)
        read[part.name] = read.get(part.name, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(loader, "_read", counting)
    on_ranks(2, lambda group: load_model(tmp_path, group=group) if group.shard.rank == 0 else None)
    halves = [name for name, size in sizes.items() if read[name] == size // 2]
    assert set(sizes) - set(halves) == {name for name in sizes if "norm" in name}


def test_a_tensor_of_another_shape_is_refused_by_its_whole_shape(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name][:, :100].contiguous()}, path, metadata={"format": "pt"})
    config = json.loads((Path(tmp_path) / "config.json").read_text())
    problem = rf"expected floating point numbers of shape \[{config['hidden_size']}, {config['intermediate_size']}\]"
    with pytest.raises(InputError, match=problem):
        on_ranks(1, lambda group: load_model(tmp_path, group=ThreadGroup(Shard(0, 2), None, [])))


# --- how they draw ---

WAYS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1e-5, seed=1),
    SamplingParams(temperature=0.7, seed=2),
    SamplingParams(temperature=1.0, seed=3, top_k=1),
    SamplingParams(temperature=1.3, seed=4, top_k=7),
    SamplingParams(temperature=5.0, seed=5, min_p=0.05),
    SamplingParams(temperature=1e30, seed=6, top_k=40, min_p=0.001),
]


def draws(logits: Tensor, params: list[SamplingParams], positions: list[int], size: int) -> list[Tensor]:
    """What each rank draws from its part of the logits."""
    uniforms = draw_uniforms(params, positions, random.Random(0))
    width = Shard(0, size).vocabulary_size(logits.shape[1])
    padded = torch.nn.functional.pad(logits, (0, width * size - logits.shape[1]), value=-torch.inf)
    drawing = Drawing.of(params, uniforms)
    assert drawing is not None

    def work(group: ThreadGroup) -> Tensor:
        first = group.shard.rank * width
        return drawing.draw(padded[:, first : first + width].contiguous(), first, group)

    expected = SamplingPlan.of(params, uniforms, torch.device("cpu")).sample(logits)
    return [expected, *on_ranks(size, work)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_draw_what_is_drawn_from_all_logits(size, dtype):
    generator = torch.Generator().manual_seed(size)
    params = WAYS * 40
    logits = (4 * torch.randn(len(params), 301, generator=generator)).to(dtype)
    logits[5, :] = 1.0  # all alike
    logits[6, 200:] = -torch.inf  # of which the last rank has nothing
    expected, *found = draws(logits, params, list(range(len(params))), size)
    assert len(set(expected.tolist())) > 100
    for tokens in found:
        assert tokens.tolist() == expected.tolist()


def test_of_logits_that_are_no_numbers_ranks_draw_nothing():
    params = [way for way in WAYS for _ in range(3)]
    logits = torch.randn(len(params), 64, generator=torch.Generator().manual_seed(0))
    for row in range(len(params)):
        logits[row, (row * 29) % 64] = (torch.nan, torch.inf, 3.0)[row % 3]
        if row % 3 == 2:
            logits[row] = -torch.inf
    expected, *found = draws(logits, params, list(range(len(params))), 2)
    assert expected.tolist() == [NOT_SAMPLED] * len(params)
    assert all(tokens.tolist() == expected.tolist() for tokens in found)


@pytest.mark.parametrize(
    "more",
    [{"logprobs": 1}, {"top_p": 0.5}, {"repetition_penalty": 1.1}, {"logit_bias": ((3, 1.0),)}, {"top_k": 5000}],
)
def test_what_needs_all_logits_is_not_drawn_on_shards(more):
    params = [SamplingParams(temperature=0.5), SamplingParams(temperature=0.5, **more)]
    assert Drawing.of(params[:1], [0.5]) is not None and Drawing.of(params, [0.5, 0.5]) is None


# --- messages ---


def test_every_reader_of_a_ring_gets_every_message():
    """Short ones, and one of several times the ring's length; a reader that is slow holds the writer up."""
    from threading import Thread

    path = Ring.make(2)
    ends = [Ring(path, 2, reader, eager_s=0.0, check=lambda: None) for reader in (None, 0, 1)]
    path.unlink()
    rng = random.Random(0)
    messages = [rng.randbytes(size) for size in (0, 1, 5000, 3 * CAPACITY + 17, 300_000, 700_000, 9)]
    heard: list[list[bytes]] = [[], []]
    readers = [
        Thread(target=lambda own=own, end=end: own.extend(end.receive() for _ in messages))
        for own, end in zip(heard, ends[1:], strict=True)
    ]
    for reader in readers:
        reader.start()
    for message in messages:
        ends[0].send(message)
    for reader in readers:
        reader.join(60)
    assert heard == [messages, messages]


def test_who_waits_at_a_ring_hears_that_nothing_will_come():
    path = Ring.make(1)

    def gone() -> None:
        raise RuntimeError("the writer is gone")

    ring = Ring(path, 1, 0, eager_s=0.0, check=gone)
    path.unlink()
    with pytest.raises(RuntimeError, match="the writer is gone"):
        ring.receive()
