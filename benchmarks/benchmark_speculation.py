"""Speculative decoding: seconds of answers with prompt lookup and without, on text with repeats and on text without.

    python benchmarks/benchmark_speculation.py [--model NAME] [--drafts N] [--tokens N] [--repeats N] [--out FOLDER]

Says on stderr what each text took as soon as it is measured. Prints JSON: for each text the seconds of both, their
ratio turn by turn, and what came of the drafts; and what prompt lookup takes. One request at a time, in turns without
drafts and with them, greedy, so that both give the same tokens; it says whether they do. With --out the same goes to a
file of the device's folder, of which benchmarks/render.py makes a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from environment import commit, device_folder, versions
from quantities import quantity, speed_up, spread_of
from result_files import write_json
from timing import spread

from twinserve.commands.progress import say
from twinserve.engine.device_queue import device_name
from twinserve.engine.hub import resolve_model
from twinserve.engine.llm import LLM
from twinserve.engine.speculation.proposers import NgramProposer
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


def measure(
    engines: Seq[LLM], text: str, tokens: int, repeats: int
) -> tuple[list[list[float]], list[list[int]], DraftCounts]:
    """Of each engine the seconds of each repeat of a request, after one that is not measured, in turns, and its tokens;
    and what came of drafts."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    token_ids, drafts = engines[0].tokenizer.encode(text), _Drafts()
    seconds: list[list[float]] = [[] for _ in engines]
    generated: list[list[int]] = [[] for _ in engines]
    running = [llm.live([drafts]) for llm in engines]
    for _ in range(1 + repeats):
        for place, live in enumerate(running):
            seq = Sequence(token_ids, params)
            begun = time.perf_counter()
            live.begin([seq])()
            seconds[place].append(time.perf_counter() - begun)
            generated[place] = seq.completion_token_ids
    for live in running:
        live.close()
    return [own[1:] for own in seconds], generated, drafts.counts


def lookup_ns(least: int, most: int, repeats: int = 25) -> tuple[float, float]:
    """Nanoseconds of prompt lookup for a sequence and for a token of its text, in a text in which nothing is found: the
    line through the medians for two lengths."""
    lookup, lengths = NgramProposer(least, most, 1 << 20), (200, 4_000)
    medians = []
    for length in lengths:
        text, taken = list(range(length)), []
        for _ in range(repeats):
            begun = time.perf_counter_ns()
            lookup.of(text, 4)
            taken.append(time.perf_counter_ns() - begun)
        medians.append(statistics.median(taken))
    token_ns = max(0.0, (medians[1] - medians[0]) / (lengths[1] - lengths[0]))
    return max(0.0, medians[0] - lengths[0] * token_ns), token_ns


def benchmark_speculation(model: str, drafts: int, tokens: int, repeats: int) -> dict[str, Any]:
    """The same requests without drafts and with those of prompt lookup."""
    folder, common = resolve_model(model, progress=say), {"max_model_len": 1024, "max_num_seqs": 1}
    config = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 2}
    settings = [Settings.load(common), Settings.load(common | {"speculative_config": config})]
    load, engines, cases = os.getloadavg()[0], [LLM(folder, settings=own) for own in settings], []
    for name, text in TEXTS.items():
        (without, with_drafts), (expected, generated), counts = measure(engines, text, tokens, repeats)
        before, after = spread(without), spread(with_drafts)
        gained = speed_up("speed-up", before, after)
        cases.append(
            {
                "text": name,
                "tokens": tokens,
                "without": before,
                "with": after,
                "speed_up": gained,
                "same_tokens": expected == generated,
                "speculation": speculation_of([counts]),
            }
        )
        say(f"{name}: {spread_of(before)} without drafts, {spread_of(after)} with them: {quantity(gained)}")
    device = engines[0].runner.device
    for llm in engines:
        llm.close()
    return {
        "benchmark": "speculation",
        "device": device_folder(device.type),
        "model": model,
        "machine": device_name(device),
        "load_before": load,
        "repeats": repeats,
        "speculative_config": config,
        "lookup_ns": lookup_ns(2, 5),
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
    parsing.add_argument("--out", type=Path, default=None, help="a folder of results")
    arguments = parsing.parse_args()
    try:
        found = benchmark_speculation(arguments.model, arguments.drafts, arguments.tokens, arguments.repeats)
    except InputError as error:
        say(f"benchmark_speculation.py: {error}")
        return 2
    print(json.dumps(found, indent=2))
    if arguments.out is not None:
        write_json(arguments.out / found["device"] / f"speculation-{found['model']}.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
