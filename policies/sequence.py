"""One generation request as the policies see it: tokens known, tokens computed, blocks held."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from mypy_extensions import i64, mypyc_attr


def token_bytes(token_ids: list[int] | array[int]) -> bytes:
    """The token ids as 4 bytes each, in the machine's order: little-endian."""
    return array("I", token_ids).tobytes()


class SequenceStatus(Enum):
    """Where a sequence is in its life. A preempted sequence is WAITING; one aborted or refused is FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    `temperature` below 1e-5 is greedy. `max_tokens` None is up to the model's length. `top_k` 0 or -1, `top_p` 1.0 and
    `min_p` 0.0 (a share of the largest probability) keep the whole vocabulary. `repetition_penalty` divides positive
    logits of earlier tokens, prompt included, and multiplies negative ones (arXiv:1909.05858); `presence_penalty` is
    taken off those of generated tokens, `frequency_penalty` as often as they came; `logit_bias` is added. A `seed` has
    a request's tokens be the same whatever runs beside it. `stop_token_ids` end it as the end-of-sequence token does,
    which alone `ignore_eos` switches off; none is sampled before there are `min_tokens`. `logprobs` asks for those of
    each generated token and of so many most probable ones, before penalties and temperature."""

    temperature: float = 1.0
    max_tokens: int | None = 64
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        whole, number, most = (int,), (int, float), float(1 << 62)
        for name, kinds, least, largest, expected in (
            ("temperature", number, 0.0, 1e30, "a number >= 0 and at most 1e30"),
            ("max_tokens", whole, 1.0, most, "an integer >= 1, or None"),
            ("top_k", whole, -1.0, most, "an integer >= -1 (0 and -1 keep every token)"),
            ("top_p", number, 1e-30, 1.0, "a number in (0, 1], at least 1e-30"),
            ("min_p", number, 0.0, 1.0, "a number in [0, 1] (0 keeps every token)"),
            ("repetition_penalty", number, 1e-6, 1e6, "a number > 0, from 1e-6 to 1e6 (1 changes nothing)"),
            ("min_tokens", whole, 0.0, most, "an integer >= 0"),
            ("presence_penalty", number, -2.0, 2.0, "a number in [-2, 2] (0 changes nothing)"),
            ("frequency_penalty", number, -2.0, 2.0, "a number in [-2, 2] (0 changes nothing)"),
            ("logprobs", whole, 0.0, most, "an integer >= 0, or None"),
            ("seed", whole, -4 * most, 4 * most, "an integer of at most 64 bits, or None"),
            ("ignore_eos", (bool,), 0.0, 1.0, "True or False"),
        ):
            value = getattr(self, name)
            if not (type(value) in kinds and least <= value <= largest or value is None and "None" in expected):
                raise ValueError(f"{name} is {value!r}, expected {expected}")

    def stops(self, token_id: int, eos_token_id: int) -> bool:
        """Does the token end a sequence, whatever its length?"""
        return (token_id == eos_token_id and not self.ignore_eos) or token_id in self.stop_token_ids


_next_seq_id = itertools.count()
BLOCK_SIZE = 256


@mypyc_attr(native_class=False)  # a descriptor is Python's own
class _BlockSize:
    """Tokens in a block: of the class, what a sequence has that no pool has seen yet; of a sequence, its pool's."""

    def __get__(self, seq: Sequence | None, owner: type[Sequence]) -> Any:
        return BLOCK_SIZE if seq is None else seq.tokens_per_block

    def __set__(self, seq: Sequence, block_size: int) -> None:
        seq.tokens_per_block = block_size


class Sequence:
    """A prompt and the tokens generated after it.

    There is no prefill or decode phase: a step computes some of the tokens that are *known* and not *computed*, and
    samples one more if it reaches the last known one.

    Args:
        token_ids: the prompt; None for a sequence of the simulator, which has `num_prompt_tokens` and `prefix_key`.
        prefix_key: `prefix_key(n)` is an integer that two sequences share exactly when their first n tokens are equal,
            generated ones included; it stands for a hash. A method `each(ends)` may give those of a range of lengths.
        priority, tenant: for orders that look at them; the smaller priority is more urgent.
        salt: sequences of different salts never share blocks.

    Attributes:
        seq_id: its owner's name for it. arrival_index, admission_index: how many were accepted, admitted before it.
        token_ids, num_tokens: prompt and generated tokens known so far (no ids in a simulation); their number.
        num_computed_tokens: tokens whose KV exists or is being computed by a launched step.
        num_in_flight: tokens that launched steps will sample and that are not known yet; drafts count as if right.
        num_drafts: draft tokens that wait for its next step.
        num_scheduled_tokens: tokens that the latest step with a row of this sequence computes for it.
        max_tokens, final_length: the most it asks for; tokens at which it ends, whatever is generated.
        block_table: ids of the KV blocks held, in token order. num_block_tokens: tokens that fit in.
        num_cached_tokens, num_registered_tokens: found in the prefix cache at the latest admission; known to it now.
        has_sampled: has a step sampled for it since its latest admission? Until then its tokens are prompt work.
        finish_reason: "stop", "length", "abort" or "refused" once FINISHED; `refusal` says why in words.
        arrival_ns, ingested_ns, first_scheduled_ns, first_token_ns, finish_ns: times; the policies never read them.
    """

    block_size: ClassVar = _BlockSize()
    __slots__ = (
        "admission_index", "arrival_index", "arrival_ns", "block_contents", "block_hashes", "block_table",
        "final_length", "finish_ns", "finish_reason", "first_scheduled_ns", "first_token_ns", "has_sampled",
        "has_token_ids", "ingested_ns", "max_tokens", "num_block_tokens", "num_cached_tokens", "num_computed_tokens",
        "num_drafts", "num_in_flight", "num_preemptions", "num_prompt_tokens", "num_registered_tokens",
        "num_scheduled_tokens", "num_tokens", "prefix_key", "priority", "refusal", "salt", "sampling_params", "seq_id",
        "status", "stop_token_ids", "tenant", "token_ids", "tokens_per_block",
    )  # fmt: skip

    def __init__(
        self,
        token_ids: list[int] | None,
        sampling_params: SamplingParams | None = None,
        *,
        seq_id: int | None = None,
        num_prompt_tokens: int | None = None,
        prefix_key: Callable[[int], int] | None = None,
        arrival_ns: int = 0,
        priority: int = 0,
        salt: str = "",
        tenant: str = "",
    ):
        if token_ids is None and (num_prompt_tokens is None or prefix_key is None):
            raise ValueError("a sequence without token_ids needs num_prompt_tokens and prefix_key")
        self.seq_id = next(_next_seq_id) if seq_id is None else seq_id
        self.has_token_ids = token_ids is not None
        self.token_ids: list[int] = list(token_ids or ())
        self.num_prompt_tokens: i64 = len(self.token_ids) if self.has_token_ids else int(num_prompt_tokens or 0)
        self.sampling_params = sampling_params or SamplingParams()
        self.stop_token_ids = self.sampling_params.stop_token_ids
        self.prefix_key, self.arrival_ns = prefix_key, arrival_ns
        self.priority, self.salt, self.tenant = priority, salt, tenant
        self.status, self.has_sampled = SequenceStatus.WAITING, False
        self.arrival_index = self.admission_index = i64(-1)  # when compiled, a machine's own integer
        self.max_tokens: i64 = self.sampling_params.max_tokens or 1 << 62
        self.num_tokens, self.final_length = self.num_prompt_tokens, self.num_prompt_tokens + self.max_tokens
        self.num_computed_tokens = self.num_in_flight = self.num_scheduled_tokens = self.num_drafts = i64(0)
        self.block_table: list[int] = []
        self.block_hashes: list[int] = []
        self.block_contents: list[bytes | None] = []
        self.tokens_per_block: i64 = BLOCK_SIZE
        self.num_block_tokens = self.num_registered_tokens = self.num_cached_tokens = self.num_preemptions = i64(0)
        self.finish_reason: str | None = None
        self.refusal: str | None = None
        self.ingested_ns: int | None = None
        self.first_scheduled_ns: int | None = None
        self.first_token_ns: int | None = None
        self.finish_ns: int | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks that all known tokens need."""
        return (self.num_tokens + self.tokens_per_block - 1) // self.tokens_per_block

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens received so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The generated tokens received so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int | None) -> None:
        """Take a generated token; None counts one in a sequence without token ids. ValueError if a scheduler hands them
        over (in `postprocess`), it has ended, or the token has no id where the others have."""
        if self.status is not SequenceStatus.WAITING or self.arrival_index >= 0:
            raise ValueError(f"{self} takes no token from outside: its scheduler hands them over, or it has ended")
        if self.has_token_ids:
            if token_id is None:
                raise ValueError(f"sequence {self.seq_id} has token ids, but was given a token without an id")
            self.token_ids.append(token_id)
        self.num_tokens += 1

    def __repr__(self) -> str:
        return (
            f"Sequence(seq_id={self.seq_id}, {self.status.name}, known={self.num_tokens}, "
            f"computed={self.num_computed_tokens}, in_flight={self.num_in_flight}, blocks={len(self.block_table)})"
        )
