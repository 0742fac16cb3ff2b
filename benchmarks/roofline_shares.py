"""The shares of a device's peaks that a roofline counts with, fitted on measured steps of Llama 3 8B.

    python benchmarks/roofline_shares.py [--out FILE]

H200: from the steps of benchmarks/results/h200/fidelity/profile-llama-3-8b-b16.jsonl.gz, each as the engine padded it;
steps with a piece of a prompt that is short beside the context before it are left out, as the engine reads that context
one block after another. Errors are those of the halves of the steps that each other's fit has not seen. The time of a
layer beside is the H100's: with what many steps take it cannot be told from that of reading weights.

H100: from the decode steps of benchmarks/results/h100/decode-llama-3-8b.json, arithmetic as on the H200.

Writes benchmarks/results/roofline-shares.json, of which `twinserve/data/devices.toml` has the numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from environment import commit
from result_files import RESULTS, write_json
from scipy.optimize import least_squares

from twinserve.sim.devices import DEVICES, PEAKS, Device
from twinserve.sim.fit import StepSample
from twinserve.sim.kernels import Kernels
from twinserve.sim.latency import StepFeatures
from twinserve.sim.model_configs import SHAPES
from twinserve.sim.profiles import Profile
from twinserve.sim.roofline import RooflineLatency

SHAPE = "llama-3-8b"
PROFILE = RESULTS / "h200" / "fidelity" / f"profile-{SHAPE}-b16.jsonl.gz"
DECODES = RESULTS / "h100" / f"decode-{SHAPE}.json"
NAMES = ("bandwidth", "flops", "attention_bandwidth", "attention_flops", "layer_ns")
START = (0.8, 0.7, 0.75, 0.5, 10_000.0)

Steps = list[tuple[StepFeatures, int]]
"""Features and nanoseconds on the device."""


def padded(sample: StepSample, kernels: Kernels) -> StepFeatures:
    """The step as it was computed: with the tokens and the rows of logits of the captured graph."""
    features = sample.features
    _, tokens, sampled = kernels.padded(
        features.decode_tokens, features.prompt_tokens, len(features.prompts), features.sampled
    )
    prompt_tokens = tokens - features.decode_tokens if features.prompt_tokens else 0
    return features._replace(prompt_tokens=prompt_tokens, sampled=sampled)


def is_short_piece(start: int, length: int) -> bool:
    """Is the context before it more than four tiles of 64 tokens, and more than eight times as long?"""
    return start > 4 * 64 and start > 8 * length


def profile_steps(path: Path) -> Steps:
    """A step of each shape of a profile, that of the median time of its repeats."""
    profile = Profile.load(path)
    shapes: list[list[StepSample]] = []
    for sample in profile.samples:
        if not shapes or shapes[-1][0].features.seqs != sample.features.seqs:
            shapes.append([])
        shapes[-1].append(sample)
    middle = [sorted(repeats, key=lambda sample: sample.device_ns or 0)[len(repeats) // 2] for repeats in shapes]
    return [
        (padded(sample, profile.kernels), sample.device_ns or 0)
        for sample in middle
        if not any(is_short_piece(start, length) for start, length in sample.features.prompts)
    ]


def decode_steps(path: Path) -> Steps:
    """The steps of a file of timed decodes."""
    steps = []
    for step in json.loads(path.read_text())["steps"]:
        rows, context = step["decodes"], step["context"]
        features = StepFeatures(0, rows, 0, rows, rows * context, rows * context, rows, longest_decode=context)
        steps.append((features, round(step["us"] * 1000)))
    return steps


def predicted(values: Any, device: Device, steps: Steps) -> np.ndarray:
    """Nanoseconds on the device by the roofline with these shares."""
    shares = PEAKS.model_copy(update=dict(zip(NAMES, values, strict=True)))
    latency = RooflineLatency(SHAPES[SHAPE], device.model_copy(update={"shares": shares}))
    return np.array([latency.step_cost(features)[1] for features, _ in steps], float)


def fitted(device: Device, steps: Steps, known: dict[str, float]) -> list[float]:
    """The shares that make the smallest relative errors, large ones counting less; those that are known stay."""
    measured = np.array([ns for _, ns in steps], float)
    free = [place for place, name in enumerate(NAMES) if name not in known]

    def whole(values: Any) -> list[float]:
        chosen = dict(zip(free, values, strict=True))
        return [float(chosen.get(place, known.get(name, 0.0))) for place, name in enumerate(NAMES)]

    found = least_squares(
        lambda values: np.log(predicted(whole(values), device, steps) / measured),
        [START[place] for place in free],
        x_scale=[START[place] / 8 for place in free],
        bounds=([0.01 * START[place] for place in free], [1.0 if place < 4 else 1e5 for place in free]),
        loss="soft_l1",
        f_scale=0.05,
        diff_step=1e-3,
    )
    return [round(value, 3) if value < 1 else round(value, -1) for value in whole(found.x)]


def errors(device: Device, steps: Steps, known: dict[str, float]) -> dict[str, Any]:
    """Mean size and bias of the relative errors, by kind of step, of each half of the steps by the other's fit."""
    halves = steps[::2], steps[1::2]
    kinds: dict[str, list[float]] = {"decodes": [], "prompts": [], "both": []}
    for half, other in (halves, halves[::-1]):
        values = fitted(device, other, known)
        for (features, ns), modelled in zip(half, predicted(values, device, half), strict=True):
            kind = "decodes" if not features.prompt_tokens else "both" if features.decode_tokens else "prompts"
            kinds[kind].append(modelled / ns - 1)
    return {
        kind: {
            "steps": len(of_kind),
            "mean_size": round(float(np.abs(of_kind).mean()), 4),
            "bias": round(float(np.mean(of_kind)), 4),
        }
        for kind, of_kind in kinds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline-shares.json")
    arguments = parser.parse_args()
    h200, h100 = DEVICES["h200"], DEVICES["h100"]
    steps, decodes = profile_steps(PROFILE), decode_steps(DECODES)
    # Decodes alone are bound by what they read, whatever the arithmetic.
    reading = dict(zip(NAMES, fitted(h100, decodes, {"flops": 1.0, "attention_flops": 1.0}), strict=True))
    known = {"layer_ns": reading["layer_ns"]}
    on_h200 = dict(zip(NAMES, fitted(h200, steps, known), strict=True))
    on_h100 = reading | {name: on_h200[name] for name in ("flops", "attention_flops")}
    of_decodes = predicted(on_h100.values(), h100, decodes) / np.array([ns for _, ns in decodes]) - 1
    write_json(
        arguments.out,
        {
            "command": "python benchmarks/roofline_shares.py",
            "commit": commit(),
            "shape": SHAPE,
            "h200": {"from": PROFILE.name, "shares": on_h200, "errors_of_unseen_halves": errors(h200, steps, known)},
            "h100": {"from": DECODES.name, "shares": on_h100, "errors": [round(float(e), 4) for e in of_decodes]},
        },
    )


if __name__ == "__main__":
    main()
