"""When does speculation pay? Runs of the same requests with drafts of a small model and without, by load.

    python benchmarks/speculation_runs.py --device cuda --dtype bfloat16 [--model llama-3-8b] [--out FOLDER]

Random weights of a shape that ships, which are loaded once, and of a small model with its vocabulary that drafts: what
is measured is time, and which drafts are accepted is drawn with a given probability. N requests come at once and all of
them run, for each N of --batches, one step ahead; after a run that is not measured, each once. Every run is recorded:
OUT/<device>/speculation.tar.xz; benchmarks/speculation_study.py makes the page of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cuda_engine import close
from environment import command, commit, device_folder, machine, versions
from result_files import RESULTS

from twinserve.engine.device_queue import compute_on
from twinserve.engine.llm import LLM
from twinserve.engine.models import ModelConfig
from twinserve.engine.models.decoder import Decoder
from twinserve.engine.models.dummy import SHAPES
from twinserve.engine.models.source import ModelSource
from twinserve.engine.options import EngineOptions
from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec, generate
from twinserve.worlds.run import run_real
from twinserve.worlds.workload import Workload

DRAFT = {"layers": 2, "hidden": 1024}


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
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        runs.mkdir()
        draft = draft_folder(arguments.model, Path(folder) / "draft")
        for name, summary in recorded(arguments, draft, runs):
            print(f"{name:24} {summary['output_tok_s']:10,.0f} tokens/s", flush=True)
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


def recorded(arguments: argparse.Namespace, draft: Path, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Record each run; its name and summary."""
    options = {"device": arguments.device, "dtype": arguments.dtype, "load_format": "dummy"}
    model, drafting = (
        compute_on(arguments.device, ModelSource.of(one, EngineOptions.load({"model": str(one)} | options)).load)
        for one in (arguments.model, draft)
    )
    for drafts, rate in [(0, 0.0), *((k, rate) for k in arguments.drafts for rate in arguments.acceptance)]:
        llm = engine(arguments, model, drafting, drafts, rate)
        served(llm, arguments, 1, None)
        for batch in arguments.batches:
            name = f"k{drafts}-a{rate}-n{batch}"
            yield name, served(llm, arguments, batch, folder / name)
        close(llm)


def engine(arguments: argparse.Namespace, model: Decoder, drafting: Decoder, drafts: int, rate: float) -> LLM:
    """The model with so many drafts in a step, each of which is accepted with this probability."""
    length, most = arguments.prompt_tokens + arguments.output_tokens, max(arguments.batches)
    settings: dict[str, Any] = {"max_num_seqs": most, "max_num_batched_tokens": 2048, "max_model_len": length + 64}
    settings |= {"block_size": 16, "num_gpu_blocks": most * (length // 16 + 8), "pipeline_depth": 1}
    if drafts:
        how = {"method": "draft_model", "num_speculative_tokens": drafts, "model": "draft"}
        settings["speculative_config"] = how | {"synthetic_acceptance_rate": rate}
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


def served(llm: LLM, arguments: argparse.Namespace, batch: int, out: Path | None) -> dict[str, Any]:
    """So many requests at once; the summary of the run, which goes to `out`."""
    lengths = [LengthSpec.parse(f"fixed:{count}") for count in (arguments.prompt_tokens, arguments.output_tokens)]
    requests = generate(seed=batch, num_requests=batch, rate=1e9, prompt_tokens=lengths[0], output_tokens=lengths[1])
    return run_real(Workload(requests), llm, out=out)


if __name__ == "__main__":
    sys.exit(main())
