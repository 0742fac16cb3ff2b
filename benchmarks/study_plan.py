"""What the study asks: of which traces, with which objectives, how closely."""

from __future__ import annotations

from typing import Any

from environment import ROOT

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
