"""The kernels of a step: attention against the bandwidth, each kernel's time, steps by batch, and a timeline.

    python benchmarks/step_kernels.py [--out FOLDER]

Attention is timed by replays of a graph of some calls, a step by replays of its own, a kernel within a step by torch's
profiler.
Results: FOLDER/h100/kernels.json and FOLDER/h100/timeline.json; the folder is called after the card.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_engine import Work, close, make_llm
from environment import cuda_facts, device_folder
from result_files import RESULTS, merge
from timing import device_us, graph_us
from torch.profiler import ProfilerActivity, profile, record_function

from twinserve.engine.graphs.step_sizes import StepSize
from twinserve.engine.llm import LLM
from twinserve.engine.model_runner import ModelRunner
from twinserve.engine.models.decoder import Decoder
from twinserve.policies import Sequence

HEADS, KV_HEADS, SIZE = 16, 8, 128
CALLS = 10
"""In the graph that attention is timed by."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    arguments = parser.parse_args()
    folder = arguments.out / device_folder("cuda")
    about = cuda_facts(arguments.commit)
    with torch.inference_mode():
        read = bandwidth()
        values: dict[str, Any] = about | {"read_gb_s": read, "decode_attention": list(decode_table(read))}
        values["prefill_attention"] = list(prefill_table())
    for attention in ("triton", "flash"):
        llm = make_llm(attention=attention, settings={"max_num_seqs": 512})
        llm.warm_up()
        with torch.inference_mode():
            values[f"steps, {attention}"] = [step_row(llm, *shape, read) for shape in STEPS]
        if attention == "triton":
            merge(folder / "timeline.json", about | {"events": timeline(llm)})
        close(llm)
    merge(folder / "kernels.json", values)
    return 0


def bandwidth() -> float:
    """GB/s at which the card reads: a sum over 4 GiB."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return round(4 * len(data) / device_us(lambda: data.sum(), 10) / 1e3, 1)


def pool(contexts: list[int], block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, and block tables that lie about in it; the last is nobody's."""
    width = max(contexts) // block_size + 1
    blocks = (len(contexts) + 1) * width
    keys = torch.randn(blocks, block_size, KV_HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(blocks, device="cuda").view(len(contexts) + 1, width).int()
    return keys, torch.randn_like(keys), tables


def decode_table(read_gb_s: float) -> Iterator[dict[str, Any]]:
    """Decode attention by batch and context, ours over blocks of 16 and 256 and flash-attn's over 256."""
    from flash_attn import flash_attn_with_kvcache

    from twinserve.engine.kernels.paged_attention import decode_attention

    generator = random.Random(0)
    shapes = [(rows, context) for rows in (1, 8, 32, 131, 256) for context in (256, 1024, 4096)]
    cases = [(f"{rows} x {context}", [context] * rows) for rows, context in shapes if rows * context < 600_000]
    cases.append(("131 of 100 to 1,740", [generator.randint(100, 1740) for _ in range(131)]))
    for name, contexts in cases:
        contexts = sorted(contexts, reverse=True)
        query = torch.randn(len(contexts), HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(query)
        rows = torch.arange(len(contexts), device="cuda").int()
        positions = torch.tensor(contexts, device="cuda").int() - 1
        times = {}
        for block_size in (16, 256):
            keys, values, tables = pool(contexts, block_size)
            ours = partial(decode_attention, query, keys, values, rows, tables, positions, out)
            times[f"ours, blocks of {block_size}"] = graph_us([ours] * CALLS)
        flash = partial(
            flash_attn_with_kvcache,
            query[:, None],
            keys,
            values,
            cache_seqlens=positions + 1,
            block_table=tables[:-1],
            causal=True,
        )
        times["flash-attn, blocks of 256"] = graph_us([flash] * CALLS)
        least = sum(contexts) * KV_HEADS * SIZE * 4 / read_gb_s / 1e3
        measured: dict[str, Any] = {"batch x context": name, "limit_us": round(least, 2)}
        measured |= {key: round(us, 2) for key, us in times.items()}
        print(measured, flush=True)
        yield measured


def prefill_table() -> Iterator[dict[str, Any]]:
    """Attention of prompts, ours and flash-attn's, over blocks of 256."""
    from flash_attn import flash_attn_varlen_func

    from twinserve.engine.kernels.cuts import prompt_tiles, tile_tokens
    from twinserve.engine.kernels.paged_attention import prefill_attention

    for name, spans in {
        "1 of 1,024": [(0, 1024)],
        "16 of 512": [(0, 512)] * 16,
        "8 of 1,024": [(0, 1024)] * 8,
        "1,024 behind 4,096": [(4096, 1024)],
        "2,048 behind 30,000": [(30000, 2048)],
    }.items():
        contexts = [start + count for start, count in spans]
        keys, values, tables = pool(contexts, 256)
        tokens = sum(count for _, count in spans)
        query = torch.randn(tokens, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(query)
        tile = tile_tokens(HEADS // KV_HEADS, query.dtype)
        tiles, offset = [], 0
        for row, (start, count) in enumerate(spans):
            tiles += prompt_tiles(row, offset, start, count, tile)
            offset += count
        cut = torch.tensor(tiles, device="cuda").int()
        ours = partial(prefill_attention, query, keys, values, cut, tables, out)
        queries = torch.tensor([0, *(count for _, count in spans)], device="cuda").cumsum(0).int()
        ends = torch.tensor([0, *contexts], device="cuda").cumsum(0).int()
        most = max(count for _, count in spans), max(contexts)
        flash = partial(
            flash_attn_varlen_func, query, keys, values, queries, ends, *most, causal=True, block_table=tables[:-1]
        )
        operations = sum(4 * HEADS * SIZE * (start * count + count * count / 2) for start, count in spans)
        measured: dict[str, Any] = {"prompts": name}
        for key, call in (("ours", ours), ("flash-attn", flash)):
            us = graph_us([call] * CALLS)
            measured |= {f"{key}_us": round(us, 1), f"{key}_tflop_s": round(operations / us / 1e6, 1)}
        print(measured, flush=True)
        yield measured


STEPS = ((1, 300), (8, 600), (32, 600), (64, 600), (131, 920), (256, 620), (512, 400))


def step_row(llm: LLM, decodes: int, context: int, read_gb_s: float) -> dict[str, Any]:
    """A step of decodes: its time, its kernels, and what its bytes alone would take."""
    runner = llm.runner
    assert not isinstance(runner, ModelRunner), "its steps are no graphs"
    rows, graph = runner._rows, runner._graphs[runner._sizes.padded(StepSize(decodes, decodes))]
    graph.inputs.fill_(rows.scratch)
    graph.inputs[:decodes] = torch.arange(decodes, dtype=torch.int32)
    width = (context + 100) // runner.block_size + 1
    for row in range(decodes):
        first = row * width % (runner.num_blocks - width)
        rows.tables[row, :width] = torch.arange(first, first + width, dtype=torch.int32)
    rows.computed[:decodes] = context - 20
    us = device_us(graph.replay, 40)
    rows.computed[:decodes] = context
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.key_averages():
        if event.device_time_total:
            found = kernels[kernel_name(event.key)]
            found[0] += event.count / 5
            found[1] += event.device_time_total / 5
    kv_bytes = decodes * context * 2 * llm.config.num_kv_heads * llm.config.head_dim * 2 * llm.config.num_layers
    weights = weight_bytes(runner.model)
    measured: dict[str, Any] = {
        "decodes": decodes,
        "context": context,
        "us": round(us, 1),
        "limit_us": round((kv_bytes + weights) / read_gb_s / 1e3, 1),
        "kv_bytes": kv_bytes,
        "weight_bytes": weights,
        "kernels": [
            {"kernel": name, "calls": round(count), "us": round(total, 1)}
            for name, (count, total) in sorted(kernels.items(), key=lambda item: -item[1][1])
        ],
    }
    print({key: value for key, value in measured.items() if key != "kernels"}, flush=True)
    for kernel in measured["kernels"][:9]:
        print("    ", kernel)
    runner._num_resident = 0
    return measured


def weight_bytes(model: Decoder) -> int:
    """Bytes of the weights that a step reads: all, but of an embedding that is no output projection a few rows."""
    unread = 0 if model.lm_head is None else model.embedding.weight.nbytes
    return sum(weight.nbytes for weight in model.parameters()) - unread


def kernel_name(name: str) -> str:
    """A kernel's name without what tells its variants apart."""
    for known in ("nvjet", "flash_fwd_splitkv_combine", "flash_fwd_splitkv", "splitKreduce"):
        if known in name:
            return {"nvjet": "matrix products (cuBLAS)", "splitKreduce": "matrix products (cuBLAS)"}.get(known, known)
    return name.removeprefix("void ").split("<")[0].strip("_").removesuffix("_kernel")


def timeline(llm: LLM, decodes: int = 64) -> list[dict[str, Any]]:
    """What host and device do over some steps of decodes, one step ahead, in microseconds."""
    work = Work.of_lengths([(200 + number, 60) for number in range(decodes)])
    core = llm.settings.build_core()
    for prompt, params in zip(work.prompts, work.params(), strict=True):
        core.ingest(Sequence(prompt, params), 0)
    launched: list[Any] = []

    def step() -> None:
        with record_function("decide"):
            batch = core.decide(0)
        with record_function("launch"):
            launched.append(llm.runner.launch(batch))
        if core.must_commit:
            with record_function("wait"):
                tokens = launched.pop(0).result()
            with record_function("commit"):
                core.commit(tokens, 0)

    for _ in range(20):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(8):
            step()
        torch.cuda.synchronize()
    names = {"decide", "launch", "wait", "commit"}
    events = []
    for event in profiler.events():
        on_device = "CUDA" in str(event.device_type)
        if on_device or event.name in names:
            if on_device and event.name in names:
                continue
            events.append(
                {
                    "lane": "device" if on_device else "host",
                    "name": kernel_name(event.name) if on_device else event.name,
                    "start_us": round(event.time_range.start, 1),
                    "us": round(event.time_range.elapsed_us(), 1),
                }
            )
    return sorted(events, key=lambda event: event["start_us"])


if __name__ == "__main__":
    sys.exit(main())
