"""Traces of tests that keep a few replicas busy."""

from __future__ import annotations

from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.request import Request


def conversations(seed: int) -> list[Request]:
    """Sixty requests, in conversations of two turns, each behind one of two system prompts."""
    return generate(
        seed=seed, num_requests=60, rate=12, prompt_tokens=LengthSpec.parse("lognormal:60:1.0:1:200"),
        output_tokens=LengthSpec.parse("lognormal:40:1.0:1:200"), num_system_prompts=2, system_prompt_tokens=40,
        turns=2, think_time_s=0.5,
    )  # fmt: skip


def dense_conversations(num_requests: int, rate: float) -> list[Request]:
    """Conversations of two turns with shared system prompts, enough to fill a small pool."""
    return generate(
        seed=3, num_requests=num_requests, rate=rate, prompt_tokens=LengthSpec.parse("lognormal:60:1.0:1:300"),
        output_tokens=LengthSpec.parse("lognormal:25:1.0:1:100"), num_system_prompts=2, system_prompt_tokens=40,
        turns=2, think_time_s=0.2,
    )  # fmt: skip
