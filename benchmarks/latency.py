"""What one user waits for: a token, the first token of a long prompt, and the engine's start.

    python benchmarks/latency.py [--repeats N] [--out FOLDER]
    python benchmarks/latency.py --shape llama-3-8b [--out FOLDER]

One request at a time through the whole engine, warm; times are the host's, from the request's coming to its token's
reading. `ready_s` is a new process, from its start to its first token, its kernels compiled by an earlier one.
Results: FOLDER/h100.json, called after the card.

With --shape, only a token of one request and steps of decodes of another shape with random weights are timed, these
beside what their bytes alone take.
Results: FOLDER/h100/decode-SHAPE.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cuda_engine import MODEL, TEMPERATURE, close, make_llm
from environment import cuda_facts, device_folder
from result_files import RESULTS, merge
from step_kernels import bandwidth, step_row

from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.llm import LLM
from twinserve.engine.online import Clock, Inbox, serve
from twinserve.policies import CoreListener, SamplingParams, Sequence

DECODES = (1, 32, 131)
CONTEXT = 920

READY = f"""
import time
from twinserve.engine.llm import LLM
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
settings = Settings.load(dict(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=2048, pipeline_depth=1))
llm = LLM({MODEL!r}, load_format="dummy", dtype="bfloat16", device="cuda", settings=settings)
llm.generate([[1, 2, 3]], SamplingParams(temperature={TEMPERATURE}, max_tokens=1, ignore_eos=True))
print("ready", flush=True)
"""


class OneByOne(CoreListener):
    """Lets the next request in when the one before has ended."""

    def __init__(self, inbox: Inbox, sequences: list[Sequence]):
        self._inbox, self._sequences = inbox, iter(sequences)
        self.finished(None)

    def finished(self, seq: Sequence | None) -> None:
        following = next(self._sequences, None)
        if following is None:
            self._inbox.close()
        else:
            self._inbox.put(following)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--shape", help="time decode steps of this shape instead, such as llama-3-8b")
    arguments = parser.parse_args()
    if arguments.shape is not None:
        values = decode_steps(arguments.shape, arguments.attention, arguments.repeats) | cuda_facts(arguments.commit)
        merge(arguments.out / device_folder("cuda") / f"decode-{arguments.shape}.json", values)
        return 0
    plain = make_llm(attention=arguments.attention, graph_options=GraphOptions(few_rows=False))
    plain.warm_up()
    without = [per_token_ms(plain) for _ in range(arguments.repeats)]
    close(plain)
    llm = make_llm(attention=arguments.attention)
    llm.warm_up()
    tokens = [per_token_ms(llm) for _ in range(arguments.repeats)]
    firsts = first_token_ms(llm, 1 + 5 * arguments.repeats)[1:]
    close(llm)
    ready = [ready_s() for _ in range(1 + arguments.repeats)][1:]
    values = {
        "batch1_ms_per_token": statistics.median(tokens),
        "ttft_1024_ms": statistics.median(firsts),
        "ready_s": statistics.median(ready),
        "batch1_without": {"as it is": tokens, "without kernels for steps of few rows": without},
        "repeats": {"batch1_ms_per_token": tokens, "ttft_1024_ms": firsts, "ready_s": ready},
    }
    print(values)
    merge(arguments.out / f"{device_folder('cuda')}.json", values | cuda_facts(arguments.commit))
    return 0


def requests(llm: LLM, count: int, prompt: int, output: int) -> list[Sequence]:
    """Serve requests one by one."""
    generator = random.Random(count)
    params = SamplingParams(temperature=TEMPERATURE, max_tokens=output, ignore_eos=True)
    sequences = [Sequence([generator.randint(0, 10000) for _ in range(prompt)], params) for _ in range(count)]
    inbox = Inbox()
    core = llm.settings.build_core(listener=OneByOne(inbox, sequences))
    serve(core, llm.runner, inbox, Clock(), lambda seq: None)
    core.scheduler.check_integrity()
    return sequences


def per_token_ms(llm: LLM) -> float:
    """Milliseconds a token of one request of 100 tokens that generates 400, the first left out."""
    seq = requests(llm, 1, 100, 400)[0]
    assert seq.finish_ns is not None and seq.first_token_ns is not None
    return round((seq.finish_ns - seq.first_token_ns) / 399 / 1e6, 4)


def first_token_ms(llm: LLM, count: int) -> list[float]:
    """Milliseconds to the first token of prompts of 1,024 tokens that share nothing."""
    sequences = requests(llm, count, 1024, 1)
    return [round(((seq.first_token_ns or 0) - (seq.ingested_ns or 0)) / 1e6, 4) for seq in sequences]


def decode_steps(shape: str, attention: str, repeats: int) -> dict[str, Any]:
    """Steps of decodes of a shape: their time, and what reading their weights and KV once would take; then a token of
    one request, milliseconds."""
    with torch.inference_mode():
        read_gb_s = bandwidth()
    torch.cuda.empty_cache()
    llm = make_llm(shape, attention=attention, settings={"max_num_seqs": max(DECODES)})
    llm.warm_up()
    with torch.inference_mode():
        steps = [step_row(llm, decodes, CONTEXT, read_gb_s) for decodes in DECODES]
    tokens = [per_token_ms(llm) for _ in range(repeats)]
    close(llm)
    return {"shape": shape, "read_gb_s": read_gb_s, "steps": steps, "batch1_ms_per_token": tokens}


def ready_s() -> float:
    """Seconds from a process's start to its first token."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", READY], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - begun
    process.wait()
    assert line == "ready\n", f"the process ended with {process.returncode}"
    return round(seconds, 2)


if __name__ == "__main__":
    sys.exit(main())
