"""Horizon: how many decisions in a row are the same if nothing comes from outside, and making them at once.

A decision repeats the one before it if nobody is admitted, preempted or has left, and every row has the same sequence,
number of tokens and outcome; tables may grow. Only sequences without token ids have a horizon, as any token may stop
one that has them.
"""

from __future__ import annotations

import math

from twinserve.policies.batch import Batch, Row
from twinserve.policies.scheduler import Scheduler
from twinserve.policies.sequence import Sequence


def horizon(scheduler: Scheduler, batch: Batch, cap: int) -> int:
    """The most decisions that are the same, `batch`, the latest in flight, being the first of them; at most `cap`.

    Every batch in flight but `batch` is committed before the second of them is decided. It is 1 where a token might
    stop a sequence, and may be too small in these cases: the budget does not reach every decode; somebody was preempted
    just now; the head of the waiting queue lacks blocks that a running prompt is about to compute; or the order's
    choice may change by itself (see `Order.is_steady`).
    """
    group = scheduler.group
    is_plain = not (batch.admitted or group.num_with_tokens or any(seq.has_token_ids for seq in scheduler.alone))
    if cap <= 1 or not batch or not is_plain or _may_end_before(scheduler, batch):
        return 1
    steps = float(cap)
    if batch.num_members:
        steps = min(steps, group.next_end() - group.planned + 1)
    for row in batch.explicit:
        steps = min(steps, _steps_of(scheduler, batch, row))
    has_row = {row.seq for row in batch.explicit}
    for seq in scheduler.alone:
        if seq not in has_row and (batch.usual_tokens or not seq.has_sampled):
            return 1
    if steps > 1 and scheduler.block_manager.num_blocks is not None:
        steps = _steps_with_room(scheduler, batch, int(steps))
    return int(_steps_until_admission(scheduler, batch, int(steps))) if steps > 1 else 1


def _may_end_before(scheduler: Scheduler, batch: Batch) -> bool:
    """Does a batch in flight before `batch` end a sequence?"""
    group = scheduler.group
    for before in scheduler.in_flight:
        if before is batch:
            break
        if before.has_members and group.ending_at(group.known + 1):
            return True
        seqs = [row.seq for row in before.explicit if row.samples] + [member.seq for member in before.late]
        for seq in seqs:
            if seq.member is None and not seq.is_finished and seq.num_tokens + 1 >= scheduler.final_length(seq):
                return True
    return False


def _steps_of(scheduler: Scheduler, batch: Batch, row: Row) -> float:
    """For how many decisions a row of a sequence alone stays the same."""
    seq, _, num_tokens, samples, is_prompt = row
    if not is_prompt:
        return scheduler.final_length(seq) - seq.num_computed_tokens
    takes_all_it_may = num_tokens == scheduler.long_prefill_token_threshold
    takes_the_rest = row is batch.explicit[-1] and batch.num_tokens == scheduler.max_num_batched_tokens
    if samples or not (takes_all_it_may or takes_the_rest):
        return 1
    return 1 + (seq.num_tokens - seq.num_computed_tokens - 1) // num_tokens


def _grown_blocks(scheduler: Scheduler, batch: Batch, num_steps: int) -> int:
    """Blocks that so many further decisions take."""
    manager = scheduler.block_manager
    grown = scheduler.group.num_beginning(num_steps) if batch.num_members else 0
    for row in batch.explicit:
        grown += max(0, manager.num_missing(row.seq, num_steps * row.num_tokens))
    return grown


def _steps_with_room(scheduler: Scheduler, batch: Batch, steps: int) -> int:
    """The most decisions, up to `steps`, for which there are free blocks."""
    free = scheduler.block_manager.num_free_blocks
    least, most = 1, steps
    while least < most:
        middle = (least + most + 1) // 2
        if _grown_blocks(scheduler, batch, middle - 1) <= free:
            least = middle
        else:
            most = middle - 1
    return least


def _steps_until_admission(scheduler: Scheduler, batch: Batch, steps: int) -> int:
    """The most decisions, up to `steps`, before the head of the waiting queue may be admitted.

    Blocks only become fewer, so a head that was refused stays so until the cache gets blocks that it misses.
    """
    decodes_only = scheduler.composition != "mixed" and batch.usual_tokens
    budget = scheduler.max_num_batched_tokens - (0 if decodes_only else batch.num_tokens)
    if not scheduler.waiting or budget <= 0 or scheduler.num_running >= scheduler.max_num_seqs:
        return steps
    if not getattr(scheduler.waiting, "is_steady", False):
        return 1
    head = scheduler.waiting.peek()
    if scheduler.find_room(head, budget) is not None:
        return 1
    refusal = scheduler.refusal
    if refusal is None or refusal.last_hash is None:
        return steps
    manager = scheduler.block_manager
    end = refusal.num_hits * manager.block_size
    ends = range(end, end + 1)
    advances = {row.seq: row.num_tokens for row in batch.explicit}
    if batch.num_members:
        advances |= dict.fromkeys((member.seq for member in batch.members), 1)
    for seq, num_tokens in advances.items():
        if seq.num_registered_blocks < refusal.num_hits and manager.prefix_keys(seq, ends) == [refusal.last_hash]:
            # Where a step has room for prompts, the head is looked at once the block is registered, else before.
            until = math.ceil((end - seq.num_computed_tokens) / num_tokens) + bool(decodes_only)
            steps = min(steps, max(1, until))
    return steps


def repeat(scheduler: Scheduler, batch: Batch, num_steps: int) -> list[list[tuple[Sequence, list[int]]]]:
    """Commit the oldest batch and decide again what `batch`, the latest one, is, so many times; within its horizon.

    The batches in flight are replaced by those that are in flight then.

    Returns:
        The blocks that each decision took.
    """
    group, decodes = scheduler.group, bool(batch.usual_tokens)
    prompts = scheduler.composition == "mixed" or not decodes
    again = Batch(group, batch.usual_tokens)
    grown: list[list[tuple[Sequence, list[int]]]] = []
    while len(grown) < num_steps:
        if decodes and not scheduler.alone and (quiet := min(group.quiet_steps(), num_steps - len(grown))):
            group.skip(quiet)
            grown += [[]] * quiet
            continue
        if decodes:
            group.receive(batch.view, None)
        again.grown = []
        if scheduler.alone:
            again.clear()
            scheduler.schedule_running(again, prompts=prompts)
        else:
            scheduler.serve(group.beginning(), group.completing(), again)
        if decodes:
            group.plan()
        grown.append(again.grown)
    assert group.known < group.next_end(), f"{num_steps} steps go on past the end at {group.next_end()}: {group.known}"
    ahead = len(scheduler.in_flight) - 1
    used_blocks = len(scheduler.block_manager.used_block_ids)
    scheduler.in_flight.clear()
    for behind in range(ahead + 1):
        if behind:
            used_blocks -= sum(len(block_ids) for _, block_ids in grown[-behind])
        scheduler.in_flight.appendleft(batch.repeated(num_steps - behind))
        scheduler.in_flight[0].num_used_blocks = used_blocks
    return grown
