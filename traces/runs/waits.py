"""Why a request waited: every nanosecond of its time to first token, and of its whole time, charged to one cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from twinserve.orders import Loading
from twinserve.policies import Batch, CoreListener, Scheduler, Sequence
from twinserve.policies.vllm_rules import VllmAdmission
from twinserve.traces.runs.metrics import DECODE, is_handed_over
from twinserve.traces.runs.record import RunRecord
from twinserve.traces.runs.replay import Hearer

CAUSES = {
    "router": "before its replica had it: at the router, or on a replica that died",
    "step in flight": "until the step that ran as it came, or as it was decided on, had ended",
    "sequences": "as many ran as may (max_num_seqs)",
    "partial prefills": "as many prompts were partly computed as may be (max_num_partial_prefills)",
    "token budget": "the step had no tokens left (max_num_batched_tokens)",
    "blocks": "too few KV blocks were free for its next tokens",
    "reserve": "there were blocks for its next tokens, but not for all that is kept for it or kept free",
    "transfer": "its KV was loaded, from the replica that had computed its prompt, or has to again, or from a tier",
    "interval": "the step was one for decodes alone (prefill_schedule_interval)",
    "pipeline": "its token was still on its way through the ranks of a pipeline",
    "rule": "an admission rule of one's own would not have it",
    "preemption": "its blocks were taken, until it had computed again what was in them",
    "another's prompt": "prompts of others in its step, in the one before it, or in one in its stead",
    "decodes beside": "decodes of others in the step of its prompt",
    "own compute": "its own step",
    "host": "nothing ran: decisions, launches, results",
}
"""What a nanosecond can be charged to, each with what it means."""

OTHERS = "another's prompt"


@dataclass
class Waited:
    """What a request's time went into.

    Attributes:
        row: the request's row in the record.
        ttft_ns: nanoseconds of its time to first token by cause, which add up to it; empty without a first token.
        e2e_ns: the same of its whole time.
        culprits: of "another's prompt" in its whole time, nanoseconds by request.
    """

    row: dict[str, Any]
    ttft_ns: Counter[str] = field(default_factory=Counter)
    e2e_ns: Counter[str] = field(default_factory=Counter)
    culprits: Counter[int] = field(default_factory=Counter)

    def go_on(self, prompt: Waited | None) -> None:
        """Add what it waited for where its prompt was computed; what lies elsewhere, where that is not known."""
        if prompt is None:
            self.charge("router", self.row["arrival_ns"], self.row["first_token_ns"], {})
            return
        for own, others in ((self.ttft_ns, prompt.ttft_ns), (self.e2e_ns, prompt.e2e_ns)):
            own.update(others)
        self.culprits.update(prompt.culprits)

    def charge(self, cause: str, begin_ns: int, end_ns: int, prompts: Mapping[int, int]) -> None:
        """Charge a time to a cause, as far as it lies before the first token, and before the end; what others' prompts
        are charged with is shared by their tokens."""
        first_ns, last_ns = self.row["first_token_ns"], self.row["finish_ns"]
        took_ns = min(end_ns, last_ns) - begin_ns
        if took_ns > 0:
            self.e2e_ns[cause] += took_ns
            if cause == OTHERS:
                self._blame(took_ns, prompts)
        if first_ns is not None and begin_ns < first_ns:
            self.ttft_ns[cause] += min(end_ns, first_ns) - begin_ns

    def _blame(self, took_ns: int, prompts: Mapping[int, int]) -> None:
        left_ns, left = took_ns, sum(prompts.values())
        for seq_id, tokens in prompts.items():
            share_ns = left_ns * tokens // left
            self.culprits[seq_id] += share_ns
            left_ns, left = left_ns - share_ns, left - tokens


def waits_of(records: list[RunRecord]) -> list[Waited]:
    """What the time of each request went into that has ended, by the run's decisions, which are made again for it.

    A fleet's records are those of its replicas; a request is told of where it ended, with what it waited for where its
    prompt was computed, if that was elsewhere.

    Raises:
        InputError: a run cannot be decided again exactly, so what its decisions could see is not known.
    """
    return joined([waited for record in records for waited in Explainer(record).waits()], is_fleet=len(records) > 1)


def joined(every: list[Waited], *, is_fleet: bool) -> list[Waited]:
    """What the requests of a run waited for, where each ended, by their ids; `every` has it replica by replica."""
    prompts = {(one.row["id"], one.row["first_token_ns"]): one for one in every if is_handed_over(one.row)}
    waits = [one for one in every if not is_handed_over(one.row)] if is_fleet else every
    for one in waits:
        if one.row.get("stage") == DECODE:
            one.go_on(prompts.get((one.row["id"], one.row["first_token_ns"])))
    return sorted(waits, key=lambda one: one.row["id"])


def slowest_of(waits: Iterable[Waited], count: int) -> list[Waited]:
    """So many requests, those that waited longest for a first token; of equal ones the lower id."""
    return sorted(waits, key=lambda one: (-one.ttft_ns.total(), one.row["id"]))[:count]


def sums_of(waits: Iterable[Waited]) -> dict[str, Counter]:
    """What requests' times went into, summed up, in nanoseconds: by cause, and by who was to blame."""
    total: dict[str, Counter] = {"ttft_ns": Counter(), "e2e_ns": Counter(), "culprits": Counter()}
    for one in waits:
        for name, parts in total.items():
            parts.update(getattr(one, name))
    return total


@dataclass
class _Life:
    """A request in the system.

    Attributes:
        charged_ns: all before it is charged.
        pending: what the time from then to the next decision is to be charged to.
        prompts: if that are others' prompts, their tokens by request.
        is_recomputing: was it preempted, and has not computed all of that again?
    """

    waited: Waited
    charged_ns: int
    pending: str = "host"
    prompts: Mapping[int, int] = field(default_factory=dict)
    is_recomputing: bool = False

    def until(self, end_ns: int, cause: str, prompts: Mapping[int, int] | None = None) -> None:
        """Charge the time up to an instant, unless it is charged already."""
        if end_ns > self.charged_ns:
            self.waited.charge(cause, self.charged_ns, end_ns, prompts or {})
            self.charged_ns = end_ns

    def settle(self, end_ns: int) -> None:
        """Charge the time up to an instant to what is pending."""
        self.until(end_ns, self.pending, self.prompts)


class Explainer(Hearer):
    """Hears a run decided again, and charges the times of its requests.

    Args:
        also: hears each decision too.

    The time of a request that is in a step goes into the end of the step before, the host, and the step, in this order.
    A step with prompts takes, for those who decode in it, as long as the latest without prompts did; the rest is the
    prompts', by their tokens. That of a request in no step goes, from one decision to the next, into what kept it out.
    """

    def __init__(self, record: RunRecord, also: CoreListener | None = None):
        super().__init__(also)
        self._record = record
        self._rows = {row["id"]: row for row in record.requests}
        self._lives: dict[int, _Life] = {}
        self._ended: list[Waited] = []
        self._decided_ns = self._ended_ns = 0
        self._plain_ns: int | None = None  # what the latest step without prompts took on the device
        self._prompts: dict[int, int] = {}  # of the latest step, which took the time from _plain_until_ns on
        self._plain_until_ns = 0

    def waits(self) -> list[Waited]:
        """See `waits_of`."""
        self.hear(self._record)
        return self.ended()

    def ended(self) -> list[Waited]:
        """What its requests waited for, once it has been decided again exactly."""
        for life in self._lives.values():  # of a replica that died behind the step in which they ended
            life.settle(life.waited.row["finish_ns"])
            self._ended.append(life.waited)
        return self._ended

    def ingested(self, seq: Sequence, number: int) -> None:
        row = self._rows[seq.seq_id]
        if row["finish_ns"] is None:
            return
        is_begun = row.get("stage") == DECODE
        life = self._lives[seq.seq_id] = _Life(Waited(row), row["first_token_ns" if is_begun else "arrival_ns"])
        ingested_ns = row["ingested_ns"]
        life.until(min(self._decided_ns, ingested_ns), "router")
        self._before(life, ingested_ns)
        life.until(ingested_ns, "router" if self._record.run["world"] == "sim" else "host")

    def decided(self, batch: Batch) -> None:
        super().decided(batch)
        row, in_step = self._record.steps[batch.decision], set(batch.seqs)
        decided_ns = self._decided_ns = row["decided_ns"]
        running = set(self.core.scheduler.running)
        for seq in batch.preempted:
            if (life := self._lives.get(seq.seq_id)) is not None:
                life.settle(decided_ns)
                life.is_recomputing = True
        waiting = self.core.scheduler.waiting
        loading = {*waiting.loading, *waiting.without} if isinstance(waiting, Loading) else set()
        prompts = _prompts_of(batch)
        kept_out = ""
        for seq_id, seq in self.core.sequences.items():
            life = self._lives.get(seq_id)
            if life is None or seq in in_step:
                continue
            life.settle(decided_ns)
            if life.is_recomputing:
                life.pending = "preemption"
            elif seq in loading:
                life.pending = "transfer"
            elif seq in running:
                life.pending = _left_out(self.core.scheduler, batch, seq)
            else:
                life.pending = kept_out = kept_out or _not_admitted(self.core.scheduler, batch)
            life.prompts = prompts
        if batch:
            self._step(batch, row, prompts)

    def _step(self, batch: Batch, row: dict[str, Any], prompts: dict[int, int]) -> None:
        """Charge the times of those who are in a step, up to its end."""
        end_ns = row["end_ns"]
        begin_ns = min(max(row["start_ns"], self._ended_ns), end_ns)
        took_ns, tokens = end_ns - begin_ns, sum(prompts.values())
        decodes = len(batch.seqs) - len(prompts)
        plain_ns = took_ns * decodes // (decodes + tokens)
        if decodes and self._plain_ns is not None:
            plain_ns = min(took_ns, self._plain_ns)
        if not prompts:
            self._plain_ns = took_ns
        sampled = set(batch.sampled)
        for seq in batch.seqs:
            life = self._lives.get(seq.seq_id)
            if life is None:
                continue
            life.settle(row["decided_ns"])
            if life.is_recomputing:
                life.until(end_ns, "preemption")
                life.is_recomputing = seq not in sampled
            self._before(life, end_ns)
            life.until(begin_ns, "host")
            if prompts:
                _share(life, prompts, begin_ns, plain_ns, took_ns)
            life.until(end_ns, "own compute")
            life.pending = "host"
        self._prompts, self._plain_until_ns = prompts, begin_ns + plain_ns if prompts else end_ns
        self._ended_ns = max(self._ended_ns, end_ns)

    def _before(self, life: _Life, end_ns: int) -> None:
        """Charge what is left of the latest step to it, and to the prompts in it."""
        life.until(min(self._plain_until_ns, end_ns), "step in flight")
        life.until(min(self._ended_ns, end_ns), OTHERS, self._prompts)

    def finished(self, seq: Sequence) -> None:
        life = self._lives.pop(seq.seq_id, None)
        if life is not None:
            life.settle(life.waited.row["finish_ns"])
            self._ended.append(life.waited)


def _share(life: _Life, prompts: dict[int, int], begin_ns: int, plain_ns: int, took_ns: int) -> None:
    """Charge what of a step others' prompts took, and, of that of a prompt, others' decodes."""
    seq_id, tokens = life.waited.row["id"], sum(prompts.values())
    own = prompts.get(seq_id, 0)
    others_ns = (took_ns - plain_ns) * (tokens - own) // tokens
    life.until(begin_ns + others_ns, OTHERS, {other: count for other, count in prompts.items() if other != seq_id})
    if own:
        life.until(begin_ns + others_ns + plain_ns, "decodes beside")


def _prompts_of(batch: Batch) -> dict[int, int]:
    """The tokens of each prompt in a step, by request."""
    if not batch.prompts:
        return {}
    prompts = set(batch.prompts)
    return {seq.seq_id: count for seq, count in zip(batch.seqs, batch.lengths, strict=True) if seq in prompts}


def _left_out(scheduler: Scheduler, batch: Batch, seq: Sequence) -> str:
    """Why a running sequence gets nothing in a step."""
    if scheduler.rules.interval.is_held and not seq.has_sampled:
        return "interval"
    if batch.preempted:
        return "blocks"
    if scheduler.composition == "prefill-first" and batch.prompts:
        return OTHERS if seq.has_sampled else "token budget"
    if seq.num_tokens + seq.num_in_flight >= seq.final_length:
        return "host"  # its last token is on its way
    return "pipeline" if scheduler.pipeline_parallel_size > 1 and seq.num_in_flight else "token budget"


def _not_admitted(scheduler: Scheduler, batch: Batch) -> str:
    """Why the head of the waiting queue is not admitted in a step, and nobody behind it."""
    if batch.preempted:
        return "blocks"
    if len(scheduler.running) >= scheduler.max_num_seqs:
        return "sequences"
    left = scheduler.max_num_batched_tokens - sum(batch.lengths)
    left -= scheduler.speculation.draft_slots * (1 + len(batch.seqs))
    if left <= 0:
        return "token budget"
    seq, manager = scheduler.waiting.peek(), scheduler.block_manager
    if seq.num_in_flight:
        return "preemption"
    hits = seq.block_table or manager.find_hits(seq)
    start = seq.num_computed_tokens or len(hits) * manager.block_size
    missing = seq.num_tokens - start
    if scheduler.rules.interval.is_held and missing > 1:
        return "interval"
    if missing > left and not scheduler.enable_chunked_prefill:
        return "token budget"
    first = min(missing, left)
    partial = sum(not other.has_sampled for other in scheduler.running)
    if first < missing and partial >= scheduler.max_num_partial_prefills:
        return "partial prefills"
    if manager.blocks_to_take(hits, start + first) > manager.num_free_blocks:
        return "blocks"
    return "reserve" if isinstance(scheduler.admission, VllmAdmission) else "rule"
