"""What an upgrade of vLLM from 0.24 to 0.33 does to three public traces, as a page.

    python benchmarks/upgrade.py --traces FOLDER [--page docs/studies/upgrade.md]

Each trace is simulated on one H200 under both versions and under each changed rule alone, as vLLM serves by default,
and with the settings that the changed rules are about: requests by priority, and a limit to long prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import page_arguments

from twinserve.planning.parallel import Workers
from twinserve.planning.upgrade import Change, find_changes

LATENCY = "roofline:llama-3-8b@h200"
TRACES: dict[str, tuple[str, dict[str, Any]]] = {
    "Azure": ("azure/AzureLLMInferenceTrace_conv.csv", {"limit": 1500, "rate_scale": 2.5}),
    "Mooncake": ("mooncake/conversation_trace.jsonl.gz", {"limit": 300, "spread_seed": 0, "rate_scale": 0.15}),
    "WEKA": ("weka", {"limit": 200}),
}
CASES: dict[str, dict[str, Any]] = {
    "as vLLM serves by default": {},
    "by priority, `long_prefill_token_threshold` 512, a pool of 6,000 blocks": {
        "scheduling_policy": "priority",
        "long_prefill_token_threshold": 512,
        "num_gpu_blocks": 6000,
    },
}
SHOWN = ("ttft_s.mean", "ttft_s.p99", "tpot_s.mean", "tpot_s.p99", "e2e_s.mean", "output_tok_s", "preemptions", "steps")


def changes_of(traces: Path, trace: str, case: str, jobs: int | None) -> list[Change]:
    """What each change does to a trace in a case."""
    path, options = TRACES[trace]
    values = {"trace": str(traces / path), "latency": LATENCY} | options | CASES[case]
    with Workers(jobs) as workers:
        return find_changes(values, "0.24", "0.33", workers)


def rows_of(trace: str, case: str, changes: list[Change]) -> list[str]:
    """Lines of the page's table: a line a change and metric that it moves."""
    lines = []
    for change in changes:
        moved = [row for row in change.moved if row.metric in SHOWN]
        for row in moved:
            assert row.a is not None and row.b is not None and row.difference is not None
            share = f"{row.difference / row.a:+.2%}" if row.a else "-"
            name = f"`{change.name}`" if "_" in change.name else change.name
            lines.append(f"| {trace} | {case} | {name} | {row.metric} | {row.a:.5g} | {row.b:.5g} | {share} |")
        if not moved:
            name = f"`{change.name}`" if "_" in change.name else change.name
            lines.append(f"| {trace} | {case} | {name} | nothing moves | | | |")
    return lines


HEAD = """# From vLLM 0.24 to 0.33: what moves

`python benchmarks/upgrade.py` writes this page. One H200 serves llama-3-8b (`{latency}`) with the defaults
of each version on it; the first {azure[limit]:,} requests of Azure's conversation trace at {azure[rate_scale]:g} times
their rate, the first {mooncake[limit]} of Mooncake's at {mooncake[rate_scale]:g} times theirs, and the first
{weka[limit]} of WEKA's. For a trace of one's own:

    twinserve upgrade TRACE --from 0.24 --to 0.33 --latency {latency}

Three rules changed that hold by default ([policies.md](../policies.md#rules-by-version)); each is set alone beside
0.24's, and in the end all together. Of what moves, the metrics {shown}
are shown; times are in seconds.

| trace | settings | change | metric | 0.24 | with it | |
| --- | --- | --- | --- | ---: | ---: | ---: |
"""


def main() -> None:
    arguments = page_arguments(__doc__, "docs/studies/upgrade.md")
    lines = []
    for trace in TRACES:
        for case in CASES:
            lines += rows_of(trace, case, changes_of(arguments.traces, trace, case, arguments.jobs))
    options = {trace.lower(): chosen for trace, (_, chosen) in TRACES.items()}
    head = HEAD.format(**options, latency=LATENCY, shown=", ".join(f"`{name}`" for name in SHOWN))
    arguments.page.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
