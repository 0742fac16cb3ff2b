"""SpeculativeRunner: runs steps whose rows carry drafts, verifies them, and has new ones proposed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from twinserve.engine.device_queue import Step, all_to_device
from twinserve.engine.forward import EagerForward, Forward
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layers.choice import choose_attention
from twinserve.engine.logprobs import AskedLogprobs, Heard, PromptLogprobs
from twinserve.engine.model_runner import ModelRunner, StepInput
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.sampler import GREEDY_BELOW, is_plain, uniform
from twinserve.engine.speculation.proposers import DraftModel, LateDrafts, Proposer, Verified
from twinserve.policies import Batch, Row, Runs, SamplingParams, Sequence


class _Launched:
    """A step as it was decided: what its computing needs of the sequences, copied at launch, and what came of it.

    It is a `twinserve.engine.device_queue.Parts`.

    Attributes:
        rows: as decided, and where they begin, as far as the host knows, once the step is laid out.
        known: by row, its tokens before its first draft, as far as they are known.
        tables: by row.
        texts: by sequence, all tokens known, of rows of prompts that sample.
        gone: sequences that no longer run.
        num_asked: how many drafts to propose.
        is_first: of its Core, so that nothing is known of what runs.
        moved: see `Verified.moved`.
        places: of each sequence that samples, its number among them.
        verified: as it is on the device; None before, and where there are no rows.
        drafts: what was proposed behind it, by the numbers of `places`.
        is_concluded: the host knows what came of it.
        heard: the log-probabilities that are asked for.
        lengths, proposed: of the tokens of each run, and how many drafts were proposed behind it.
    """

    def __init__(self, runner: SpeculativeRunner, batch: Batch, tables: list[np.ndarray]) -> None:
        self._runner, self.rows, self.tables = runner, list(batch.rows), tables
        self.known = [row.seq.token_ids[row.start : row.start + row.num_tokens] for row in self.rows]
        self.texts = {row.seq: row.seq.token_ids[:] for row in self.rows if row.is_prompt and row.samples}
        self.gone = [*batch.left, *batch.preempted]
        self.num_asked, self.is_first = batch.num_drafts_asked, batch.decision <= 0
        self.places = {row.seq: place for place, row in enumerate(row for row in self.rows if row.samples)}
        self.moved: Tensor | None = None
        self.verified: Verified | None = None
        self.drafts: Seq[list[int]] = []
        self.is_concluded = False
        self.heard: list[AskedLogprobs | PromptLogprobs] = []
        self.lengths: list[int] = []
        self.proposed: list[int] = []
        self._laid: _Laid | None = None
        self._tokens: Tensor | None = None

    @property
    def waits(self) -> bool:
        return self._runner.must_know(self)

    def lay_out(self) -> None:
        self._runner.forget(self)
        self._laid = self._runner.laid_out(self) if self.rows else None

    def compute(self) -> Tensor:
        """How many drafts of each row are accepted, then the run of each and what lies behind it."""
        laid, self._laid = self._laid, None  # which knows the step before, and that would know the one before it
        if laid is None:
            return torch.empty(0, dtype=torch.int64)
        self.verified = self._runner.verify(self, laid)
        return torch.cat((self.verified.accepted[:, None], self.verified.runs), dim=1).flatten()

    def go_on(self) -> None:
        if self.verified is not None:
            self._runner.propose_ahead(self, self.verified)

    def conclude(self, numbers: list[int]) -> list[int]:
        self.is_concluded = True
        if self.verified is None:
            return []
        width = 1 + self.verified.runs.shape[1]
        lines = [numbers[first : first + width] for first in range(0, len(numbers), width)]
        return self._runner.conclude(self, [line[1 : 2 + line[0]] for line in lines])

    @property
    def tokens(self) -> Tensor:
        """The last token of each run, then the drafts of each row, on the device."""
        assert self.verified is not None
        if self._tokens is None:
            last = self.verified.runs.gather(1, self.verified.accepted[:, None])[:, 0]
            drafts = [self.drafts.tokens.flatten()] if isinstance(self.drafts, LateDrafts) else []
            self._tokens = torch.cat((last, *drafts))
        return self._tokens

    def sources(self, seq: Sequence, count: int) -> list[int]:
        """Where the last token of a sequence's run and so many drafts behind it lie in `tokens`; whatever in place of
        drafts that there are none of."""
        place, width = self.places[seq], self.drafts.tokens.shape[1] if isinstance(self.drafts, LateDrafts) else 0
        first = len(self.places) + place * width
        return [place, *(first + min(number, width - 1) if width else place for number in range(count))]


@dataclass(frozen=True)
class _Laid:
    """A step that is laid out.

    Attributes:
        before: the step that has what of its tokens the device alone knows.
        asked: the log-probabilities that are asked for.
        places: [sampled rows, 1 + most drafts], int64: the places, among the tokens that the model chooses, of those
            before each row's first draft and behind each; its last one again where it has fewer.
        may: [sampled rows, most drafts], bool: there is such a draft, and chance does not refuse it.
    """

    step: StepInput
    before: _Launched | None
    asked: AskedLogprobs
    places: Tensor
    may: Tensor


class VerifiedStep:
    """A launched step with drafts; a `twinserve.engine.online.StepHandle` whose result are Runs.

    Attributes:
        waited_ns: for how long its launch waited for steps before it.
    """

    def __init__(self, step: Step, launched: _Launched, logprobs: Heard, *, tells: bool) -> None:
        self._step, self._launched, self._logprobs, self._tells = step, launched, logprobs, tells
        self.start_ns = self.end_ns = 0
        self.waited_ns = step.waited_ns

    def result(self) -> Runs:
        """Wait for the step; a run of tokens for each of the batch's `sampled`."""
        tokens = self._step.result()
        self.start_ns, self.end_ns = self._step.start_ns, self._step.end_ns
        for asked in self._launched.heard:
            asked.read(self._logprobs)
        return Runs(tokens, self._launched.lengths, self._launched.proposed if self._tells else None)


class SpeculativeRunner(ModelRunner):
    """Runs steps with drafts, all of a row's tokens at once, through the same attention as any other row.

    Before each draft, and behind the last, the model's own token is drawn, by the uniform number of its place: a draft
    is accepted if it is that token, and the first that is not ends the run. A draft is one token and no distribution,
    so this is rejection sampling (arXiv:2211.17192): it is accepted with the probability p that the model gives it,
    else the token comes from what is left of p. And a request with a seed gets the tokens it gets without drafts.

    Where decisions run ahead (`is_async`), a step is laid out when the one before has run: a row then begins behind
    what was accepted, not where the policies had it, and its drafts are those just proposed, as many as there are.
    Where a model drafts, the device alone need know either: plain rows are laid out and launched while it is at the
    step before, and the host learns what was accepted when it commits that.

    Args:
        make_proposer: gives what guesses.
        max_model_len: tokens of the longest text.
        is_async: nobody is told how many were proposed.
        acceptance_rate: drafts are accepted with this probability, whatever they are; None compares them.
        others: as of ModelRunner.

    Attributes:
        acceptance_rate: as given; it may be changed between two runs.
    """

    def __init__(
        self,
        *others: Any,
        make_proposer: Callable[[SpeculativeRunner], Proposer | DraftModel],
        max_model_len: int,
        is_async: bool,
        acceptance_rate: float | None = None,
        seed: int = 0,
        **named: Any,
    ):
        super().__init__(*others, seed=seed, **named)
        self._proposer, self._is_async, self.acceptance_rate = make_proposer(self), is_async, acceptance_rate
        self._seed, self._max_model_len = seed, max_model_len
        # These are of the thread that computes: the texts, drafts of sequences that were not in the step behind them,
        # how often each had drafts; the step laid out last; while one is laid out, that step if nobody knows what came
        # of it, and by how many tokens rows begin later because of it.
        self._texts: dict[Sequence, list[int]] = {}
        self._drafts: dict[Sequence, tuple[Seq[list[int]], int]] = {}
        self._turns: dict[Sequence, int] = {}
        self._before: _Launched | None = None
        self._unknown: _Launched | None = None
        self._moves: Tensor | None = None
        self._tables: dict[Sequence, np.ndarray] = {}

    def forward_of(self, model: Decoder) -> Forward:
        """The forward pass of a model that drafts, over a pool of its own with blocks of the same numbers."""
        chosen = choose_attention(self.attention.name, model.config.head_dim, model.dtype, self.device, self.block_size)
        return EagerForward(model, chosen.make(), self._cache_for(model))

    def _cache_for(self, model: Decoder) -> KVCache:
        """A pool for a model that drafts."""
        return KVCache(model.config, self.num_blocks, self.block_size, model.dtype, self.device)

    def kernel_facts(self) -> dict[str, Any]:
        """See ModelRunner. On CUDA the host waits for what a step gives, unless drafts and places are the device's."""
        return {} if (self._is_async and self._is_free) or self.device.type != "cuda" else {"waits": True}

    @property
    def _is_free(self) -> bool:
        """Can steps be laid out whose tokens and places the device alone knows?"""
        return isinstance(self._proposer, DraftModel) and self._proposer.is_free and self._forward.is_free

    def adopt(self, sequences: Iterable[Sequence]) -> None:
        """Go on from these sequences as they are, whoever computed them; nothing may be in flight."""
        self._texts = {seq: seq.token_ids[:] for seq in sequences}
        self._drafts.clear()
        self._turns.clear()
        self._before = None

    def launch(self, batch: Batch) -> VerifiedStep:
        """Start a step."""
        self.num_launched += 1
        launched = _Launched(self, batch, super()._block_tables(batch.rows))
        return VerifiedStep(self._queue.submit_parts(launched), launched, self.logprobs, tells=not self._is_async)

    # --- the parts of a step, in the thread that computes ---

    def must_know(self, launched: _Launched) -> bool:
        """Does the host have to know what came of the step before, to lay a step out? Not of plain rows that go on from
        it, for which a model drafts: the device has their tokens and places."""
        before = self._before
        if before is None or launched.is_first or launched.gone or self.prompt_asks or not self._is_free:
            return True
        drafted = before.num_asked + launched.num_asked
        return not all(
            (row.is_prompt or row.seq in before.places)
            and row.start + row.num_tokens + drafted < self._max_model_len
            and _is_placeless(row.seq.sampling_params)
            for row in launched.rows
        )

    def forget(self, launched: _Launched) -> None:
        """Forget the sequences that no longer run when a step begins."""
        if launched.is_first:
            self.adopt(())
        for seq in launched.gone:
            for kept in (self._texts, self._drafts, self._turns):
                kept.pop(seq, None)

    def laid_out(self, launched: _Launched) -> _Laid:
        """A step as it is computed."""
        self._texts.update(launched.texts)
        self._tables = dict(zip([row.seq for row in launched.rows], launched.tables, strict=True))
        before, tokens = self._before, list[list[int]]()
        self._unknown = None if before is None or before.is_concluded else before
        for number, (row, known) in enumerate(zip(launched.rows, launched.known, strict=True)):
            if not row.is_prompt:
                text = self._texts[row.seq]
                known = [] if self._unknown else text[-1:]
                launched.rows[number] = row = row._replace(start=len(text) - len(known))
            if not self._drafts_lie_there(row):
                known = known + self._found(row)
                known += [0] * (row.num_tokens - len(known))
            tokens.append(known)
        sampled = [row for row in launched.rows if row.samples]
        places, may = self._acceptable(sampled)
        self._moves = launched.moved = self._moves_of(launched.rows)
        step = self._snapshot(launched.rows, tokens)
        asked = AskedLogprobs(step.drawn)
        launched.heard = [one for one in (asked, step.prompts) if one]
        if before is not None:
            skipped = before.places.keys() & self._texts.keys() - self._tables.keys()
            self._drafts.update((seq, (before.drafts, before.places[seq])) for seq in skipped)
        self._before = launched
        return _Laid(step, before, asked, places, may)

    def verify(self, launched: _Launched, laid: _Laid) -> Verified:
        """Compute a step: how many drafts of each row are accepted, those up to the first that the model itself did not
        choose; where acceptance is forced, up to the first that chance refuses."""
        step, places = laid.step, laid.places
        token_ids = self._token_ids(step.flat, laid.before)
        chosen = self._chosen(step, token_ids, laid.asked)[places]
        drafts = token_ids[step.flat.last[places[:, 1:]]]
        agree = laid.may if self.acceptance_rate is not None else laid.may & (drafts == chosen[:, :-1])
        accepted = agree.long().cumprod(dim=1).sum(dim=1)
        is_draft = torch.arange(places.shape[1], device=self.device) < accepted[:, None]
        runs = pad(drafts, (0, 1)).where(is_draft, chosen)
        last, rows = step.arranged.layout.last, launched.rows
        begins = [place + 1 - row.num_tokens for place, row in zip(last, rows, strict=True)]
        return Verified(rows, launched.moved, launched.tables, token_ids, begins, accepted, runs)

    def propose_ahead(self, launched: _Launched, verified: Verified) -> None:
        """Have drafts proposed behind a step, where that takes no texts."""
        if isinstance(self._proposer, DraftModel):
            launched.drafts = self._proposer.propose_behind(verified, launched.num_asked)

    def conclude(self, launched: _Launched, runs: list[list[int]]) -> list[int]:
        """The tokens of a step's runs, one behind another; the texts go on with them, and drafts are proposed."""
        for seq, run in zip(launched.places, runs, strict=True):
            launched.lengths.append(len(run))
            self._texts[seq] += [max(0, token) for token in run]  # one of which none was sampled goes on
        texts = {seq: self._texts[seq] for seq in launched.places}
        if isinstance(self._proposer, DraftModel):
            assert isinstance(launched.drafts, LateDrafts)
            most = [self._max_model_len - len(text) for text in texts.values()]
            launched.proposed = launched.drafts.counts = [max(0, min(launched.num_asked, left)) for left in most]
        else:
            launched.drafts = self._proposer.propose(texts, launched.num_asked)
            launched.proposed = list(map(len, launched.drafts))
        return [token for run in runs for token in run]

    def _acceptable(self, sampled: Seq[Row]) -> tuple[Tensor, Tensor]:
        """`_Laid.places` and `_Laid.may` of rows that sample."""
        most = max((row.num_drafts for row in sampled), default=0)
        places, may = np.zeros((len(sampled), 1 + most), np.int64), np.zeros((len(sampled), most), np.bool_)
        first = 0
        for number, row in enumerate(sampled):
            places[number] = np.minimum(np.arange(1 + most), row.num_drafts) + first
            first += 1 + row.num_drafts
            may[number, : self._num_found(row)] = True
            if (rate := self.acceptance_rate) is not None and row.num_drafts:
                turn = self._turns[row.seq] = self._turns.get(row.seq, -1) + 1
                seed = self._seed + row.seq.seq_id * 0x9E3779B9
                may[number] &= [uniform(seed, turn << 16 | draft) < rate for draft in range(most)]
        told = all_to_device([places, may], self.device)
        return told[0].view(places.shape), told[1].view(may.shape).bool()

    def _moves_of(self, rows: Seq[Row]) -> Tensor | None:
        """By how many tokens rows begin later than the host has them: by the drafts that were accepted in the step of
        which it does not know yet; None where it knows."""
        if self._unknown is None:
            return None
        assert self._unknown.verified is not None
        places = [-1 if row.is_prompt else self._unknown.places[row.seq] for row in rows]
        return pad(self._unknown.verified.accepted, (0, 1))[all_to_device([places], self.device)[0]]

    def _drafts_lie_there(self, row: Row) -> bool:
        """Has the device the drafts of a row?"""
        before = self._before
        goes_on = before is not None and not row.is_prompt and row.seq in before.places
        return goes_on and isinstance(self._proposer, DraftModel)

    def _num_found(self, row: Row) -> int:
        """How many drafts of a row were proposed, so far as it has places for them."""
        if self._unknown is not None and not row.is_prompt:
            return min(self._unknown.num_asked, row.num_drafts)
        if self._drafts_lie_there(row):
            assert self._before is not None and isinstance(self._before.drafts, LateDrafts)
            return min(self._before.drafts.counts[self._before.places[row.seq]], row.num_drafts)
        return len(self._found(row))

    def _found(self, row: Row) -> list[int]:
        """The drafts of a row that were proposed, as the host knows them; those of a padded admission are none."""
        if row.is_prompt:
            return []
        before = self._before
        if before is not None and row.seq in before.places:
            return before.drafts[before.places[row.seq]][: row.num_drafts]
        drafts, place = self._drafts.get(row.seq, ([[]], 0))
        return drafts[place][: row.num_drafts]

    # --- what ModelRunner asks of sequences: here it is of the thread that computes ---

    def _late(self, row: Row, missing: int) -> list[int]:
        assert self._before is not None
        return self._before.sources(row.seq, row.num_drafts)[-missing:]

    def _moved(self, order: Seq[int]) -> Tensor | None:
        return None if self._moves is None else self._moves[all_to_device([order], self.device)[0]]

    def _block_tables(self, rows: Seq[Row]) -> list[np.ndarray]:
        return [self._tables[row.seq] for row in rows]

    def _known(self, row: Row) -> list[int]:
        return (self._texts[row.seq] + self._found(row) + [0] * row.num_drafts)[: row.start + row.num_tokens]


def _is_placeless(params: SamplingParams) -> bool:
    """Does it make no difference to how a row is sampled at which place it is?"""
    return is_plain(params) and (params.seed is None or params.temperature < GREEDY_BELOW)
