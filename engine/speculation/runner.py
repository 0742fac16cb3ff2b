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
from twinserve.engine.model_runner import ModelRunner, StepInput, drawn
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.sampler import uniform
from twinserve.engine.speculation.proposers import DraftModel, LateDrafts, Proposer, Verified
from twinserve.policies import Batch, Row, Runs, Sequence


class _Launched:
    """A step as it was decided: what its computing needs of the sequences, copied at launch, and what came of it.

    It is a `twinserve.engine.device_queue.Parts`.

    Attributes:
        rows: as decided, and where they really begin once the step is laid out.
        known: by row, its tokens before its first draft, those that are known; all of them once it is laid out.
        tables: by row.
        texts: by sequence, all tokens known, of rows of prompts that sample.
        gone: sequences that no longer run.
        num_asked: how many drafts to propose.
        is_first: of its Core, so that nothing is known of what runs.
        heard: the log-probabilities that are asked for.
        lengths, proposed: of the tokens of each run, and how many drafts were proposed behind it.
    """

    def __init__(self, runner: SpeculativeRunner, batch: Batch, tables: list[np.ndarray]) -> None:
        self._runner, self.rows, self.tables = runner, list(batch.rows), tables
        self.known = [row.seq.token_ids[row.start : row.start + row.num_tokens] for row in self.rows]
        self.texts = {row.seq: row.seq.token_ids[:] for row in self.rows if row.is_prompt and row.samples}
        self.gone = [*batch.left, *batch.preempted]
        self.num_asked, self.is_first = batch.num_drafts_asked, batch.decision <= 0
        self.heard: list[AskedLogprobs | PromptLogprobs] = []
        self.lengths: list[int] = []
        self.proposed: list[int] = []
        self._laid: _Laid | None = None
        self._verified: Verified | None = None
        self._late: LateDrafts | None = None

    def lay_out(self) -> None:
        self._laid = self._runner.laid_out(self)

    def compute(self) -> Tensor:
        """How many drafts of each row are accepted, then the run of each and what lies behind it."""
        if self._laid is None:
            return torch.empty(0, dtype=torch.int64)
        self._verified = self._runner.verified(self, self._laid)
        return torch.cat((self._verified.accepted[:, None], self._verified.runs), dim=1).flatten()

    def go_on(self) -> None:
        if self._verified is not None:
            self._late = self._runner.proposed_ahead(self._verified, self.num_asked)

    def conclude(self, numbers: list[int]) -> list[int]:
        if self._verified is None:
            return []
        width = 1 + self._verified.runs.shape[1]
        lines = [numbers[first : first + width] for first in range(0, len(numbers), width)]
        return self._runner.concluded(self, [line[1 : 2 + line[0]] for line in lines], self._late)


@dataclass(frozen=True)
class _Laid:
    """A step that is laid out.

    Attributes:
        late: the drafts among it that are on the device alone.
        asked: the log-probabilities that are asked for.
        places: [sampled rows, 1 + most drafts], int64: the places, among the tokens that the model chooses, of those
            before each row's first draft and behind each; its last one again where it has fewer.
        may: [sampled rows, most drafts], bool: there is such a draft, and chance does not refuse it.
    """

    step: StepInput
    late: LateDrafts | None
    asked: AskedLogprobs
    places: Tensor
    may: Tensor


class VerifiedStep:
    """A launched step with drafts; a `twinserve.engine.online.StepHandle` whose result are Runs."""

    def __init__(self, step: Step, launched: _Launched, logprobs: Heard, *, tells: bool) -> None:
        self._step, self._launched, self._logprobs, self._tells = step, launched, logprobs, tells
        self.start_ns = self.end_ns = 0

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
    what was accepted, not where the policies had it, and its drafts are those just proposed, as many as there are. The
    device may be at these while the host goes on: they are read when all else of the step is laid out.

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
        self._texts: dict[Sequence, list[int]] = {}  # these are of the thread that computes
        self._drafts: dict[Sequence, list[int]] = {}
        self._coming: tuple[dict[Sequence, int], Seq[list[int]]] = (
            {},
            [],
        )  # drafts that nobody has read yet, and their places
        self._tables: dict[Sequence, np.ndarray] = {}

    def forward_of(self, model: Decoder) -> Forward:
        """The forward pass of a model that drafts, over a pool of its own with blocks of the same numbers."""
        chosen = choose_attention(self.attention.name, model.config.head_dim, model.dtype, self.device, self.block_size)
        return EagerForward(model, chosen.make(), self._cache_for(model))

    def _cache_for(self, model: Decoder) -> KVCache:
        """A pool for a model that drafts."""
        return KVCache(model.config, self.num_blocks, self.block_size, model.dtype, self.device)

    def kernel_facts(self) -> dict[str, Any]:
        """See ModelRunner. On CUDA the host waits for what a step gives, as it verifies and proposes."""
        return {"waits": True} if self.device.type == "cuda" else {}

    def adopt(self, sequences: Iterable[Sequence]) -> None:
        """Go on from these sequences as they are, whoever computed them; nothing may be in flight."""
        self._texts = {seq: seq.token_ids[:] for seq in sequences}
        self._forget_drafts()

    def _forget_drafts(self) -> None:
        self._drafts.clear()
        self._coming = {}, []

    def _read_drafts(self) -> None:
        """Wait for the drafts that were proposed last, and know them."""
        for seq, drafts in zip(*self._coming, strict=True):
            if seq in self._texts:
                self._drafts[seq] = drafts
        self._coming = {}, []

    def launch(self, batch: Batch) -> VerifiedStep:
        """Start a step."""
        self.num_launched += 1
        launched = _Launched(self, batch, super()._block_tables(batch.rows))
        return VerifiedStep(self._queue.submit_parts(launched), launched, self.logprobs, tells=not self._is_async)

    # --- the parts of a step, in the thread that computes ---

    def laid_out(self, launched: _Launched) -> _Laid | None:
        """A step as it is computed; None where there are no rows."""
        if launched.is_first:
            self._texts.clear()
            self._forget_drafts()
        for seq in launched.gone:
            self._texts.pop(seq, None)
            self._drafts.pop(seq, None)
        self._texts.update(launched.texts)
        if not launched.rows:
            return None
        self._tables = dict(zip([row.seq for row in launched.rows], launched.tables, strict=True))
        drafts = self._coming[1]
        late = drafts if isinstance(drafts, LateDrafts) and drafts.width else None
        if late is None:
            self._read_drafts()
        sampled = self._place(launched)
        counts = [0 if row.is_prompt else self._num_found(row) for row in sampled]
        tokens = [own + self._padded(row, own) for row, own in zip(launched.rows, launched.known, strict=True)]
        step = self._snapshot(launched.rows, tokens)
        asked = AskedLogprobs([one for row in sampled for one, _ in drawn(row, 0)])
        launched.heard = [one for one in (asked, step.prompts) if one]
        most = max((row.num_drafts for row in sampled), default=0)
        places, may = np.zeros((len(sampled), 1 + most), np.int64), np.zeros((len(sampled), most), np.bool_)
        first = 0
        for number, (row, count) in enumerate(zip(sampled, counts, strict=True)):
            places[number] = np.minimum(np.arange(1 + most), row.num_drafts) + first
            first += 1 + row.num_drafts
            may[number, :count] = [self._may(row, draft) for draft in range(count)]
        told = all_to_device([places, may], self.device)
        return _Laid(step, late, asked, told[0].view(places.shape), told[1].view(may.shape).bool())

    def verified(self, launched: _Launched, laid: _Laid) -> Verified:
        """A step computed, and how many of each row's drafts are accepted: those up to the first that the model itself
        did not choose; where acceptance is forced, up to the first that chance refuses."""
        step, places = laid.step, laid.places
        token_ids = self._token_ids(step.flat, laid.late)
        chosen = self._chosen(step, token_ids, laid.asked)[places]
        drafts = token_ids[step.flat.last[places[:, 1:]]]
        agree = laid.may if self.acceptance_rate is not None else laid.may & (drafts == chosen[:, :-1])
        accepted = agree.long().cumprod(dim=1).sum(dim=1)
        is_draft = torch.arange(places.shape[1], device=self.device) < accepted[:, None]
        runs = pad(drafts, (0, 1)).where(is_draft, chosen)
        return Verified(launched.rows, launched.known, launched.tables, accepted, runs)

    def proposed_ahead(self, verified: Verified, asked: int) -> LateDrafts | None:
        """Drafts behind a step, where they do not need its texts."""
        drafting = self._proposer
        return drafting.propose_behind(verified, asked) if isinstance(drafting, DraftModel) else None

    def concluded(self, launched: _Launched, runs: list[list[int]], late: LateDrafts | None) -> list[int]:
        """The tokens of a step's runs, one behind another; the texts go on with them, and drafts are proposed."""
        self._read_drafts()
        seqs = [row.seq for row in launched.rows if row.samples]
        for seq, run in zip(seqs, runs, strict=True):
            launched.lengths.append(len(run))
            self._texts[seq] += [max(0, token) for token in run]  # one of which none was sampled goes on
        texts = {seq: self._texts[seq] for seq in seqs}
        if late is None:
            assert not isinstance(self._proposer, DraftModel)
            drafts: Seq[list[int]] = self._proposer.propose(texts, launched.num_asked)
            launched.proposed += map(len, drafts)
        else:
            most = [self._max_model_len - len(text) for text in texts.values()]
            late.counts = [max(0, min(launched.num_asked, left)) for left in most]
            drafts = late
            launched.proposed += late.counts
        self._coming = {seq: place for place, seq in enumerate(seqs)}, drafts
        return [token for run in runs for token in run]

    def _place(self, launched: _Launched) -> list[Row]:
        """Have the rows of a step begin where they really do; those that sample."""
        for number, row in enumerate(launched.rows):
            if not row.is_prompt:
                text = self._texts[row.seq]
                launched.rows[number] = row._replace(start=len(text) - 1)
                launched.known[number] = text[-1:]
        return [row for row in launched.rows if row.samples]

    def _padded(self, row: Row, known: list[int]) -> list[int]:
        """What comes behind a row's known tokens: its drafts, and a 0 in place of each that there is none of; nothing
        where the device alone knows them."""
        if row.seq in self._coming[0] and not row.is_prompt:
            return []
        found = self._found(row)
        return found + [0] * (row.num_tokens - len(known) - len(found))

    def _late(self, row: Row, missing: int) -> list[int]:
        """See ModelRunner: the drafts that were proposed last. Where a row has more places than there are drafts,
        whatever lies there is in the last ones."""
        places, drafts = self._coming
        assert isinstance(drafts, LateDrafts)
        first = places[row.seq] * drafts.width
        return [first + min(number, drafts.width - 1) for number in range(missing)]

    def _num_found(self, row: Row) -> int:
        """How many drafts of a row were proposed, so far as it has places for them."""
        places, drafts = self._coming
        if row.seq in places and isinstance(drafts, LateDrafts):
            return min(drafts.counts[places[row.seq]], row.num_drafts)
        return len(self._found(row))

    def _found(self, row: Row) -> list[int]:
        """The drafts of a row that were proposed, as the host knows them; those of a padded admission are none."""
        return [] if row.is_prompt else self._drafts.get(row.seq, [])[: row.num_drafts]

    def _may(self, row: Row, draft: int) -> bool:
        """Does chance let a draft of a row be accepted, the first being 0?"""
        rate, place = self.acceptance_rate, row.start + row.num_tokens - row.num_drafts + draft
        return rate is None or uniform(self._seed + row.seq.seq_id * 0x9E3779B9, place) < rate

    # --- what ModelRunner asks of sequences: here it is of the thread that computes ---

    def _block_tables(self, rows: Seq[Row]) -> list[np.ndarray]:
        return [self._tables[row.seq] for row in rows]

    def _known(self, row: Row) -> list[int]:
        self._read_drafts()
        text = self._texts[row.seq]
        return (text + self._found(row) + [0] * row.num_drafts)[: row.start + row.num_tokens]
