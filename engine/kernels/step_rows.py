"""What a step's tokens are, worked out on the device from what it keeps of each sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count"])
def _edit_kernel(state, edits, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(edits + index, index < count, other=0)
    tl.store(state + place, tl.load(edits + count + index, index < count), index < count)


def apply_edits(state: Tensor, edits: Tensor) -> None:
    """Write `edits` [2, count] into `state`, both int32: the places, no two of them equal, then their values."""
    count = edits.shape[1]
    _edit_kernel[(triton.cdiv(count, 256),)](state, edits, count, 256)


@triton.jit(do_not_specialize=["count"])
def _read_rows_kernel(
    rows, tokens, computed, tables, prompt_tokens, prompt_positions, token_ids, positions, slots, count, scratch,
    table_width, HAS_PROMPTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    row = tl.load(rows + index, inside, other=scratch)
    real = row != scratch
    if HAS_PROMPTS:
        given = tl.load(prompt_tokens + index, real, other=-1)
        decodes = real & (given < 0)
        token = tl.where(given < 0, 0, given) + tl.load(tokens + row, decodes, other=0)
        position = tl.load(prompt_positions + index, real & (given >= 0), other=0)
        position += tl.load(computed + row, decodes, other=0)
    else:
        token = tl.load(tokens + row, real, other=0)
        position = tl.load(computed + row, real, other=0)
    block = tl.load(tables + row.to(tl.int64) * table_width + position // BLOCK_SIZE, real, other=0)
    tl.store(token_ids + index, token, inside)
    tl.store(positions + index, position, inside)
    tl.store(slots + index, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), inside)


def read_rows(
    rows: Tensor,
    tokens: Tensor,
    computed: Tensor,
    tables: Tensor,
    prompt_tokens: Tensor,
    prompt_positions: Tensor,
    block_size: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The token, position and KV slot of each token of a step.

    The last device row is scratch: it stands for token 0 at position 0, which is not stored (slot -1).

    Args:
        rows: [step's tokens], int32: the device row of each token's sequence.
        tokens, computed: [device rows], int32: the token that each row computes next, and how many came before it.
        tables: [device rows, blocks], int32.
        prompt_tokens, prompt_positions: [step's tokens], int32: tokens of prompts, -1 for one that its row has; empty
            where there is none.
        out: token ids, positions and slots [step's tokens], int32; written.
    """
    count = len(rows)
    _read_rows_kernel[(triton.cdiv(count, 128),)](
        rows, tokens, computed, tables, prompt_tokens, prompt_positions, *out, count, len(tokens) - 1, tables.shape[1],
        len(prompt_tokens) > 0, block_size, 128,
    )  # fmt: skip


@triton.jit
def _gather_tables_kernel(
    rows, positions, tables, lengths, gathered, scratch, table_width, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index)
    length = tl.where(row == scratch, 1, tl.load(positions + index) + 1)
    source = tables + row.to(tl.int64) * table_width
    for first in range(0, tl.cdiv(length, BLOCK_SIZE), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(
            gathered + index * table_width + columns,
            tl.load(source + columns, columns < table_width),
            columns < table_width,
        )
    tl.store(lengths + index, length)


def gather_tables(
    rows: Tensor, positions: Tensor, tables: Tensor, block_size: int, lengths: Tensor, gathered: Tensor
) -> None:
    """Context lengths and block tables in the order of `rows`, for kernels that want them so.

    Args:
        rows, positions: [decodes], int32: device rows, the last of which is scratch, and the places of the tokens they
            compute.
        lengths: [decodes], int32; written.
        gathered: [decodes, blocks], int32; written as far as a row's context goes.
    """
    _gather_tables_kernel[(len(rows),)](
        rows, positions, tables, lengths, gathered, len(tables) - 1, tables.shape[1], block_size, 64, num_warps=1
    )
