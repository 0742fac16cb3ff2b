"""Latency models: what a step costs the host and the device, in integer nanoseconds."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from mypy_extensions import mypyc_attr

from twinserve.policies import Batch
from twinserve.settings.errors import InputError
from twinserve.traces.runs.digest import places_of
from twinserve.traces.runs.metrics import stayed_busy

_NO_DRAFTS = (0, 0, 0, 0, 0)
"""The last fields of the features of a step that has none, and asks for none."""
Count = Any
"""An integer; where features stand for several steps, a column of them."""


class StepFeatures(NamedTuple):
    """What a step's cost depends on.

    Attributes:
        decision: the number of the step in its run.
        seqs: rows.
        prompt_tokens: tokens of rows that have sampled nothing since their admission, or have drafts.
        decode_tokens: tokens of the other rows, one each.
        kv_tokens: sum over rows of the context length after the step (keys read from the KV pool).
        attention_pairs: query-key pairs: a row of n tokens from position s on has n s + n (n + 1) / 2.
        sampled: rows of logits: one of each row that samples, and one of each draft.
        arrived: requests that came in since the decision before.
        left: sequences that ended since the decision before.
        decided_ns: when the step was decided.
        longest_decode: the longest context among the rows of `decode_tokens`, after the step.
        prompts: (start, length) of each row of `prompt_tokens`: the position of its first token and its tokens.
        shared_tokens: of the tokens of `kv_tokens` that decodes read, those in blocks that another row reads as well,
            but for the first of these; as far as all that run are rows of the step.
        asked: drafts that are proposed behind the step for each sequence that samples in it.
        drafting, drafting_tokens: where any are asked for, these sequences, and the sum of their contexts.
        verifying, drafts: rows that have drafts, and these, all together.
    """

    decision: Count
    seqs: int
    prompt_tokens: int
    decode_tokens: int
    kv_tokens: Count
    attention_pairs: Count
    sampled: int
    arrived: int = 0
    left: int = 0
    decided_ns: int = 0
    longest_decode: Count = 0
    prompts: tuple[tuple[Count, int], ...] = ()
    shared_tokens: int = 0
    asked: int = 0
    drafting: int = 0
    drafting_tokens: Count = 0
    verifying: int = 0
    drafts: int = 0

    @classmethod
    def of(cls, batch: Batch, arrived: int = 0) -> StepFeatures:
        """The features of a decided batch."""
        inside, drafts, decodes = batch.prompts, batch.drafts, batch.starts
        if drafts:
            known = set(inside)
            inside = [seq for seq in batch.seqs if seq in known or seq in drafts]
        prompts: list[tuple[int, int]] = []
        if inside:
            decodes = list(decodes)
            for place in reversed(places_of(batch, inside)):
                prompts.append((decodes.pop(place), batch.lengths[place]))
            prompts.reverse()
        longest_decode = 0
        for start in decodes:
            if start >= longest_decode:
                longest_decode = start + 1
        num_shared = -batch.num_used_blocks
        for seq in batch.seqs:
            num_shared += len(seq.block_table)
        shared_tokens = 0
        if num_shared > 0:
            prompt_kv_tokens = sum([start + length for start, length in prompts])
            shared_tokens = min(num_shared * batch.seqs[0].tokens_per_block, batch.num_kv_tokens - prompt_kv_tokens)
        ends: list[int] = []
        if batch.num_drafts_asked:
            chunks = set(batch.chunks)
            for place, seq in enumerate(batch.seqs):
                if seq not in chunks:
                    ends.append(batch.starts[place] + batch.lengths[place])
        # A row with drafts counts as a prompt's, as one of several tokens; `attended` says what an engine makes of it.
        num_prompt_tokens = sum([length for _, length in prompts]) if drafts else batch.num_prompt_tokens
        num_drafts = sum(drafts.values())
        values = (
            batch.decision,
            len(batch),
            num_prompt_tokens,
            batch.num_tokens - num_prompt_tokens,
            batch.num_kv_tokens,
            batch.num_attention_pairs,
            batch.num_sampled + num_drafts,
            arrived,
            len(batch.left),
            batch.decided_ns,
            longest_decode,
            tuple(prompts),
            shared_tokens,
            batch.num_drafts_asked,
            len(ends),
            sum(ends),
            len(drafts),
            num_drafts,
        )
        return tuple.__new__(cls, values)  # as the class does, in a third of the time

    def attended(self, single: int) -> StepFeatures:
        """The features where each token of a row of up to `single` attends as a decode does, over the context up to
        itself: such rows are no prompts. What one of their tokens has read just now, the next one reads as well."""
        short = [(start, length) for start, length in self.prompts if length <= single]
        if not short:
            return self
        tokens = sum([length for _, length in short])
        again = sum([length * start + length * (length + 1) // 2 - (start + length) for start, length in short])
        return self._replace(
            prompt_tokens=self.prompt_tokens - tokens,
            decode_tokens=self.decode_tokens + tokens,
            kv_tokens=self.kv_tokens + again,
            longest_decode=max(self.longest_decode, *(start + length for start, length in short)),
            prompts=tuple(prompt for prompt in self.prompts if prompt[1] > single),
            shared_tokens=self.shared_tokens + again,
        )

    def repeated(self, number: Count, decided_ns: int) -> StepFeatures:
        """The features of the `number`-th repetition of the step: every context has grown by the tokens of its row.

        With an array of numbers, what grows are arrays, too: the features of several repetitions, as columns.
        """
        decision, seqs, prompt_tokens, decode_tokens, kv_tokens, attention_pairs, sampled = self[:7]
        prompts = tuple([(start + number * length, length) for start, length in self.prompts])
        values = (
            decision + number,
            seqs,
            prompt_tokens,
            decode_tokens,
            kv_tokens + number * (prompt_tokens + decode_tokens),
            attention_pairs + number * self.num_new_pairs,
            sampled,
            0,
            0,
            decided_ns,
            self.longest_decode + number if decode_tokens else 0,
            prompts,
            self.shared_tokens,
            *_NO_DRAFTS,
        )
        return tuple.__new__(StepFeatures, values)  # as the class does, in a third of the time

    @property
    def num_new_pairs(self) -> int:
        """By how much `attention_pairs` is larger when the step is repeated."""
        return self.decode_tokens + sum(length * length for _, length in self.prompts)

    @property
    def decode_kv_tokens(self) -> Count:
        """The sum of the contexts of the rows of `decode_tokens`."""
        return self.kv_tokens - sum([start + length for start, length in self.prompts])

    @property
    def longest_prompt(self) -> Count:
        """The longest context among the rows of `prompt_tokens`, after the step."""
        ends = [start + length for start, length in self.prompts]
        return max(ends, default=0) if not ends or isinstance(ends[0], int) else np.maximum.reduce(ends)

    @property
    def tokens(self) -> int:
        """All tokens that the step computes."""
        return self.prompt_tokens + self.decode_tokens


class StepCost(NamedTuple):
    """What a step costs, in nanoseconds.

    Attributes:
        host_ns: from the decision, or what held it up, until the step is launched.
        device_ns: on the device.
        lead_ns: how long before the end of the launch the device can begin: a step launched kernel by kernel is
            computed while it is being launched; a captured one is launched at once.
        stages: of a pipeline, nanoseconds that each stage takes, `device_ns` together; none: there is one device.
    """

    host_ns: int
    device_ns: int
    lead_ns: int = 0
    stages: tuple[int, ...] = ()

    def slower(self, factor: float) -> StepCost:
        """The same with the device's time times a factor."""
        stages = tuple([round(ns * factor) for ns in self.stages])
        return self._replace(device_ns=sum(stages) if stages else round(self.device_ns * factor), stages=stages)

    def followed(self, more_ns: int) -> StepCost:
        """The same with so much more time of the device behind it; of a pipeline, of its last stage."""
        stages = (*self.stages[:-1], self.stages[-1] + more_ns) if self.stages else ()
        return self._replace(device_ns=self.device_ns + more_ns, stages=stages)

    @classmethod
    def of_waiting(cls, host_ns: int, device_ns: int) -> StepCost:
        """Of a step for which the host waits before it goes on, so that its launch ends when the step does."""
        return cls(host_ns + device_ns, device_ns, device_ns)

    def times(self, decided_ns: int, device_free_ns: int) -> tuple[int, int, int]:
        """When a step is launched, starts and ends; not before it is decided, and it ends not before it is launched."""
        host_ns, device_ns, lead_ns, _ = self
        launched = decided_ns + host_ns
        start = max(launched - min(lead_ns, host_ns), device_free_ns)
        return launched, start, max(start + device_ns, launched)


class LatencyModel(Protocol):
    """Says what a step costs; the same features always cost the same.

    All steps of a model have as many `stages`. A model may also have the method of RepeatedCosts, for speed, and that
    of Watching. It may be asked about steps that are never made, as a request that comes in changes what is decided.
    """

    def step_cost(self, features: StepFeatures) -> tuple[int, int] | StepCost:
        """The fields of a StepCost; two alone are host_ns and device_ns."""


def cost_of(latency: LatencyModel, features: StepFeatures) -> StepCost:
    """What a model says that a step costs.

    Raises:
        InputError: it does not say it in integers >= 0.
    """
    anything: Any = latency  # compiled code would trust what the method says that it gives
    given = anything.step_cost(features)
    try:
        if type(given) is tuple and len(given) == 2:
            host_ns, device_ns = given
            cost: StepCost = tuple.__new__(StepCost, (host_ns, device_ns, 0, ()))  # as the class does, but faster
        else:
            cost = given if isinstance(given, StepCost) else StepCost(*given)
        is_whole = type(cost.host_ns) is type(cost.device_ns) is int
        if is_whole and cost.host_ns >= 0 <= cost.device_ns and cost.lead_ns >= 0:
            return cost
    except TypeError:
        pass
    problem = "expected host_ns and device_ns, integers >= 0"
    raise InputError(problem, field=f"step_cost of {type(latency).__name__}", value=given)


class RepeatedCosts(Protocol):
    """A latency model that says at once what steps cost that repeat one another."""

    def repeated_costs(self, features: StepFeatures, count: int) -> tuple[int, np.ndarray] | None:
        """host_ns, the same for all, and device_ns, as int64, of the `count` steps that repeat one with these features.

        They are those of `step_cost`, with no lead and no stages; None where they have any, or not the same host_ns.
        """


class Watching(Protocol):
    """A latency model that is told which steps were made, to know how far they lie beyond what it was made from."""

    def watch(self, features: StepFeatures, count: int = 1) -> None:
        """`count` steps were made: one with these features, and those that repeat it."""


@mypyc_attr(native_class=False)  # it may be subclassed, and pickled
class ScaledLatency:
    """Another model's costs, all times a factor."""

    def __init__(self, latency: LatencyModel, factor: float):
        self._latency, self._factor = latency, factor

    def step_cost(self, features: StepFeatures) -> StepCost:
        """The scaled cost."""
        cost = cost_of(self._latency, features).slower(self._factor)
        return cost._replace(host_ns=round(cost.host_ns * self._factor), lead_ns=round(cost.lead_ns * self._factor))


@mypyc_attr(native_class=False)  # it may be subclassed, and pickled
class RecordedLatency:
    """A recorded run's own times, by the number of the step.

    The host's part of a step is the time from its decision to its start, or to the next decision where that came
    first (one step ahead), and what lay between its end and the next decision while the engine was busy. A step with
    drafts that was launched nearer to its end than to its start was waited for before anything else was done: then the
    host's part is what lay between it and the steps beside it.

    Args:
        steps: the rows of a record's steps, in order.
    """

    def __init__(self, steps: list[dict]):
        self._costs: list[tuple[int, int] | StepCost] = []
        ended = 0
        for row, following in zip(steps, [*steps[1:], None], strict=True):
            launched = row.get("launched_ns") or 0
            waited = "asked" in row and launched - row["start_ns"] > row["end_ns"] - launched
            host = row["start_ns"] - (max(row["decided_ns"], ended) if waited else row["decided_ns"])
            ended = row["end_ns"]
            if following is not None and stayed_busy(row, following):
                gap = following["decided_ns"] - row["end_ns"]
                if gap >= 0:
                    host += gap
                elif not waited:
                    host = min(host, following["decided_ns"] - row["decided_ns"])
            host, device = max(0, host), row["end_ns"] - row["start_ns"]
            self._costs.append(StepCost.of_waiting(host, device) if waited else (host, device))

    def step_cost(self, features: StepFeatures) -> tuple[int, int] | StepCost:
        """The recorded cost of the step with this number.

        Raises:
            InputError: the record has fewer steps, so the simulation decides otherwise than the run did.
        """
        if features.decision >= len(self._costs):
            raise InputError(
                f"the recorded run has {len(self._costs)} steps, and step {features.decision} was asked for: expected "
                "the trace and the settings of the run"
            )
        return self._costs[features.decision]
