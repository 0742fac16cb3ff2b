"""The recorded runs of vLLM that the simulator is held against, and what is looked at in each."""

from __future__ import annotations

from typing import Any

RUNS = "vllm-0.24.0-h100"
FITTED_ON = ("profile-launch", "azure-0.80-launch")
REPEATS = ("azure-0.80", "azure-0.80-again", "azure-0.80-launch", "azure-0.80-launch-again", "azure-0.80-third")
"""One window with the same settings."""

SETTINGS = {
    "default": ("azure-0.80", "azure-saturation"),
    "2048/128": ("azure-0.80-small-budget", "small-budget-saturation"),
    "not asynchronous": ("azure-0.80-no-async", "no-async-saturation"),
    "small pool": ("azure-0.80-small-pool", None),
}
"""The window and the overload that were recorded with each."""

LATENCIES = {"ttft_s": ("TTFT", "ms", 1e3), "tpot_s": ("TPOT", "ms", 1e3), "e2e_s": ("end to end", "s", 1.0)}
"""How each is called on the page, its unit there, and how many of them a second is."""

STATISTICS = ("mean", "p50", "p90", "p99")
PHASES = 8
"""Simulations of a run that begin at different places of the host's drift."""

BLOCK_S = 10
"""A host's speed is taken to be unrelated to what it was so many seconds before."""

Result = dict[str, Any]
