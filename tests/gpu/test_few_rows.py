"""The kernels of steps of few rows give what the plain ones give, and steps use them where they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton")

from twinserve.engine.graphs import fused_decoder
from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.kernels.few_rows import attend, product
from twinserve.engine.kernels.fused import rotate_and_store
from twinserve.engine.kernels.paged_attention import decode_attention
from twinserve.engine.llm import LLM
from twinserve.engine.models.dummy import dummy_model
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings

pytestmark = pytest.mark.gpu
LENGTHS = (1, 2, 64, 65, 300, 1024, 1025, 4097)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm().detach() / wanted.double().norm())


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("size, inner", [(4096, 1024), (1024, 3072), (960, 576), (4096, 4096)])
def test_products(rows: int, size: int, inner: int, dtype: torch.dtype) -> None:
    x, norm = random(rows, inner, dtype=dtype), 1 + random(inner, dtype=dtype, scale=0.1)
    linear = nn.Linear(inner, size, device="cuda", dtype=dtype)
    both = nn.Linear(inner, 2 * size, bias=False, device="cuda", dtype=dtype)
    residual = random(rows, size, dtype=dtype)
    before = residual.double()
    normed = F.rms_norm(x.double(), (inner,), eps=1e-6) * norm.double()
    wanted = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    gate, up = F.linear(normed, both.weight.double()).chunk(2, dim=-1)
    bound = 4e-3 if dtype == torch.bfloat16 else 5e-4
    with torch.inference_mode():
        assert relative(product(x, linear), wanted) < bound
        assert relative(product(x, both, norm, 1e-6, gated=True), F.silu(gate) * up) < bound
        assert product(x, linear, residual=residual) is residual
    assert relative(residual, before + wanted) < bound


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads, kv_heads, size, normed", [(16, 8, 128, True), (9, 3, 64, False), (32, 8, 128, False)])
def test_attention(heads: int, kv_heads: int, size: int, normed: bool, window: int | None, kept: torch.dtype) -> None:
    """One to eight rows of all lengths, a row of padding among them: what is attended and what is stored."""
    block_size, width = 16, 300
    blocks = torch.randperm(len(LENGTHS) * width, device="cuda").view(-1, width)
    tables = torch.cat((blocks, torch.zeros_like(blocks[:1]))).int()
    pool = (len(LENGTHS) * width, block_size, kv_heads, size)
    keys, values = random(*pool).to(kept), random(*pool).to(kept)
    angles = torch.randn(5000, size // 2, device="cuda")
    rotation = angles.cos(), angles.sin()
    norm = 1 + random(heads + kv_heads, size, scale=0.1) if normed else None
    for count in range(1, len(LENGTHS) + 1):
        rows = torch.arange(count, dtype=torch.int32, device="cuda")
        real = torch.ones(count, dtype=torch.bool)
        if count > 2:
            rows[1], real[1] = len(LENGTHS), False
        positions = torch.tensor(LENGTHS[-count:], dtype=torch.int32, device="cuda") - 1
        places = positions.long()
        slots = tables[rows.long(), places // block_size] * block_size + (places % block_size).int()
        slots[~real.cuda()] = -1
        qkv = random(count, (heads + 2 * kv_heads) * size)
        plain, own = (keys.clone(), values.clone()), (keys.clone(), values.clone())
        query = rotate_and_store(qkv, positions, slots, rotation, norm, 1e-6, *plain)
        wanted = torch.zeros_like(query)
        decode_attention(query, *plain, rows, tables, positions, wanted, window)
        got = attend(qkv, rotation, norm, 1e-6, *own, rows, tables, positions, window).view_as(wanted)
        assert relative(got[real], wanted[real]) < 1e-2
        for mine, other, before in zip(own, plain, (keys, values), strict=True):
            changed = (other.float() != before.float()).flatten(1).any(1)
            assert torch.equal((mine.float() != before.float()).flatten(1).any(1), changed)
            assert int(changed.sum()) == int(real.sum())
            assert relative(mine[changed], other[changed]) < 1e-2


def log_probabilities(model: str, options: GraphOptions, count: int) -> list[list[float]]:
    """Of the tokens that `count` requests are made to generate together."""
    settings = Settings.load(
        {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 512, "num_gpu_blocks": 600}
    )
    decoder = dummy_model(model, dtype=torch.bfloat16, device="cuda")
    llm = LLM(decoder, name=model, device="cuda", settings=settings, graph_options=options)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0, logit_bias=((7, 100.0),))
    completions = llm.generate([[number + 1] * (20 + number) for number in range(count)], params)
    llm.close()
    assert all(completion.token_ids == [7] * 24 for completion in completions)
    return [[token.logprob for token in completion.logprobs or []] for completion in completions]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_steps_of_few_rows_are_near_those_of_plain_kernels(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"attend": 0, "product": 0}
    for name in used:
        kernel = getattr(fused_decoder, name)

        def counted(*args: object, _name: str = name, _kernel: object = kernel, **more: object) -> Tensor:
            used[_name] += 1
            return _kernel(*args, **more)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(fused_decoder, name, counted)
    plain = log_probabilities("qwen3-0.6b", GraphOptions(few_rows=False), count)
    assert used == {"attend": 0, "product": 0}
    few = log_probabilities("qwen3-0.6b", GraphOptions(), count)
    assert used["attend"] > 0 and used["product"] > 0
    differences = torch.tensor(few) - torch.tensor(plain)
    assert 0 < float(differences.abs().mean()) < 0.03
