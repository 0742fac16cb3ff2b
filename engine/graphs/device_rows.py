"""DeviceRows: what the device keeps of each running sequence, changed by edits as the policies' deltas come."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device
from twinserve.engine.kernels.step_rows import apply_edits
from twinserve.engine.sampler import is_plain, mark_seen, mixed
from twinserve.policies import Batch, Row, SamplingParams, Sequence

_EVERY_TOKEN = (1 << 31) - 1


class DeviceRows:
    """A row on the device for each running sequence: its last token, its length, its block table, how it samples.

    Steps write the tokens they sample into the rows themselves, so the host need not know a token to launch the step
    that computes it. The host writes what a decision changes: one copy and one kernel a step, none if nothing changed.

    Args:
        num_rows: sequences that may run at once; one row more is scratch, for padding.
        table_width: blocks of the longest context.
        vocab_size: of the model.
        generator: draws the seeds of requests without one.
        is_sampled: whether a step samples by itself as parameters ask for; those of others are special.

    Attributes:
        tokens, computed: [num_rows + 1], int32: the token that a row computes next, and how many came before it.
        temperatures: [num_rows + 1], float32.
        filters: [num_rows + 1, 3], int32: top-k, and the bits of top-p and min-p in float32.
        seeds: [num_rows + 1, 2], int32: the mixed seed's low and high half.
        tables: [num_rows + 1, table_width], int32.
        special: sequences with a row that ask for more than a step samples by itself.
        seen: [num_rows, vocab_size], bool: the tokens before the next one, of rows with a repetition penalty.
    """

    def __init__(
        self,
        num_rows: int,
        table_width: int,
        vocab_size: int,
        num_blocks: int,
        device: torch.device,
        generator: random.Random,
        is_sampled: Callable[[SamplingParams], bool] = is_plain,
    ):
        self._device, self._generator, self._num_blocks = device, generator, num_blocks
        self._is_sampled = is_sampled
        rows = num_rows + 1
        starts = np.cumsum(
            [0, *(aligned(size) for size in (rows, rows, rows, 2 * rows, 3 * rows, rows * table_width))]
        ).tolist()
        self._state = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        views = [self._state[start:end] for start, end in zip(starts, starts[1:], strict=False)]
        self.tokens, self.computed = views[0][:rows], views[1][:rows]
        self.temperatures = views[2][:rows].view(torch.float32)
        self.seeds = views[3][: 2 * rows].view(rows, 2)
        self.filters = views[4][: 3 * rows].view(rows, 3)
        self.tables = views[5][: rows * table_width].view(rows, table_width)
        self._computed, self._temperatures, self._seeds, self._filters, self._tables = starts[1:6]
        self._width, self._vocab_size = table_width, vocab_size
        self.scratch = num_rows
        self._free = list(range(num_rows - 1, -1, -1))
        self._rows: dict[Sequence, int] = {}
        self.special: set[Sequence] = set()
        self._with_seen: set[int] = set()

    def of(self, seqs: Iterable[Sequence]) -> list[int]:
        """The rows of these sequences."""
        rows = self._rows
        return [rows[seq] for seq in seqs]

    def clear(self) -> None:
        """Forget every sequence."""
        for seq in list(self._rows):
            self._forget(seq)

    def changes(self, batch: Batch, rows: Iterable[Row]) -> np.ndarray | None:
        """What a decision changes: who came, who went, whose block tables grew; None if nothing on the device.

        The result is for `apply`, in the order of the decisions.

        Args:
            rows: those whose sequences may not be known yet.

        Raises:
            ValueError: a block is not of the pool.
            RuntimeError: a row's token is neither on the device nor known to the host.
        """
        for seq in (*batch.left, *batch.preempted):
            self._forget(seq)
        edits: list[tuple[int, list[int]]] = []
        for seq, block_ids in batch.grown:
            if seq in self._rows:
                first = self._rows[seq] * self._width + len(seq.block_table) - len(block_ids)
                edits.append((self._tables + first, block_ids))
                _check_blocks(seq, block_ids, self._num_blocks)
        for row in rows:
            if row.seq not in self._rows:
                edits += self._describe(row)
        if not edits:
            return None
        places = np.concatenate([np.arange(place, place + len(values)) for place, values in edits])
        values = np.concatenate([values for _, values in edits])
        return np.stack((places, values)).astype(np.int32)

    def apply(self, changes: np.ndarray) -> None:
        """Write what `changes` gave, behind the steps launched before."""
        apply_edits(self._state, to_device(changes, self._device))

    @cached_property
    def seen(self) -> Tensor:
        return torch.zeros(self.scratch, self._vocab_size, dtype=torch.bool, device=self._device)

    def unseen(self, row: Row) -> list[int] | None:
        """The tokens up to the end of a row that samples, to be given to `see`; None where `seen` has them."""
        index = self._rows[row.seq]
        if index in self._with_seen:
            return None
        self._with_seen.add(index)
        return row.seq.token_ids[: row.start + row.num_tokens]

    def see(self, tokens: dict[int, list[int]]) -> None:
        """Write into `seen` what `unseen` gave for these rows, behind the steps launched before."""
        if tokens:
            rows = np.array(list(tokens))
            pairs = np.stack(
                (np.repeat(rows, [len(ids) for ids in tokens.values()]), np.concatenate([*tokens.values()]))
            )
            self.seen.index_fill_(0, to_device(rows, self._device), False)
            mark_seen(self.seen, *to_device(pairs, self._device))

    def _describe(self, row: Row) -> list[tuple[int, list[int]]]:
        """Give a sequence a row on the device; the edits that describe it."""
        seq = row.seq
        _check_blocks(seq, seq.block_table, self._num_blocks)
        index = self._rows[seq] = self._free.pop()
        params = seq.sampling_params
        if not self._is_sampled(params):
            self.special.add(seq)
        seed = mixed(self._generator.getrandbits(64) if params.seed is None else params.seed)
        edits = [
            (self._temperatures + index, _bits(params.temperature)),
            (self._seeds + 2 * index, np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32).tolist()),
            (self._filters + 3 * index, [min(max(0, params.top_k), _EVERY_TOKEN), *_bits(params.top_p, params.min_p)]),
            (self._tables + index * self._width, seq.block_table),
        ]
        if not row.is_prompt:
            if row.start >= seq.num_tokens:
                raise RuntimeError(f"the last token of {row} is neither known nor sampled by the step launched before")
            edits += [(index, [seq.token_ids[row.start]]), (self._computed + index, [row.start])]
        return edits

    def _forget(self, seq: Sequence) -> None:
        row = self._rows.pop(seq, None)
        if row is not None:
            self._free.append(row)
            self._with_seen.discard(row)
            self.special.discard(seq)


def _bits(*numbers: float) -> list[int]:
    """Those of float32 numbers, as int32."""
    return np.array(numbers, np.float32).view(np.int32).tolist()


def _check_blocks(seq: Sequence, block_ids: list[int], num_blocks: int) -> None:
    if block_ids and max(block_ids) >= num_blocks:
        raise ValueError(f"{seq} holds block {max(block_ids)}, but this runner has {num_blocks} blocks")


def aligned(size: int) -> int:
    """`size` int32 numbers, so that what comes behind them begins at 64 bytes."""
    return -(-size // 16) * 16
