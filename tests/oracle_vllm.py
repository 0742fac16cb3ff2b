"""Decide recorded scenarios of vLLM's own scheduler again and compare every step.

    python tests/oracle_vllm.py [FOLDER]     a line a scenario; exit status 1 if one parts

FOLDER defaults to $TWINSERVE_ORACLES.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from twinserve.policies import BlockManager, PrefixCache, SamplingParams, Scheduler, Sequence

FIELDS = ("sched", "pre", "fin", "adm", "free", "free_end", "run", "wait", "blk")


@dataclass
class Difference:
    """The first field in which a scenario parts from the record."""

    step: int
    field: str
    recorded: object
    ours: object

    def __str__(self) -> str:
        return f"step {self.step}: {self.field} is {self.ours}, vLLM's is {self.recorded}"


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
    """A Scheduler with a scenario's settings; vLLM's pool counts a block that is never given out."""
    return Scheduler(
        BlockManager(config["num_gpu_blocks"] - 1, config["block_size"]),
        config["max_num_seqs"],
        composition="mixed",
        max_num_batched_tokens=config["max_num_batched_tokens"],
        enable_chunked_prefill=config["enable_chunked_prefill"],
        long_prefill_token_threshold=config["long_prefill_token_threshold"],
        max_model_len=config["max_model_len"],
        prefix_cache=PrefixCache() if config["enable_prefix_caching"] else None,
        reserve_full_prompt=config["scheduler_reserve_full_isl"],
        watermark_blocks=int(config["watermark"] * config["num_gpu_blocks"]),
    )


def decide_again(path: Path) -> tuple[int, Difference | None]:
    """Steps decided, and the first difference from the record (None: every step is equal)."""
    header, requests, steps = load(path)
    scheduler = build_scheduler(header["config"])
    num_blocks = scheduler.block_manager.num_blocks
    arrivals = iter(requests)
    coming = next(arrivals, None)
    resumed: set[int] = set()
    for number, recorded in enumerate(steps):
        while coming is not None and coming["at"] <= recorded["step"]:
            params = SamplingParams(max_tokens=coming["out"], ignore_eos=True)
            seq = Sequence(prompt_tokens(coming["prompt"]), params, seq_id=coming["request"])
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
                return number, Difference(recorded["step"], field, recorded[field], ours[field])
    if not scheduler.is_finished() or scheduler.block_manager.num_free_blocks != num_blocks:
        return len(steps), Difference(steps[-1]["step"], "left over", 0, len(scheduler.running))
    return len(steps), None


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ["TWINSERVE_ORACLES"])
    parted = 0
    for path in sorted(folder.glob("*.jsonl.gz")):
        steps, difference = decide_again(path)
        parted += difference is not None
        print(f"{path.name.removesuffix('.jsonl.gz'):28} {steps:6} steps  {difference or 'equal'}")
    return 1 if parted else 0


if __name__ == "__main__":
    sys.exit(main())
