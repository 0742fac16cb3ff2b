"""One generation request as the policies see it: tokens known, tokens computed, blocks held."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto


class SequenceStatus(Enum):
    """Where a sequence is in its life. A preempted sequence is WAITING; one aborted or refused is FINISHED."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    `temperature` below 1e-5 is greedy. `top_k` 0 and `top_p` 1.0 keep the whole vocabulary. `seed` makes the sampled
    tokens of a request repeatable whatever else runs beside it. `stop_token_ids` end a request like the tokenizer's
    end-of-sequence token does; `ignore_eos` switches both off.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature is {self.temperature}, expected a number >= 0")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected an integer >= 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected an integer >= 0 (0 keeps every token)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}, expected a number in (0, 1]")


_next_seq_id = itertools.count()


class Sequence:
    """A prompt and the tokens generated after it.

    There is no prefill or decode phase here: a sequence has tokens it *knows* (`num_tokens`) and tokens whose KV
    exists or will exist once the launched steps have run (`num_computed_tokens`). A step computes some of the
    difference; a step that reaches the last known token samples one more.

    A sequence of the simulator has no token ids: it is made with `token_ids=None` and `num_prompt_tokens`, and
    `prefix_key` says what its tokens are. `prefix_key(n)` is an integer that two sequences share exactly when their
    first n tokens are equal, generated tokens included; the prefix cache then uses it in place of hashing.

    Attributes:
        seq_id: identifies the sequence to its owner; nothing is ordered or hashed by it.
        token_ids: prompt and generated tokens; empty for a sequence without token ids.
        num_prompt_tokens: tokens of the prompt.
        block_table: ids of the KV blocks held, in token order.
        num_cached_tokens: tokens found in the prefix cache at the latest admission.
        num_computed_tokens: tokens whose KV exists or is being computed by a launched step.
        num_in_flight: tokens that launched steps will sample and that are not known yet.
        num_scheduled_tokens: tokens the latest decided step computes for it.
        finish_reason: "stop", "length", "abort" or "refused" once FINISHED.
        arrival_ns, ingested_ns, first_scheduled_ns, first_token_ns, finish_ns: times in integer nanoseconds, written
            by whoever knows them (Core for all but the first); the policies never read them.
    """

    block_size: int = 256

    def __init__(
        self,
        token_ids: list[int] | None,
        sampling_params: SamplingParams | None = None,
        *,
        seq_id: int | None = None,
        num_prompt_tokens: int | None = None,
        prefix_key: Callable[[int], int] | None = None,
        arrival_ns: int = 0,
    ):
        if token_ids is None and (num_prompt_tokens is None or prefix_key is None):
            raise ValueError("a sequence without token_ids needs num_prompt_tokens and prefix_key")
        self.seq_id = next(_next_seq_id) if seq_id is None else seq_id
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.has_token_ids = token_ids is not None
        self.token_ids: list[int] = list(token_ids) if token_ids is not None else []
        self.num_prompt_tokens: int = len(self.token_ids) if token_ids is not None else int(num_prompt_tokens or 0)
        self.sampling_params = sampling_params or SamplingParams()
        self.prefix_key = prefix_key
        self._num_tokens = self.num_prompt_tokens

        self.block_table: list[int] = []
        self.block_hashes: list[int] = []
        self.num_cached_tokens = 0
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_scheduled_tokens = 0
        self.num_registered_blocks = 0
        self.has_sampled = False
        self.num_preemptions = 0
        self.refusal: str | None = None

        self.arrival_ns = arrival_ns
        self.ingested_ns: int | None = None
        self.first_scheduled_ns: int | None = None
        self.first_token_ns: int | None = None
        self.finish_ns: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt and the generated tokens received so far."""
        return self._num_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks that all known tokens need."""
        return (self._num_tokens + self.block_size - 1) // self.block_size

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens received so far."""
        return self._num_tokens - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The generated tokens received so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int | None) -> None:
        """Take a generated token; None counts one in a sequence without token ids."""
        if self.has_token_ids:
            if token_id is None:
                raise ValueError(f"sequence {self.seq_id} has token ids, but was given a token without an id")
            self.token_ids.append(token_id)
        self._num_tokens += 1

    def __repr__(self) -> str:
        return (
            f"Sequence(seq_id={self.seq_id}, {self.status.name}, known={self._num_tokens}, "
            f"computed={self.num_computed_tokens}, in_flight={self.num_in_flight}, blocks={len(self.block_table)})"
        )
