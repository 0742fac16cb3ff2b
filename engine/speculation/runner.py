"""SpeculativeRunner: runs steps whose rows carry drafts, verifies them, and has new ones proposed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twinserve.engine.device_queue import Step
from twinserve.engine.forward import EagerForward, Forward
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.layers.choice import choose_attention
from twinserve.engine.logprobs import AskedLogprobs, Heard, PromptLogprobs
from twinserve.engine.model_runner import ModelRunner, StepInput, drawn
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.sampler import uniform
from twinserve.engine.speculation.proposers import LateDrafts, Proposer, VerifiedRow
from twinserve.policies import Batch, Row, Runs, Sequence


@dataclass
class _Launched:
    """A step as it was decided: what its computing needs of the sequences, copied at launch, and what came of it.

    Attributes:
        known: by row, its tokens as far as they were known.
        texts: by sequence, all tokens known, of rows of prompts that sample.
        gone: sequences that no longer run.
        asked: how many drafts to propose.
        is_first: of its Core, so that nothing is known of what runs.
    """

    rows: list[Row]
    known: list[list[int]]
    tables: dict[Sequence, np.ndarray]
    texts: dict[Sequence, list[int]]
    gone: list[Sequence]
    asked: int
    is_first: bool
    heard: list[AskedLogprobs | PromptLogprobs] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)


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
        proposer: guesses.
        is_async: nobody is told how many were proposed.
        acceptance_rate: drafts are accepted with this probability, whatever they are; None compares them.
        others: as of ModelRunner.

    Attributes:
        acceptance_rate: as given; it may be changed between two runs.
    """

    def __init__(
        self,
        *others: Any,
        make_proposer: Callable[[SpeculativeRunner], Proposer],
        is_async: bool,
        acceptance_rate: float | None = None,
        seed: int = 0,
        **named: Any,
    ):
        super().__init__(*others, seed=seed, **named)
        self._proposer, self._is_async, self.acceptance_rate = make_proposer(self), is_async, acceptance_rate
        self._seed = seed
        self._texts: dict[Sequence, list[int]] = {}  # these are of the thread that computes
        self._drafts: dict[Sequence, list[int]] = {}
        self._coming: tuple[list[Sequence], Seq[list[int]]] = ([], [])  # drafts that nobody has read yet
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
        self._coming = [], []

    def _read_drafts(self) -> None:
        """Wait for the drafts that were proposed last, and know them."""
        for seq, drafts in zip(*self._coming, strict=True):
            if seq in self._texts:
                self._drafts[seq] = drafts
        self._coming = [], []

    def launch(self, batch: Batch) -> VerifiedStep:
        """Start a step."""
        self.num_launched += 1
        rows = batch.rows
        tables = dict(zip([row.seq for row in rows], super()._block_tables(rows), strict=True))
        launched = _Launched(
            rows,
            [row.seq.token_ids[row.start : row.start + row.num_tokens] for row in rows],
            tables,
            {row.seq: row.seq.token_ids[:] for row in rows if row.is_prompt and row.samples},
            [*batch.left, *batch.preempted],
            batch.num_drafts_asked,
            batch.decision <= 0,
        )
        step = self._queue.submit(lambda: self._run(launched))
        return VerifiedStep(step, launched, self.logprobs, tells=not self._is_async)

    def _run(self, launched: _Launched) -> Tensor:
        """Compute a step, verify its drafts and have new ones proposed; the tokens of its runs, one behind another."""
        if launched.is_first:
            self._texts.clear()
            self._forget_drafts()
        for seq in launched.gone:
            self._texts.pop(seq, None)
            self._drafts.pop(seq, None)
        self._texts.update(launched.texts)
        if not launched.rows:
            return torch.empty(0, dtype=torch.int64)
        self._tables = launched.tables
        rows, tokens = self._placed(launched)
        step = self._with_drafts(self._snapshot(rows, tokens), rows, tokens)
        draws = [one for row in rows if row.samples for one, _ in drawn(row, 0)]
        asked = AskedLogprobs(draws)
        chosen: list[int] = self._compute(step, None, asked).tolist()
        launched.heard = [one for one in (asked, step.prompts) if one]
        verified, made = self._verified(rows, tokens, chosen, launched)
        drafts = self._proposer.propose(verified, launched.asked)
        self._coming = [row.seq for row in verified if row.text], drafts
        launched.proposed += drafts.counts if isinstance(drafts, LateDrafts) else map(len, drafts)
        return torch.tensor(made)

    def _placed(self, launched: _Launched) -> tuple[list[Row], list[list[int]]]:
        """The rows where they really begin, and their tokens; a placeholder for each draft."""
        rows, tokens = [], []
        for row, known in zip(launched.rows, launched.known, strict=True):
            if not row.is_prompt:
                text = self._texts[row.seq]
                row, known = row._replace(start=len(text) - 1), text[-1:]
            rows.append(row)
            tokens.append(known + [0] * (row.num_tokens - len(known)))
        return rows, tokens

    def _with_drafts(self, step: StepInput, rows: Seq[Row], tokens: Seq[list[int]]) -> StepInput:
        """A step with the drafts in their places, as far as there are any; so have `tokens` then."""
        self._read_drafts()
        drafted = [(own, found) for row, own in zip(rows, tokens, strict=True) if (found := self._found(row))]
        if not drafted:
            return step
        for own, found in drafted:
            own[1 : 1 + len(found)] = found
        token_ids = [token for number in step.arranged.layout.order for token in tokens[number]]
        return replace(step, flat=replace(step.flat, token_ids=self._to_device(token_ids)))

    def _found(self, row: Row) -> list[int]:
        """The drafts of a row that were proposed; those of a padded admission are none."""
        return [] if row.is_prompt else self._drafts.get(row.seq, [])[: row.num_drafts]

    def _verified(
        self, rows: Seq[Row], tokens: Seq[list[int]], chosen: list[int], launched: _Launched
    ) -> tuple[list[VerifiedRow], list[int]]:
        """The rows with what came of them, and the tokens of all runs."""
        verified, made, first = [], [], 0
        for row, own in zip(rows, tokens, strict=True):
            table, text = self._tables[row.seq], []
            if row.samples:
                run = self._accepted(row, chosen[first : first + 1 + row.num_drafts])
                first += 1 + row.num_drafts
                made += run
                launched.lengths.append(len(run))
                self._texts[row.seq] += [max(0, token) for token in run]  # one of which none was sampled goes on
                text = self._texts[row.seq]
                own = text[row.start :]
            verified.append(VerifiedRow(row.seq, row.start, own, text, table))
        return verified, made

    def _accepted(self, row: Row, chosen: list[int]) -> list[int]:
        """The run of a row for which the model has `chosen` these tokens: before its first draft, and behind each."""
        found, rate = self._found(row), self.acceptance_rate
        run: list[int] = []
        place = row.start + row.num_tokens - row.num_drafts
        for number, draft in enumerate(found):
            if rate is None:
                is_right = draft == chosen[number]
            else:
                is_right = uniform(self._seed + row.seq.seq_id * 0x9E3779B9, place + number) < rate
            if not is_right:
                break
            run.append(draft)
        return [*run, chosen[len(run)]]

    # --- what ModelRunner asks of sequences: here it is of the thread that computes ---

    def _block_tables(self, rows: Seq[Row]) -> list[np.ndarray]:
        return [self._tables[row.seq] for row in rows]

    def _known(self, row: Row) -> list[int]:
        self._read_drafts()
        text = self._texts[row.seq]
        return (text + self._found(row) + [0] * row.num_drafts)[: row.start + row.num_tokens]
