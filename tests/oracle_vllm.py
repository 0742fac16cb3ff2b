"""Decide recorded scenarios of vLLM's own scheduler again, by that version's rules, and compare every step.

    python tests/oracle_vllm.py [FOLDER ...]     a line a scenario; exit status 1 if one parts

FOLDER defaults to $TWINSERVE_ORACLES and the folders beside it whose names go on from its own with a hyphen.

Every scenario is walked through Core, an asynchronous one as many steps ahead as vLLM was. An abort that fell between
the decision of a step and the output processed in it is handed to the Scheduler there, as Core itself lets it wait for
the next decision; the line says how many there were. Of speculative decoding, how many tokens each run had and, if
the engine was synchronous, how many drafts were proposed behind it come from the record.

Under its priority policy vLLM can preempt a request that it has scheduled in the same step; the blocks of that step
stay in its cache though no step computes them, and can be hit. Ours never can. The header of a scenario in which that
happens says how many such tokens were hit; there, and there alone, ours has to part at an admission that hits fewer.
Where such a block is not hit, it is given out again as cached ones are, later than ours gives it out: a scenario that
parts there, at the number of a block, parts rightly, too.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twinserve.orders import Priority
from twinserve.policies import (
    Batch,
    BlockManager,
    Core,
    FirstCome,
    PrefixCache,
    Runs,
    SamplingParams,
    Scheduler,
    Sequence,
    Speculation,
    VllmAdmission,
)
from twinserve.settings.speculative import VllmDraftLength
from twinserve.settings.vllm_versions import build_rules, nearest_version

ORDERS = {"fcfs": FirstCome, "priority": Priority}

FIELDS = ("sched", "spec", "pre", "abo", "adm", "free", "run", "wait", "blk", "upd", "got", "fin", "free_end")


@dataclass
class Difference:
    """The first field in which a scenario parts from the record; `is_right`: as vLLM cached what it never computed."""

    step: int
    field: str
    recorded: object
    ours: object
    is_right: bool = False

    def __str__(self) -> str:
        rightly = "parts rightly at " if self.is_right else ""
        return f"{rightly}step {self.step}: {self.field} is {self.ours}, vLLM's is {self.recorded}"


def load(path: Path) -> tuple[dict, list[dict], list[dict]]:
    """Header, requests and steps of a scenario file."""
    with gzip.open(path, "rt") as lines:
        header = json.loads(next(lines))
        rows = [json.loads(line) for line in lines]
    return header, rows[: header["requests"]], rows[header["requests"] :]


def prompt_tokens(prompt: list) -> list[int]:
    """The token ids that a prompt's parts stand for."""
    base = {"t": 20_000_000, "o": 1_000_000}
    return [base[kind] + which * 10_000 + k for kind, which, n in prompt for k in range(n)]


def generated_token(request: int, number: int) -> int:
    """The token id that a request generates as its `number`-th one, from 0 on."""
    return prompt_tokens([["o", request, number + 1]])[-1]


def depth_of(config: dict) -> int:
    """How many steps are in flight when the next is decided."""
    return config.get("pipeline_parallel_size", 1) if config["async_scheduling"] else 0


def build_core(header: dict) -> Core:
    """A Core with a scenario's settings and its version's rules; vLLM's pool counts a block that is never given out.

    `max_num_partial_prefills` is left out: vLLM's scheduler reads nothing but the threshold derived from it.
    """
    config = header["config"]
    scheduler = Scheduler(
        BlockManager(config["num_gpu_blocks"] - 1, config["block_size"]),
        config.get("max_num_active_seqs") or config["max_num_seqs"],
        composition="mixed",
        max_num_batched_tokens=config["max_num_batched_tokens"],
        enable_chunked_prefill=config["enable_chunked_prefill"],
        long_prefill_token_threshold=config["long_prefill_token_threshold"],
        max_model_len=config["max_model_len"],
        pipeline_parallel_size=config.get("pipeline_parallel_size", 1),
        prefix_cache=(
            PrefixCache(hash_lookahead_tokens=config.get("hash_lookahead_tokens", 0))
            if config["enable_prefix_caching"]
            else None
        ),
        order=ORDERS[config["policy"]](),
        admission=VllmAdmission(
            reserve_full_prompt=config["scheduler_reserve_full_isl"],
            watermark_blocks=int(config["watermark"] * config["num_gpu_blocks"]),
        ),
        rules=build_rules(
            nearest_version(header["vllm"]),
            adaptive=config.get("long_prefill_token_threshold_adaptive", False),
            prefill_schedule_interval=config.get("prefill_schedule_interval", 1),
        ),
        speculation=speculation_of(config) if "speculative_method" in config else None,
    )
    return Core(scheduler, pipeline_depth=depth_of(config))


def speculation_of(config: dict) -> Speculation:
    """How a scenario's drafts are scheduled."""
    table = config.get("num_speculative_tokens_per_batch_size")
    return Speculation(
        config["num_speculative_tokens"],
        None if table is None else VllmDraftLength(config["num_speculative_tokens"], table).choose,
        config.get("num_lookahead_tokens", 0),
        config.get("draft_slots", 0),
        config["async_scheduling"],
    )


def hit_more(recorded: list[list[int]], ours: list[list[int]]) -> int:
    """By how many tokens the first admission of a step hit more in the record, if it is of the same request."""
    same = bool(recorded and ours) and recorded[0][0] == ours[0][0]
    return recorded[0][1] - ours[0][1] if same else 0


def first_other_block(recorded: list[list], ours: list[list]) -> int | None:
    """Of the blocks that a step gave out, the first of ours where the record has another."""
    theirs, mine = ([block for _, blocks in of_step for block in blocks] for of_step in (recorded, ours))
    return next((own for own, other in zip(mine, theirs, strict=False) if own != other), None)


class Scenario:
    """A scenario on its way through Core.

    Attributes:
        late_aborts: aborts that fell between a decision and the output processed in its step.
        taken_back: blocks that requests would have filled in the very step in which they were preempted, until they are
            given out again.
    """

    def __init__(self, header: dict, requests: list[dict]):
        self.core = build_core(header)
        self.late_aborts = 0
        self.taken_back: set[int] = set()
        self._given: set[int] = set()
        self._is_async = header["config"]["async_scheduling"]
        self._depth = self.core.pipeline_depth
        self._arriving = list(reversed(requests))
        self._aborts = {(row["request"], *row["abort"]) for row in requests if "abort" in row}
        self._resumed: set[int] = set()
        self._in_flight: list[tuple[int, Batch]] = []

    def step(self, recorded: dict) -> dict[str, object]:
        """Decide a step and process the output that is due in it; its fields as a record has them.

        Of what is recorded, its number and what came from outside are read: the runs and the proposals.
        """
        number = recorded["step"]
        core, manager = self.core, self.core.scheduler.block_manager
        while self._in_flight and self._in_flight[0][0] < number - self._depth:
            self._process({}, {})  # of steps that scheduled nothing, in which nothing was decided either
        while self._arriving and self._arriving[-1]["at"] <= number:
            seq = self._sequence(self._arriving.pop())
            if not core.ingest(seq, 0):
                return {"refused": seq.refusal}
        aborted = [[request, 0] for request in self._due(number, 0)]
        for request, _ in aborted:
            core.abort(request, 0)
        self.taken_back -= self._given
        filling = {seq: blocks for seq in core.scheduler.running if (blocks := self._fills(seq))}
        batch = core.decide(0)
        self.taken_back.update(*(filling.get(seq, ()) for seq in batch.preempted))
        self._in_flight.append((number, batch))
        given = [[seq.seq_id, [b + 1 for b in ids]] for seq, ids in batch.grown]
        given += [[row.seq.seq_id, [b + 1 for b in row.seq.block_table]] for row in batch.admitted]
        self._given = {block for _, blocks in given for block in blocks}
        ours: dict[str, object] = {
            "sched": [[row.seq.seq_id, row.num_tokens, row.start] for row in batch.rows],
            "spec": [[row.seq.seq_id, row.num_drafts] for row in batch.rows if row.num_drafts],
            "pre": [seq.seq_id for seq in batch.preempted],
            "adm": [[row.seq.seq_id, row.start, int(row.seq.seq_id in self._resumed)] for row in batch.admitted],
            "free": manager.num_free_blocks,
            "run": len(core.scheduler.running),
            "wait": len(core.scheduler.waiting),
            "blk": given,
        }
        self._resumed.update(seq.seq_id for seq in batch.preempted)
        for request in self._due(number, 1):
            self.late_aborts += 1
            aborted.append([request, 1])
            core.scheduler.abort(core.sequences.pop(request))
        if aborted:
            ours["abo"] = aborted
        is_due = self._in_flight[0][0] == number - self._depth
        got = {request: made for request, made, _ in recorded.get("got", ())}
        processed, finished, kept = self._process(got, dict(recorded.get("prop", ()))) if is_due else (None, [], [])
        if self._is_async:
            ours["upd"] = processed
        return ours | {"got": kept, "fin": finished, "free_end": manager.num_free_blocks}

    def _sequence(self, row: dict) -> Sequence:
        request = row["request"]
        stops = (generated_token(request, row["stop"] - 1),) if "stop" in row else ()
        params = SamplingParams(max_tokens=row["out"], stop_token_ids=stops)
        return Sequence(prompt_tokens(row["prompt"]), params, seq_id=request, priority=row["prio"])

    def _fills(self, seq: Sequence) -> list[int]:
        """The blocks of a running request, as vLLM numbers them, that its next step can fill."""
        size, computed = self.core.scheduler.block_manager.block_size, seq.num_computed_tokens
        first, end = computed // size, seq.num_tokens // size
        return [block + 1 for block in seq.block_table[first:end]]

    def _due(self, number: int, place: int) -> Iterator[int]:
        """The requests that are aborted in a step: before its decision (0) or after it (1); not those that ended."""
        for request, step, when in sorted(self._aborts):
            if (step, when) == (number, place) and request in self.core.sequences:
                yield request

    def _process(self, made: dict[int, int], proposed: dict[int, int]) -> tuple[int | None, list[int], list[list[int]]]:
        """Take the output of the oldest step in flight: its number (None if it scheduled nothing), who ended, and with
        drafts what each run had and what was kept of it."""
        number, batch = self._in_flight.pop(0)
        if not self.core.scheduler.speculation.most:
            tokens = [generated_token(seq.seq_id, seq.num_completion_tokens) for seq in batch.sampled]
            return number if batch else None, [seq.seq_id for seq in self.core.commit(tokens, 0)], []
        live = [seq for seq in batch.sampled if not seq.is_finished]
        before = {seq: seq.num_completion_tokens for seq in live}
        lengths = [made.get(seq.seq_id, 1) for seq in batch.sampled]
        first = [seq.num_completion_tokens for seq in batch.sampled]
        runs = Runs(
            [
                generated_token(seq.seq_id, first[place] + k)
                for place, seq in enumerate(batch.sampled)
                for k in range(lengths[place])
            ],
            lengths,
            None if self._is_async else [proposed.get(seq.seq_id, 0) for seq in batch.sampled],
        )
        finished = [seq.seq_id for seq in self.core.commit(runs, 0)]
        kept = [[seq.seq_id, made.get(seq.seq_id, 1), seq.num_completion_tokens - before[seq]] for seq in live]
        return number if batch else None, finished, kept


def decide_again(path: Path) -> tuple[int, Difference | None, int]:
    """Steps decided as recorded, the first difference (None: every step is equal), and how many aborts came late."""
    header, requests, steps = load(path)
    scenario = Scenario(header, requests)
    scheduler = scenario.core.scheduler
    never_computed = header["totals"].get("hit_tokens_never_computed", 0)
    for number, recorded in enumerate(steps):
        ours = scenario.step(recorded)
        for field in FIELDS:
            if field not in recorded and field in ("spec", "got"):
                continue  # a scenario without drafts
            if ours.get(field) != recorded.get(field):
                difference = Difference(recorded["step"], field, recorded.get(field), ours.get(field))
                difference.is_right = 0 < hit_more(recorded["adm"], ours.get("adm", [])) <= never_computed or (
                    field == "blk" and first_other_block(recorded["blk"], ours["blk"]) in scenario.taken_back
                )
                return number, difference, scenario.late_aborts
    if never_computed:
        return len(steps), Difference(steps[-1]["step"], "hits of tokens never computed", never_computed, 0), 0
    if not scheduler.is_finished() or scheduler.block_manager.num_used_blocks:
        return len(steps), Difference(steps[-1]["step"], "left over", 0, len(scheduler.running)), scenario.late_aborts
    return len(steps), None, scenario.late_aborts


def folders() -> list[Path]:
    """The folder that $TWINSERVE_ORACLES names, and those beside it whose names go on from its own with a hyphen."""
    named = os.environ.get("TWINSERVE_ORACLES")
    return [Path(named), *sorted(Path(named).parent.glob(f"{Path(named).name}-*"))] if named else []


def main() -> int:
    parted = 0
    for path in [
        path
        for folder in [Path(name) for name in sys.argv[1:]] or folders()
        for path in sorted(folder.glob("*.jsonl.gz"))
    ]:
        name = f"{path.name.removesuffix('.jsonl.gz'):28}"
        steps, difference, late_aborts = decide_again(path)
        parted += difference is not None and not difference.is_right
        told = f" ({late_aborts} aborts handed to the Scheduler between decision and output)" if late_aborts else ""
        print(f"{name} {steps:6} steps  {difference or 'equal'}{told}")
    return 1 if parted else 0


if __name__ == "__main__":
    sys.exit(main())
