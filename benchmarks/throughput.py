"""Output tokens per second of the CUDA engine: whole workloads, what each optimisation buys, and a peer beside it.

    python benchmarks/throughput.py [--repeats N] [--out FOLDER] [--trace azure.csv] [--no-peer] [--no-ablation]
    python benchmarks/throughput.py --shape llama-3-8b [--repeats N] [--out FOLDER]

What is timed: from the first request's coming to the last token's reading, the policies included; the model is loaded
and warm. Random weights of the Qwen3-0.6B shape in bfloat16, temperature 0.6, no end-of-sequence token. Results:
FOLDER/h100.json (W256), FOLDER/h100/throughput.json (the rest); the folder is called after the card.

With --shape, W256 by a shape is timed with its weights and its keys and values in bfloat16 and in float8.
Results: FOLDER/h100/w256-SHAPE.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cuda_engine import MODEL, TEMPERATURE, Work, close, make_llm, throughput
from environment import cuda_facts, device_folder
from result_files import RESULTS, merge

from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.traces.readers import read_trace

KEPT = {"top_k": 20, "top_p": 0.95}
"""What Qwen3's own generation config keeps."""

FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "keys and values in float8": {"kv_cache_dtype": "fp8"},
    "weights in float8": {"quantization": "fp8"},
    "both in float8": {"kv_cache_dtype": "fp8", "quantization": "fp8"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--trace", type=Path, help="a trace whose first 512 requests' lengths are served, too")
    parser.add_argument("--no-peer", action="store_true", help="without transformers' continuous batching")
    parser.add_argument("--no-ablation", action="store_true", help="without switching optimisations off")
    parser.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    parser.add_argument("--shape", help="time W256 by this shape in several formats instead, such as llama-3-8b")
    arguments = parser.parse_args()
    folder = device_folder("cuda")
    about = cuda_facts(arguments.commit)
    if arguments.shape is not None:
        path = arguments.out / folder / f"w256-{arguments.shape}.json"
        merge(path, about | {"shape": arguments.shape, "formats": formats(arguments.shape, arguments.repeats)})
        return 0

    work = Work.w256()
    llm = make_llm()
    llm.warm_up()
    repeats = [throughput(llm, work) for _ in range(arguments.repeats)]
    median = statistics.median(one["output_tok_s"] for one in repeats)
    show("W256", repeats)
    merge(arguments.out / f"{folder}.json", about | {"w256_output_tok_s": median, "repeats": {"w256": repeats}})

    values: dict[str, Any] = about | {"w256": repeats, "attention": vars(llm.attention)}
    values["w256_kept"] = KEPT | {"repeats": [throughput(llm, replace(work, kept=KEPT)) for _ in repeats]}
    show(f"W256, {KEPT}", values["w256_kept"]["repeats"])
    others = {"long": Work.of_lengths([(12_000 + 500 * number, 256) for number in range(16)])}
    if arguments.trace is not None:
        lengths = [(request.prompt_tokens, request.max_tokens) for request in read_trace(arguments.trace).requests]
        others["trace"] = Work.of_lengths([(prompt, output) for prompt, output in lengths[:512]])
    close(llm)
    llm = make_llm(settings={"max_model_len": 24_576})
    llm.warm_up()
    for name, other in others.items():
        values[name] = [throughput(llm, other)]
        show(name, values[name])
    close(llm)
    merge(arguments.out / folder / "throughput.json", values)
    if not arguments.no_peer:
        values["transformers"] = []
        for attention in ("flash_attention_2", "sdpa"):
            values["transformers"].append(transformers_continuous_batching(work, attention))
            print("transformers", values["transformers"][-1], flush=True)
            merge(arguments.out / folder / "throughput.json", values)
    if not arguments.no_ablation:
        values["ablation"] = ablation(work, arguments.repeats)
        merge(arguments.out / folder / "throughput.json", values)
    return 0


def formats(shape: str, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """W256 by a shape, its numbers in each of FORMATS."""
    found = {}
    for name, options in FORMATS.items():
        llm = make_llm(shape, **options)
        llm.warm_up()
        found[name] = [throughput(llm, Work.w256()) for _ in range(repeats)]
        show(f"{shape}, {name}", found[name])
        close(llm)
    return found


def ablation(work: Work, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """W256 with one thing switched off at a time, between two measurements of the whole."""

    variants: dict[str, dict[str, Any]] = {
        "as it is": {},
        "a step's tokens read before the next is decided (depth 0)": {"settings": {"pipeline_depth": 0}},
        "kernels launched one by one, none captured": {"graph_options": GraphOptions(captured="none")},
        "steps with prompts not captured": {"graph_options": GraphOptions(captured="decodes")},
        "decodes in running order, not longest first": {"graph_options": GraphOptions(longest_first=False)},
        "flash-attn for decodes, over blocks of 256 tokens": {"attention": "flash"},
        "blocks of 256 tokens": {"settings": {"block_size": 256}},
        "keys and values in float8": {"kv_cache_dtype": "fp8"},
        "weights in float8": {"quantization": "fp8"},
        "no fused kernels: torch's own, launched one by one": {"execution": "eager"},
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for name in (*variants, "as it is"):
        llm = make_llm(**variants[name])
        llm.warm_up()
        found[name] += [throughput(llm, work) for _ in range(repeats)]
        show(name, found[name])
        close(llm)
    return found


def transformers_continuous_batching(work: Work, attention: str) -> dict[str, Any]:
    """The same work by transformers' continuous batching, its settings left to it but for the sampling."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from twinserve.engine.models.dummy import SHAPES

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(SHAPES / MODEL)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()
    generation = GenerationConfig(do_sample=True, temperature=TEMPERATURE, eos_token_id=-1, pad_token_id=0)

    def once() -> float:
        manager = model.init_continuous_batching(generation_config=generation)
        manager.start()
        begun = time.perf_counter()
        for number, (prompt, output) in enumerate(zip(work.prompts, work.outputs, strict=True)):
            manager.add_request(prompt, request_id=str(number), max_new_tokens=output)
        tokens, waiting = 0, len(work.prompts)
        for result in manager:
            if result.is_finished():
                tokens += len(result.generated_tokens)
                waiting -= 1
                if not waiting:
                    break
        seconds = time.perf_counter() - begun
        manager.stop(block=True)
        assert tokens == sum(work.outputs), f"{tokens} tokens came, {sum(work.outputs)} were asked for"
        return seconds

    repeats = [once() for _ in range(2)]
    tokens = sum(work.outputs)
    return {
        "attention": model.config._attn_implementation,
        "repeats": [{"seconds": round(one, 3), "output_tok_s": round(tokens / one, 1)} for one in repeats],
    }


def show(name: str, repeats: list[dict[str, Any]]) -> None:
    rates = [one["output_tok_s"] for one in repeats]
    print(f"{name:60} {statistics.median(rates):8,.0f} tok/s  {repeats[-1]} {rates}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
