"""The twin held against the engine on many windows: `record` serves them, `page` recomputes every number from records.

    python benchmarks/fidelity.py record --out FOLDER [--seconds 540] [--shape qwen3-0.6b]
    python benchmarks/fidelity.py page [--check]

`record` needs a CUDA device, and the public traces in $TWINSERVE_TRACES. It profiles the engine, measures at which rate
each workload saturates under its settings, and serves each window in real time. What lies in the folder of the card's
results or in FOLDER already is not done again, and nothing is begun that would not end within `--seconds`, so the work
can be cut into parts. `page` needs neither: it writes docs/fidelity.md, the card's fidelity.json and the latencies that
ship, of its profiles with blocks of 16, or says with `--check` which number is no longer what it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environment import ROOT, cuda_facts, device_folder
from fidelity_numbers import numbers, saturation
from fidelity_text import page, plot
from fidelity_windows import GROUPS, LARGE, MODEL_LEN, SMALL, WINDOW_S, Group, has_trace, served_rate
from result_files import RESULTS, write_json

from twinserve.commands.progress import Bar
from twinserve.planning.parallel import Workers
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.fit import FittedLatency
from twinserve.sim.profiles import Profile
from twinserve.traces.request import TokenMaker
from twinserve.worlds.run import fit_profile, load_llm, measure_steps, profile_of, run_real
from twinserve.worlds.workload import Workload

if TYPE_CHECKING:
    from twinserve.engine.llm import LLM

PROFILE: dict[str, Any] = {"max_context": MODEL_LEN - 64, "max_prompt": 8192, "repeats": 4}
SHAPES = {16: 448, 256: 192}
"""Shapes of a profile, by the size of a block."""
TOLERANCE = {"limits": 0.05, "": 2e-3}
"""By what numbers may differ from what is written: limits by more, as near saturation a digit moves them."""

PARAMS = SamplingParams(temperature=0.0, ignore_eos=True)

PIECE_S = {"profile": 95.0, "window": WINDOW_S + 16.0, "capture": 25.0}
"""What each piece of work may take; it is begun only if so much time is left."""


class Recording:
    """What is served on this card in one part.

    Args:
        out: takes the files.
        have: holds those of earlier parts.
        seconds: in which the part ends.
    """

    def __init__(self, out: Path, have: Path, seconds: float):
        self._out, self._have = out, have
        self._deadline = time.monotonic() + seconds
        self._out.mkdir(parents=True, exist_ok=True)
        self._saturation: dict[str, float] = {}
        self._built: tuple[Any, TokenMaker] | None = None  # weights, and what makes prompts for them
        for folder in (have, out):
            if (path := folder / "saturation.json").exists():
                self._saturation |= json.loads(path.read_text())["requests_per_s"]

    def shape(self, shape: str) -> bool:
        """Profile and serve all windows of a shape that are missing; False if time ran out."""
        self._built = None
        groups = [group for group in GROUPS if group.shape == shape]
        most_tokens = max(group.blocks * group.block_size for group in groups)
        for block_size, name in sorted({(group.block_size, group.profile) for group in groups}):
            if not self._is_done(f"{name}.jsonl.gz"):
                if not self._has("profile"):
                    return False
                self._profile(shape, block_size, most_tokens // block_size, self._out / f"{name}.jsonl.gz")
        for group in groups:
            missing = [(name, load) for name, load in group.windows if not self._is_done(f"{name}.tar.xz")]
            if missing and not (self._has("capture", "window") and self._serve_all(group, missing)):
                return False
        return True

    def _is_done(self, name: str) -> bool:
        return (self._have / name).exists() or (self._out / name).exists()

    def _has(self, *pieces: str, beside: float = 0.0) -> bool:
        return time.monotonic() + sum(PIECE_S[piece] for piece in pieces) + beside < self._deadline

    def _llm(self, shape: str, settings: Settings) -> LLM:
        """The engine with these settings, around the weights that another has had; whoever had that is done with it."""
        import gc

        import torch

        from twinserve.engine.llm import LLM
        from twinserve.engine.options import EngineOptions

        options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
        if self._built is None:
            llm = load_llm(EngineOptions(model=shape, load_format="dummy", **options), settings, progress=print)
            self._built = llm.runner.model, llm.token_maker
            return llm
        gc.collect()
        torch.cuda.empty_cache()
        weights, makes = self._built
        return LLM(weights, name=shape, settings=settings, token_maker=makes, **options)

    def _profile(self, shape: str, block_size: int, num_blocks: int, path: Path) -> None:
        """Measure the engine's steps; every sample is kept."""
        settings = Settings(
            max_num_seqs=1024,
            max_num_batched_tokens=8192,
            max_model_len=MODEL_LEN,
            block_size=block_size,
            num_gpu_blocks=num_blocks,
            pipeline_depth=1,
        )
        llm, begun = self._llm(shape, settings), time.monotonic()
        samples = measure_steps(
            llm,
            shapes=SHAPES[block_size],
            max_seqs=settings.max_num_seqs,
            progress=lambda total: Bar(path.name, total),
            **PROFILE,
        )
        measured = profile_of(llm, samples)
        seconds = round(time.monotonic() - begun, 1)
        replace(measured, about=measured.about | {"measured": cuda_facts(None) | {"seconds": seconds}}).save(path)
        print(f"{path.name}: {len(samples)} steps, {seconds} s", flush=True)
        llm.close()

    def _serve_all(self, group: Group, windows: list[tuple[str, float]]) -> bool:
        """Measure what saturates a workload, unless that is known, and serve these windows; False if time ran out."""
        llm = self._llm(group.shape, group.build_settings())
        llm.warm_up()
        if group.name not in self._saturation:
            if not self._has("window", beside=group.overload_s[1]):
                return False
            self._saturate(group, llm)
        for name, load in windows:
            if not self._has("window"):
                return False
            self._serve(group, llm, name, load)
        llm.close()
        return True

    def _saturate(self, group: Group, llm: LLM) -> None:
        """Measure how many requests a second end while more come in than can be served."""
        requests = group.overload()
        begun: list[Any] = []

        def abort_all() -> None:
            from twinserve.engine.online import Abort

            inbox, clock = begun
            time.sleep(max(0.0, group.overload_s[1] - clock() / 1e9))
            inbox.put(*(Abort(request.id) for request in requests))

        def on_start(inbox: Any, clock: Any) -> None:
            begun.extend((inbox, clock))
            threading.Thread(target=abort_all, daemon=True).start()

        ended = llm.run_trace(requests, params=PARAMS, on_start=on_start)
        queued = sum(seq.first_token_ns is None for seq in ended)
        rate = self._saturation[group.name] = served_rate(ended, requests, group.overload_s)
        print(f"{group.name}: saturates at {rate:.1f} requests/s, {queued} were still queued", flush=True)
        if queued < 10:
            raise RuntimeError(f"{group.name}: {group.guess} requests/s are served, so they do not saturate it")
        write_json(self._out / "saturation.json", cuda_facts(None) | {"requests_per_s": self._saturation})

    def _serve(self, group: Group, llm: LLM, name: str, load: float) -> None:
        """Serve a window, and keep its record."""
        saturation = self._saturation[group.name]
        requests = group.requests(load * saturation)
        window = {"name": name, "group": group.name, "load": load, "requests_per_s_at_saturation": saturation}
        facts = {
            "path": group.workload,
            "format": "window",
            "sha256": hashlib.sha256(repr(requests).encode()).hexdigest(),
            "notes": {},
            "handled": {},
            "transforms": [],
            "window": window | {"measured": cuda_facts(None)},
        }
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            summary = run_real(Workload(requests, facts, 0, 0), llm, out=folder, params=PARAMS)
            with tarfile.open(self._out / f"{name}.tar.xz", "w:xz") as archive:
                archive.add(folder, arcname=name)
        tpot, ttft = summary["tpot_s"]["mean"] * 1e3, summary["ttft_s"]["mean"] * 1e3
        print(f"{name}: {summary['steps']} steps, TPOT {tpot:.2f} ms, TTFT {ttft:.1f} ms", flush=True)


def models_of(card: str) -> dict[str, FittedLatency]:
    """What is fitted from the profiles of a card, by their names."""
    return {
        path.name.removesuffix(".jsonl.gz"): fit_profile(Profile.load(path))
        for path in sorted((RESULTS / card / "fidelity").glob("profile-*.jsonl.gz"))
    }


def results_of(card: str, models: dict[str, FittedLatency], written: dict[str, Any]) -> dict[str, Any]:
    """Every number of the page, from the records of a card.

    Args:
        models: see `models_of`.
        written: what was said before of the rates that saturate: these are not in the records, so that without the
            public traces they are not worked out again.
    """
    folder = RESULTS / card / "fidelity"
    jobs = [
        (path, models[group.profile])
        for group in GROUPS
        for name, _ in group.windows
        if (path := folder / f"{name}.tar.xz").exists()
    ]
    found: dict[int, Any] = {}
    with Bar("windows", len(jobs)) as bar:
        for number, window in Workers(None).computed(numbers, jobs):
            if isinstance(window, InputError):
                raise window
            found[number] = window
            bar.advance()
    windows = [found[number] for number in range(len(jobs))]
    measured = json.loads((folder / "saturation.json").read_text())
    rates, left_out = {}, []
    for group in GROUPS:
        real, before = measured["requests_per_s"].get(group.name), written.get(group.name)
        if real is not None and before is not None and not has_trace(group):
            rates[group.name] = before
            left_out.append(group.workload)
        elif real is not None:
            rates[group.name] = {"real": real, "sim": saturation(group, models[group.profile])}
    if left_out:
        words = ", ".join(dict.fromkeys(left_out))
        print(f"fidelity.py: TWINSERVE_TRACES has no {words}: what of it can be served is as written", file=sys.stderr)
    return {
        "card": card,
        "device": measured["card"],
        "decisions": [sum(window.replayed[place] for window in windows) for place in (0, 1)],
        "residuals": {name: model.data["residuals"] for name, model in models.items()},
        "saturation": rates,
        "windows": {window.name: asdict(window) for window in windows},
    }


def parted(found: Any, written: Any, where: str = "") -> list[str]:
    """Where two results differ: counts and words at all, other numbers by more than the last digits that another
    processor's arithmetic may change."""
    if isinstance(found, dict) and isinstance(written, dict) and found.keys() == written.keys():
        return [place for name in found for place in parted(found[name], written[name], f"{where}/{name}")]
    if isinstance(found, list) and isinstance(written, list) and len(found) == len(written):
        pairs = enumerate(zip(found, written, strict=True))
        return [place for number, (one, other) in pairs for place in parted(one, other, f"{where}/{number}")]
    if isinstance(found, float) and isinstance(written, float):
        most = next(tolerance for name, tolerance in TOLERANCE.items() if name in where)
        return [] if math.isclose(found, written, rel_tol=most, abs_tol=most) else [where]
    return [] if found == written else [where]


def write_page(card: str, check: bool) -> int:
    """Recompute every number and write it down; with `check`, say which are others than those written down."""
    path, docs = RESULTS / card / "fidelity.json", ROOT / "docs"
    before = json.loads(path.read_text()) if path.exists() else {}
    models = models_of(card)
    results = json.loads(json.dumps(results_of(card, models, before.get("saturation", {}))))
    shipped = {
        ROOT / "sim" / "data" / f"{shape}-{card}.json": models[name].data
        for shape in (SMALL, LARGE)
        if (name := f"profile-{shape}-b16") in models
    }
    said = before if check else results
    texts = {docs / "fidelity.md": page(said), docs / "fidelity.svg": plot(said["windows"])}
    if not check:
        write_json(path, results)
        for file, data in shipped.items():
            write_json(file, data)
        for file, text in texts.items():
            file.write_text(text)
        return 0
    wrong = parted(results, before)
    for file, data in shipped.items():
        wrong += parted(json.loads(json.dumps(data)), json.loads(file.read_text()), str(file.relative_to(ROOT)))
    wrong += [str(file.relative_to(ROOT)) for file, text in texts.items() if file.read_text() != text]
    if wrong:
        print(f"fidelity.py: {len(wrong)} are not as they were: {', '.join(wrong[:8])}", file=sys.stderr)
    else:
        equal, recorded = results["decisions"]
        print(f"{len(results['windows'])} windows, {equal:,} of {recorded:,} decisions: every number is as written")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="serve the windows on this machine's CUDA device")
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--seconds", type=float, default=540.0)
    recording.add_argument("--shape", choices=(SMALL, LARGE), action="append")
    making = commands.add_parser("page", help="recompute every number from the records, and write the page")
    making.add_argument("--card", default="h200")
    making.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "page":
        return write_page(arguments.card, arguments.check)
    part = Recording(arguments.out, RESULTS / device_folder("cuda") / "fidelity", arguments.seconds)
    return 0 if all(part.shape(shape) for shape in arguments.shape or (SMALL, LARGE)) else 3


if __name__ == "__main__":
    sys.exit(main())
