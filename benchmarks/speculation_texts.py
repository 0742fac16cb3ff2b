"""The twin held against runs with prompt lookup: on text with repeats and on text without, replayed and simulated.

    python benchmarks/speculation_texts.py [--model smollm2-135m] [--rounds N] [--requests N] [--out FOLDER]

An engine that looks drafts up serves requests that come by and by, whose prompts are texts: lists whose lines repeat,
and prose of this project's pages. In rounds: some of its steps are measured, then each text is served, as a machine
that others use is not as fast all the time. Each run is decided again from its record, all of it or the exit status is
1, and simulated with the latency fitted to the steps of all rounds: with the acceptance recorded request by request,
and with the law that is fitted to the other rounds, whose requests are others; and once more as if the machine had been
as fast while it was measured as it was in that run. Prints a table; results: OUT/<device>/lookup-texts.json, of which
benchmarks/speculation_study.py makes a part of its page.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from environment import ROOT, command, commit, device_folder, versions
from result_files import RESULTS, write_json
from speculation_twin import METRICS, SEEDS, by_law, errors, simulated, summed

from twinserve.commands.progress import Bar
from twinserve.engine.hub import resolve_model
from twinserve.engine.llm import LLM
from twinserve.settings.build_core import Settings
from twinserve.sim.fit import REGIMES, FittedLatency, StepSample
from twinserve.sim.intervals import scaled
from twinserve.sim.recorded_steps import steps_of
from twinserve.sim.speculation import fit_law
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Request, TokenMaker
from twinserve.traces.runs.compare import value_of
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import fit_profile, measure_steps, profile_of, run_real
from twinserve.worlds.workload import Workload

DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2}
SETTINGS = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 512, "num_gpu_blocks": 256}
PROMPT_TOKENS = 96
NAMES = ("Ada", "Alan", "Grace", "Edsger", "Barbara", "John", "Frances", "Kathleen", "Niklaus", "Donald")
PAGES = ("design", "latency", "policies", "fleets", "capacity", "traces", "serving", "reports")
REPEATS = 4
"""Steps of each shape of a profile that count."""


class Texts(TokenMaker):
    """Makes the prompt of each request from a text of its own.

    Args:
        maker: says which tokens there are.
        prompts: token ids, by request.
    """

    def __init__(self, maker: TokenMaker, prompts: list[list[int]]) -> None:
        super().__init__(maker.vocab_size, maker.first_id)
        object.__setattr__(self, "_prompts", prompts)

    def token_ids(self, request: Request, answers: Mapping[int, Any]) -> list[int]:
        prompts: list[list[int]] = vars(self)["_prompts"]
        return prompts[request.id]


def lists(count: int) -> list[str]:
    """So many lists, whose lines repeat."""
    generator = random.Random(0)
    texts = []
    for number in range(count):
        rows = [f"{name} {number}: {generator.randint(10, 99)} points, room 4\n" for name in generator.sample(NAMES, 3)]
        texts.append("".join(rows) * 12)
    return texts


def prose(count: int) -> list[str]:
    """So many pieces of prose, one behind another in this project's pages."""
    words: list[str] = []
    for page in PAGES:
        for paragraph in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split("\n\n"):
            if re.match(r"[A-Z][a-z]+ ", paragraph):
                words += re.sub(r"[`*\[\]]|\(\S+\)", "", paragraph).split()
    size = PROMPT_TOKENS  # a word is a token at least
    assert len(words) >= count * size, f"{len(words)} words, expected {count * size}"
    return [" ".join(words[number * size : (number + 1) * size]) for number in range(count)]


TEXTS = {"with repeats": lists, "without repeats": prose}


def serve(llm: LLM, texts: list[str], arguments: argparse.Namespace, seed: int, folder: Path) -> None:
    """Serve texts, and record it."""
    prompts = [llm.tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    assert all(len(prompt) == PROMPT_TOKENS for prompt in prompts), "a text is too short"
    maker = llm.token_maker
    llm.token_maker = Texts(maker, prompts)
    lengths = [LengthSpec.parse(text) for text in (f"fixed:{PROMPT_TOKENS}", "lognormal:40:0.5:8:96")]
    requests = generate(
        seed=seed,
        num_requests=len(texts),
        rate=arguments.rate,
        prompt_tokens=lengths[0],
        output_tokens=lengths[1],
    )
    with Bar(folder.name, len(requests)) as bar:
        run_real(Workload(requests), llm, out=folder, progress=bar.ended)
    llm.token_maker = maker


def held(folder: Path, others: list[Path], latency: FittedLatency) -> dict[str, Any]:
    """What a recorded run was, and by how much the twin is off; a law is fitted to the others."""
    record = load_record(folder)
    again, summary = replay(record), record.run["summary"]
    law = fit_law(*(load_record(other).steps for other in others))
    steps = [(latency.step_cost(features).device_ns, ns) for features, ns in steps_of(record)]
    pace = sum(ns for _, ns in steps) / sum(modelled for modelled, _ in steps)
    as_fast = scaled(latency, dict.fromkeys(REGIMES, pace), pace)
    off = {
        "as recorded": errors(record, simulated(record, latency, record.path)),
        "by the law": errors(record, *by_law(record, latency, law)),
        "as recorded, machine as fast": errors(record, simulated(record, as_fast, record.path)),
        "by the law, machine as fast": errors(record, *by_law(record, as_fast, law)),
    }
    return {
        "decisions": {"recorded": again.recorded, "equal": again.equal},
        "tokens_per_step": round(summary["speculation"]["tokens_per_step"], 3),
        "acceptance_rate": round(summary["speculation"]["acceptance_rate"], 3),
        "served": {metric: value_of(summary, metric) for metric in METRICS},
        "pace": round(pace, 3),
        "errors": off,
    }


def measured(llm: LLM, arguments: argparse.Namespace, seed: int) -> list[StepSample]:
    """Measure some shapes."""
    return measure_steps(
        llm,
        shapes=arguments.shapes,
        max_seqs=SETTINGS["max_num_seqs"],
        max_context=256,
        max_prompt=SETTINGS["max_num_batched_tokens"] // 2,
        repeats=REPEATS,
        seed=seed,
        progress=lambda total: Bar(f"profile, round {seed + 1}", total),
    )


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--model", default="smollm2-135m")
    parsing.add_argument("--rounds", type=int, default=5, help="two at least, as a law is fitted to the others")
    parsing.add_argument("--requests", type=int, default=8, help="of each text in a round")
    parsing.add_argument("--rate", type=float, default=0.5, help="requests a second")
    parsing.add_argument("--shapes", type=int, default=32, help="shapes measured in a round")
    parsing.add_argument("--out", type=Path, default=RESULTS)
    arguments = parsing.parse_args()
    load = [round(os.getloadavg()[0], 1)]
    llm = LLM(
        resolve_model(arguments.model),
        name=arguments.model,
        settings=Settings.load(SETTINGS | {"speculative_config": DRAFTS}),
    )
    with tempfile.TemporaryDirectory() as scratch:
        samples: list[StepSample] = []
        for number in range(arguments.rounds):
            samples += measured(llm, arguments, number)
            for name, make in TEXTS.items():
                own = make(arguments.rounds * arguments.requests)[number :: arguments.rounds]
                serve(llm, own, arguments, number, Path(scratch) / f"{name} {number}")
            load.append(round(os.getloadavg()[0], 1))
        latency = fit_profile(profile_of(llm, samples))
        cases = {}
        for name in TEXTS:
            runs = [Path(scratch) / f"{name} {number}" for number in range(arguments.rounds)]
            cases[name] = [held(run, [other for other in runs if other is not run], latency) for run in runs]
    device = device_folder(llm.runner.device.type)
    llm.close()
    found = {
        "benchmark": "speculation-texts",
        "device": llm.device_name,
        "model": arguments.model,
        "load": load,
        "settings": SETTINGS,
        "speculative_config": DRAFTS,
        "options": {name: value for name, value in vars(arguments).items() if name != "out"},
        "law": f"that was fitted to the requests of the other rounds, the mean of {SEEDS} draws",
        "residuals": latency.data["residuals"],
        "cases": cases,
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }
    write_json(arguments.out / device / "lookup-texts.json", found)
    for name, case in cases.items():
        for way in case[0]["errors"]:
            words = [f"{METRICS[metric]} {summed(case, way, metric)}" for metric in METRICS]
            print(f"{name}, {way}: {', '.join(words)}")
    found_again = [run["decisions"] for case in cases.values() for run in case]
    return 0 if all(one["equal"] == one["recorded"] for one in found_again) else 1


if __name__ == "__main__":
    sys.exit(main())
