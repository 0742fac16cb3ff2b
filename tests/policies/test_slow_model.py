"""The slow model itself decides what vLLM's own scheduler decided on the recorded scenarios."""

from pathlib import Path

import oracle_vllm
import pytest
from slow_model import FINISHED, Request, Rules, SlowModel

PATHS = [path for folder in oracle_vllm.folders() for path in sorted(folder.glob("*.jsonl.gz"))]
# vLLM lets a request hit blocks that no step had computed; step, field and both values at the first that shows it.
PARTS = {
    ("vllm", "g_priority_uncomputed"): (21, "sched", [[0, 45, 160]], [[0, 64, 128]]),
    ("vllm-0.33", "l_priority_uncomputed"): (21, "sched", [[1, 29, 176]], [[1, 77, 128]]),
}


def rules_of(header: dict) -> Rules:
    config, is_old = header["config"], header["vllm"].startswith("0.24")
    return Rules(
        num_blocks=config["num_gpu_blocks"] - 1,
        block_size=config["block_size"],
        max_num_seqs=config.get("max_num_active_seqs", config["max_num_seqs"]),
        budget=config["max_num_batched_tokens"],
        chunked=config["enable_chunked_prefill"],
        threshold=config["long_prefill_token_threshold"],
        max_model_len=config["max_model_len"],
        caching=config["enable_prefix_caching"],
        reserve_full_prompt=config["scheduler_reserve_full_isl"],
        watermark_blocks=int(config["watermark"] * config["num_gpu_blocks"]),
        order=config["policy"],
        self_ends=is_old,
        victim_skips=is_old,
        binds_alone=is_old,
        adaptive=config.get("long_prefill_token_threshold_adaptive", False),
        interval=config.get("prefill_schedule_interval", 1),
        ranks=config.get("pipeline_parallel_size", 1),
        most_drafts=config.get("num_speculative_tokens", 0),
        lookahead=config.get("num_lookahead_tokens", 0),
        draft_slots=config.get("draft_slots", 0),
        key_lookahead=config.get("hash_lookahead_tokens", 0),
        is_async=config["async_scheduling"],
    )


def end_request(model: SlowModel, key: int) -> bool:
    """Abort a request, unless it has ended."""
    request = model.requests[key]
    if request.status != FINISHED:
        model.abort(request)
    return request.reason == "abort"


def first_difference(path: Path) -> tuple | None:
    """Step, field, vLLM's value and the model's, where a scenario first parts from its record."""
    header, requests, steps = oracle_vllm.load(path)
    model, depth = SlowModel(rules_of(header)), oracle_vllm.depth_of(header["config"])
    coming, aborts = list(reversed(requests)), [(row["request"], *row["abort"]) for row in requests if "abort" in row]
    in_flight: dict[int, bool] = {}  # steps, and whether they scheduled anything
    for recorded in steps:
        number = recorded["step"]
        while coming and coming[-1]["at"] <= number:
            row = coming.pop()
            tokens = oracle_vllm.prompt_tokens(row["prompt"])
            stops = (oracle_vllm.generated_token(row["request"], row["stop"] - 1),) if "stop" in row else ()
            assert model.add(
                Request(row["request"], tokens, len(tokens), row["out"], stop_tokens=stops, priority=row["prio"])
            )
        aborted = [[key, 0] for key, step, when in aborts if (step, when) == (number, 0) and end_request(model, key)]
        step = model.decide()
        in_flight[number] = bool(step.rows)
        ours: dict[str, object] = {
            "sched": [[row.request.key, row.num_tokens, row.start] for row in step.rows],
            "spec": [[row.request.key, row.num_drafts] for row in step.rows if row.num_drafts],
            "pre": [request.key for request in step.preempted],
            "adm": [[row.request.key, row.start, int(row.request.preemptions > 0)] for row in step.admitted],
            "free": len(model.free),
            "run": len(model.running),
            "wait": len(model.waiting),
            "blk": [[row.request.key, [block + 1 for block in row.new_blocks]] for row in step.rows if row.new_blocks],
        }
        aborted += [[key, 1] for key, step, when in aborts if (step, when) == (number, 1) and end_request(model, key)]
        if aborted:
            ours["abo"] = aborted
        is_due, finished = in_flight.get(number - depth, False), []
        if is_due:
            got, prop = {key: made for key, made, _ in recorded.get("got", ())}, dict(recorded.get("prop", ()))
            sampled = model.in_flight[0].sampled
            lengths = [got.get(request.key, 1) for request in sampled]
            tokens = [
                oracle_vllm.generated_token(request.key, request.known - request.num_prompt + k)
                for request, length in zip(sampled, lengths, strict=True)
                for k in range(length)
            ]
            proposed = None if header["config"]["async_scheduling"] else [prop.get(r.key, 0) for r in sampled]
            finished = model.commit(tokens, lengths, proposed)
        if header["config"]["async_scheduling"]:
            ours["upd"] = number - depth if is_due else None
        ours |= {"fin": [request.key for request in finished], "free_end": len(model.free)}
        for field in oracle_vllm.FIELDS:
            if field == "got" or (field == "spec" and field not in recorded):
                continue
            if ours.get(field) != recorded.get(field):
                return number, field, recorded.get(field), ours.get(field)
    return None


@pytest.mark.skipif(not PATHS, reason="TWINSERVE_ORACLES does not name a folder of recorded vLLM scenarios")
@pytest.mark.parametrize("path", PATHS or [Path("none")], ids=lambda path: f"{path.parent.name}-{path.name[:-9]}")
def test_the_slow_model_decides_as_vllm_decided(path):
    assert first_difference(path) == PARTS.get((path.parent.name, path.name[:-9]))
