"""What the study asks: of which traces, with which objectives, how closely."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from environment import ROOT, take_traces, traces_of

STUDIES = ROOT / "docs" / "studies"
AZURE, MOONCAKE = "azure/AzureLLMInferenceTrace_conv.csv", "mooncake/conversation_trace.jsonl.gz"
OBJECTIVES = {
    "interactive": "p99 TTFT <= 1 s and p99 TPOT <= 50 ms",
    "strict": "p99 TTFT <= 300 ms and p99 TPOT <= 25 ms",
    "long": "p99 TTFT <= 10 s and p99 TPOT <= 50 ms",
}
TOLERANCE = 0.05
PRICE = 2.5
"""Dollars for an hour of a GPU, as in the plans."""

SYSTEM_PROMPT = 512
"""Tokens that all prompts of the Mooncake trace begin with."""

Result = dict[str, Any]


def study_arguments(doc: str | None) -> tuple[argparse.Namespace, Path | None]:
    """The command line of a study whose script says `doc`, and the folder of the traces; None where none are served."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    take_traces(parser)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    return arguments, None if arguments.page or arguments.check else traces_of(parser, arguments)
