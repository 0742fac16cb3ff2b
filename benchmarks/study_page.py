"""docs/studies/azure-and-mooncake.md and the pictures beside it, from the results of studies.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import prose, table
from study_charts import bars, curves
from study_plan import OBJECTIVES, PRICE, STUDIES, SYSTEM_PROMPT, TOLERANCE, Result

from twinserve.sim.devices import DEVICES


def written(results: Result) -> dict[Path, str]:
    """The page and its pictures, by where they lie."""
    pictures = STUDIES / "pictures"
    interactive, strict = results["azure-interactive"], results["azure-strict"]
    one_gpu = [
        (named(row), [(OBJECTIVES["interactive"], row), (OBJECTIVES["strict"], other)])
        for row, other in zip(interactive, strict, strict=True)
    ]
    routers = list(dict.fromkeys(row["varied"]["router"] for row in results["mooncake"]))
    budgets = list(dict.fromkeys(row["varied"]["max_num_batched_tokens"] for row in results["mooncake"]))
    fleets = [
        (router, [(f"{budget:,} tokens", case(results["mooncake"], router=router, max_num_batched_tokens=budget))
                  for budget in budgets])
        for router in routers
    ]  # fmt: skip
    return {
        pictures / "azure-capacity.svg": bars("The highest rate one H100 keeps", one_gpu, "requests a second"),
        pictures / "azure-rates.svg": curves("Latency against rate", rate_panels(results), "requests a second"),
        pictures / "mooncake-fleet.svg": bars("The fewest H100s that keep the objective", fleets, "H100s"),
        STUDIES / "azure-and-mooncake.md": "\n".join(page(results)),
    }


def rate_panels(results: Result) -> list[Result]:
    """p99 TTFT and p99 TPOT of one H100 against the rate, a curve a token budget."""
    panels = []
    for metric, title, limit in (("ttft_s.p99", "p99 TTFT", 0.3), ("tpot_s.p99", "p99 TPOT", 0.025)):
        series: dict[str, list[tuple[float, ...]]] = {}
        for row in results["azure-rates"]:
            found = row["metrics"][metric]
            low, high = found["interval"]
            name = f"{row['varied']['max_num_batched_tokens']:,} tokens a step"
            series.setdefault(name, []).append((row["varied"]["rate"], found["mean"], low, high))
        panels.append({"title": title, "limit": limit, "series": series})
    return panels


def case(rows: list[Result], **varied: Any) -> Result:
    """The case with these values."""
    return next(row for row in rows if all(row["varied"].get(name) == value for name, value in varied.items()))


def named(row: Result) -> str:
    return f"{row['varied']['composition']}, {row['varied']['max_num_batched_tokens']:,} tokens"


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def spread(row: Result, digits: int = 3) -> str:
    """What the seeds keep by themselves, in their mean with its interval."""
    if row["mean"] is None:
        return "–"
    half = (row["interval"][1] - row["mean"]) if row["interval"] else 0.0
    return f"{row['mean']:.{digits}g} ± {half:.2g}"


def at_capacity(row: Result) -> list[str]:
    """Latencies and costs at the capacity, or dashes."""
    if row["value"] is None:
        return ["–"] * 4
    metrics = row["metrics"]
    return [
        seconds(metrics["ttft_s.p99"]["mean"]),
        seconds(metrics["tpot_s.p99"]["mean"]),
        f"{row['cost']['total']:.3f}",
        f"{row['cost']['output']:.3f}",
    ]


def capacity_table(heads: list[str], labels: list[list[str]], rows: list[Result]) -> list[str]:
    """A table of capacities, with what they cost and what stops them."""
    lines = [
        [*label, "–" if row["value"] is None else f"{row['value']:.3g}", spread(row), *at_capacity(row),
         "; ".join(row["missed"]).replace("<=", "≤") or "nothing"]
        for label, row in zip(labels, rows, strict=True)
    ]  # fmt: skip
    rest = ["seeds alone", "p99 TTFT", "p99 TPOT", "$ per M tokens", "$ per M output tokens", "what stops it"]
    return table([*heads, *rest], lines)


def page(results: Result) -> list[str]:
    """docs/studies/azure-and-mooncake.md."""
    return [
        "<!-- Written by benchmarks/studies.py from benchmarks/results/studies.json. -->",
        "",
        *_opening(results),
        *_azure(results),
        *_azure_rates(results),
        *_azure_fleet(results),
        *_mooncake(results),
        *_mooncake_affine(results),
        *_mooncake_split(results),
        *_again(),
    ]


def best(rows: list[Result]) -> Result:
    """The case with the highest capacity, the cheapest of those."""
    return max((row for row in rows if row["value"] is not None), key=lambda row: (row["value"], -row["cost"]["total"]))


def _opening(results: Result) -> list[str]:
    interactive, strict, fleet = best(results["azure-interactive"]), best(results["azure-strict"]), results["mooncake"]
    kept = [row["value"] for row in fleet if row["value"] is not None]
    prompts = results["mooncake-prompts"]["window"]
    return [
        "# How many H100s for which traffic",
        "",
        *prose(
            f"""Two public traces, one model of eight billion parameters, and the question of whoever pays for it: which
            composition, token budget and router keep which objective, on how many H100s, and what do a million tokens
            cost? In short, with {PRICE} dollars for a GPU-hour:"""
        ),
        f"- **Azure's chat** (short prompts, no reuse): one H100 keeps `{OBJECTIVES['interactive']}` up to "
        f"{interactive['value']:.3g} requests/s ({named(interactive)}),",
        f"  at {interactive['cost']['total']:.3f} $ per million tokens; `{OBJECTIVES['strict']}` up to "
        f"{strict['value']:.3g} requests/s ({named(strict)}), at {strict['cost']['total']:.3f} $.",
        f"- **Mooncake's conversations** (prompts of {prompts['mean_prompt']:,.0f} tokens, the longest "
        f"{prompts['longest_prompt']:,}), at the rate that was recorded: {min(kept)} to {max(kept)} H100s keep",
        f"  `{OBJECTIVES['long']}`, by router and token budget{floors(fleet)}. {_what_decides(fleet)}",
        "",
        "## What was simulated",
        "",
        *prose(
            f"""**Latency**: {results["azure-strict"][0]["latency"]}. A roofline takes the model's shape, the peaks of
            NVIDIA's data sheet, the shares of them that are reached ({DEVICES["h100"].shares.source}), and the host
            time of vLLM's records; what engines lose between operations is in it as far as those shares have it. So
            take orders and ratios from this page rather than last digits. `docs/fidelity-vllm.md` says how far fitted
            models are off.""",
            """**Azure** (conversations of 2023): the first 2,000 arrivals of the trace (4,000 for the fleet) as
            bursty as
            they are, made denser to the rate in question; the lengths of the requests are drawn from the whole trace
            without replacement, anew with each seed. **Mooncake** (conversation trace): the five minutes from 600 s
            to 900 s, at the recorded rate, the three-second steps of its clock spread out anew with each seed; its
            prefixes are as recorded, and the caches are empty at the start. Clipping the traces keeps this page at
            minutes of computing; it also keeps rare long prompts and far reuse out.""",
            f"""**Search**: three seeds, each with a search of its own; rates to {TOLERANCE:.0%}. The value given is one
            that every seed kept, simulated with every seed; *seeds alone* is the mean of what each
            keeps by itself, with
            its 95% interval (Student's t with two degrees of freedom, so it is wide). All cases share the seeds, so a
            difference between two cases that every seed shows is one, even within these intervals. One step ahead
            (`pipeline_depth` 1), 256 sequences, the pool that the device's memory leaves beside the weights.""",
        ),
    ]


def better_in_every_seed(row: Result, other: Result) -> str:
    """In words, in how many seeds a case has the higher capacity."""
    pairs = list(zip(row["by_seed"], other["by_seed"], strict=True))
    wins = sum(mine > theirs for mine, theirs in pairs)
    return f"with {wins} of {len(pairs)} seeds"


def _azure(results: Result) -> list[str]:
    lines = [
        "## Azure on one H100",
        "",
        "![The highest rate by composition and budget](pictures/azure-capacity.svg)",
        "",
    ]
    lines += ["Bars: the rate that every seed keeps. Dots: what each seed keeps alone.", ""]
    for name in ("interactive", "strict"):
        rows = results[f"azure-{name}"]
        lines += [f"**{OBJECTIVES[name].replace('<=', '≤')}**", ""]
        labels = [[row["varied"]["composition"], f"{row['varied']['max_num_batched_tokens']:,}"] for row in rows]
        lines += capacity_table(["composition", "tokens a step", "requests/s"], labels, rows)
    strict = results["azure-strict"]
    mixed, small = (case(strict, composition="mixed", max_num_batched_tokens=budget) for budget in (2048, 512))
    first = case(strict, composition="prefill-first", max_num_batched_tokens=2048)
    quick, other = (row["metrics"]["ttft_s.p99"]["mean"] for row in (first, mixed))
    more = "more" if mixed["value"] > first["value"] else "no more"
    is_alike = small["missed"] == mixed["missed"]
    moved = "leaves the limit where it is" if is_alike else "moves the limit from one metric to the other"
    return lines + prose(
        f"""**Mixed batches serve {more} than prefill first**: {mixed["value"]:.3g} against {first["value"]:.3g}
        requests/s under the strict limits with 2,048 tokens (more {better_in_every_seed(mixed, first)}). To a first
        token prefill first takes {seconds(quick)}, mixed batches {seconds(other)}, at p99 and each at its own capacity:
        in prefill first every decode waits while prompts are computed, and what stops it is
        {limits_of(first)}.""",
        f"""**The budget {moved}.** With 512 tokens a step, what stops it is {limits_of(small)}: a step that
        reads all weights anyway computes 512 prompt tokens at most, while p99 TPOT is
        {seconds(small["metrics"]["tpot_s.p99"]["mean"])}. With 2,048 it is {limits_of(mixed)}: a decode shares its step
        with up to 2,048 prompt tokens.""",
    )


def _azure_rates(results: Result) -> list[str]:
    rows = results["azure-rates"]
    budgets = list(dict.fromkeys(row["varied"]["max_num_batched_tokens"] for row in rows))
    rates = list(dict.fromkeys(row["varied"]["rate"] for row in rows))
    cells = []
    for rate in rates:
        line = [f"{rate:g}"]
        for budget in budgets:
            metrics = case(rows, rate=rate, max_num_batched_tokens=budget)["metrics"]
            line.append(f"{seconds(metrics['ttft_s.p99']['mean'])}, {seconds(metrics['tpot_s.p99']['mean'])}")
        cells.append(line)
    heads = ["requests/s", *(f"{budget:,} tokens: p99 TTFT, p99 TPOT" for budget in budgets)]
    return [
        "## Where the knee is",
        "",
        "![p99 TTFT and p99 TPOT against the rate](pictures/azure-rates.svg)",
        "",
        "Means over seeds with 95% intervals; dashed: the strict limits. Mixed batches on one H100.",
        "",
        *table(heads, cells),
        *prose(
            f"""The first of these rates that misses a limit: {"; ".join(_knee(rows, budget) for budget in budgets)}.
            Beyond the knee a number depends on how long the trace goes on, as the queue grows until the arrivals end:
            it says that the rate cannot be served, not how long somebody would wait."""
        ),
    ]


def _azure_fleet(results: Result) -> list[str]:
    rows = results["azure-fleet"]
    one = case(results["azure-interactive"], composition="mixed", max_num_batched_tokens=2048)
    return [
        "## Azure on a fleet",
        "",
        *prose(
            f"""At 60 requests/s, eleven times the recorded rate, `{OBJECTIVES["interactive"]}`, mixed
            batches, 2,048 tokens.
            Dividing by what one H100 keeps ({one["value"]:.3g} requests/s) would give
            {60 / one["value"]:.2f} of them."""
        ),
        *capacity_table(["router", "H100s"], [[row["varied"]["router"]] for row in rows], rows),
    ]


def _mooncake(results: Result) -> list[str]:
    rows = results["mooncake"]
    labels = [[row["varied"]["router"], f"{row['varied']['max_num_batched_tokens']:,}"] for row in rows]
    window, trace = results["mooncake-prompts"]["window"], results["mooncake-prompts"]["trace"]
    routers = list(dict.fromkeys(row["varied"]["router"] for row in rows))
    hits = [row["hit_ratio"] for row in rows if row["value"] is not None]
    by_limit: dict[str, list[str]] = {}
    for row in rows:
        varied = row["varied"]
        by_limit.setdefault(limits_of(row), []).append(f"{varied['router']} {varied['max_num_batched_tokens']:,}")
    stops = "; ".join(f"{limit} ({', '.join(of)})" for limit, of in by_limit.items())
    return [
        "## Mooncake on a fleet",
        "",
        f"{window['requests']:,} requests in five minutes, `{OBJECTIVES['long']}`.",
        "",
        "![The fewest H100s by router and budget](pictures/mooncake-fleet.svg)",
        "",
        *capacity_table(["router", "tokens a step", "H100s"], labels, rows),
        *prose(
            f"""**By router**: {"; ".join(f"{router} {_needs(rows, router)}" for router in routers)}. Prompts differ by
            a factor of a hundred. A router that counts requests, or nothing, piles long prompts onto one replica while
            another idles; the one with the fewest outstanding tokens is the one that is soonest free.""",
            f"""**What stops one H100 fewer**, or any number: {stops}.
            While a long prompt is computed, every decode beside it gets one token a step, and a step of 8,192 prompt
            tokens takes long; a first token waits for the prompts before it.""",
            f"""**The prefix cache could give** {window["reusable"]:.0%} of this window's prompt tokens, were it without
            end; over the whole hour it is {trace["reusable"]:.0%}, as conversations come back after more than five
            minutes. What was hit, where the objective is kept, is {min(hits):.1%} to {max(hits):.1%} of prompt
            tokens.""",
        ),
    ]


def limits_of(row: Result) -> str:
    """The limits that stop a case."""
    return " and ".join(row["missed"]).replace("<=", "≤") or "nothing that was tried"


def without(rows: list[Result]) -> list[str]:
    """The routers that keep the objective with no number of replicas, whatever the budget."""
    routers = dict.fromkeys(row["varied"]["router"] for row in rows)
    return [
        router for router in routers if all(row["value"] is None for row in rows if row["varied"]["router"] == router)
    ]


def floors(rows: list[Result]) -> str:
    """In words, which routers keep it with no number of replicas."""
    names = without(rows)
    return f"; {' and '.join(names)} keep{'s' * (len(names) == 1)} it with no number of them" if names else ""


def _needs(rows: list[Result], router: str) -> str:
    """How many replicas a router needs, by budget."""
    words = []
    for row in rows:
        if row["varied"]["router"] == router:
            count = "no number" if row["value"] is None else str(row["value"])
            words.append(f"{count} with {row['varied']['max_num_batched_tokens']:,} tokens")
    return " and ".join(words)


def _what_decides(rows: list[Result]) -> str:
    """Whether another router or another budget moves the number of replicas more."""
    kept = {(row["varied"]["router"], row["varied"]["max_num_batched_tokens"]): row["value"] for row in rows}
    counts = {place: count for place, count in kept.items() if count is not None}

    def widest(index: int) -> int:
        spans = []
        for common in {place[1 - index] for place in counts}:
            alike = [count for place, count in counts.items() if place[1 - index] == common]
            spans.append(max(alike) - min(alike))
        return max(spans)

    by_router, by_budget = widest(0), widest(1)
    if by_router == by_budget:
        return f"Router and token budget move the number by up to {by_router} alike."
    names = ("The router", "the token budget") if by_router > by_budget else ("The token budget", "the router")
    most, least = max(by_router, by_budget), min(by_router, by_budget)
    return f"{names[0]} moves the number by up to {most}, {names[1]} by {least}."


def _knee(rows: list[Result], budget: int) -> str:
    """The first rates at which one H100 misses each limit, with a budget."""
    words = []
    for metric in ("p99 TTFT", "p99 TPOT"):
        missed = [
            row["varied"]["rate"]
            for row in rows
            if row["varied"]["max_num_batched_tokens"] == budget and any(metric in limit for limit in row["missed"])
        ]
        words.append(f"{metric} {f'at {min(missed):g}' if missed else 'at none'}")
    return f"with {budget:,} tokens a step {', '.join(words)}"


def _mooncake_affine(results: Result) -> list[str]:
    rows = results["mooncake-affine"]
    window = results["mooncake-prompts"]["window"]
    cells = [
        [
            f"{row['varied']['max_num_batched_tokens']:,}",
            f"{row['varied']['max_lead_tokens']:,}",
            f"{row['hit_ratio']:.1%}",
            seconds(row["metrics"]["ttft_s.p99"]["mean"]),
            seconds(row["metrics"]["tpot_s.p99"]["mean"]),
            "; ".join(row["missed"]).replace("<=", "≤") or "nothing",
        ]
        for row in rows
    ]
    named_none = "prefix-affine" in without(results["mooncake"])
    widest = max(row["varied"]["max_lead_tokens"] for row in rows)
    by_lead = {lead: case(rows, max_num_batched_tokens=2048, max_lead_tokens=lead) for lead in (0, widest)}
    tpot = {lead: row["metrics"]["tpot_s.p99"]["mean"] for lead, row in by_lead.items()}
    hits = {lead: row["hit_ratio"] for lead, row in by_lead.items()}
    floor = (
        f"""More replicas do not change whom they follow, so it keeps the objective with no number of them (the search
        went to {max(row["failed"] or 0 for row in results["mooncake"] if row["value"] is None)})."""
        if named_none
        else ""
    )
    return [
        "### What the router that knows prefixes does here",
        "",
        *prose(
            f"""It sends a request to the replica that has its longest known prefix, unless that replica is more than
            `max_lead_tokens` outstanding tokens (32,768 unless given) ahead of the least loaded. But
            all prompts of this trace
            begin with the same {SYSTEM_PROMPT} tokens, and {window["system_prompt_alone"]:.0%} of the
            window's requests share nothing
            more with an earlier one: they know a prefix all the same, that of the system prompt, on the
            replica to which the
            request before them was sent. To save {SYSTEM_PROMPT} tokens they follow it, and queue
            behind up to 32,768. {floor} Four H100s with smaller leads:"""
        ),
        *table(["tokens a step", "max_lead_tokens", "hit", "p99 TTFT", "p99 TPOT", "misses"], cells),
        *prose(
            f"""With 2,048 tokens a step, from a lead of {widest:,} to none p99 TPOT goes from
            {seconds(tpot[widest])} to {seconds(tpot[0])}, and hits from {hits[widest]:.1%} to {hits[0]:.1%} of prompt
            tokens."""
        ),
    ]


def _mooncake_split(results: Result) -> list[str]:
    rows = results["mooncake-split"]
    cells = [
        [
            f"{row['varied']['replicas']} of {8 // row['varied']['replicas']}",
            "on" if row["varied"]["enable_prefix_caching"] else "off",
            f"{row['hit_ratio']:.1%}",
            seconds(row["metrics"]["ttft_s.p50"]["mean"]),
            seconds(row["metrics"]["ttft_s.p99"]["mean"]),
            seconds(row["metrics"]["tpot_s.p50"]["mean"]),
            seconds(row["metrics"]["tpot_s.p99"]["mean"]),
            f"{row['cost']['total']:.3f}",
        ]
        for row in rows
    ]
    window = results["mooncake-prompts"]["window"]
    alone, halves, quarters = (
        case(rows, replicas=count, enable_prefix_caching=True)["metrics"]["ttft_s.p99"]["mean"] for count in (8, 4, 2)
    )
    median = case(rows, replicas=8, enable_prefix_caching=True)["metrics"]["ttft_s.p50"]["mean"]
    lesson = (
        """So an objective below the floor is a matter of tensor parallelism, not of fleet size; a search for replicas
        alone would add GPUs until it gave up."""
        if quarters < halves < alone
        else "Splitting replicas further does not lower it everywhere."
    )
    heads = [
        "replicas of H100s",
        "prefix cache",
        "hit",
        "p50 TTFT",
        "p99 TTFT",
        "p50 TPOT",
        "p99 TPOT",
        "$ per M tokens",
    ]
    return [
        "## A floor that no number of replicas lowers",
        "",
        *prose(
            f"""On eight H100s p99 TTFT is {seconds(alone)}, and p50 {seconds(median)}: what is left is the time
            that a prompt of some hundred thousand tokens takes by itself ({window["over_64k"]} of the
            {window["requests"]:,} have more than 65,536). More replicas do not help one request. The same eight as
            replicas of one, two and four GPUs:"""
        ),
        *table(heads, cells),
        *prose(
            f"""With the same eight H100s, p99 TTFT goes from {seconds(alone)} to {seconds(halves)} with pairs and
            {seconds(quarters)} with fours. {lesson}"""
        ),
    ]


def _again() -> list[str]:
    return [
        "## Again, and on your own traffic",
        "",
        "    python benchmarks/studies.py",
        "",
        "or one part of it, from its plan:",
        "",
        "    twinserve capacity TRACE --plan docs/studies/azure.toml --objective 'p99 TTFT <= 1 s' --tolerance 0.05",
        "    twinserve capacity TRACE --plan docs/studies/mooncake.toml --find replicas --objective 'p99 TTFT <= 9 s'",
        "",
        "[capacity.md](../capacity.md) says what is searched and how sure it is.",
        "",
    ]
