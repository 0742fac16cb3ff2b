"""ModelRunner: runs the batches that the scheduler decides."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from twinserve.engine.device_queue import CpuQueue, CudaQueue, HasTokens, Step, all_to_device, compute_on, to_device
from twinserve.engine.forward import EagerForward, Forward
from twinserve.engine.kv_cache import KVCache
from twinserve.engine.kv_sizing import default_num_blocks
from twinserve.engine.layers.choice import choose_attention
from twinserve.engine.layout import Layout
from twinserve.engine.logprobs import AskedLogprobs, Heard, LogprobStep, PromptLogprobs
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.loader import adopt_model
from twinserve.engine.online import StepHandle, TokenHandle
from twinserve.engine.sampler import GeneratedTokens, SamplingPlan, draw_uniforms, mark_seen, row_token_pairs
from twinserve.policies import Batch, Row, Runs, SamplingParams, Sequence


@dataclass(frozen=True)
class Arranged:
    """What the model has to know of a step, as the host arranges it.

    Attributes:
        layout: the rows in the order of the flat batch.
        token_ids: of the flat batch, 0 in place of a token that is not known yet.
        last: places in the flat batch of the last token of each row that samples; of one with drafts, of the token
            before the first of them and of each of them.
        late: places in the flat batch of tokens that the device alone knows, as those that the step before samples, and
            their places among what has them.
    """

    layout: Layout
    token_ids: list[int]
    last: list[int]
    late: tuple[list[int], list[int]]


@dataclass(frozen=True)
class FlatStep:
    """The same on the device.

    Attributes:
        token_ids: [tokens], of the flat batch.
        laid: what the forward pass has to know of it, see `Forward.lay`.
        last: [sampled].
        late: two of [late]; None where every token is known.
    """

    token_ids: Tensor
    laid: Any
    last: Tensor
    late: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class StepInput:
    """All that a step needs, copied from the sequences at launch.

    Attributes:
        arranged, flat: what the model computes, on the host and on the device.
        drawn: the rows behind which a token is drawn, see `drawn`.
        params, uniforms: of each of them, its parameters and its uniform number.
        sampling: the same on the device.
        seen: (row, token) for each known token of each row with a repetition penalty, and the places in the flat batch
            of their last tokens; None where there is no such row.
        generated: what rows with a presence or frequency penalty have generated; None where there is no such row.
        prompts: the log-probabilities of prompts that are asked for.
    """

    arranged: Arranged
    flat: FlatStep
    drawn: list[Row]
    params: list[SamplingParams]
    uniforms: list[float]
    sampling: SamplingPlan
    seen: tuple[Tensor, Tensor] | None
    generated: GeneratedTokens | None
    prompts: PromptLogprobs


class ModelRunner:
    """Runs steps of a model over a pool of paged KV, in the order in which they are launched.

    All that a step needs of its sequences is copied at launch, so the policies may change them at once. On a CPU the
    steps run in a thread of the runner, on CUDA they are enqueued on the stream; either way the caller goes on.

    Args:
        model: a Decoder, or a transformers model whose weights are then copied.
        tokenizer: the model's, or None; it only says what to pad with.
        device: "cpu", "cuda", ...
        num_blocks: blocks of the pool; None takes what fits 1 GiB (CPU) or what is left (CUDA), see
            `default_num_blocks`.
        block_size: tokens in a block; None takes `Sequence.block_size`.
        attention: the attention backend; "auto" takes flash where it can serve, else sdpa.
        seed: of the draws for requests without a seed of their own.

    Attributes:
        model, tokenizer, device, num_blocks, block_size: as in use.
        attention: the attention backend in use, and why.
        logprobs: what steps that were waited for have given of those asked for, until whoever serves a sequence takes
            it out.
        prompt_asks: of the sequences that ask for the log-probabilities of their prompts, for how many most probable
            tokens at each place.
        num_launched: steps launched, for whoever wants to know whether another has launched any.

    Raises:
        InputError: the attention backend cannot serve this model, device or block size, or the pool does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device | str,
        *,
        num_blocks: int | None = None,
        block_size: int | None = None,
        attention: Literal["auto", "flash", "sdpa"] = "auto",
        seed: int = 0,
    ):
        self.device = torch.device(device)
        self.model = compute_on(self.device, lambda: _decoder(model, self.device))
        self.tokenizer = tokenizer
        config, dtype = self.model.config, self.model.dtype
        self.block_size = block_size or Sequence.block_size
        self.attention = choose_attention(attention, config.head_dim, dtype, self.device, self.block_size)
        self.num_blocks = num_blocks or default_num_blocks(config, self.block_size, dtype, self.device)
        self._cache = compute_on(
            self.device, lambda: KVCache(config, self.num_blocks, self.block_size, dtype, self.device)
        )
        self._generator = random.Random(seed)
        self._queue = CudaQueue(self.device) if self.device.type == "cuda" else CpuQueue()
        self.logprobs: Heard = {}
        self.prompt_asks: dict[Sequence, int] = {}
        self.num_launched = 0
        self._previous: tuple[Step, dict[Sequence, int]] | None = None
        self._forward: Forward = EagerForward(self.model, self.attention.make(), self._cache)

    def kernel_facts(self) -> dict[str, Any]:
        """How steps are padded and cut, as the facts of a run say it (`twinserve.sim.kernels.Kernels`): not at all."""
        return {}

    def capture(self) -> None:
        """There is nothing to capture: steps are launched kernel by kernel."""

    def fill_cache(self, seed: int) -> None:
        """Nothing is filled: of a step that is launched kernel by kernel it makes no difference what is read."""

    def close(self) -> None:
        """Wait for what was launched."""
        self._queue.close()

    # --- the guide's calls ---

    def prepare_prefill(self, seqs: Seq[Sequence]) -> tuple[Tensor, Tensor]:
        """The tokens that each sequence computes in this step, in one batch padded on the right.

        Returns:
            input_ids [sequences, longest] and attention_mask of the same shape, 1 where there is a token.
        """
        tokens = [_scheduled_tokens(seq) for seq in seqs]
        longest = max(len(row) for row in tokens)
        padding = getattr(self.tokenizer, "pad_token_id", None) or 0
        input_ids = torch.tensor([row + [padding] * (longest - len(row)) for row in tokens])
        attention_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens])
        return input_ids.to(self.device), attention_mask.to(self.device)

    def prepare_decode(self, seqs: Seq[Sequence]) -> Tensor:
        """The last token of each sequence, [sequences, 1]."""
        return torch.tensor([[seq.token_ids[-1]] for seq in seqs]).to(self.device)

    def run(self, seqs: Seq[Sequence], is_prefill: bool) -> list[int]:
        """Run the step that was just scheduled; the next token of each sequence that computes its last known one.

        Args:
            seqs: as `schedule` gave them; each one's latest `num_scheduled_tokens` are computed.

        Raises:
            ValueError: a sequence has nothing scheduled.
        """
        if is_prefill:
            input_ids, attention_mask = self.prepare_prefill(seqs)
            tokens = [row[: int(length)].tolist() for row, length in zip(input_ids, attention_mask.sum(1), strict=True)]
        else:
            tokens = self.prepare_decode(seqs).tolist()
        rows = []
        for seq, row_tokens in zip(seqs, tokens, strict=True):
            start = seq.num_computed_tokens - len(row_tokens)
            rows.append(Row(seq, start, len(row_tokens), seq.num_computed_tokens == seq.num_tokens, is_prefill))
        return self._launch(rows, tokens).result()

    # --- the engine's calls ---

    def execute(self, batch: Batch) -> Runs | list[int]:
        """Run a step; a token for each of `batch.sampled`, or a run of them."""
        return self.launch(batch).result()

    def launch(self, batch: Batch) -> StepHandle:
        """Start a step.

        A row may reach one token beyond those known: the one that the step launched before samples for it.

        Raises:
            ValueError: a sequence's blocks are not of this runner's pool.
            RuntimeError: a row's last token is neither known nor sampled by the step launched before.
        """
        known = [row.seq.token_ids[row.start : row.start + row.num_tokens] for row in batch.rows]
        return self._launch(batch.rows, known)

    def _launch(self, rows: Seq[Row], tokens: Seq[list[int]]) -> TokenHandle:
        """Start a step of `rows`; `tokens` are each row's, as far as they are known."""
        self.num_launched += 1
        step_input = self._snapshot(rows, tokens) if rows else None
        if step_input is not None:
            self._tell(step_input)
        before = self._previous[0] if self._previous else None
        sampled = [row for row in rows if row.samples]
        asked = AskedLogprobs(sampled)
        step = self._queue.submit(lambda: self._compute(step_input, before, asked))
        self._previous = step, {row.seq: index for index, row in enumerate(sampled)}
        every = [one for one in (asked, step_input.prompts if step_input else None) if one]
        return LogprobStep(step, every, self.logprobs) if every else step

    def _snapshot(self, rows: Seq[Row], tokens: Seq[list[int]]) -> StepInput:
        """Copy what the step needs, in the order of its flat batch."""
        arranged = self._arranged(rows, tokens)
        sampled = [one for i, row in enumerate(rows) if row.samples for one in drawn(row, arranged.layout.last[i])]
        params = [row.seq.sampling_params for row, _ in sampled]
        lengths = [row.start + row.num_tokens for row, _ in sampled]
        uniforms = draw_uniforms(params, lengths, self._generator)
        answers = [length - row.seq.num_prompt_tokens for length, (row, _) in zip(lengths, sampled, strict=True)]
        return StepInput(
            arranged=arranged,
            flat=self._flat(arranged),
            drawn=[row for row, _ in sampled],
            params=params,
            uniforms=uniforms,
            sampling=SamplingPlan.of(params, uniforms, self.device, answers),
            seen=self._seen(sampled),
            generated=GeneratedTokens.of(sampled, self.device, self._known),
            prompts=PromptLogprobs([rows[i] for i in arranged.layout.order], self.prompt_asks, self.logprobs),
        )

    def _arranged(self, rows: Seq[Row], tokens: Seq[list[int]]) -> Arranged:
        """The rows in the order of the flat batch."""
        spans = [(row.start, row.num_tokens) for row in rows]
        layout = Layout.of(spans, self._block_tables(rows), self._forward.most_single)
        token_ids, places, sources = list[int](), list[int](), list[int]()
        for i in layout.order:
            token_ids += tokens[i]
            if missing := rows[i].num_tokens - len(tokens[i]):
                token_ids += [0] * missing
                places += range(layout.last[i] + 1 - missing, layout.last[i] + 1)
                sources += self._late(rows[i], missing)
        last = [place for i, row in enumerate(rows) if row.samples for _, place in drawn(row, layout.last[i])]
        return Arranged(layout, token_ids, last, (places, sources))

    def _tell(self, step: StepInput) -> None:
        """Tell those who compute a step together with this runner; here nobody does."""

    def _flat(self, arranged: Arranged) -> FlatStep:
        """What was arranged, on the device."""
        told = all_to_device([arranged.token_ids, arranged.last, *arranged.late], self.device)
        late = (told[2], told[3]) if len(told[2]) else None
        laid = self._forward.lay(arranged.layout, self._moved(arranged.layout.order))
        return FlatStep(token_ids=told[0], laid=laid, last=told[1], late=late)

    def _moved(self, order: Seq[int]) -> Tensor | None:
        """By how many tokens rows, given by their numbers, begin later than where they are laid: by none."""
        return None

    def _seen(self, sampled: Seq[tuple[Row, int]]) -> tuple[Tensor, Tensor] | None:
        """`StepInput.seen` for the rows that sample, each with the place of its last token."""
        penalised = [(row, place) for row, place in sampled if row.seq.sampling_params.repetition_penalty != 1.0]
        if not penalised:
            return None
        known = [self._known(row) for row, _ in penalised]
        return self._to_device(row_token_pairs(known)), self._to_device([place for _, place in penalised])

    def _block_tables(self, rows: Seq[Row]) -> list[np.ndarray]:
        """The block table of each row, all of them within the pool."""
        for row in rows:
            if row.seq.block_size != self.block_size or max(row.seq.block_table) >= self.num_blocks:
                raise ValueError(
                    f"{row.seq} holds blocks of {row.seq.block_size} tokens up to block {max(row.seq.block_table)}, "
                    f"but this runner has {self.num_blocks} blocks of {self.block_size}"
                )
        return [np.array(row.seq.block_table, dtype=np.int64) for row in rows]

    def _known(self, row: Row) -> list[int]:
        """The tokens up to the end of a row, as far as they are known."""
        return row.seq.token_ids[: row.start + row.num_tokens]

    def _late(self, row: Row, missing: int) -> list[int]:
        """Where the last tokens of a row lie, which are not known, `missing` of them: one, as the step launched before
        samples it; its place among those sampled."""
        place = self._previous[1].get(row.seq) if self._previous else None
        if place is None or row.start + row.num_tokens != row.seq.num_tokens + 1:
            raise RuntimeError(f"the last token of {row} is neither known nor sampled by the step launched before")
        return [place]

    def _to_device(self, values: Any) -> Tensor:
        return to_device(np.asarray(values, dtype=np.int64), self.device)

    def _compute(self, step: StepInput | None, before: HasTokens | None, asked: AskedLogprobs) -> Tensor:
        """The tokens that a step samples; `before` has those that it goes on from and the host does not know."""
        if step is None:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        return self._chosen(step, self._token_ids(step.flat, before), asked)

    def _chosen(self, step: StepInput, token_ids: Tensor, asked: AskedLogprobs) -> Tensor:
        """The same, from the tokens of the flat batch."""
        hidden = self._forward.computed(step.flat.laid, token_ids)
        if step.prompts:
            step.prompts.take(hidden, self.model.logits)
        return self._sample(step, hidden[step.flat.last], token_ids, asked)

    def _token_ids(self, flat: FlatStep, before: HasTokens | None) -> Tensor:
        """The tokens of the flat batch, those among them that `before` has."""
        if flat.late is None or before is None:
            return flat.token_ids
        places, sources = flat.late
        # A sequence of which none was sampled goes on until it is ended.
        return flat.token_ids.index_copy(0, places, before.tokens[sources].clamp(min=0))

    def _sample(self, step: StepInput, hidden: Tensor, token_ids: Tensor, asked: AskedLogprobs) -> Tensor:
        """A token for each row of `hidden` [sampled, hidden_size]."""
        return self._sample_from(self.model.logits(hidden), step, token_ids, asked)

    def _sample_from(self, logits: Tensor, step: StepInput, token_ids: Tensor, asked: AskedLogprobs) -> Tensor:
        """A token for each row of `logits` [sampled, vocab]; `token_ids` are those of the flat batch."""
        seen = None
        if step.seen is not None:
            pairs, last = step.seen
            seen = torch.zeros(len(last), logits.shape[-1], dtype=torch.bool, device=self.device)
            mark_seen(seen, *pairs)
            seen.scatter_(1, token_ids[last][:, None], True)
        counts = None if step.generated is None else step.generated.counts(token_ids, logits.shape[-1])
        tokens = step.sampling.sample(logits, seen, counts)
        if asked:
            asked.take(logits, tokens)
        return tokens


def drawn(row: Row, last: int) -> list[tuple[Row, int]]:
    """What a row that samples draws tokens behind: itself, as it would be with its first drafts alone, and the place of
    its last token in the flat batch then; `last` is that of the whole row."""
    if not row.num_drafts:
        return [(row, last)]
    cut = range(row.num_drafts, -1, -1)
    return [(row._replace(num_tokens=row.num_tokens - n, num_drafts=row.num_drafts - n), last - n) for n in cut]


def _decoder(model: nn.Module, device: torch.device) -> Decoder:
    return model.to(device) if isinstance(model, Decoder) else adopt_model(model, device=device)


def _scheduled_tokens(seq: Sequence) -> list[int]:
    """The tokens that the latest decided step computes for `seq`.

    Raises:
        ValueError: none are.
    """
    if not seq.num_scheduled_tokens:
        raise ValueError(f"{seq} has nothing scheduled: run what schedule() gave last")
    return seq.token_ids[seq.num_computed_tokens - seq.num_scheduled_tokens : seq.num_computed_tokens]
