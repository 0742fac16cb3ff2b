"""Rules of one's own, as a person would write them into a file: what tests name as own_rules.py:CLASS."""

from __future__ import annotations

from twinserve.policies import LastAdmitted


class LastCome:
    """The latest of the first few is next.

    Args:
        window: sequences in front of the queue that are looked at.
    """

    starvation_free = False
    is_steady = True
    victim = LastAdmitted()

    def __init__(self, window=1000):
        self.queue, self.window = [], window

    def push(self, seq):
        self.queue.append(seq)

    def push_preempted(self, seq):
        self.queue.insert(0, seq)

    def peek(self):
        return self.queue[: self.window][-1]

    def pop_next(self):
        seq = self.peek()
        self.queue.remove(seq)
        return seq

    def remove(self, seq):
        self.queue.remove(seq)

    def __len__(self):
        return len(self.queue)

    def __iter__(self):
        return iter(self.queue)


class FirstAdmitted:
    """The sequence that was admitted first gives way."""

    def choose(self, running, seq):
        return next(iter(running))


class Roomy:
    """A prompt is admitted where it leaves blocks free.

    Args:
        spare: so many, while anything runs.
    """

    def __init__(self, *, spare):
        self.spare = spare

    def lacks(self, manager, seq, hits, num_tokens, is_alone):
        needed = manager.blocks_to_take(hits, seq.num_tokens) + (0 if is_alone else self.spare)
        return max(0, needed - manager.num_free_blocks)


class Modulo:
    """A router: request number modulo `count`, as far as so many are up."""

    is_blind = True

    def __init__(self, count=2):
        self.count = count

    def choose(self, request, replicas):
        return request.id % min(self.count, len(replicas))
