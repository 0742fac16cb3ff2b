"""Speculative decoding: seconds a token with prompt lookup and without, on text with repeats and on text without.

python benchmarks/benchmark_speculation.py [--model NAME] [--drafts N] [--tokens N] [--repeats N]

Prints JSON: for each text the median seconds of both, their ratio, and what came of the drafts. One request at a time,
greedy, so that both give the same tokens; it says whether they do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from environment import commit, versions

from twinserve.commands.progress import say
from twinserve.engine.device_queue import device_name
from twinserve.engine.hub import resolve_model
from twinserve.engine.llm import LLM
from twinserve.policies import Batch, CoreListener, SamplingParams, Sequence
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.runs.metrics import DraftCounts, speculation_of

TEXTS = {
    "with repeats": "name: Ada, born: 1815, died: 1852\n" * 6 + "name: Ada, born:",
    "without repeats": "The history of computing begins long before electronics, with",
}


class _Drafts(CoreListener):
    """Counts what came of drafts."""

    def __init__(self) -> None:
        self.counts = DraftCounts()

    def committed(self, batch: Batch) -> None:
        for seq, made, _ in batch.runs:
            self.counts.add(batch.drafts[seq], made)


def measure(llm: LLM, text: str, tokens: int, repeats: int) -> tuple[list[float], list[int], DraftCounts]:
    """Seconds of each repeat of a request, after one that is not measured; its tokens, and what came of drafts."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    token_ids, drafts, seconds = llm.tokenizer.encode(text), _Drafts(), []
    live = llm.live([drafts])
    for _ in range(1 + repeats):
        seq = Sequence(token_ids, params)
        begun = time.perf_counter()
        live.begin([seq])()
        seconds.append(time.perf_counter() - begun)
    live.close()
    return seconds[1:], seq.completion_token_ids, drafts.counts


def benchmark_speculation(model: str, drafts: int, tokens: int, repeats: int) -> dict[str, Any]:
    """The same requests without drafts and with those of prompt lookup."""
    folder, common = resolve_model(model, progress=say), {"max_model_len": 1024, "max_num_seqs": 1}
    config = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 2}
    plain = LLM(folder, settings=Settings.load(common))
    speculative = LLM(folder, settings=Settings.load(common | {"speculative_config": config}))
    cases = []
    for name, text in TEXTS.items():
        without, expected, _ = measure(plain, text, tokens, repeats)
        with_drafts, generated, counts = measure(speculative, text, tokens, repeats)
        cases.append(
            {
                "text": name,
                "tokens": tokens,
                "without_s": statistics.median(without),
                "with_s": statistics.median(with_drafts),
                "speed_up": statistics.median(without) / statistics.median(with_drafts),
                "same_tokens": expected == generated,
                "speculation": speculation_of([counts]),
            }
        )
    device = device_name(plain.runner.device)
    for llm in (plain, speculative):
        llm.close()
    return {
        "benchmark": "speculation",
        "model": model,
        "device": device,
        "speculative_config": config,
        "cases": cases,
        "versions": versions(),
        "commit": commit(),
    }


def main() -> int:
    """As the command line says."""
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--model", default="smollm2-135m", help="as twinserve --model")
    parsing.add_argument("--drafts", type=int, default=4)
    parsing.add_argument("--tokens", type=int, default=64)
    parsing.add_argument("--repeats", type=int, default=3)
    arguments = parsing.parse_args()
    try:
        found = benchmark_speculation(arguments.model, arguments.drafts, arguments.tokens, arguments.repeats)
    except InputError as error:
        say(f"benchmark_speculation.py: {error}")
        return 2
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
