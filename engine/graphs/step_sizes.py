"""Which steps are captured, of what sizes, and to which of them a step is padded."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Literal, get_args

from twinserve.settings.errors import InputError

CAPTURED_PROMPT_TOKENS = (16, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Prompt tokens of the steps that are captured; a step is padded to the next of them."""

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

    Raises:
        InputError: `captured` is none of these.
    """

    captured: Captured = "all"
    longest_first: bool = True

    def __post_init__(self) -> None:
        if self.captured not in get_args(Captured):
            raise InputError(f"expected one of {', '.join(get_args(Captured))}", field="captured", value=self.captured)


@dataclass(frozen=True)
class StepSize:
    """How many rows of each kind a step has, padding included."""

    decodes: int
    prompt_tokens: int = 0
    prompts: int = 0


class StepSizes:
    """Sizes close together for steps of decodes alone, and a few numbers of decodes for each of prompt tokens.

    Args:
        max_num_seqs, max_num_batched_tokens: limits of the policies.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int):
        self._decodes = sorted(
            {*(size for size in (1, 2, 4) if size < max_num_seqs), *range(8, max_num_seqs, 8), max_num_seqs}
        )
        most = bisect_left(CAPTURED_PROMPT_TOKENS, max_num_batched_tokens)
        self._prompt_tokens = CAPTURED_PROMPT_TOKENS[: most + 1]
        self._decodes_beside = [0, *(size for size in (16, 64) if size < max_num_seqs), max_num_seqs]

    def captured(self, which: Captured) -> list[StepSize]:
        """The sizes of these steps, the largest of each kind first."""
        decodes = [StepSize(size) for size in self._decodes]
        mixed = [
            StepSize(decodes, tokens, CAPTURED_PROMPTS)
            for tokens in self._prompt_tokens
            for decodes in self._decodes_beside
        ]
        return {"all": mixed[::-1] + decodes[::-1], "decodes": decodes[::-1], "none": []}[which]

    def as_facts(self, which: Captured) -> dict[str, Any]:
        """The sizes of these steps, as the facts of a run name them."""
        facts: dict[str, Any] = {"decodes": self._decodes} if which != "none" else {}
        if which == "all":
            beside = {"prompt_tokens": list(self._prompt_tokens), "decodes_beside": self._decodes_beside}
            facts |= beside | {"prompts": CAPTURED_PROMPTS}
        return facts

    def padded(self, step: StepSize) -> StepSize:
        """The smallest size that can be captured and has room for a step, or the step's own if there is none."""
        if not step.prompt_tokens:
            return StepSize(self._decodes[bisect_left(self._decodes, step.decodes)]) if step.decodes else step
        if step.prompt_tokens > self._prompt_tokens[-1] or step.prompts > CAPTURED_PROMPTS:
            return step
        tokens = self._prompt_tokens[bisect_left(self._prompt_tokens, step.prompt_tokens)]
        decodes = self._decodes_beside[bisect_left(self._decodes_beside, step.decodes)]
        return StepSize(decodes, tokens, CAPTURED_PROMPTS)
