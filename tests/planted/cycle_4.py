"""Wrong versions of cycle 4: the scheduler, the model runner and the loop around them."""

from __future__ import annotations

import torch
from plants import planted

SCHEDULER = "twinserve.policies.scheduler:Scheduler"
RUNNER = "twinserve.engine.model_runner:ModelRunner"
LOOP = "twinserve.engine.continuous_batching:run_continuous_batching"
BASIC, SHORT = "test_continuous_batching_basic", "test_short_request_finishes_first"


@planted(f"{SCHEDULER}.add", "puts a new request before those that wait", SHORT)
def _(right):
    def wrong(self, seq):
        accepted = right(self, seq)
        self.waiting.rotate(1)
        return accepted

    return wrong


@planted(f"{SCHEDULER}.is_finished", "does not look at those that run", BASIC)
def _(right):
    return lambda self: not self.waiting


@planted(f"{SCHEDULER}.is_finished", "does not look at those that wait", BASIC)
def _(right):
    return lambda self: not self.running


@planted(f"{SCHEDULER}.schedule", "lets nobody in while anything runs", BASIC)
def _(right):
    def wrong(self):
        waiting = self.waiting
        if self.running:
            self.waiting = type(waiting)()
        batch = right(self)
        self.waiting = waiting
        return batch

    return wrong


@planted(f"{SCHEDULER}.schedule", "serves one request at a time", BASIC)
def _(right):
    def wrong(self):
        self.max_num_seqs = 1
        return right(self)

    return wrong


@planted(f"{SCHEDULER}.schedule", "never mixes prompts and decodes", BASIC)
def _(right):
    def wrong(self):
        self.composition = "prefill-first"
        return right(self)

    return wrong


@planted(f"{SCHEDULER}.schedule", "calls a prefill a decode", BASIC)
def _(right):
    def wrong(self):
        batch = right(self)
        batch.is_prefill = False
        return batch

    return wrong


@planted(f"{SCHEDULER}.postprocess", "hands tokens to the wrong sequences", BASIC)
def _(right):
    return lambda self, seqs, token_ids, eos_token_id=None: right(self, seqs, token_ids[::-1], eos_token_id)


@planted(f"{SCHEDULER}.postprocess", "frees no blocks", SHORT)
def _(right):
    def wrong(self, seqs, token_ids, eos_token_id=None):
        self.block_manager.deallocate = lambda seq: None
        try:
            return right(self, seqs, token_ids, eos_token_id)
        finally:
            del self.block_manager.deallocate

    return wrong


@planted(f"{SCHEDULER}.postprocess", "does not end at the end-of-sequence token", SHORT)
def _(right):
    return lambda self, seqs, token_ids, eos_token_id=None: right(self, seqs, token_ids, None)


@planted(f"{SCHEDULER}.final_length", "lets a sequence go one token beyond max_tokens", SHORT)
def _(right):
    return lambda self, seq: right(self, seq) + 1


@planted(f"{SCHEDULER}.postprocess", "leaves ended sequences among those that run", SHORT)
def _(right):
    def wrong(self, seqs, token_ids, eos_token_id=None):
        running = dict(self._running)
        finished = right(self, seqs, token_ids, eos_token_id)
        self._running = running
        return finished

    return wrong


@planted(f"{RUNNER}.prepare_prefill", "pads on the left and masks on the right", BASIC)
def _(right):
    def wrong(self, seqs):
        input_ids, mask = right(self, seqs)
        shifts = (mask.shape[1] - mask.sum(dim=1)).tolist()
        return torch.stack([row.roll(shift) for row, shift in zip(input_ids, shifts, strict=True)]), mask

    return wrong


@planted(f"{RUNNER}.prepare_prefill", "does not mask the padding", BASIC)
def _(right):
    def wrong(self, seqs):
        input_ids, mask = right(self, seqs)
        return input_ids, torch.ones_like(mask)

    return wrong


@planted(f"{RUNNER}.prepare_decode", "takes the first token", BASIC)
def _(right):
    return lambda self, seqs: torch.tensor([[seq.token_ids[0]] for seq in seqs])


@planted(f"{RUNNER}.run", "returns the tokens in reverse order", BASIC)
def _(right):
    return lambda self, seqs, is_prefill: right(self, seqs, is_prefill)[::-1]


@planted(f"{RUNNER}.run", "runs the first sequence alone", BASIC)
def _(right):
    return lambda self, seqs, is_prefill: right(self, seqs[:1], is_prefill) * len(seqs)


@planted(LOOP, "serves one prompt after the other", BASIC)
def _(right):
    def wrong(scheduler, model_runner, prompts, tokenizer, *, sampling_params=None):
        results = {}
        for prompt in prompts:
            results |= right(scheduler, model_runner, [prompt], tokenizer, sampling_params=sampling_params)
        return results

    return wrong


@planted(LOOP, "returns the text that ends first and no other", BASIC)
def _(right):
    def wrong(*args, **kwargs):
        return dict(list(right(*args, **kwargs).items())[:1])

    return wrong
