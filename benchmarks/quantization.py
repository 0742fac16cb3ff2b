"""What int8 and float8 weights leave of a model: its perplexity of a held-out text, and its memory.

    python benchmarks/quantization.py [--model NAME] [--device cuda] [--dtype DTYPE] [--out FILE]

The text is that of cycle 7, computed at once by the engine's layers. Without --out the result is
benchmarks/results/DEVICE/quantization.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from benchmark_cycle7 import HELD_OUT, MOST_TOKENS, perplexity
from environment import command, commit, device_folder, versions
from result_files import RESULTS, write_json

from twinserve.engine.device_queue import device_name
from twinserve.engine.hub.resolve import resolve_model
from twinserve.engine.models.loader import DTYPES, load_model
from twinserve.engine.models.source import load_tokenizer
from twinserve.engine.options import Quantization
from twinserve.engine.quantization import measure_memory


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, dtype = arguments.device, arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    folder = Path(resolve_model(arguments.model))
    tokens = load_tokenizer(folder).encode(HELD_OUT.read_text(encoding="utf-8"))[:MOST_TOKENS]
    token_ids, figures = torch.tensor(tokens, device=device), dict[str, dict[str, float]]()
    for quantization in get_args(Quantization):
        model = load_model(folder, dtype=DTYPES[dtype], device=device, quantization=quantization)
        figures[quantization] = {"perplexity": perplexity(model, token_ids), "memory_mb": measure_memory(model)}
        print(quantization, figures[quantization], flush=True)
        del model
    values: dict[str, Any] = {
        "command": command(),
        "commit": commit(),
        "device": device_name(torch.device(device)),
        "versions": versions(),
        "model": arguments.model,
        "dtype": dtype,
        "tokens": len(tokens),
        "weights": figures,
    }
    write_json(arguments.out or RESULTS / device_folder(device) / "quantization.json", values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
