"""docs/studies/azure-and-mooncake.md and the pictures beside it, from the results of studies.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages import prose, table
from study_charts import bars, curves
from study_plan import OBJECTIVES, PRICE, STUDIES, SYSTEM_PROMPT, TOLERANCE, Result


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
    fewest = min(row["value"] for row in fleet if row["value"] is not None)
    most = max(row["value"] for row in fleet if row["value"] is not None)
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
        f"{prompts['longest_prompt']:,}), at the rate that was recorded: {fewest} to {most} H100s keep",
        f"  `{OBJECTIVES['long']}`. The router decides which, before the token budget does.",
        "",
        "## What was simulated",
        "",
        *prose(
            f"""**Latency**: {results["azure-strict"][0]["latency"]}. No Llama-3-8B was timed. A roofline takes the
            model's shape, the peaks of NVIDIA's data sheet, the shares of them that were measured on an H100, and the
            host time of vLLM's records; what engines lose between operations is not in it. So take orders and ratios
            from this page rather than last digits. `docs/fidelity-vllm.md` says how far fitted models are off.""",
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
    return lines + prose(
        f"""**Mixed batches serve more than prefill first**: {mixed["value"]:.3g} against
        {first["value"]:.3g} requests/s
        under the strict limits with 2,048 tokens ({better_in_every_seed(mixed, first)}). Prefill first
        is the quicker to a
        first token ({seconds(first["metrics"]["ttft_s.p99"]["mean"])} against
        {seconds(mixed["metrics"]["ttft_s.p99"]["mean"])} at p99, though at less load), as every decode
        waits while prompts are
        computed; that is what its p99 TPOT is made of, and its limit.""",
        f"""**The budget moves the limit from one metric to the other.** With 512 tokens a step, what stops it is
        {" and ".join(small["missed"]).replace("<=", "≤")}: a step that reads all weights anyway
        computes 512 prompt tokens at
        most, and prompts queue, while p99 TPOT is {seconds(small["metrics"]["tpot_s.p99"]["mean"])}. With more it is
        {" and ".join(mixed["missed"]).replace("<=", "≤")}: a decode shares its step with
        up to 2,048 prompt tokens or more.""",
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
            """Both latencies are flat far below capacity and leave together. Beyond the knee a number depends on
            how long
            the trace goes on, as the queue grows until the arrivals end: it says that the rate cannot
            be served, not how
            long somebody would wait."""
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
    least, tripled = (case(rows, router="least-outstanding", max_num_batched_tokens=budget) for budget in (2048, 8192))
    affine = case(rows, router="prefix-affine", max_num_batched_tokens=8192)
    return [
        "## Mooncake on a fleet",
        "",
        f"{window['requests']:,} requests in five minutes, `{OBJECTIVES['long']}`.",
        "",
        "![The fewest H100s by router and budget](pictures/mooncake-fleet.svg)",
        "",
        *capacity_table(["router", "tokens a step", "H100s"], labels, rows),
        *prose(
            """**Count tokens, not requests.** Prompts differ by a factor of a hundred. A router that
            counts requests, or
            nothing, piles long prompts onto one replica while another idles: round robin and random need more H100s
            than the replica with the least outstanding tokens, for the same traffic and the same objective.""",
            f"""**p99 TPOT is what stops every case**, never TTFT: while a long prompt is computed, every decode
            beside it gets one token a step, and a step of 8,192 prompt tokens takes long. At four H100s and the
            least outstanding tokens, p99 TPOT is {seconds(least["metrics"]["tpot_s.p99"]["mean"])} with 2,048 tokens a
            step, and {seconds(tripled["metrics"]["tpot_s.p99"]["mean"])} with 8,192.""",
            f"""**The prefix cache has little to give in this window.** With a cache without end
            {window["reusable"]:.0%} of
            its prompt tokens could be reused; over the whole hour it is {trace["reusable"]:.0%}, as
            conversations come back
            after more than five minutes. What was hit is {least["hit_ratio"]:.1%} (least outstanding, 2,048) to
            {affine["hit_ratio"]:.1%} (prefix-affine, 8,192) of prompt tokens.""",
        ),
    ]


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
    return [
        "### Why does the router that knows prefixes need more?",
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
            behind up to 32,768. Four H100s
            with smaller leads:"""
        ),
        *table(["tokens a step", "max_lead_tokens", "hit", "p99 TTFT", "p99 TPOT", "misses"], cells),
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
            f"""Eight H100s hardly queue, and yet p99 TTFT stays at {seconds(alone)}. It is the time
            that a prompt of some
            hundred thousand tokens takes by itself ({window["over_64k"]} of the {window["requests"]:,}
            have more than 65,536):
            more replicas do not help one request. Splitting each replica over more GPUs does:"""
        ),
        *table(heads, cells),
        *prose(
            f"""With the same eight H100s, p99 TTFT goes from {seconds(alone)} to {seconds(halves)} with pairs and
            {seconds(quarters)} with fours. So an objective below the floor is a matter of tensor
            parallelism, not of fleet
            size; a search for replicas alone would add GPUs until it gave up."""
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
