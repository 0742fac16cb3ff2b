"""Which steps are captured, of what sizes, and to which of them a step is padded."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Literal, get_args

from twinserve.settings.errors import InputError

CAPTURED_TOKENS = (16, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)
"""Tokens of the steps with prompts that are captured; a step is padded to the next of them. Products of matrices are
worked out in tiles of 128 rows, so that a few tokens more than a multiple of it can cost as much as a tile."""

CAPTURED_BEYOND = (2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
"""Tokens of further steps, of models that are so small that launching their kernels one by one would take longer."""

LAUNCHED_FLOP = 7e12
"""Floating point operations that an H200 works for as long as a step's kernels take to be launched one by one."""

CAPTURED_PROMPTS = 32
"""Prompts of a captured step at most."""

Captured = Literal["all", "decodes", "none"]


@dataclass(frozen=True)
class GraphOptions:
    """What can be switched off in the steps that are graphs, to measure what it buys.

    Attributes:
        captured: which steps are captured: "all" that have a size here, those of "decodes" alone, or "none"; the
            kernels of the others are launched one by one.
        longest_first: the decodes of a step lie by falling context, so that the last programs of attention to start are
            short ones; else in running order.
        few_rows: steps of a few rows have kernels of their own (`engine/kernels/few_rows.py`).
        peer_sums: ranks that can read each other's memory sum by it (`engine/kernels/peer_sums.py`); else by NCCL.

    Raises:
        InputError: `captured` is none of these.
    """

    captured: Captured = "all"
    longest_first: bool = True
    few_rows: bool = True
    peer_sums: bool = True

    def __post_init__(self) -> None:
        if self.captured not in get_args(Captured):
            raise InputError(f"expected one of {', '.join(get_args(Captured))}", field="captured", value=self.captured)


@dataclass(frozen=True)
class StepSize:
    """How large a step is, padding included.

    Attributes:
        decodes: rows that attend as decodes; they are among the first tokens.
        tokens: of all rows.
        prompts: rows beside the decodes that may sample.
    """

    decodes: int
    tokens: int
    prompts: int = 0


class StepSizes:
    """Sizes close together for steps of decodes alone, and a few numbers of decodes for each of tokens with prompts.

    Args:
        max_num_seqs, max_num_batched_tokens: limits of the policies.
        token_flop: floating point operations that the model's layers take for a token.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, token_flop: float):
        sizes = (1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs, 32))
        self._decodes = [*(size for size in sizes if size < max_num_seqs), max_num_seqs]
        most = LAUNCHED_FLOP / token_flop
        tokens = CAPTURED_TOKENS + tuple(size for size in CAPTURED_BEYOND if size <= most)
        self._tokens = tokens[: bisect_left(tokens, max_num_batched_tokens) + 1]
        self._max_num_batched_tokens = max_num_batched_tokens
        self._decodes_beside = [0, *(size for size in (16, 64, 256) if size < max_num_seqs), max_num_seqs]

    @property
    def most_tokens(self) -> int:
        """Of the largest step, padding included."""
        return max(self._decodes[-1], self._tokens[-1], self._max_num_batched_tokens)

    def captured(self, which: Captured) -> list[StepSize]:
        """The sizes of these steps, the largest of each kind first."""
        decodes = [StepSize(size, size) for size in self._decodes]
        mixed = [
            StepSize(decodes, tokens, CAPTURED_PROMPTS)
            for tokens in self._tokens
            for decodes in self._decodes_beside
            if decodes <= tokens
        ]
        return {"all": mixed[::-1] + decodes[::-1], "decodes": decodes[::-1], "none": []}[which]

    def as_facts(self, which: Captured) -> dict[str, Any]:
        """The sizes of these steps, as the facts of a run name them."""
        facts: dict[str, Any] = {"decodes": self._decodes} if which != "none" else {}
        if which == "all":
            beside = {"tokens": list(self._tokens), "decodes_beside": self._decodes_beside}
            facts |= beside | {"prompts": CAPTURED_PROMPTS}
        return facts

    def padded(self, step: StepSize) -> StepSize:
        """The smallest size that can be captured and has room for a step, or the step's own if there is none."""
        if not step.prompts:
            if not step.decodes:
                return step
            size = self._decodes[bisect_left(self._decodes, step.decodes)]
            return StepSize(size, size)
        decodes = self._decodes_beside[bisect_left(self._decodes_beside, step.decodes)]
        tokens = max(step.tokens, decodes)
        if tokens > self._tokens[-1] or step.prompts > CAPTURED_PROMPTS:
            return step
        return StepSize(decodes, self._tokens[bisect_left(self._tokens, tokens)], CAPTURED_PROMPTS)
