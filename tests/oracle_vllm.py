"""Decide recorded scenarios of vLLM's own scheduler again and compare every step.

    python tests/oracle_vllm.py [FOLDER]     a line a scenario; exit status 1 if one parts

FOLDER defaults to $TWINSERVE_ORACLES.

Under its priority policy vLLM can preempt a request that it has scheduled in the same step; the blocks of that step
stay in its cache though no step computes them, and can be hit. Ours never can. The header of a scenario in which that
happens says how many such tokens were hit; there, and there alone, ours has to part at an admission that hits fewer.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from twinserve.policies import (
    BlockManager,
    FirstCome,
    PrefixCache,
    Priority,
    SamplingParams,
    Scheduler,
    Sequence,
    VllmAdmission,
)

ORDERS = {"fcfs": FirstCome, "priority": Priority}

FIELDS = ("sched", "pre", "fin", "adm", "free", "free_end", "run", "wait", "blk")


@dataclass
class Difference:
    """The first field in which a scenario parts from the record; `is_right` where vLLM hit what it never computed."""

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


def build_scheduler(config: dict) -> Scheduler:
    """A Scheduler with a scenario's settings; vLLM's pool counts a block that is never given out.

    `max_num_partial_prefills` is left out: vLLM's scheduler reads nothing but the threshold derived from it.
    """
    if config["async_scheduling"]:
        raise ValueError("async_scheduling is true, expected scenarios of synchronous scheduling")
    return Scheduler(
        BlockManager(config["num_gpu_blocks"] - 1, config["block_size"]),
        config["max_num_seqs"],
        composition="mixed",
        max_num_batched_tokens=config["max_num_batched_tokens"],
        enable_chunked_prefill=config["enable_chunked_prefill"],
        long_prefill_token_threshold=config["long_prefill_token_threshold"],
        max_model_len=config["max_model_len"],
        prefix_cache=PrefixCache() if config["enable_prefix_caching"] else None,
        order=ORDERS[config["policy"]](),
        admission=VllmAdmission(
            reserve_full_prompt=config["scheduler_reserve_full_isl"],
            watermark_blocks=int(config["watermark"] * config["num_gpu_blocks"]),
        ),
    )


def hit_more(recorded: list[list[int]], ours: list[list[int]]) -> int:
    """By how many tokens the first admission of a step hit more in the record, if it is of the same request."""
    same = bool(recorded and ours) and recorded[0][0] == ours[0][0]
    return recorded[0][1] - ours[0][1] if same else 0


def decide_again(path: Path) -> tuple[int, Difference | None]:
    """Steps decided as recorded, and the first difference (None: every step is equal)."""
    header, requests, steps = load(path)
    scheduler = build_scheduler(header["config"])
    num_blocks = scheduler.block_manager.num_blocks
    never_computed = header["totals"].get("hit_tokens_never_computed", 0)
    arrivals = iter(requests)
    coming = next(arrivals, None)
    resumed: set[int] = set()
    for number, recorded in enumerate(steps):
        while coming is not None and coming["at"] <= recorded["step"]:
            params = SamplingParams(max_tokens=coming["out"], ignore_eos=True)
            prompt = prompt_tokens(coming["prompt"])
            seq = Sequence(prompt, params, seq_id=coming["request"], priority=coming["prio"])
            if not scheduler.add(seq):
                return number, Difference(recorded["step"], "refused", None, seq.refusal)
            coming = next(arrivals, None)
        batch = scheduler.schedule()
        ours = {
            "sched": [[row.seq.seq_id, row.num_tokens, row.start] for row in batch.rows],
            "pre": [seq.seq_id for seq in batch.preempted],
            "adm": [[row.seq.seq_id, row.start, int(row.seq.seq_id in resumed)] for row in batch.admitted],
            "free": scheduler.block_manager.num_free_blocks,
            "run": len(scheduler.running),
            "wait": len(scheduler.waiting),
            "blk": [[seq.seq_id, [b + 1 for b in ids]] for seq, ids in batch.grown]
            + [[row.seq.seq_id, [b + 1 for b in row.seq.block_table]] for row in batch.admitted],
        }
        resumed.update(ours["pre"])
        tokens = [1_000_000 + seq.seq_id * 10_000 + seq.num_completion_tokens for seq in batch.sampled]
        finished = scheduler.postprocess(batch, tokens) if batch else []
        ours["fin"] = [seq.seq_id for seq in finished]
        ours["free_end"] = scheduler.block_manager.num_free_blocks
        for field in FIELDS:
            if ours[field] != recorded[field]:
                difference = Difference(recorded["step"], field, recorded[field], ours[field])
                difference.is_right = 0 < hit_more(recorded["adm"], ours["adm"]) <= never_computed
                return number, difference
    if never_computed:
        return len(steps), Difference(steps[-1]["step"], "hits of tokens never computed", never_computed, 0)
    if not scheduler.is_finished() or scheduler.block_manager.num_free_blocks != num_blocks:
        return len(steps), Difference(steps[-1]["step"], "left over", 0, len(scheduler.running))
    return len(steps), None


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ["TWINSERVE_ORACLES"])
    parted = 0
    for path in sorted(folder.glob("*.jsonl.gz")):
        steps, difference = decide_again(path)
        parted += difference is not None and not difference.is_right
        print(f"{path.name.removesuffix('.jsonl.gz'):28} {steps:6} steps  {difference or 'equal'}")
    return 1 if parted else 0


if __name__ == "__main__":
    sys.exit(main())
