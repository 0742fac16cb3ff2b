"""When does speculation pay? Runs of the same requests with drafts of a small model and without, by load.

    python benchmarks/speculation_runs.py --device cuda --dtype bfloat16 [--model llama-3-8b] [--out FOLDER]

Random weights of a shape that ships, which are loaded once, and of a small model with its vocabulary that drafts: what
is measured is time, and which drafts are accepted is drawn with a given probability. For each number of drafts, and for
none, an engine serves, one step ahead, after a run that is not measured: N requests that come at once and all of them
run, for each N of --batches, once; and traffic, which comes by and by. Before that its steps are measured, without
drafts and with the most, so that a latency model can be fitted to them which has seen none of the runs. All of it goes
to OUT/<device>/speculation.tar.xz; benchmarks/speculation_study.py makes the page of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cuda_engine import close
from environment import command, commit, device_folder, machine, versions
from result_files import RESULTS

from twinserve.commands.progress import Bar
from twinserve.engine.device_queue import compute_on
from twinserve.engine.llm import LLM
from twinserve.engine.models import ModelConfig
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.dummy import SHAPES
from twinserve.engine.models.source import ModelSource
from twinserve.engine.options import EngineOptions
from twinserve.engine.speculation.runner import SpeculativeRunner
from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Request
from twinserve.worlds.run import measure_steps, profile_of, run_real
from twinserve.worlds.workload import Workload

DRAFT = {"layers": 2, "hidden": 1024}
REPEATS = 4
"""Steps of each shape of a profile that count."""


def main() -> int:
    arguments = parse()
    about = {
        "machine": machine(),
        "device": device_folder(arguments.device),
        "versions": versions(),
        "commit": arguments.commit or commit(),
        "command": command(),
        "options": {name: value for name, value in vars(arguments).items() if name not in ("out", "commit")},
        "draft": DRAFT,
    }
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        runs.mkdir()
        draft = draft_folder(arguments.model, Path(folder) / "draft")
        for line in recorded(arguments, draft, runs):
            print(f"{time.monotonic() - begun:5.0f} s  {line}", flush=True)
        (runs / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        out = arguments.out / about["device"]
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out / "speculation.tar.xz", "w:xz") as archive:
            archive.add(runs, arcname="speculation")
    return 0


def parse() -> argparse.Namespace:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--device", default="cpu")
    parsing.add_argument("--dtype", default="float32")
    parsing.add_argument("--model", default="smollm2-135m-shape", help="a shape that ships")
    parsing.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8])
    parsing.add_argument("--acceptance", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parsing.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parsing.add_argument("--prompt-tokens", type=int, default=256)
    parsing.add_argument("--output-tokens", type=int, default=192)
    parsing.add_argument("--shapes", type=int, default=128, help="shapes of each profile; 0 measures none")
    parsing.add_argument("--traffic", type=int, default=48, help="requests of traffic; 0 serves none")
    parsing.add_argument("--traffic-drafts", type=int, default=4, help="drafts of the engine that serves traffic")
    parsing.add_argument("--rate", type=float, default=8.0, help="requests of traffic a second")
    parsing.add_argument("--out", type=Path, default=RESULTS)
    parsing.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    return parsing.parse_args()


def draft_folder(model: str, folder: Path) -> Path:
    """A folder with the config.json of a small model that has the vocabulary and the context of a shape that ships."""
    config = json.loads((SHAPES / model / "config.json").read_text())
    heads = DRAFT["hidden"] // 64
    config |= {"num_hidden_layers": DRAFT["layers"], "hidden_size": DRAFT["hidden"], "head_dim": 64}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    config |= {"intermediate_size": 3 * DRAFT["hidden"], "_source": f"made small, of {model}"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    ModelConfig.load(folder)
    return folder


def recorded(arguments: argparse.Namespace, draft: Path, folder: Path) -> Iterator[str]:
    """Keep each profile and record each run, in a folder; a line about each."""
    options = {"device": arguments.device, "dtype": arguments.dtype, "load_format": "dummy"}
    model, drafting = (
        compute_on(arguments.device, ModelSource.of(one, EngineOptions.load({"model": str(one)} | options)).load)
        for one in (arguments.model, draft)
    )
    yield "loaded"
    for drafts in (0, *arguments.drafts):
        llm = engine(arguments, model, drafting, drafts)
        served(llm, at_once(arguments, 1), None)
        yield f"k{drafts}: captured"
        if arguments.shapes and drafts in (0, max(arguments.drafts)):
            yield profiled(llm, arguments, folder / f"profile-k{drafts}.jsonl.gz")
        for rate in arguments.acceptance if drafts else (0.0,):
            accept(llm, rate)
            for batch in arguments.batches:
                name = f"k{drafts}-a{rate}-n{batch}"
                yield told(name, served(llm, at_once(arguments, batch), folder / name))
            if arguments.traffic and drafts in (0, arguments.traffic_drafts):
                name = f"k{drafts}-a{rate}-traffic"
                yield told(name, served(llm, traffic(arguments), folder / name))
        close(llm)


def engine(arguments: argparse.Namespace, model: Decoder, drafting: Decoder, drafts: int) -> LLM:
    """The model with so many drafts in a step."""
    length, most = arguments.prompt_tokens + arguments.output_tokens, max(arguments.batches)
    settings: dict[str, Any] = {"max_num_seqs": most, "max_num_batched_tokens": 2048, "max_model_len": 2 * length + 64}
    settings |= {"block_size": 16, "num_gpu_blocks": most * (length // 8 + 8), "pipeline_depth": 1}
    if drafts:
        how = {"method": "draft_model", "num_speculative_tokens": drafts, "model": "draft"}
        settings["speculative_config"] = how | {"synthetic_acceptance_rate": 1.0}
    llm = LLM(
        model,
        name=arguments.model,
        settings=Settings.load(settings),
        draft=drafting if drafts else None,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    if arguments.device != "cpu":
        llm.warm_up()
    return llm


def accept(llm: LLM, rate: float) -> None:
    """Have drafts accepted with this probability, and the settings of the next runs say so."""
    config = llm.settings.speculative_config
    if config is not None:
        assert isinstance(llm.runner, SpeculativeRunner)
        llm.runner.acceptance_rate = rate
        config = config.model_copy(update={"synthetic_acceptance_rate": rate})
        llm.settings = llm.settings.model_copy(update={"speculative_config": config})


def profiled(llm: LLM, arguments: argparse.Namespace, path: Path) -> str:
    """Measure the engine's steps, and keep them."""
    samples = measure_steps(
        llm,
        shapes=arguments.shapes,
        max_seqs=max(arguments.batches),
        max_context=arguments.prompt_tokens + arguments.output_tokens,
        max_prompt=min(2048, max(arguments.batches) * arguments.prompt_tokens),
        repeats=REPEATS,
        progress=lambda total: Bar(path.name, total),
    )
    profile_of(llm, samples).save(path)
    return f"{path.name}: {len(samples)} steps"


def at_once(arguments: argparse.Namespace, number: int) -> list[Request]:
    """So many requests that come at once."""
    lengths = [LengthSpec.parse(f"fixed:{count}") for count in (arguments.prompt_tokens, arguments.output_tokens)]
    return generate(seed=number, num_requests=number, rate=1e9, prompt_tokens=lengths[0], output_tokens=lengths[1])


def traffic(arguments: argparse.Namespace) -> list[Request]:
    """Requests of many lengths that come by and by."""
    most = (2 * arguments.prompt_tokens, arguments.output_tokens)
    lengths = [LengthSpec.parse(f"lognormal:{length // 2}:0.6:1:{length}") for length in most]
    return generate(
        seed=0,
        num_requests=arguments.traffic,
        rate=arguments.rate,
        prompt_tokens=lengths[0],
        output_tokens=lengths[1],
    )


def served(llm: LLM, requests: list[Request], out: Path | None) -> dict[str, Any]:
    """Serve requests; the summary of the run, which goes to `out`."""
    return run_real(Workload(requests), llm, out=out)


def told(name: str, summary: dict[str, Any]) -> str:
    """A line about a run."""
    return f"{name:20} {summary['output_tok_s']:10,.0f} tokens/s"


if __name__ == "__main__":
    sys.exit(main())
