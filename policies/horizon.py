"""Horizon: how many decisions in a row are the same if nothing comes from outside, and making them at once.

A decision repeats the one before it if nobody is admitted, preempted or has left, and every row has the same sequence,
number of tokens and outcome; tables may grow. Only sequences without token ids have a horizon, as any token may stop
one that has them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from operator import itemgetter

from twinserve.policies.batch import Batch, Row
from twinserve.policies.scheduler import Scheduler
from twinserve.policies.sequence import Sequence

Growth = list[tuple[int, Sequence, list[int]]]
"""Of repeated decisions, the number of one from 1 on, a sequence, and the blocks that this one gave it."""


def horizon(scheduler: Scheduler, batch: Batch, cap: int) -> int:
    """The most decisions that are the same, `batch`, the latest in flight, being the first of them; at most `cap`.

    Every batch in flight but `batch` is committed before the second of them is decided. It is 1 where a token might
    stop a sequence, and may be too small in these cases: a batch in flight has other rows than `batch`; a decode has a
    row of its own, or none as the budget does not reach it; somebody was preempted just now; the head of the waiting
    queue lacks blocks that a running sequence is about to compute; or the order's choice may change by itself (see
    `Order.is_steady`).
    """
    group, alone, steps = scheduler.group, scheduler.alone, cap
    if cap <= 1 or not batch or batch.admitted or group.num_with_tokens:
        return 1
    for row in batch.explicit:
        steps = min(steps, _steps_of(scheduler, batch, row))
    if steps == 1 or not all(before is batch or _is_like(before, batch) for before in scheduler.in_flight):
        return 1
    if alone:
        with_row = {row.seq for row in batch.explicit}
        for seq in alone:
            if seq.has_token_ids or (seq not in with_row and (batch.usual_tokens or not seq.has_sampled)):
                return 1
    if batch.num_members:
        steps = min(steps, min(group.ends) - group.planned + 1)
    if steps > 1 and scheduler.block_manager.num_blocks is not None:
        steps = _steps_with_room(scheduler, batch, steps)
    return steps if steps == 1 or _is_head_kept_out(scheduler, batch) else 1


def _is_like(before: Batch, batch: Batch) -> bool:
    """Have two batches the same rows, but for their lengths?"""
    rows = [[(row.seq, *row[2:]) for row in one.explicit] for one in (before, batch)]
    return before.view is batch.view and rows[0] == rows[1]


def _steps_of(scheduler: Scheduler, batch: Batch, row: Row) -> int:
    """For how many decisions the row of a sequence on its own stays the same."""
    seq, _, num_tokens, samples, is_prompt = row
    takes_all_it_may = num_tokens == scheduler.long_prefill_token_threshold
    takes_the_rest = row is batch.explicit[-1] and batch.num_tokens == scheduler.max_num_batched_tokens
    if samples or not is_prompt or not (takes_all_it_may or takes_the_rest):
        return 1
    return 1 + (seq.num_tokens - seq.num_computed_tokens - 1) // num_tokens


def _steps_with_room(scheduler: Scheduler, batch: Batch, steps: int) -> int:
    """The most decisions, up to `steps`, for which there are free blocks."""
    manager, group = scheduler.block_manager, scheduler.group

    def blocks_of(num_steps: int) -> int:
        """Blocks that so many decisions, `batch` among them, take from now on."""
        grown = group.num_beginning(num_steps - 1) if batch.num_members else 0
        missing = (manager.num_missing(row.seq, (num_steps - 1) * row.num_tokens) for row in batch.explicit)
        return grown + sum(blocks for blocks in missing if blocks > 0)

    free = manager.num_free_blocks
    if not batch.explicit and batch.num_members * (steps // manager.block_size + 1) <= free:
        return steps
    return steps if blocks_of(steps) <= free else bisect_right(range(1, steps), free, key=blocks_of)


def _is_head_kept_out(scheduler: Scheduler, batch: Batch) -> bool:
    """Will nobody be admitted while the same is decided? Blocks only become fewer, so only more hits would help."""
    decodes_only = scheduler.composition != "mixed" and batch.usual_tokens
    budget = scheduler.max_num_batched_tokens - (0 if decodes_only else batch.num_tokens)
    if not scheduler.waiting or budget <= 0 or scheduler.num_running >= scheduler.max_num_seqs:
        return True
    if not getattr(scheduler.waiting, "is_steady", False):
        return False
    if scheduler.find_room(scheduler.waiting.peek(), budget) is not None:
        return False
    refusal, manager = scheduler.refusal, scheduler.block_manager
    if refusal is None or refusal.last_hash is None:
        return True
    end = refusal.num_hits * manager.block_size
    return not any(
        manager.prefix_keys(seq, range(end, end + 1)) == [refusal.last_hash]
        for seq in batch.seqs
        if seq.num_registered_blocks < refusal.num_hits
    )


def repeat(scheduler: Scheduler, num_steps: int) -> Growth:
    """Commit the oldest batch and decide again what the latest one is, so many times; the blocks that this took.

    The batches in flight are replaced by those that are in flight then.
    """
    batch, group = scheduler.in_flight[-1], scheduler.group
    grown = _repeat_all(scheduler, num_steps) if scheduler.alone else _repeat_members(scheduler, num_steps)
    is_within = batch.view in (None, group.view) and group.known < min(group.ends, default=math.inf)
    assert is_within, f"{num_steps} steps go on past the end of a member, {group.known} are known"
    used_blocks = scheduler.block_manager.num_used_blocks
    for behind in range(len(scheduler.in_flight)):
        now = scheduler.in_flight[-1 - behind] = batch.repeated(num_steps - behind) if behind < num_steps else batch
        later = (block_ids for number, _, block_ids in grown if number > num_steps - behind) if behind else ()
        now.num_used_blocks = used_blocks - sum(map(len, later))
    return grown


def _repeat_all(scheduler: Scheduler, num_steps: int) -> Growth:
    """Walk all decisions, as there are sequences on their own; the blocks that this took."""
    batch, group, grown = scheduler.in_flight[-1], scheduler.group, list[tuple[int, Sequence, list[int]]]()
    decodes = bool(batch.usual_tokens)
    for number in range(1, num_steps + 1):
        group.known += decodes
        again = Batch(batch.usual_tokens)
        scheduler.serve_running(again, prompts=scheduler.composition == "mixed" or not decodes)
        grown += [(number, *pair) for pair in again.grown]
        if decodes:
            group.plan()
    return grown


def _repeat_members(scheduler: Scheduler, num_steps: int) -> Growth:
    """Look only at decisions in which a member begins a block or completes one; the blocks that this took.

    Of the 2.4 million decodes of the Mooncake trace on 8 replicas, 94% have neither. All blocks are taken at once, then
    shown full at once. A block evicted so may equal one that was full before, and the cache has other prefixes in them
    then; but nothing behind the evicted one, which was given up after all that lay behind it, so nobody can notice.
    """
    group, manager = scheduler.group, scheduler.block_manager
    size, cache = manager.block_size, manager.prefix_cache
    begun: list[tuple[int, Sequence]] = []
    full: list[tuple[int, Sequence]] = []
    for phase, seqs in group.phases.items():
        first = (phase - group.planned) % size + 1
        begun += [(number, seq) for number in range(first, num_steps + 1, size) for seq in seqs]
        if cache is not None:
            first = (phase - group.registered - 1) % size + 1
            full += [(number, seq) for number in range(first, num_steps + 1, size) for seq in seqs]
    begun.sort(key=itemgetter(0))
    full.sort(key=itemgetter(0))
    extended = manager.extend_each([seq for _, seq in begun])
    if cache is not None:
        blocks = [(seq, seq.base + group.registered + number, b"") for number, seq in full]
        cache.register_each(blocks, size, manager.register)
    group.skip(num_steps)
    return [(number, *pair) for (number, _), pair in zip(begun, extended, strict=True)]
