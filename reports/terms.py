"""What the words of a page mean; where one stands at the head of a column, hovering or focusing it tells."""

from __future__ import annotations

from html import escape

DEFINITIONS = {
    "TTFT": "time to first token: first token − arrival",
    "TPOT": "time per output token: (finish − first token) / (output tokens − 1), of answers longer than one token",
    "ITL": "inter-token latency: the gaps between successive tokens of a request",
    "End to end": "finish − arrival",
    "Tokens / s": "tokens of the finished requests / duration, which lasts from the first arrival to the last finish",
    "Cached": "prompt tokens whose KV blocks were in the prefix cache, so that they were not computed",
    "Preemptions": "requests that gave up their KV blocks for others, and were computed again",
    "Device waits": "the share of the duration in which the device had work but stood idle, waiting for the host",
    "Step": "one batch: what the device computes between two decisions",
    "Rows with drafts": "rows of steps in which draft tokens were verified",
    "Tokens a step": "tokens that a row with drafts gave on average: the drafts that were accepted, and one more",
    "Drafted": "draft tokens that were computed",
    "Accepted": "drafts that were right, as were all before them in their row",
    "Wasted": "drafted − accepted: tokens that were computed in vain",
    "Error": "(simulated − real) / real",
    "Refused": "requests that could never be served: too long for the context or for the pool",
    "Shortened": "answers that ended with fewer tokens than they asked for, because of the context's length",
    "Capped": "requests whose prompt or answer was cut to a cap before the run",
    "Dropped": "requests of the trace that were not replayed",
    "Attainment": "the share of all requests that keep every limit by themselves; who was not served does not",
    "Goodput": "requests a second that keep every limit by themselves",
    "Wait": "first scheduled − arrival",
    "p50, p90, p95, p99": "the value that so many of a hundred requests do not exceed",
}


def term(text: str, name: str) -> str:
    """Words, which are HTML, that tell a definition to who hovers over them or comes to them by the keyboard."""
    return f'<span class="term" tabindex="0" data-tip="{escape(DEFINITIONS[name])}">{text}</span>'


def sorter(text: str, name: str | None = None) -> str:
    """The button at the head of a column that sorts by it, and tells a definition as `term` does."""
    tip = f' class="term" data-tip="{escape(DEFINITIONS[name])}"' if name else ""
    return f'<button type="button"{tip}>{text}</button>'


def definitions() -> str:
    """All of them, folded."""
    terms = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in DEFINITIONS.items())
    return f"<details><summary>What the numbers mean</summary><dl>{terms}</dl></details>\n"
