"""Drawing tokens where each rank has the logits of some of the vocabulary, without bringing them together."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from twinserve.engine.device_queue import to_device
from twinserve.engine.online import NOT_SAMPLED
from twinserve.engine.parallel.group import Group
from twinserve.engine.sampler import GREEDY_BELOW, is_plain
from twinserve.policies import SamplingParams

MOST_TOP_K = 1024
"""Of a row's logits, as many as each rank gives to the others to find the k-th largest."""


@dataclass(frozen=True)
class Drawing:
    """How the rows of a step draw, as plain numbers that are told to every rank; none for rows that are greedy.

    Attributes:
        rows: those that draw.
        temperatures, uniforms: of each of them.
        top_k: tokens that each keeps; 0 is all.
        min_p: the share of the largest probability that each keeps.
    """

    rows: list[int]
    temperatures: list[float]
    uniforms: list[float]
    top_k: list[int]
    min_p: list[float]

    @classmethod
    def of(cls, params: Seq[SamplingParams], uniforms: Seq[float]) -> Drawing | None:
        """How rows with `params` draw, each by its uniform number; None where one of them needs all logits: for
        log-probabilities, a penalty, a bias, top-p, or a top-k above MOST_TOP_K."""
        rows = [row for row, param in enumerate(params) if param.temperature >= GREEDY_BELOW]
        drawn = [params[row] for row in rows]
        if not all(map(is_plain, params)) or any(one.top_p < 1.0 or one.top_k > MOST_TOP_K for one in drawn):
            return None
        return cls(
            rows,
            [one.temperature for one in drawn],
            [uniforms[row] for row in rows],
            [max(0, one.top_k) for one in drawn],
            [one.min_p for one in drawn],
        )

    def draw(self, logits: Tensor, first_token: int, group: Group) -> Tensor:
        """A token [rows] for each row, alike on all ranks; as `SamplingPlan.sample` draws from all logits.

        Args:
            logits: [rows, vocabulary of the rank], minus infinity where there is no token.
            first_token: the token of its first column.
        """
        highest, own = logits.max(dim=-1)  # a NaN is the largest of its row
        every = group.gather(torch.stack((highest.double(), (own + first_token).double())))
        best = every[:, 0].amax(dim=0)
        tokens = every[:, 1].masked_fill(every[:, 0] != best, torch.inf).amin(dim=0)  # of equal logits the first
        tokens = torch.where(best.isfinite(), tokens, float(NOT_SAMPLED)).long()
        if not self.rows:
            return tokens
        device = logits.device
        rows = to_device(torch.tensor(self.rows), device)
        scaled = (logits[rows].float() - best[rows, None].float()) / _column(self.temperatures, torch.float32, device)
        if any(self.min_p):
            scaled = scaled.masked_fill(scaled < _column(self.min_p, torch.float32, device).log(), -torch.inf)
        if any(self.top_k):
            scaled = scaled.masked_fill(scaled < self._kth(scaled, group), -torch.inf)
        drawn = _inverted(scaled.double().exp(), _column(self.uniforms, torch.float64, device), first_token, group)
        drawn = torch.where(tokens[rows] == NOT_SAMPLED, NOT_SAMPLED, drawn)
        return tokens.index_copy(0, rows, drawn)

    def _kth(self, scaled: Tensor, group: Group) -> Tensor:
        """The least of `scaled` [rows, vocabulary of the rank] that each row keeps, [rows, 1]."""
        most = min(max(self.top_k), scaled.shape[-1])
        largest = group.gather(scaled.topk(most).values).transpose(0, 1).flatten(1).sort(dim=-1, descending=True).values
        top_k = _column(self.top_k, torch.int64, scaled.device)
        kth = largest.gather(1, top_k.clamp(1, largest.shape[-1]) - 1)
        return kth.masked_fill((top_k == 0) | (top_k > largest.shape[-1]), -torch.inf)


def _inverted(weights: Tensor, uniforms: Tensor, first_token: int, group: Group) -> Tensor:
    """The token [rows] at which each row's cumulative weight exceeds its uniform number's share of all ranks' weight.

    Args:
        weights: [rows, vocabulary of the rank], float64.
        uniforms: [rows, 1], in [0, 1).
    """
    cumulative = weights.cumsum(dim=-1)
    bounds = group.gather(cumulative[:, -1]).cumsum(dim=0)  # [ranks, rows]
    target = uniforms[:, 0] * bounds[-1]
    owner = (bounds <= target).sum(dim=0).clamp(max=group.shard.size - 1)
    rest = target - torch.cat((torch.zeros_like(bounds[:1]), bounds[:-1])).gather(0, owner[None])[0]
    # `right`: the first token whose cumulative weight is above the rest, so never one of weight 0; rounding can leave
    # the rest beyond the rank's sum, and then it is the last token that can be drawn.
    place = torch.searchsorted(cumulative, rest[:, None], right=True)[:, 0]
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(dim=-1)
    token = torch.minimum(place, last) + first_token
    return group.max(torch.where(owner == group.shard.rank, token, NOT_SAMPLED))


def _column(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype)[:, None], device)
