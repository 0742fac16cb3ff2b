"""Horizon: how many decisions in a row are the same if nothing comes from outside, and the leap that makes them.

A decision repeats the one before it if nobody is admitted, preempted or has left, and every row has the same sequence,
number of tokens and outcome; tables may grow. Only sequences without token ids have a horizon, as any token may stop
one that has them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

from twinserve.policies import Batch, Core, Scheduler
from twinserve.policies.block_manager import ENDLESS
from twinserve.policies.core import Growth, Span


def horizon(core: Core, batch: Batch, cap: int) -> int:
    """How many decisions in a row are as `batch`, the latest one, if nothing comes from outside; at most `cap`.

    Every batch in flight but `batch` is committed before the second of them is decided. It is 1 where that one can be
    decided before anything is committed, where a token might stop a sequence, in a pipeline of ranks, or with drafts,
    as nobody knows how many of them are right. It may be too small in these cases: a batch in flight has other rows
    than `batch`; somebody was preempted just now; the head of the waiting queue has a token in flight, or lacks blocks
    that a running sequence is about to compute, or somebody came behind it and changed the threshold of prompts; a
    prefill interval begins or ends; or the order's choice may change by itself (see `Order.is_steady`).
    """
    scheduler, in_flight = core.scheduler, core.in_flight
    if scheduler.speculation.most or core.aborts or core.can_decide:
        return 1
    if batch is not in_flight[-1]:
        return 1
    if batch.chunks and len(scheduler.waiting) != batch.num_waiting:
        return 1  # how many wait may have changed the threshold that cut them
    if (interval := scheduler.rules.interval).steps > 1:
        if interval.holds(scheduler.running) != interval.is_held:
            return 1
        if interval.is_held:
            cap = min(cap, interval.steps - interval.num_since)
    if cap <= 1 or scheduler.pipeline_parallel_size > 1 or not batch or batch.admitted or batch.preempted:
        return 1
    if not all(before is batch or _is_like(before, batch) for before in in_flight):
        return 1
    if batch.prompts != batch.chunks:
        return 1  # somebody's first token came
    steps = cap
    for seq in batch.sampled:
        left = 1 + seq.final_length - seq.num_tokens - seq.num_in_flight
        if left < steps:
            steps = left
        if seq.has_token_ids:
            return 1
    for seq in batch.chunks:  # cut by a limit that is the same until the last one
        steps = min(steps, 1 + (seq.num_tokens - seq.num_computed_tokens - 1) // seq.num_scheduled_tokens)
        if seq.has_token_ids:
            return 1
    steps = _steps_with_room(scheduler, batch, steps)
    return steps if steps == 1 or _is_head_kept_out(scheduler, batch) else 1


def _is_like(before: Batch, batch: Batch) -> bool:
    """Have two batches the same rows, but for where they start?"""
    is_like = before.seqs == batch.seqs and before.lengths == batch.lengths
    return is_like and before.chunks == batch.chunks and before.prompts == batch.prompts


def _steps_with_room(scheduler: Scheduler, batch: Batch, steps: int) -> int:
    """The most decisions, up to `steps`, for which there are free blocks."""
    manager = scheduler.block_manager
    free = manager.num_free_blocks
    if 2 * len(batch) + manager.blocks_for(steps * batch.num_tokens) <= free:
        return steps
    fits, most = 1, steps
    middle = most
    while fits < most:
        missing = 0
        for place, seq in enumerate(batch.seqs):
            missing += max(0, manager.num_missing(seq, (middle - 1) * batch.lengths[place]))
        if missing <= free:
            fits = middle
        else:
            most = middle - 1
        middle = (fits + most + 1) // 2
    return fits


def _is_head_kept_out(scheduler: Scheduler, batch: Batch) -> bool:
    """Will nobody be admitted while the same is decided? Blocks only become fewer, so only more hits would help."""
    is_for_decodes = scheduler.composition != "mixed" and batch.usual_tokens
    budget = scheduler.max_num_batched_tokens - (0 if is_for_decodes else batch.num_tokens)
    if not scheduler.has_place(budget):
        return True
    if scheduler.long_prefill_token_threshold < ENDLESS and len(scheduler.waiting) != batch.num_waiting:
        return False  # the threshold may be another now, and so what the head needs
    head = scheduler.waiting.peek()
    if not getattr(scheduler.waiting, "is_steady", False) or head.num_in_flight:
        return False
    if scheduler.find_admission(budget) is not None:
        return False
    refusal, manager = scheduler.refusal, scheduler.block_manager
    if refusal is None or refusal.last_hash is None:
        return True
    end = refusal.num_hits * manager.block_size
    return not any(
        manager.prefix_keys(seq, range(end, end + 1)) == [refusal.last_hash]
        for seq in batch.seqs
        if seq.num_registered_tokens < end
    )


def advance(core: Core, spans: Seq[Span]) -> None:
    """Repeat the latest decision, committing the oldest batch in flight before each, within its horizon.

    What is decided, and all that comes of it, is what as many calls of `commit` and `decide` would have given. With a
    horizon of k there may be up to k - 1.
    """
    if not spans:
        return
    first, before = core.in_flight[-1], list(core.in_flight)[:-1]
    grown = _leap(core.scheduler, len(spans))
    core.in_flight = deque(core.scheduler.in_flight)
    for behind in range(1, 1 + min(len(core.in_flight), len(spans))):
        batch = core.in_flight[-behind]
        batch.decided_ns, batch.start_ns, batch.end_ns = spans[len(spans) - behind]
    core.num_decisions = core.in_flight[-1].decision + 1
    core.last_committed = core.in_flight[0].decision - 1
    for batch in before:
        core.listener.committed(batch)
    num_committed = max(0, core.last_committed - first.decision + 1)
    core.listener.repeated(first, spans, grown, num_committed, core.in_flight[-1])


def _leap(scheduler: Scheduler, num_steps: int) -> Growth:
    """Commit the oldest batch and decide again what the latest one is, so many times; the blocks that this took.

    The batches in flight are replaced by those that are in flight then.

    All blocks are taken at once, in the order in which the decisions take them, then shown full at once. A block
    evicted so may equal one that was full before, and the cache has other prefixes in them then; but nothing behind the
    evicted one, which was given up after all that lay behind it, so nobody can notice.
    """
    batch, manager = scheduler.in_flight[-1], scheduler.block_manager
    size, cacheable, num_rows = manager.block_size, manager.cacheable_tokens, len(batch)
    begun: list[int] = []  # number of a decision * rows + place of the row for which it takes a block: in this order
    full: list[int] = []  # the same where a block becomes full
    for place, seq in enumerate(batch.seqs):
        num_tokens, held, computed = batch.lengths[place], seq.num_block_tokens, seq.num_computed_tokens
        last = computed + num_steps * num_tokens
        end = held
        while end < last:
            begun.append(((end - computed) // num_tokens + 1) * num_rows + place)
            end += size
        if last - seq.num_registered_tokens >= cacheable:
            shown = min(computed, seq.num_tokens)  # to the cache, and from now on `num_tokens` more by each decision
            end = seq.num_registered_tokens + size
            while end <= shown + num_steps * num_tokens:
                full.append(-((shown - end) // num_tokens) * num_rows + place)
                end += size
        seq.num_computed_tokens = last
    for seq in batch.sampled:
        seq.num_tokens += num_steps
        past_end = seq.num_tokens + seq.num_in_flight > seq.final_length
        assert not past_end, f"{num_steps} steps go on past the end of {seq}, {seq.final_length}"
    if (interval := scheduler.rules.interval).steps > 1:
        interval.end(num_steps, bool(batch.prompts), len(scheduler.waiting) > 0)
    grown = _take_blocks(scheduler, batch, sorted(begun))
    for entry in sorted(full):
        seq = batch.seqs[entry % num_rows]
        manager.register(seq, seq.num_registered_tokens + size)
    used_blocks = manager.num_used_blocks
    for behind in range(len(scheduler.in_flight)):
        now = scheduler.in_flight[-1 - behind] = _repeated(batch, num_steps - behind) if behind < num_steps else batch
        now.num_used_blocks = used_blocks - sum(len(ids) for number, _, ids in grown if number > num_steps - behind)
    return grown


def _repeated(decided: Batch, num_steps: int) -> Batch:
    """The decision that comes so many steps later and is the same, but for the lengths that have grown."""
    batch = Batch(decided.usual_tokens)
    batch.seqs, batch.lengths = decided.seqs, decided.lengths
    batch.chunks, batch.prompts = decided.chunks, decided.prompts
    batch.sampled, batch.skipped, batch.is_ahead = decided.sampled, decided.skipped, decided.is_ahead
    starts = decided.starts
    batch.starts = [starts[place] + num_steps * seq.num_scheduled_tokens for place, seq in enumerate(decided.seqs)]
    batch.num_tokens, batch.num_prompt_tokens = decided.num_tokens, decided.num_prompt_tokens
    batch.num_kv_tokens = decided.num_kv_tokens + num_steps * decided.num_tokens
    new_pairs = batch.num_sampled + sum([seq.num_scheduled_tokens**2 for seq in decided.chunks])
    batch.num_attention_pairs = decided.num_attention_pairs + num_steps * new_pairs
    batch.num_waiting, batch.num_running = decided.num_waiting, decided.num_running
    batch.decision, batch.committed = decided.decision + num_steps, decided.committed + num_steps
    batch.seen, batch.decided_ns = decided.seen, decided.decided_ns
    return batch


def _take_blocks(scheduler: Scheduler, batch: Batch, begun: list[int]) -> Growth:
    """Take a block for each number of a decision * rows + place of a row, in order."""
    manager, num_rows = scheduler.block_manager, len(batch)
    grown: Growth = []
    block_ids, first = manager.take(len(begun)), 0
    while first < len(begun):
        entry, end = begun[first], first + 1
        while end < len(begun) and begun[end] == entry:
            end += 1
        seq, taken = batch.seqs[entry % num_rows], block_ids[first:end]
        manager.grow(seq, taken)
        grown.append((entry // num_rows, seq, taken))
        first = end
    return grown
