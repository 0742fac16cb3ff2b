"""The slow model itself decides what vLLM's own scheduler decided on the recorded scenarios."""

import os
from pathlib import Path

import oracle_vllm
import pytest
from slow_model import Request, Rules, SlowModel

ORACLES = os.environ.get("TWINSERVE_ORACLES")
NAMES = sorted(path.name for path in Path(ORACLES).glob("*.jsonl.gz")) if ORACLES else []
# vLLM lets a request hit blocks that no step had computed; field and both values at the first step that shows it.
PARTS = {"g_priority_uncomputed.jsonl.gz": (21, "sched", [[0, 45, 160]], [[0, 64, 128]])}


def rules_of(config: dict) -> Rules:
    return Rules(
        num_blocks=config["num_gpu_blocks"] - 1,
        block_size=config["block_size"],
        max_num_seqs=config["max_num_seqs"],
        budget=config["max_num_batched_tokens"],
        chunked=config["enable_chunked_prefill"],
        threshold=config["long_prefill_token_threshold"],
        max_model_len=config["max_model_len"],
        caching=config["enable_prefix_caching"],
        reserve_full_prompt=config["scheduler_reserve_full_isl"],
        watermark_blocks=int(config["watermark"] * config["num_gpu_blocks"]),
        order=config["policy"],
    )


def first_difference(path: Path) -> tuple | None:
    """Step, field, vLLM's value and the model's, where a scenario first parts from its record."""
    header, requests, steps = oracle_vllm.load(path)
    model = SlowModel(rules_of(header["config"]))
    coming = list(reversed(requests))
    for recorded in steps:
        while coming and coming[-1]["at"] <= recorded["step"]:
            row = coming.pop()
            tokens = oracle_vllm.prompt_tokens(row["prompt"])
            assert model.add(
                Request(row["request"], tokens, len(tokens), row["out"], ignore_eos=True, priority=row["prio"])
            )
        step = model.decide()
        ours: dict[str, object] = {
            "sched": [[row.request.key, row.num_tokens, row.start] for row in step.rows],
            "pre": [request.key for request in step.preempted],
            "adm": [[row.request.key, row.start, int(row.request.preemptions > 0)] for row in step.admitted],
            "free": len(model.free),
            "run": len(model.running),
            "wait": len(model.waiting),
            "blk": [[row.request.key, [block + 1 for block in row.new_blocks]] for row in step.rows if row.new_blocks],
        }
        tokens = [1_000_000 + request.key * 10_000 + request.known - request.num_prompt for request in step.sampled]
        ours["fin"] = [request.key for request in (model.commit(tokens) if step.rows else [])]
        ours["free_end"] = len(model.free)
        for field in oracle_vllm.FIELDS:
            if ours[field] != recorded[field]:
                return recorded["step"], field, recorded[field], ours[field]
    return None


@pytest.mark.skipif(not NAMES, reason="TWINSERVE_ORACLES does not name a folder of recorded vLLM scenarios")
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_the_slow_model_decides_as_vllm_decided(name):
    assert first_difference(Path(ORACLES or "") / name) == PARTS.get(name)
