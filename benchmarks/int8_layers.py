"""Int8 layers, and on CUDA float8 ones, against those of the device's own dtype: float32 on a CPU, bfloat16 on CUDA.

    python benchmarks/int8_layers.py [--device cuda] [--tune] [--out benchmarks/results/DEVICE/int8-layers.json]

Times every kind of layer of two models by the rows that it is given. Other weights push a layer's out of the
caches before it is measured again, as in a model. On CUDA, calls are replayed from a graph, so that what is timed is
the device's work alone; how long the host takes to launch one is given beside it. Float8 is timed with the rounding of
what a layer is given ("fp8"), and without ("fp8_product"). --tune tries other tilings. At the end it says up to how
many rows the product that dequantises on the way is no slower than bfloat16, and than writing the weights out: the
second is what FUSED_ROWS in engine/quantization/int8_tiling.py should be.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from environment import command, commit, device_folder, versions
from result_files import RESULTS, write_json
from timing import graph_us
from torch import Tensor
from torch.nn import functional as F

from twinserve.commands.progress import say
from twinserve.engine.capability import FLOAT8_FROM, Capability
from twinserve.engine.device_queue import device_name
from twinserve.engine.float8 import FLOAT8
from twinserve.engine.models import ModelConfig
from twinserve.engine.models.dummy import SHAPES
from twinserve.engine.quantization import AbsMaxQuantizer
from twinserve.engine.quantization.float8_product import float8_product, float8_rows
from twinserve.engine.quantization.int8_product import int8_product
from twinserve.engine.quantization.int8_tiling import FUSED_ROWS

MODELS = ("smollm2-135m-shape", "qwen3-0.6b")
ROWS = {"cpu": (1, 4, 8, 16, 128), "cuda": (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512)}
MOST_FUSED = 256
"""Rows up to which the product that dequantises on the way is timed, whatever FUSED_ROWS is."""
COLD_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
MOST_COPIES = 256
TILES = [
    (16, 64, 1, 2),
    (16, 64, 1, 4),
    (16, 64, 2, 4),
    (16, 64, 4, 2),
    (16, 64, 4, 4),
    (16, 128, 1, 4),
    (32, 128, 1, 4),
    (32, 128, 4, 4),
    (64, 128, 1, 4),
    (128, 64, 1, 4),
    (64, 64, 1, 4),
    (64, 64, 2, 4),
    (64, 64, 4, 4),
    (64, 128, 1, 4),
    (64, 64, 2, 8),
    (128, 64, 1, 8),
]


def layer_shapes(model: str) -> dict[str, tuple[int, int]]:
    """(out, in) of each kind of linear layer of a shape that ships."""
    config = ModelConfig.load(SHAPES / model)
    heads = config.num_heads * config.head_dim
    return {
        "qkv": (heads + 2 * config.num_kv_heads * config.head_dim, config.hidden_size),
        "output": (config.hidden_size, heads),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (config.vocab_size, config.hidden_size),
    }


def benchmark_int8_layers(
    device: str, models: Seq[str] = MODELS, *, rows: Seq[int] = (), tune: bool = False
) -> list[dict[str, Any]]:
    """Microseconds of every kind of layer, by rows: in the device's dtype, in int8, and the first over the second.

    Args:
        rows: none are the device's ROWS.
        tune: on CUDA, also the fastest of other tilings.
    """
    measured = []
    for model in models:
        for layer, (num_out, num_in) in layer_shapes(model).items():
            weights = _Weights(num_out, num_in, device)
            for count in rows or ROWS[device]:
                figures: dict[str, Any] = {"model": model, "layer": layer, "out": num_out, "in": num_in, "rows": count}
                figures |= _on_cuda(weights, count, tune) if device == "cuda" else _on_cpu(weights, count)
                figures["ratio"] = figures["plain_us"] / figures["int8_us"]
                say(_line(figures))
                measured.append(figures)
    return measured


def _line(figures: dict[str, Any]) -> str:
    """Figures for a person."""
    values = (f"{value:.2f}" if isinstance(value, float) else value for value in figures.values())
    return "  ".join(f"{name} {value}" for name, value in zip(figures, values, strict=True))


class _Weights:
    """Enough copies of a layer's weights that none is still in a cache when its turn comes again."""

    def __init__(self, num_out: int, num_in: int, device: str):
        self.device, self.num_in = device, num_in
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)
        copies = max(2, min(MOST_COPIES, COLD_BYTES[device] // (num_out * num_in)))
        floats = [
            torch.empty(num_out, num_in, device=device).normal_(0, 0.05, generator=generator) for _ in range(copies)
        ]
        self.int8 = [AbsMaxQuantizer.quantize(weight) for weight in floats]
        has_float8 = device == "cuda" and Capability.of(torch.device(device)).level >= FLOAT8_FROM
        self.float8 = [AbsMaxQuantizer.quantize(weight, dtype=FLOAT8) for weight in floats] if has_float8 else []
        self.plain = [weight.to(self.dtype) for weight in floats]

    def x(self, rows: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(rows, self.num_in, device=self.device, generator=generator).to(self.dtype)


@torch.inference_mode()
def _on_cpu(weights: _Weights, rows: int) -> dict[str, float]:
    """Both kinds by turns, so that what else the machine does meets both; the lower quartile, as that only adds."""
    x, plain, int8 = weights.x(rows), cycle(weights.plain), cycle(weights.int8)
    calls: dict[str, Callable[[], object]] = {
        "plain_us": lambda: F.linear(x, next(plain)),
        "int8_us": lambda: int8_product(x, *next(int8)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + 1.0
    while time.perf_counter() < until or len(seconds["int8_us"]) < 8:
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.quantiles(values, n=4)[0] * 1e6 for name, values in seconds.items()}


@torch.inference_mode()
def _on_cuda(weights: _Weights, rows: int, tune: bool) -> dict[str, Any]:
    from twinserve.engine.quantization.int8_matmul import int8_matmul
    from twinserve.engine.quantization.int8_tiling import choose_tiling

    x = weights.x(rows)

    def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype)).mul_(scale.T)

    figures: dict[str, Any] = {
        "plain_us": graph_us([partial(F.linear, x, weight) for weight in weights.plain]),
        "int8_us": graph_us([partial(int8_product, x, *pair) for pair in weights.int8]),
        "dequantised_us": graph_us([partial(dequantised, *pair) for pair in weights.int8]),
        "plain_launch_us": _launch_us(lambda: F.linear(x, weights.plain[0])),
        "int8_launch_us": _launch_us(lambda: int8_product(x, *weights.int8[0])),
        "fused": rows <= FUSED_ROWS,
    }
    if weights.float8:
        rounded = float8_rows(x)
        figures["fp8_us"] = graph_us([partial(float8_product, x, *pair) for pair in weights.float8])
        figures["fp8_product_us"] = graph_us([partial(float8_product, rounded, *pair) for pair in weights.float8])
    if rows <= MOST_FUSED:
        figures["fused_us"] = graph_us([partial(int8_matmul, x, *pair) for pair in weights.int8])
    if tune and rows <= MOST_FUSED:
        figures |= _best_tiling(weights, x) | {
            "tiling": str(choose_tiling(rows, len(weights.plain[0]), weights.num_in))
        }
    return figures


def _best_tiling(weights: _Weights, x: Tensor) -> dict[str, Any]:
    """The fastest of the tilings that fit a multiprocessor, and its time."""
    from twinserve.engine.kernels import SMALLEST_DOT
    from twinserve.engine.quantization.int8_matmul import int8_matmul
    from twinserve.engine.quantization.int8_tiling import FEW_ROWS, Tiling, tile_bytes

    row_block = max(SMALLEST_DOT, 1 << (len(x) - 1).bit_length())
    times: dict[Tiling, float] = {}
    for outputs, inputs, splits, warps in TILES:
        tiles = -(-weights.num_in // (inputs * splits))
        for stages in sorted({min(4, tiles), min(6, tiles)}):
            if stages < 2 or stages * tile_bytes(row_block, outputs, inputs) > 200 << 10:
                continue
            tiling = Tiling(row_block, outputs, inputs, splits, warps, stages, row_block > FEW_ROWS and outputs >= 64)
            times[tiling] = graph_us([partial(int8_matmul, x, *pair, tiling) for pair in weights.int8])
    best = min(times, key=lambda tiling: times[tiling])
    return {"best_us": times[best], "best_tiling": str(best)}


def crossovers(layers: Seq[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By model: up to how many rows the layers of a step together take no longer when they dequantise on the way than
    in bfloat16 ("plain"), and than when the weights are written out ("dequantised"); 0 is never."""
    found: dict[str, dict[str, int]] = {}
    for model in dict.fromkeys(one["model"] for one in layers):
        sums: dict[int, dict[str, float]] = {}
        for one in layers:
            if one["model"] == model and "fused_us" in one:
                of_rows = sums.setdefault(one["rows"], dict.fromkeys(("plain", "dequantised", "fused"), 0.0))
                for name in of_rows:
                    of_rows[name] += one[f"{name}_us"]
        found[model] = {}
        for name in ("plain", "dequantised"):
            lost = [rows for rows, of_rows in sorted(sums.items()) if of_rows["fused"] > of_rows[name]]
            found[model][name] = max((rows for rows in sums if not lost or rows < lost[0]), default=0)
    return found


def _launch_us(call: Callable[[], object], count: int = 200) -> float:
    """Microseconds that the host takes to launch a call, the device being given time to keep up."""
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            call()
        seconds.append((time.perf_counter() - begun) / count)
    torch.cuda.synchronize()
    return min(seconds) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(ROWS), default="cpu")
    parser.add_argument("--model", action="append", choices=MODELS, help="of this shape alone; repeatable")
    parser.add_argument("--rows", type=int, action="append", help="for so many rows alone; repeatable")
    parser.add_argument("--tune", action="store_true", help="on CUDA, try other tilings of the kernel")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    device = arguments.device
    layers = benchmark_int8_layers(device, arguments.model or MODELS, rows=arguments.rows or (), tune=arguments.tune)
    values = {
        "command": command(),
        "device": device_name(device),
        "load": os.getloadavg(),
        "versions": versions(),
        "commit": commit(),
        "layers": layers,
    }
    if device == "cuda":
        values["crossovers"] = crossovers(layers)
        for model, rows in crossovers(layers).items():
            print(
                f"{model}: dequantising on the way is no slower than bfloat16 up to {rows['plain']} rows, than writing "
                f"the weights out up to {rows['dequantised']}; FUSED_ROWS is {FUSED_ROWS}"
            )
    out = arguments.out or RESULTS / device_folder(device) / "int8-layers.json"
    write_json(out, values)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
