"""Commands of the pages as tests walk them: the engine serves a tiny model of random weights in place of SmolLM2."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8192, "eos_token_id": 2,
}  # fmt: skip
ENGINE = ("--model", "tiny", "--load-format", "dummy")
SEARCHES, ONE_PROCESS = ("capacity", "plan", "sweep", "tune", "upgrade"), ["--jobs", "1"]
LINE = re.compile(r"^    (twinserve .*?)(?: {2,}#.*| {4}#.*)?$", re.MULTILINE)


def commands(page: str) -> list[str]:
    """The commands of a page, in the order in which they stand."""
    return LINE.findall(page)


def make_tiny(folder: Path) -> None:
    """The model that ENGINE names, below `folder`."""
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(TINY))


def as_walked(command: str) -> list[str]:
    """The arguments of `twinserve`, with what keeps them short."""
    words = shlex.split(command)[1:]
    if words[0] == "capacity":  # by coarser steps than one would take
        words += ["--tolerance", "0.3"]
    if words[0] in SEARCHES:
        words += ONE_PROCESS
    if words[0] == "run":
        words += [*ENGINE, "--time-scale", "0", "--num-gpu-blocks", "4096"]
    if words[0] == "profile":
        words += [*ENGINE, "--repeats", "1", "--max-seqs", "2", "--max-context", "64", "--max-prompt", "32"]
    return words
