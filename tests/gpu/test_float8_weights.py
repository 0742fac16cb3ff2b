"""Float8 weights on a device: rows rounded by the kernels, products of the matrix units, and steps that are graphs."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from engine_judge import judge_of
from quantized_numbers import error, logits_of, some
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from twinserve.engine.float8 import FLOAT8, Float8Rows
from twinserve.engine.graphs import fused_decoder
from twinserve.engine.kernels import fused
from twinserve.engine.kernels.few_rows import fits
from twinserve.engine.llm import LLM
from twinserve.engine.models import adopt_model, random_model
from twinserve.engine.models.dummy import dummy_model
from twinserve.engine.quantization import AbsMaxQuantizer
from twinserve.engine.quantization.float8_product import float8_product, float8_rows
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no float8 on this card"
    ),
]


def check_rows(found: Float8Rows, numbers: Tensor) -> None:
    """Assert that rows in float8 are what `numbers` are rounded to; one in a hundred may be a step away, where the
    kernel has another last bit before it rounds, and halfway between two."""
    values, scale = AbsMaxQuantizer.quantize(numbers, dtype=FLOAT8)
    assert found.values.dtype == FLOAT8 and found.values.shape == numbers.shape and found.scale.shape == scale.shape
    torch.testing.assert_close(found.scale, scale, rtol=1e-5, atol=0)
    other = found.values.float() != values.float()
    assert int(other.sum()) <= 1 + 1e-2 * numbers.numel()
    # The next number of float8 is at most an eighth of a number away, or 2**-9.
    away = (found.values.float() - values.float()).abs()
    assert (away <= torch.maximum(values.float().abs() / 7, torch.tensor(2.0**-9, device="cuda"))).all()


@pytest.mark.parametrize("size", [64, 576, 1024, 1536, 3072, 4096, 14_336])
@pytest.mark.parametrize("rows", [1, 3, 256, 2048])
def test_rows_are_rounded_as_on_the_host(rows, size):
    x = some(rows, size).bfloat16().cuda()
    x[-1] = 0.0
    found = float8_rows(x)
    assert found.dtype == torch.bfloat16
    check_rows(found, x)


def test_what_is_not_finite_stays_in_its_row():
    x = some(4, 576).bfloat16().cuda()
    x[1, 7] = torch.nan
    rounded = AbsMaxQuantizer.dequantize(*float8_rows(x)[:2])
    assert rounded[1, 7].isnan() and rounded[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("size", [64, 576, 1024, 4096])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_norm_and_gated_activation_round_what_they_make(rows, size):
    x, residual = some(rows, size).bfloat16().cuda(), some(rows, size, seed=1).bfloat16().cuda()
    weight = 1 + 0.1 * torch.randn(size, device="cuda").bfloat16()
    alone = fused.rms_norm_float8(x, weight, 1e-6)
    check_rows(alone, F.rms_norm(x.float(), (size,), eps=1e-6) * weight.float())
    added, plain = residual.clone(), residual.clone()
    normed = fused.rms_norm_float8(x, weight, 1e-6, added)
    fused.rms_norm(x, weight, 1e-6, plain)
    assert torch.equal(added, plain)
    check_rows(normed, F.rms_norm(plain.float(), (size,), eps=1e-6) * weight.float())
    both = some(rows, 2 * size, seed=2).bfloat16().cuda()
    gate, up = both.float().chunk(2, dim=1)
    check_rows(fused.silu_and_mul_float8(both), F.silu(gate) * up)


SHAPES = [(960, 576), (576, 1536), (4096, 1024), (1024, 3072), (6144, 4096), (4096, 14_336), (32, 64)]


@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 64, 128, 200, 256, 2048])
def test_the_product_is_that_of_the_rounded_numbers(num_out, num_in, rows):
    weight, scale = AbsMaxQuantizer.quantize(some(num_out, num_in, seed=1), dtype=FLOAT8)
    x = some(rows, num_in, seed=2).bfloat16()
    output = float8_product(x.cuda(), weight.cuda(), scale.cuda())
    assert output.shape == (rows, num_out) and output.dtype == torch.bfloat16
    # Rounded to bfloat16 once; the matrix units sum up with fewer bits than float32 has.
    assert error(output, AbsMaxQuantizer.dequantize(*float8_rows(x)[:2]), weight.double(), scale) < 8e-3
    whole = float8_product(float8_rows(x.cuda()), weight.cuda(), scale.cuda())
    assert torch.equal(whole, output)
    assert float8_product(x[:0].cuda(), weight.cuda(), scale.cuda()).shape == (0, num_out)


def log_probabilities(execution: str) -> tuple[list[list[int]], Tensor]:
    """Tokens of a model in float8 that runs by graphs or by torch, and log-probabilities of the first of each row."""
    settings = Settings(max_num_seqs=8, max_model_len=512, block_size=16, num_gpu_blocks=256)
    options: dict[str, Any] = {"dtype": "bfloat16", "quantization": "fp8", "execution": execution}
    prompts = [[5 + row] * (row + 1) + [9, 300] for row in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    with closing(LLM("qwen3-0.6b", load_format="dummy", device="cuda", settings=settings, **options)) as llm:
        assert llm.facts()["quantization"] == "fp8" and llm.facts()["execution"] == execution
        done = llm.generate(prompts, params)
    return [one.token_ids for one in done], torch.tensor([one.logprobs[0].logprob for one in done])


def test_graphs_say_what_torch_says(monkeypatch):
    """Random weights leave near ties, which noise decides: what is held against each other is how likely tokens are."""
    rounds = []
    monkeypatch.setattr(
        fused_decoder, "silu_and_mul_float8", lambda x: rounds.append(len(x)) or fused.silu_and_mul_float8(x)
    )
    graphs, eager = (log_probabilities(execution) for execution in ("graphs", "eager"))
    assert rounds, "the graphs round as they go"
    assert all(len(tokens) == 12 for tokens in graphs[0])
    # The eager path rounds to bfloat16 before it rounds to float8, the kernels do not.
    assert (graphs[1] - eager[1]).abs().mean() < 0.15


@pytest.mark.parametrize("execution", ["graphs", "eager"])
def test_a_judges_model_in_float8_takes_tokens_that_are_as_good_as_any(execution):
    """Over chunks, mixed steps and padding: each token is near the best by the same model on the host."""
    config = adopt_model(judge_of("qwen3").model).config
    decoder = random_model(config, std=0.08, quantization="fp8", dtype=torch.bfloat16, device="cuda")
    on_host = random_model(config, std=0.08, quantization="fp8")
    on_host.load_state_dict(decoder.state_dict())
    settings = Settings(block_size=16, num_gpu_blocks=64, max_num_seqs=4, max_num_batched_tokens=64)
    prompts = [[5, 9, 300, 17] * 5 + [20 + i] * (3 + 9 * i) for i in range(6)]
    with closing(LLM(decoder, device="cuda", execution=execution, settings=settings)) as llm:
        done = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True))
    below = []
    for prompt, completion in zip(prompts, done, strict=True):
        logits = logits_of(on_host, torch.tensor(prompt + completion.token_ids[:-1]))[len(prompt) - 1 :]
        spread = logits.std(dim=1)
        taken = logits.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        below += ((logits.amax(dim=1) - taken) / spread).tolist()
    assert len(below) == 6 * 24 and max(below) < 0.5, "a deviation of the logits is far more than float8's noise"


def test_the_kernels_of_few_rows_leave_float8_layers_alone():
    model = dummy_model("qwen3-0.6b", dtype=torch.bfloat16, device="cuda")
    assert all(map(fits, linears_of(model)))
    model = dummy_model("qwen3-0.6b", dtype=torch.bfloat16, device="cuda", quantization="fp8")
    assert not any(map(fits, linears_of(model)))


def linears_of(model):
    """Of each layer, its linear layers."""
    return [[one for one in layer.modules() if type(one).__name__.endswith("Linear")] for layer in model.layers]
