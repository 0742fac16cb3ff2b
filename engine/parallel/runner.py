"""ShardedRunner: runs a rank's part of each step; rank 0's tells the others what the step is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twinserve.engine.device_queue import CudaQueue, HasTokens, Step, to_device
from twinserve.engine.logprobs import AskedLogprobs, PromptLogprobs
from twinserve.engine.model_runner import Arranged, FlatStep, ModelRunner, StepInput
from twinserve.engine.models.sharded_decoder import ShardedDecoder
from twinserve.engine.parallel.drawing import Drawing
from twinserve.engine.parallel.ranks import Ranks


class ShardedRunner(ModelRunner):
    """Runs a rank's part of steps, kernel by kernel.

    Rank 0 has the policies, and so the sequences. What the others have to know of a step is what it arranges: tokens,
    places, block tables and how to draw. They draw with it, so that the tokens of a step are on every rank when the
    next begins; where a row needs all logits, rank 0 has them gathered, draws alone, and tells the tokens.

    Args:
        ranks: the others, of rank 0; None is for one of them.
        others: as of ModelRunner.
    """

    model: ShardedDecoder

    def __init__(self, *others: Any, ranks: Ranks | None, **named: Any):
        super().__init__(*others, **named)
        self._ranks = ranks
        if ranks is not None and self.device.type == "cuda":
            self._queue = CudaQueue(self.device, ranks.check)

    def follow(self, arranged: Arranged, drawing: Drawing | None, prompt_places: list[int]) -> Step:
        """Start the part of a step of a rank that is told of it."""
        flat, before = self._flat(arranged), self._previous[0] if self._previous else None
        step = self._queue.submit(lambda: self._follow(flat, before, drawing, prompt_places))
        self._previous = step, {}
        return step

    def _follow(self, flat: FlatStep, before: Step | None, drawing: Drawing | None, prompt_places: list[int]) -> Tensor:
        """The tokens of a step, whose part is computed as rank 0 computes its own."""
        token_ids = self._token_ids(flat, before)
        hidden = self._forward.computed(flat.laid, token_ids)
        for places in to_device(torch.tensor(prompt_places, dtype=torch.int64), self.device).split(
            PromptLogprobs.AT_ONCE
        ):
            if len(places):
                self.model.logits(hidden[places])
        logits = self.model.shard_logits(hidden[flat.last])
        if drawing is not None:
            return drawing.draw(logits, self.model.first_token, self.model.group)
        self.model.gathered(logits)
        return self.model.group.from_first(torch.empty(len(logits), dtype=torch.int64, device=self.device))

    # --- of rank 0 ---

    def _tell(self, step: StepInput) -> None:
        assert self._ranks is not None
        self._ranks.tell("follow", step.arranged, Drawing.of(step.params, step.uniforms), step.prompts.places)

    def _compute(self, step: StepInput | None, before: HasTokens | None, asked: AskedLogprobs) -> Tensor:
        assert self._ranks is not None
        with self._ranks.failing_together():
            return super()._compute(step, before, asked)

    def _sample(self, step: StepInput, hidden: Tensor, token_ids: Tensor, asked: AskedLogprobs) -> Tensor:
        logits, group = self.model.shard_logits(hidden), self.model.group
        drawing = Drawing.of(step.params, step.uniforms)
        if drawing is not None:
            return drawing.draw(logits, self.model.first_token, group)
        return group.from_first(self._sample_from(self.model.gathered(logits), step, token_ids, asked))
