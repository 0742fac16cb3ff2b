"""What a card draws: its power, sampled while the engine serves windows of different load, and a model fitted on it.

    python benchmarks/energy.py --device cuda [--model llama-3-8b] [--window-s 6] [--hz 25] [--out FOLDER]

Power is read by NVML (nvidia-ml-py), or where that is not installed by nvidia-smi. The model is `twinserve.sim.devices
.Power`: an idle power, more while a step is computed, and joules a byte and an operation, fitted by least squares of
relative errors on some windows; those that are held out say how far it is off. Writes FOLDER/DEVICE/energy.json, whose
`toml` is the table of twinserve/data/devices.toml. The weights are random; they and the KV move all the same.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from environment import command, commit, device_folder, versions
from result_files import RESULTS, write_json

from twinserve.commands.progress import say
from twinserve.engine.llm import LLM
from twinserve.engine.options import EngineOptions
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.devices import DEVICES, Power
from twinserve.sim.power import Use, Work
from twinserve.sim.recorded_steps import features_of
from twinserve.sim.roofline import RooflineLatency
from twinserve.sim.shapes import ModelShape
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.worlds.run import load_llm, recording

SETTINGS = Settings(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=4096, pipeline_depth=1)
PAUSE_S = 1.5
"""Between windows: a reading may be a mean over the second before it."""


@dataclass(frozen=True)
class Window:
    """A load: requests a second at random, and the lengths of their prompts and answers.

    Attributes:
        is_held_out: no fit sees it.
    """

    name: str
    rate: float
    prompt: int = 0
    answer: int = 0
    is_held_out: bool = False


WINDOWS = (
    Window("idle", 0.0),
    Window("one at a time", 1.0, 64, 128),
    Window("few decodes", 4.0, 128, 256),
    Window("decodes", 12.0, 128, 256, True),
    Window("many decodes", 24.0, 128, 256),
    Window("most decodes", 48.0, 128, 192),
    Window("few prompts", 3.0, 2048, 2),
    Window("prompts", 7.0, 2048, 2, True),
    Window("many prompts", 12.0, 2048, 2),
    Window("both", 5.0, 1024, 128, True),
    Window("more of both", 12.0, 1024, 128),
)
"""For a model of eight billion parameters on an H200, from idle to near saturation."""


class Readings:
    """Power in watts, read so often a second by a thread of its own.

    Args:
        read: gives the power now.
    """

    def __init__(self, read: Callable[[], float], hz: float):
        self._read, self._period_s = read, 1 / hz
        self.times_s: list[float] = []
        self.watts: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while not self._is_over.is_set():
            watts = self._read()
            self.times_s.append(time.perf_counter())
            self.watts.append(watts)
            self._is_over.wait(self._period_s)

    def joules(self, begin_s: float, end_s: float) -> tuple[float, int]:
        """The energy between two times, by the trapezoidal rule, and from how many readings.

        Raises:
            InputError: there are fewer than three.
        """
        count = len(self.watts)
        times, watts = np.array(self.times_s[:count]), np.array(self.watts[:count])
        inside = (times > begin_s) & (times < end_s)
        if inside.sum() < 3:
            raise InputError("expected three readings of the power at least", field="hz", value=1 / self._period_s)
        grid = np.concatenate(([begin_s], times[inside], [end_s]))
        return float(np.trapezoid(np.interp(grid, times, watts), grid)), int(inside.sum())

    def close(self) -> None:
        """Read no more."""
        self._is_over.set()
        self._thread.join()


@contextmanager
def power_reader(index: int) -> Iterator[tuple[Callable[[], float], str]]:
    """What reads a card's power in watts, and in words how.

    Raises:
        InputError: neither NVML nor nvidia-smi is there.
    """
    try:
        import pynvml
    except ImportError:
        with _smi_reader(index) as read:
            yield read, "nvidia-smi power.draw"
        return
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        yield lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3, "NVML nvmlDeviceGetPowerUsage"
    finally:
        pynvml.nvmlShutdown()


@contextmanager
def _smi_reader(index: int) -> Iterator[Callable[[], float]]:
    """The latest line of an nvidia-smi that goes on saying the power, every 20 ms."""
    query = ["nvidia-smi", f"--id={index}", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "20"]
    try:
        started = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        raise InputError("expected pynvml (pip install nvidia-ml-py) or nvidia-smi", field="device") from error
    lines = started.stdout
    assert lines is not None
    latest = [float(lines.readline())]

    def follow() -> None:
        for line in lines:
            latest[0] = float(line)

    threading.Thread(target=follow, daemon=True).start()
    try:
        yield lambda: latest[0]
    finally:
        started.terminate()
        started.wait()


def use_of(record: RunRecord) -> Use:
    """What the device did in a run: its steps' work, and the time in which any was computed."""
    facts = record.run["facts"]
    shape = ModelShape.of_facts(str(facts.get("model")), facts["shape"])
    work = Work(RooflineLatency(shape, DEVICES["h200"]))  # of which only the shape counts
    used, ended_ns = Use(), 0
    for row, features in zip(record.steps, features_of(record), strict=True):
        if not features.seqs:
            continue
        busy_ns = row["end_ns"] - max(row["start_ns"], ended_ns)
        ended_ns = row["end_ns"]
        used += work.of(features, busy_ns)
    return used


def served(llm: LLM, window: Window, seconds: float, seed: int, readings: Readings, folder: Path) -> dict[str, Any]:
    """What a window drew; what it did is in the record that it leaves."""
    time.sleep(PAUSE_S)
    begin_s = time.perf_counter()
    if window.rate:
        count = max(1, round(window.rate * seconds))
        prompts, answers = (LengthSpec.parse(f"fixed:{tokens}") for tokens in (window.prompt, window.answer))
        requests = generate(
            seed=seed, num_requests=count, rate=window.rate, prompt_tokens=prompts, output_tokens=answers
        )
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        begin_s = time.perf_counter()
        with recording(folder, "real", llm.settings, {"sampling": asdict(params), **llm.facts()}) as recorder:
            llm.run_trace(requests, params=params, recorder=recorder)
            end_s = time.perf_counter()
            recorder.close({})
    else:
        time.sleep(seconds)
        end_s = time.perf_counter()
    joules, count = readings.joules(begin_s, end_s)
    say(f"{window.name}: {joules / (end_s - begin_s):.0f} W for {end_s - begin_s:.1f} s")
    return asdict(window) | {"seconds": end_s - begin_s, "joules": joules, "readings": count}


def fitted(rows: list[dict[str, Any]], source: str) -> Power:
    """The power model, by least squares of relative errors; no part is below zero."""
    from scipy.optimize import nnls

    columns = np.array([[row["seconds"], row["busy_s"], row["bytes"], row["operations"]] for row in rows])
    scales = columns.max(axis=0)
    scales[scales == 0] = 1.0
    joules = np.array([row["joules"] for row in rows])
    parts = nnls(columns / scales / joules[:, None], np.ones_like(joules))[0] / scales
    names = ("idle_w", "active_w", "joules_per_byte", "joules_per_operation")
    return Power(**{name: float(f"{value:.4g}") for name, value in zip(names, parts, strict=True)}, source=source)


def errors_of(power: Power, rows: list[dict[str, Any]]) -> dict[str, float]:
    """By how much the model is off, window by window: modelled over measured, less one."""
    return {
        row["name"]: round(
            Use(row["busy_s"], row["bytes"], row["operations"]).joules(power, row["seconds"]) / row["joules"] - 1, 4
        )
        for row in rows
    }


def table_of(device: str, power: Power) -> str:
    """The table of devices.toml."""
    values = {name: value for name, value in power.model_dump().items() if name != "source"}
    lines = [f"{name} = {value:.4g}" for name, value in values.items()]
    return "\n".join([f"[power.{device}]", *lines, f'source = "{power.source}"', ""])


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """All windows, the model and its errors."""
    on_cuda = arguments.device != "cpu"
    engine = EngineOptions(
        model=arguments.model,
        device=arguments.device,
        load_format="dummy",
        dtype="bfloat16" if on_cuda else "auto",
    )
    rows = []
    with closing(load_llm(engine, SETTINGS, progress=say)) as llm, power_reader(0) as (read, how):
        if on_cuda:
            llm.warm_up()
        name, readings = llm.device_name, Readings(read, arguments.hz)
        with closing(readings), tempfile.TemporaryDirectory() as scratch:
            for number, window in enumerate(WINDOWS):
                scaled = Window(
                    window.name,
                    window.rate * arguments.rate_scale,
                    round(window.prompt * arguments.length_scale),
                    max(1, round(window.answer * arguments.length_scale)),
                    window.is_held_out,
                )
                rows.append(served(llm, scaled, arguments.window_s, number, readings, Path(scratch) / str(number)))
            for number, row in enumerate(rows):
                row |= asdict(use_of(load_record(Path(scratch) / str(number))) if row["rate"] else Use())
    device = device_folder(arguments.device)
    source = f"benchmarks/results/{device}/energy.json: {how} of {name}"
    kept, held_out = ([row for row in rows if row["is_held_out"] == held] for held in (False, True))
    power = fitted(kept, source)
    errors = errors_of(power, held_out)
    return {
        "device": device,
        "card": name,
        "model": arguments.model,
        "read_by": how,
        "hz": arguments.hz,
        "power": power.model_dump(),
        "errors_of_fitted": errors_of(power, kept),
        "errors_of_held_out": errors,
        "worst_of_held_out": max(map(abs, errors.values())),
        "mean_of_held_out": round(statistics.fmean(map(abs, errors.values())), 4),
        "windows": rows,
        "toml": table_of(device, power),
        "versions": versions(),
        "commit": arguments.commit or commit(),
        "command": command(),
    }


def main() -> int:
    """As the command line says."""
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to try the script")
    parsing.add_argument("--model", default="llama-3-8b", help="a shape that ships")
    parsing.add_argument("--window-s", type=float, default=6.0, help="seconds in which a window's requests come")
    parsing.add_argument("--hz", type=float, default=25.0, help="readings a second")
    parsing.add_argument("--rate-scale", type=float, default=1.0, help="of all windows' requests a second")
    parsing.add_argument("--length-scale", type=float, default=1.0, help="of all windows' lengths")
    parsing.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    parsing.add_argument("--out", type=Path, default=RESULTS)
    arguments = parsing.parse_args()
    try:
        found = measured(arguments)
    except InputError as error:
        say(f"energy.py: {error}")
        return 2
    write_json(arguments.out / found["device"] / "energy.json", found)
    print(found["toml"])
    print(f"held out: {found['errors_of_held_out']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
