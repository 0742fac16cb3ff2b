"""The learning guide's sixth cycle: attention over packed and paged keys and values equals plain attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import flash_stand_in
import pytest
import torch
from flash_stand_in import AnywhereFlash
from torch import Tensor

from twinserve.engine.layers import AttentionBackend, SdpaAttention
from twinserve.engine.layers.attention import FlashAttention
from twinserve.settings.errors import InputError

PAGE = 256


@dataclass(frozen=True)
class Subject:
    """An implementation to hold against plain attention; `bound` is how far off it may be, relative to that."""

    name: str
    make: Callable[[], AttentionBackend]
    device: str
    dtype: torch.dtype
    bound: float


ON_CPU = [
    Subject("sdpa", SdpaAttention, "cpu", torch.float32, 1e-5),
    Subject("flash-stand-in", AnywhereFlash, "cpu", torch.float32, 1e-5),
]
# bfloat16 keeps 8 bits, so some 2e-3 are seen; float32 attention on the device multiplies in parts of its mantissa.
ON_CUDA = [
    Subject("flash-cuda", FlashAttention, "cuda", torch.bfloat16, 1e-2),
    Subject("sdpa-cuda", SdpaAttention, "cuda", torch.bfloat16, 1e-2),
    Subject("sdpa-cuda-float32", SdpaAttention, "cuda", torch.float32, 1e-4),
]
SUBJECTS = [pytest.param(subject, id=subject.name) for subject in ON_CPU]
SUBJECTS += [pytest.param(subject, id=subject.name, marks=pytest.mark.gpu) for subject in ON_CUDA]

HEADS = {"16/8 of 128": (16, 8, 128), "8/8 of 128": (8, 8, 128), "9/3 of 64": (9, 3, 64)}
# (tokens before, tokens now) of each sequence: whole prompts; chunks behind what came before, across pages and not.
PROMPTS = [(0, 5), (0, 3), (0, 7), (0, 1), (0, 300)]
CHUNKS = [(3, 2), (256, 17), (300, 40), (511, 3), (0, 260), (700, 129)]
CONTEXTS = [1, 255, 256, 257, 700, 33, 2]


@pytest.fixture(autouse=True)
def _library(request, monkeypatch):
    """flash-attn itself for tests on the device, a stand-in for all others."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in.module())
    else:
        pytest.importorskip("flash_attn")


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last tokens of one sequence over its whole context, in float32."""
    tokens, heads, head_dim = q.shape
    context, kv_heads, _ = k.shape
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / head_dim**0.5
    later = torch.arange(context) > torch.arange(context - tokens, context)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


class Problem:
    """Random queries, keys and values of some sequences, and what plain attention makes of them.

    Args:
        rows: (tokens before, tokens now) of each sequence.
    """

    def __init__(self, subject: Subject, heads: tuple[int, int, int], rows: list[tuple[int, int]]):
        num_heads, kv_heads, head_dim = heads
        generator = torch.Generator().manual_seed(len(rows))

        def draw(tokens: int, heads: int) -> Tensor:
            return torch.randn(tokens, heads, head_dim, generator=generator).to(subject.dtype)

        self._subject = subject
        self.queries = [draw(now, num_heads) for _, now in rows]
        self.keys, self.values = ([draw(before + now, kv_heads) for before, now in rows] for _ in range(2))
        wide = [[x.float() for x in part] for part in (self.queries, self.keys, self.values)]
        self.expected = torch.cat([plain_attention(*row) for row in zip(*wide, strict=True)])

    def packed(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).to(self._subject.device)

    def cumulative(self, parts: list[Tensor]) -> Tensor:
        ends = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
        return torch.tensor(ends, dtype=torch.int32, device=self._subject.device)

    def paged(self, parts: list[Tensor], table: Tensor) -> Tensor:
        """`parts` in the blocks that `table` names; every other slot holds no number."""
        pool = torch.full((int(table.max()) + 2, PAGE, *parts[0].shape[1:]), torch.nan, dtype=parts[0].dtype)
        for part, row in zip(parts, table, strict=True):
            for block, (start, end) in zip(
                row.tolist(), pairwise([*range(0, len(part), PAGE), len(part)]), strict=False
            ):
                pool[block, : end - start] = part[start:end]
        return pool.to(self._subject.device)

    def table(self) -> Tensor:
        """A block table whose blocks lie in no order."""
        needed = [-(-len(part) // PAGE) for part in self.keys]
        ids = torch.randperm(sum(needed) + 5, generator=torch.Generator().manual_seed(1)).split([*needed, 5])[:-1]
        return torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True).to(torch.int32)

    def error(self, output: Tensor) -> float:
        """How far `output` is off, relative to the size of what was expected."""
        assert output.shape == self.expected.shape and output.dtype == self._subject.dtype
        difference = (output.float().cpu() - self.expected).norm() / self.expected.norm()
        print(f"{self._subject.name}: relative error {difference:.1e}")
        return float(difference)


def prefill(attention: AttentionBackend, problem: Problem, *, paged: bool) -> Tensor:
    table = problem.table() if paged else None
    place = problem.packed if table is None else lambda parts: problem.paged(parts, table)
    return attention.prefill_attention(
        problem.packed(problem.queries),
        place(problem.keys),
        place(problem.values),
        problem.cumulative(problem.queries),
        problem.cumulative(problem.keys),
        max(len(part) for part in problem.queries),
        max(len(part) for part in problem.keys),
        block_table=None if table is None else table.to(problem.packed(problem.queries).device),
    )


def decode(attention: AttentionBackend, problem: Problem) -> Tensor:
    query, table = problem.packed(problem.queries), problem.table()
    contexts = torch.tensor([len(part) for part in problem.keys], dtype=torch.int32, device=query.device)
    pools = problem.paged(problem.keys, table), problem.paged(problem.values, table)
    return attention.decode_attention(query, *pools, contexts, table.to(query.device))


KINDS: dict[str, tuple[list[tuple[int, int]], Callable[[AttentionBackend, Problem], Tensor]]] = {
    "prompts": (PROMPTS, lambda attention, problem: prefill(attention, problem, paged=False)),
    "prompts-in-pages": (PROMPTS, lambda attention, problem: prefill(attention, problem, paged=True)),
    "chunks": (CHUNKS, lambda attention, problem: prefill(attention, problem, paged=False)),
    "chunks-in-pages": (CHUNKS, lambda attention, problem: prefill(attention, problem, paged=True)),
    "decode": ([(context - 1, 1) for context in CONTEXTS], decode),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_flash_attention_correctness(subject, heads, kind):
    rows, attend = KINDS[kind]
    problem = Problem(subject, HEADS[heads], rows)
    with torch.inference_mode():
        assert problem.error(attend(subject.make(), problem)) <= subject.bound


@pytest.mark.parametrize(
    ("head_dim", "dtype", "page", "message"),
    [
        (32, torch.bfloat16, 256, "head_dim is 32, expected 64 or 128 for flash-attn"),
        (96, torch.bfloat16, 256, "head_dim is 96, expected 64 or 128 for flash-attn"),
        (64, torch.float32, 256, "dtype is 'float32', expected bfloat16 or float16 for flash-attn"),
        (64, torch.bfloat16, 16, "block_size is 16, expected a multiple of 256 for flash-attn"),
        (64, torch.bfloat16, 384, "block_size is 384, expected a multiple of 256 for flash-attn"),
    ],
)
def test_what_the_kernels_cannot_do_never_reaches_them(head_dim, dtype, page, message):
    pool = torch.zeros(2, page, 1, head_dim, dtype=dtype)
    query = torch.zeros(1, 1, head_dim, dtype=dtype)
    ends, table = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    attention = FlashAttention()
    with pytest.raises(InputError, match=f"^{message}$"):
        attention.decode_attention(query, pool, pool, ends[1:], table)
    with pytest.raises(InputError, match=f"^{message}$"):
        attention.prefill_attention(query, pool, pool, ends, ends, 1, 1, table)


def test_without_pages_any_number_of_keys_will_do():
    key = torch.ones(3, 1, 64, dtype=torch.bfloat16)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    assert torch.equal(FlashAttention().prefill_attention(key, key, key, ends, ends, 3, 3), key)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(InputError, match="attention is 'flash', cannot be imported, expected flash-attn >= 2.7"):
        FlashAttention()
