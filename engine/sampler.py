"""Sampling: logits to token ids.

A sampled row inverts its cumulative distribution at one uniform number. With a seed, that number is a hash of the seed
and the token's position, so a request's tokens depend neither on the batch around it nor on a preemption.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device
from twinserve.engine.online import NOT_SAMPLED
from twinserve.policies import Row, SamplingParams

GREEDY_BELOW = 1e-5
_MASK = (1 << 64) - 1
_EVERY_TOKEN = 1 << 62


def is_plain(params: SamplingParams) -> bool:
    """Do `params` ask for a token of the logits as they are, and for nothing beside it?"""
    changes = params.repetition_penalty != 1.0 or params.min_tokens or params.logit_bias or counts_tokens(params)
    return not changes and params.logprobs is None


def counts_tokens(params: SamplingParams) -> bool:
    """Do `params` penalise tokens that were generated before?"""
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def greedy_sample(logits: Tensor) -> int:
    """The most probable token of `logits` [vocab] or [1, vocab]."""
    return int(logits.argmax(dim=-1).item())


def sample_with_temperature(logits: Tensor, temperature: float, *, seed: int | None = None) -> int:
    """A token drawn from softmax(logits / temperature), `logits` being [vocab] or [1, vocab].

    Args:
        temperature: below 1e-5 the most probable token is taken.
        seed: the same seed draws the same token from the same logits; None draws by torch's generator.
    """
    if temperature < GREEDY_BELOW:
        return greedy_sample(logits)
    draw = torch.rand((), dtype=torch.float64).item() if seed is None else uniform(seed, 0)
    plan = SamplingPlan.of([SamplingParams(temperature=temperature)], [draw], logits.device)
    return int(plan.sample(logits.reshape(1, -1)).item())


def sample(
    logits: Tensor,
    params: Seq[SamplingParams],
    positions: Seq[int],
    *,
    generator: random.Random | None = None,
    seen: Tensor | None = None,
    generated: Seq[int] | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """A token for each row of `logits` [rows, vocab].

    Args:
        params: of each row.
        positions: the place of each row's new token in its sequence, from 0; it makes a seeded row's draw.
        generator: draws for rows without a seed.
        seen: [penalised, vocab], bool; of each row with a repetition penalty, the tokens before the new one.
        generated: how many tokens of each row's answer there are; None is none.
        counts: [counted, vocab], float; of each row with a presence or frequency penalty, how often each token was
            generated.

    Returns:
        [rows], int64

    Raises:
        ValueError: `seen` or `counts` has not a row for each row with such a penalty.
    """
    draws = draw_uniforms(params, positions, generator or random.Random())
    return SamplingPlan.of(params, draws, logits.device, generated).sample(logits, seen, counts)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from `seed` and `position` alone: two rounds of splitmix64 (doi:10.1145/2660193.2660195)."""
    return (mixed(mixed(seed) + position) >> 11) * 2.0**-53


def mixed(x: int) -> int:
    """64 bits that look random, from the low 64 of `x`: a round of splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def draw_uniforms(params: Seq[SamplingParams], positions: Seq[int], generator: random.Random) -> list[float]:
    """The uniform number of each row; a greedy row uses none, and draws none from `generator`."""
    return [
        0.0
        if param.temperature < GREEDY_BELOW
        else generator.random()
        if param.seed is None
        else uniform(param.seed, position)
        for param, position in zip(params, positions, strict=True)
    ]


def mark_seen(seen: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Note in `seen` [rows, vocab] a token of each of `rows`. An assignment would copy its value from the host."""
    seen.view(-1).index_fill_(0, rows.long() * seen.shape[-1] + token_ids.long(), True)


def row_token_pairs(tokens: Seq[list[int]]) -> np.ndarray:
    """(row, token) for each token of each row: [2, tokens]."""
    rows = np.repeat(np.arange(len(tokens)), [len(row) for row in tokens])
    return np.stack((rows, np.concatenate([np.array(row, np.int64) for row in tokens])))


@dataclass(frozen=True)
class GeneratedTokens:
    """What the rows of a step that are penalised for it have generated; made on the host before the step runs.

    Attributes:
        num_rows: rows with a presence or frequency penalty.
        known: rows and tokens [2, tokens] that the host knows.
        late: rows, and the places in the flat batch of their last tokens [2, late], which the step before samples.
    """

    num_rows: int
    known: Tensor
    late: Tensor

    @classmethod
    def of(
        cls,
        sampled: Seq[tuple[Row, int]],
        device: torch.device,
        known_of: Callable[[Row], list[int]] | None = None,
    ) -> GeneratedTokens | None:
        """Of the rows that sample, each with the place of its last token; None where no row is penalised for any.

        Args:
            known_of: the tokens up to the end of a row, as far as they are known; None asks its sequence.
        """
        counted = [(row, place) for row, place in sampled if counts_tokens(row.seq.sampling_params)]
        if not counted:
            return None
        known_of = known_of or (lambda row: row.seq.token_ids[: row.start + row.num_tokens])
        known = [known_of(row)[row.seq.num_prompt_tokens :] for row, _ in counted]
        late = [
            (number, place)
            for number, (row, place) in enumerate(counted)
            if row.seq.num_prompt_tokens + len(known[number]) < row.start + row.num_tokens
        ]
        pairs = row_token_pairs(known), np.array(late, np.int64).reshape(-1, 2).T.copy()
        return cls(len(counted), *(to_device(values, device) for values in pairs))

    def counts(self, token_ids: Tensor, vocab_size: int) -> Tensor:
        """How often each token was generated, [num_rows, vocab_size], float32; `token_ids` are the flat batch's."""
        counts = torch.zeros(self.num_rows, vocab_size, device=token_ids.device)
        for rows, tokens in (self.known, (self.late[0], token_ids[self.late[1]].long())):
            # An accumulating assignment would have the host wait for a look at the indices.
            counts.view(-1).index_add_(0, rows * vocab_size + tokens, torch.ones_like(rows, dtype=counts.dtype))
        return counts


@dataclass(frozen=True)
class SamplingPlan:
    """How each row of a step is sampled; made on the host before the logits exist.

    Attributes:
        rows: [drawn], the rows that are not greedy.
        temperatures, uniforms: [drawn, 1], float32 and float64.
        top_k: [drawn, 1], tokens kept; None where every row keeps all.
        top_p: [drawn, 1], the probability kept; None where every row keeps all.
        min_p: [drawn, 1], the share of the largest probability kept; None where every row keeps all.
        penalised: [penalised], the rows with a repetition penalty; None where there is none.
        penalties: [penalised, 1], float32.
        added: rows, tokens and what is added to their logits, [added] each: biases, and minus infinity for stop tokens
            that come too early; None where there is nothing.
        counted: [counted], the rows with a presence or frequency penalty; None where there is none.
        frequencies, presences: [counted, 1], float32, their penalties.
    """

    rows: Tensor
    temperatures: Tensor
    uniforms: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    penalised: Tensor | None
    penalties: Tensor
    added: tuple[Tensor, Tensor, Tensor] | None
    counted: Tensor | None
    frequencies: Tensor
    presences: Tensor

    @classmethod
    def of(
        cls,
        params: Seq[SamplingParams],
        uniforms: Seq[float],
        device: torch.device,
        generated: Seq[int] | None = None,
    ) -> SamplingPlan:
        """The plan for rows with `params`, each with its uniform number, and its answer's tokens so far: None is 0."""
        rows = [row for row, param in enumerate(params) if param.temperature >= GREEDY_BELOW]
        if params and not rows and all(map(is_plain, params)):
            return _most_probable(device)
        drawn = [params[row] for row in rows]

        def column(values: list, dtype: torch.dtype) -> Tensor:
            return to_device(torch.tensor(values, dtype=dtype)[:, None], device)

        top_k = [param.top_k if param.top_k > 0 else _EVERY_TOKEN for param in drawn]
        top_p = [param.top_p for param in drawn]
        min_p = [param.min_p for param in drawn]
        penalised = [row for row, param in enumerate(params) if param.repetition_penalty != 1.0]
        counted = [row for row, param in enumerate(params) if counts_tokens(param)]
        return cls(
            rows=to_device(torch.tensor(rows, dtype=torch.int64), device),
            temperatures=column([param.temperature for param in drawn], torch.float32),
            uniforms=column([uniforms[row] for row in rows], torch.float64),
            top_k=column(top_k, torch.int64) if any(k < _EVERY_TOKEN for k in top_k) else None,
            top_p=column(top_p, torch.float32) if any(p < 1.0 for p in top_p) else None,
            min_p=column(min_p, torch.float32) if any(p > 0.0 for p in min_p) else None,
            penalised=to_device(torch.tensor(penalised), device) if penalised else None,
            penalties=column([params[row].repetition_penalty for row in penalised], torch.float32),
            added=_added(params, generated or [0] * len(params), device),
            counted=to_device(torch.tensor(counted), device) if counted else None,
            frequencies=column([params[row].frequency_penalty for row in counted], torch.float32),
            presences=column([params[row].presence_penalty for row in counted], torch.float32),
        )

    def sample(self, logits: Tensor, seen: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """A token [rows] for each row of `logits` [rows, vocab]; NOT_SAMPLED where the largest is no finite number.

        Args:
            seen: [penalised, vocab], bool; of each row with a repetition penalty, the tokens before the new one.
            counts: [counted, vocab], float; of each row with a presence or frequency penalty, how often each token was
                generated.

        Raises:
            ValueError: `seen` or `counts` has not a row for each row with such a penalty.
        """
        if self.added is not None:
            rows, tokens, values = self.added
            logits = logits.float().index_put((rows, tokens), values, accumulate=True)
        if self.penalised is not None:
            seen = _shaped("seen", seen, self.penalised, logits)
            chosen = logits[self.penalised].float()
            lowered = torch.where(chosen > 0, chosen / self.penalties, chosen * self.penalties)
            logits = logits.float().index_copy(0, self.penalised, torch.where(seen, lowered, chosen))
        if self.counted is not None:
            counts = _shaped("counts", counts, self.counted, logits)
            lowered = logits[self.counted].float() - self.frequencies * counts - self.presences * (counts > 0)
            logits = logits.float().index_copy(0, self.counted, lowered)
        highest, tokens = logits.max(dim=-1)  # a NaN is the largest of its row
        tokens = tokens.masked_fill_(~highest.isfinite(), NOT_SAMPLED)
        if not len(self.rows):
            return tokens
        # From the largest on, so that no temperature makes an infinity of it.
        scaled = (logits[self.rows].float() - highest[self.rows, None].float()) / self.temperatures
        if self.min_p is not None:
            scaled = scaled.masked_fill(scaled < self.min_p.log(), -torch.inf)
        if self.top_k is not None or self.top_p is not None:
            scaled = scaled.masked_fill(~self._kept(scaled), -torch.inf)
        cumulative = scaled.double().softmax(dim=-1).cumsum(dim=-1)
        # `right`: the first token whose cumulative probability is above the draw, so never one of probability 0.
        drawn = torch.searchsorted(cumulative, self.uniforms * cumulative[:, -1:], right=True)
        drawn = torch.where(tokens[self.rows] == NOT_SAMPLED, NOT_SAMPLED, drawn[:, 0])
        return tokens.index_copy(0, self.rows, drawn)

    def _kept(self, scaled: Tensor) -> Tensor:
        """Which tokens top-k, which keeps all that are as probable as the last, then top-p, keep; of equal logits top-p
        takes the lower ids first."""
        logits, order = scaled.sort(dim=-1, descending=True, stable=True)
        kept = torch.ones_like(order, dtype=torch.bool)
        if self.top_k is not None:
            kept = logits >= logits.gather(1, self.top_k.clamp(max=order.shape[-1]) - 1)
        if self.top_p is not None:
            probabilities = logits.masked_fill(~kept, -torch.inf).softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            kept = kept & ((before < self.top_p) | (self.top_p >= 1.0))
        return torch.zeros_like(kept).scatter(1, order, kept)


@cache
def _most_probable(device: torch.device) -> SamplingPlan:
    """The plan for rows that take their most probable tokens, however many: that of none."""
    return SamplingPlan.of([], [], device)


def _added(
    params: Seq[SamplingParams], generated: Seq[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`SamplingPlan.added`."""
    found: list[tuple[int, int, float]] = []
    for row, (param, count) in enumerate(zip(params, generated, strict=True)):
        found += [(row, token, bias) for token, bias in param.logit_bias]
        if count < param.min_tokens:
            found += [(row, token, -torch.inf) for token in param.stop_token_ids]
    if not found:
        return None
    rows, tokens, values = zip(*found, strict=True)
    return (
        to_device(torch.tensor(rows), device),
        to_device(torch.tensor(tokens), device),
        to_device(torch.tensor(values, dtype=torch.float32), device),
    )


def _shaped(name: str, values: Tensor | None, rows: Tensor, logits: Tensor) -> Tensor:
    """`values`, which have a row for each of `rows`.

    Raises:
        ValueError: they have not.
    """
    shape, expected = None if values is None else tuple(values.shape), (len(rows), logits.shape[-1])
    if values is None or shape != expected:
        raise ValueError(f"{name} is of shape {shape}, expected {expected}")
    return values
