"""What AIConfigurator says that steps take; benchmarks/anchors.py starts it.

    PYTHON benchmarks/aiconfigurator_steps.py STEPS

PYTHON is one that has aiconfigurator and aiconfigurator-core, which has its measured operations. STEPS is a JSON list
of objects with `system`, `model`, `tp`, `kind` ("decode" or "prompt"), `batch` and `tokens`; printed are the version,
and of each step milliseconds, or in words why there are none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from importlib.metadata import version
from typing import Any


def milliseconds(step: dict[str, Any]) -> Any:
    """Of a step of the vLLM backend, without a scheduler: of so many prompts, or of so many decodes that have so many
    tokens in their contexts."""
    from aiconfigurator.cli.api import cli_estimate

    is_prompt = step["kind"] == "prompt"
    try:
        found = cli_estimate(
            step["model"],
            step["system"],
            mode="static_ctx" if is_prompt else "static_gen",
            backend_name="vllm",
            isl=step["tokens"] if is_prompt else step["tokens"] - 1,
            osl=1 if is_prompt else 2,
            batch_size=step["batch"],
            tp_size=step["tp"],
            stride=1,
        )
    except Exception as error:  # whatever it raises is its answer
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found.ttft if is_prompt else found.tpot


def main() -> int:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", type=json.loads)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        told = {
            "version": version("aiconfigurator-core"),
            "milliseconds": [milliseconds(step) for step in arguments.steps],
        }
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
