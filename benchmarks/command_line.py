"""The command line of the benchmarks of the seven cycles."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cycle_results import write
from result_files import scratch_folder
from sizes import SIZES
from subject import DEFAULT_MODEL, Subject

from twinserve.commands.progress import say
from twinserve.engine.device_queue import device_name
from twinserve.engine.models.loader import DTYPES
from twinserve.settings.errors import InputError

DEFAULT_SHAPE = "smollm2-135m-shape"


def parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parsing = argparse.ArgumentParser(description=description)
    parsing.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parsing.add_argument("--model", action="append", default=[], help="as twinserve --model; may be repeated")
    parsing.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="of --model")
    parsing.add_argument("--shape", action="append", default=[], help="--model with --load-format dummy; repeatable")
    parsing.add_argument("--dtype", choices=sorted(DTYPES), help="float32 on a CPU and bfloat16 on CUDA, unless given")
    parsing.add_argument("--repeats", type=int, default=3)
    parsing.add_argument(
        "--out", type=Path, help="folder of the results; a scratch folder, which is named, unless given"
    )
    parsing.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    return parsing


def subjects(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and load format of each model that the command line asks for."""
    named = [(name, arguments.load_format) for name in arguments.model]
    named += [(name, "dummy") for name in arguments.shape]
    default = DEFAULT_SHAPE if arguments.load_format == "dummy" else DEFAULT_MODEL
    return named or [(default, arguments.load_format)]


def options_for(name: str, load_format: str, arguments: argparse.Namespace) -> list[str]:
    """The options that measure one of `subjects` alone, as the command line says; without where results go."""
    options = ["--device", arguments.device, "--shape" if load_format == "dummy" else "--model", name]
    if arguments.dtype:
        options += ["--dtype", arguments.dtype]
    return [*options, "--repeats", str(arguments.repeats)]


def main(benchmark: Callable[..., dict[str, Any]]) -> int:
    """Run a benchmark as the command line says, and write its JSON."""
    arguments = parser((benchmark.__doc__ or "").splitlines()[0]).parse_args()
    script = Path(sys.argv[0]).name
    for name, load_format in subjects(arguments):
        try:
            subject = Subject.of(name, load_format=load_format, device=arguments.device, dtype=arguments.dtype)
            print(f"{script.removesuffix('.py')}: {subject.name} on {device_name(subject.device)}", flush=True)
            measured = benchmark(subject, repeats=arguments.repeats)
        except InputError as error:
            say(f"{script}: {error}")
            return 2
        command = ["python", f"benchmarks/{script}", *options_for(name, load_format, arguments)]
        measured["command"] = shlex.join(command)
        measured["commit"] = arguments.commit or measured["commit"]
        arguments.out = arguments.out or scratch_folder()
        print(write(measured, arguments.out))
    return 0
