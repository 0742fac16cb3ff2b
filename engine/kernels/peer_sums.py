"""Sums and gatherings over the ranks of one host: a kernel of each reads the others' parts where they lie.

Where a device reads another's memory over a link, a sum takes the link's time and no copy. A flag in each other's
memory says that a part is there. What stands behind the sum in a layer, the residual and the norm, is done by the same
kernel. All ranks add in the same order, so they have the same sum to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from twinserve.engine.float8 import Float8Rows
from twinserve.engine.kernels.fused import float8_like, store_normed


@dataclass(frozen=True)
class PeerSum:
    """A sum of parts, one of each rank, or what is gathered of them.

    Attributes:
        parts: of each rank, [rows, size], or [words].
        flags: of each rank, [ranks] int64: of each other rank, the last sum whose part is there, as all ranks count.
        base: [1], int64, the sums before this step.
        number: in its step, from 1.
        rank: which of the ranks this is.
    """

    parts: tuple[Tensor, ...]
    flags: tuple[Tensor, ...]
    base: Tensor
    number: int
    rank: int

    @property
    def own(self) -> Tensor:
        """This rank's part."""
        return self.parts[self.rank]


@triton.jit
def _seen(flag):
    """What a flag says; whoever reads it sees what its writer had written before."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u64 $0, [$1];", "=l,l", [flag.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _say(flags, now, RANK: tl.constexpr):
    """Say to the others that this rank's part is there: a kernel that has begun has the one before it, which made the
    part, behind it."""
    if tl.program_id(0) == 0:
        for rank in tl.static_range(len(flags)):
            if rank != RANK:
                tl.atomic_xchg(flags[rank] + RANK, now, sem="release", scope="sys")


@triton.jit
def _wait(flags, now, RANK: tl.constexpr):
    """Wait until all others have said so."""
    for rank in tl.static_range(len(flags)):
        if rank != RANK:
            flag = flags[RANK] + rank
            seen = _seen(flag)
            while seen < now:
                seen = _seen(flag)


@triton.jit
def _sum_kernel(
    parts, flags, base, number, residual, weight, out, scales, eps, size,
    RANK: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, FLOAT8: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    now = tl.load(base) + number
    _say(flags, now, RANK)
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    # What needs no waiting for is asked for before the wait.
    own = tl.load(parts[RANK] + row + columns, inside, other=0.0)
    before = tl.load(residual + row + columns, inside, other=0.0) if ADD else own
    weights = tl.load(weight + columns, inside, other=0.0) if NORM else own
    _wait(flags, now, RANK)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(len(parts)):
        if rank == RANK:
            total += own.to(tl.float32)
        else:
            total += tl.load(parts[rank] + row + columns, inside, other=0.0).to(tl.float32)
    values = total.to(own.dtype)
    if ADD:
        values = (values.to(tl.float32) + before.to(tl.float32)).to(own.dtype)
    tl.store(residual + row + columns, values, inside)
    if NORM:
        store_normed(out + row + columns, scales, values, weights, inside, eps, size, FLOAT8)


@triton.jit
def _gather_kernel(parts, flags, base, number, out, count, RANK: tl.constexpr, BLOCK: tl.constexpr):
    now = tl.load(base) + number
    _say(flags, now, RANK)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    _wait(flags, now, RANK)
    for rank in tl.static_range(len(parts)):
        tl.store(out + rank * count + at, tl.load(parts[rank] + at, inside), inside)


def gather_peers(one: PeerSum) -> Tensor:
    """The parts of all ranks, [ranks, words]."""
    out, count, block = one.own.new_empty(len(one.parts), len(one.own)), len(one.own), 512
    _gather_kernel[(triton.cdiv(count, block),)](
        one.parts, one.flags, one.base, one.number, out, count, one.rank, block, num_warps=4
    )  # fmt: skip
    return out


@triton.jit
def _embed_kernel(tokens, table, out, first, count, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64) - first
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    is_own = (token >= 0) & (token < count)
    vector = tl.load(table + token * size + columns, inside & is_own, other=0.0)
    tl.store(out + row * size + columns, vector, inside)


def embed_part(token_ids: Tensor, table: Tensor, first: int, out: Tensor) -> None:
    """The vectors of the tokens that lie in a rank's `table` [tokens, size], from token `first` on, in `out`
    [rows, size]; zeros for the others."""
    rows, size = out.shape
    block = triton.next_power_of_2(size)
    _embed_kernel[(rows,)](token_ids, table, out, first, len(table), size, block, num_warps=max(1, block // 512))


def sum_peers(one: PeerSum, out: Tensor) -> Tensor:
    """A sum, left in `out` [rows, size]."""
    _launch(one, out, None, 0.0, out, None, add=False)
    return out


def add_peers(one: PeerSum, residual: Tensor, *, early: bool) -> None:
    """Add a sum to `residual` [rows, size].

    Args:
        early: start while the kernel before this one runs, and have the one behind it do so.
    """
    _launch(one, residual, None, 0.0, residual, None, early=early)


def add_peers_and_norm(one: PeerSum, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Add a sum to `residual` [rows, size], and give what comes of it after root mean square normalisation.

    Args:
        out: takes the result, if there is one.
    """
    out = torch.empty_like(residual) if out is None else out
    _launch(one, residual, weight, eps, out, None)
    return out


def add_peers_and_norm_float8(one: PeerSum, residual: Tensor, weight: Tensor, eps: float) -> Float8Rows:
    """What `add_peers_and_norm` gives, in float8."""
    out = float8_like(residual, residual.shape[1])
    _launch(one, residual, weight, eps, out.values, out.scale)
    return out


def _launch(
    one: PeerSum,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    scales: Tensor | None,
    *,
    add: bool = True,
    early: bool = False,
) -> None:
    rows, size = residual.shape
    block = triton.next_power_of_2(size)
    _sum_kernel[(rows,)](
        one.parts, one.flags, one.base, one.number, residual, residual if weight is None else weight, out,
        residual if scales is None else scales, eps, size,
        one.rank, block, add, weight is not None, scales is not None, early, num_warps=_warps(rows, block),
        launch_pdl=early,
    )  # fmt: skip


def _warps(rows: int, block: int) -> int:
    """For a program that sums a row of so many numbers: many where few rows leave most of a device idle, few where all
    wait for the link. Measured with rows of 4,096 on two H200s."""
    wanted = 16 if rows <= 64 else 8 if rows < 256 else 4
    return max(1, min(wanted, block // 64))
