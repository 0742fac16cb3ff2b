"""results.md and the figures in README, in the pages of the cycles and of vLLM, from the benchmarks' JSON alone.

Pages below the folder of a language get code and figures from the page that they translate.

    python benchmarks/render.py [--results FOLDER] [--out FILE] [--pages FOLDER] [--vllm-page FILE]
                                [--serving-page FILE] [--readme FILE] [--check]

With --check nothing is written, and the exit status is 1 where something would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from headline import headline
from pages import table, write_or_check
from quantities import (
    NOTHING,
    between,
    compared,
    duration,
    in_turns,
    megabytes,
    number,
    quantity,
    seconds,
    spread_of,
)
from translated import with_blocks_of

from twinserve.commands.progress import say

HERE = Path(__file__).resolve().parent
MARKED = re.compile(r"(<!-- figures of cycle (\d+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
ALONE = re.compile(
    r"(<!-- figures of one request with drafts -->\n).*?(<!-- end of figures of one request with drafts -->\n)",
    re.DOTALL,
)
SUMMED = {"peers": "by the ranks' memory", "nccl": "by NCCL", "gloo": "by gloo"}
RANKS = re.compile(
    r"(<!-- figures of tensor parallelism -->\n).*?(<!-- end of figures of tensor parallelism -->)", re.DOTALL
)
WINDOW = re.compile(r"(<!-- a window over ranks -->\n).*?(<!-- end of a window over ranks -->)", re.DOTALL)
DRAFTS = re.compile(r"(<!-- figures of speculation -->\n).*?(<!-- end of figures of speculation -->)", re.DOTALL)
BOUGHT = re.compile(r"(<!-- what each thing buys -->\n).*?(<!-- end of what each thing buys -->)", re.DOTALL)
HTTP = re.compile(r"(<!-- what HTTP costs -->\n).*?(<!-- end of what HTTP costs -->)", re.DOTALL)
TWIN = ("ttft_s.mean", "ttft_s.p99", "tpot_s.mean", "tpot_s.p99", "e2e_s.mean", "e2e_s.p99", "output_tok_s")
"""The metrics of which the page on serving shows the twin's."""
HEADLINE = re.compile(r"(<!-- measured -->\n).*?(<!-- end of measured -->)", re.DOTALL)
COSTS = re.compile(r"(<!-- what a step costs -->\n).*?(<!-- end of what a step costs -->)", re.DOTALL)
DEVICES = {"cpu": "a CPU", "h100": "an H100"}
"""The devices that every page tells of, measured or not, in this order."""
SIMULATIONS: dict[str, tuple[str, float, float, float]] = {
    "a": ("10,000 requests of the Azure conversation trace, 1 replica", 0.5, 0.9, 150.0),
    "b": ("the Mooncake conversation trace, 12,031 requests, 8 replicas", 3.0, 3.6, 150.0),
    "c": ("the same, prefill and decode apart, 4 replicas each, with two KV tiers", 6.0, 7.2, 300.0),
}
"""What benchmarks/simulator.py runs; at most how many seconds of simulation, seconds in all, and MB that may take with
compiled policies."""
YARDSTICK = "the requests that every cycle serves"
STEPS = {"step_us": "decodes alone", "mixed_step_us": "decodes beside a chunk of 256 tokens"}
"""What benchmarks/policies.py runs, of which the page shows the cost of a step."""

INTRODUCTION = """\
# What each cycle buys

Rendered from the files in `benchmarks/results` by `python benchmarks/render.py`; `make bench` measures and renders.

Latency, throughput and memory of a row are those of the same requests in every row, served with what the cycle adds to
the one before it; so the speed-ups compare like with like. Latency is the time until the last token of the last
request. The figures below a table are what the learning guide lists for each cycle, with its own prompts and lengths.

A time is a median, with the least and the most of its repeats. A speed-up is a median too, with its least and most:
neighbours take turns in one process, and their times are divided turn by turn. Where the least and the most lie on both
sides of 1, the spread does not tell the two apart, and no speed-up is given. Cycle 1 was measured in another process:
of its times each is divided by each, and what the machine did in between is in none of these spreads.
"""


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--results", type=Path, default=HERE / "results")
    parsing.add_argument("--out", type=Path, default=HERE / "results.md")
    parsing.add_argument("--pages", type=Path, default=HERE.parent / "docs" / "cycles")
    parsing.add_argument("--vllm-page", type=Path, default=HERE.parent / "docs" / "vllm.md")
    parsing.add_argument("--serving-page", type=Path, default=HERE.parent / "docs" / "serving.md")
    parsing.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parsing.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    arguments = parsing.parse_args()
    results = load(arguments.results)
    costs = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in ("policies", "simulator")
        if (path := arguments.results / f"{name}.json").exists()
    }
    texts = {arguments.out: results_page(results, **costs)}
    for path in sorted(arguments.pages.glob("cycle*.md")):
        texts[path] = with_figures(path.read_text(encoding="utf-8"), results)
    for name, files_of, marks, figures in (
        ("cycle8", "throughput.json", BOUGHT, bought_figures),
        ("speculation", "speculation-*.json", DRAFTS, drafts_figures),
        ("speculation", "draft-study.json", ALONE, alone_figures),
        ("tensor-parallel", "tensor-parallel-[!w]*.json", RANKS, ranks_figures),
        ("tensor-parallel", "tensor-parallel-window.json", WINDOW, ranks_window),
    ):
        beside = arguments.pages / f"{name}.md"
        if beside.exists():
            files = sorted(arguments.results.glob(f"*/{files_of}"))
            shown = figures([json.loads(path.read_text()) for path in files])
            texts[beside] = marks.sub(
                lambda match, shown=shown: match[1] + shown + match[2],
                texts.get(beside) or beside.read_text(encoding="utf-8"),
            )
    for path in sorted(arguments.pages.glob("*/*.md")):
        source = arguments.pages / path.name
        if source.exists():
            there = texts.get(source) or source.read_text(encoding="utf-8")
            try:
                texts[path] = with_blocks_of(path.read_text(encoding="utf-8"), there)
            except ValueError as error:
                say(f"render.py: {path}: {error}")
                return 2
    if "policies" in costs and arguments.vllm_page.exists():
        page = arguments.vllm_page.read_text(encoding="utf-8")
        texts[arguments.vllm_page] = COSTS.sub(
            lambda found: found[1] + cost_beside_vllm(costs["policies"]) + found[2], page
        )
    if arguments.serving_page.exists():
        page = arguments.serving_page.read_text(encoding="utf-8")
        found = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("*/http-overhead.json"))]
        texts[arguments.serving_page] = HTTP.sub(lambda match: match[1] + cost_of_http(found) + match[2], page)
    if arguments.readme.exists():
        page = arguments.readme.read_text(encoding="utf-8")
        shown = headline(arguments.results)
        texts[arguments.readme] = HEADLINE.sub(lambda match: match[1] + shown + match[2], page)
    return write_or_check(texts, check=arguments.check)


def load(folder: Path) -> list[dict[str, Any]]:
    """All results, by device, model and cycle."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/cycle*.json")]
    order = list(DEVICES)

    def place(result: dict[str, Any]) -> tuple:
        device = result["device"]
        known = order.index(device) if device in order else len(order)
        return known, device, result["weights"] == "random", result["model"], result["cycle"]

    return sorted(results, key=place)


def results_page(
    results: list[dict[str, Any]],
    policies: dict[str, Any] | None = None,
    simulator: dict[str, Any] | None = None,
) -> str:
    """The page of all results; with what the policies and the simulator take, where those were measured."""
    parts = [INTRODUCTION]
    if not results:
        parts.append("Nothing is measured yet.\n")
    for _, group in groupby(results, key=lambda result: (result["device"], result["model"])):
        parts.append(section(list(group)))
    if policies is not None:
        parts.append(policies_section(policies))
    if simulator is not None:
        parts.append(simulator_section(simulator))
    return "\n".join(parts)


def circumstances(measured: dict[str, Any]) -> str:
    """On what, when and by what something was measured, and how busy the machine was with other work."""
    machine = measured["machine"]
    return (
        f"On one of {machine['cores']} cores ({machine['cpu']}), Python {machine['python']}, {measured['date']}, by "
        f"`{measured['command']}`; the load average before was {number(measured['load_before'])}."
    )


def bought_figures(found: list[dict[str, Any]]) -> str:
    """What each optimisation of a step buys, by card: the whole over the engine with one of them switched off."""
    found = [result for result in found if "ablation" in result]
    if not found:
        return "\nNot measured yet.\n\n"
    columns = [bought(result) for result in found]
    names = merged([list(column) for column in columns])
    rows = [[name, *(column.get(name, NOTHING) for column in columns)] for name in names]
    lines = table(["W256, output tokens/s, and over that the whole", *(result["card"] for result in found)], rows)
    lines += [
        f"- {result['card']}: commit {result['commit']}, `{result['command'].partition(' --out')[0]}`"
        for result in found
    ]
    return "\n".join(["", *lines, "", ""])


def bought(result: dict[str, Any]) -> dict[str, str]:
    """By what is switched off: the throughput that is left, and the whole's over it.

    The spread of the whole has every repeat of it in the file, the first of its process too. What was served once is
    taken to spread as the whole does.
    """
    rates = {name: [one["output_tok_s"] for one in repeats] for name, repeats in result["ablation"].items()}
    whole = rates.pop("as it is")
    of_whole = [*whole, *(one["output_tok_s"] for one in result["w256"])]
    cells = {"as it is": f"{number(median(whole))} ({between(number(min(of_whole)), number(max(of_whole)))})"}
    for name, left in rates.items():
        spread = left if len(left) > 1 else [left[0] * one / median(whole) for one in of_whole]
        over_it = compared("", [one / other for one in of_whole for other in spread], "x")
        over_it["value"] = median(whole) / median(left)
        cells[name] = f"{number(median(left))}: {quantity(over_it)}"
    return cells


def drafts_figures(found: list[dict[str, Any]]) -> str:
    """What prompt lookup buys on each device: a table a measurement."""
    if not found:
        return "\nNot measured yet.\n\n"
    lines = [""]
    for result in found:
        most, (row_ns, token_ns) = result["speculative_config"]["num_speculative_tokens"], result["lookup_ns"]
        lines += [
            f"{result['model']} on {result['machine']}, at most {most} drafts, medians of {result['repeats']} turns "
            f"(commit {result['commit']}, load average before {number(result['load_before'])}). Prompt "
            f"lookup takes {number(row_ns / 1000)} us and {number(token_ns)} ns a token of the text.",
            "",
            *table(
                [
                    "text",
                    "tokens",
                    "without drafts",
                    "with drafts",
                    "speed-up",
                    "drafts right",
                    "tokens a row with drafts",
                ],
                [
                    [
                        case["text"],
                        str(case["tokens"]),
                        spread_of(case["without"]),
                        spread_of(case["with"]),
                        quantity(case["speed_up"]),
                        f"{case['speculation']['acceptance_rate']:.0%}" if case["speculation"] else NOTHING,
                        number(case["speculation"]["tokens_per_step"]) if case["speculation"] else NOTHING,
                    ]
                    for case in result["cases"]
                ],
                numbers=True,
            ),
        ]
    return "\n".join([*lines, ""])


def alone_figures(found: list[dict[str, Any]]) -> str:
    """What a model that drafts buys one request on each device, by how often its drafts are right."""
    if not found:
        return "\nNot measured on a GPU yet.\n\n"
    lines = [""]
    for result in found:
        about, options = result["about"], result["about"]["options"]
        rates = {
            (run["drafts"], run["acceptance"]): run["output_tok_s"] for run in result["runs"] if run["requests"] == 1
        }
        plain = rates[0, 0.0]
        lines += [
            f"{options['model']} with random weights on one {about['device'].upper()}, one request, a small model of "
            f"random weights drafting for it, each draft accepted with a given probability (commit {about['commit']}): "
            f"{number(plain)} tokens a second without drafts, and times as many with them:",
            "",
            *table(
                ["a draft is right", *(f"{drafts} drafts" for drafts in options["drafts"])],
                [
                    [f"{rate:.0%}", *(f"{rates[drafts, rate] / plain:.2f}x" for drafts in options["drafts"])]
                    for rate in options["acceptance"]
                ],
                numbers=True,
            ),
        ]
    return "\n".join([*lines, ""])


def ranks_figures(found: list[dict[str, Any]]) -> str:
    """What ranks bought on each device, and what an all-reduce took between them."""
    if not found:
        return "\nNot measured yet.\n\n"
    lines: list[str] = []
    for result in found:
        cases = [*result["cases"], *result["cases_by_nccl"]]
        first = rates_of(cases[0])
        names = [str(case["ranks"]) for case in result["cases"]]
        names += [f"{case['ranks']}, sums by NCCL" for case in result["cases_by_nccl"]]
        lines += [
            "",
            f"{result['model']} with random weights, {result['workload']}, {cases[-1]['machine']}, medians of "
            f"{result['repeats']}, one number of ranks after the other, load before {result['load_before']:.1f}, "
            f"commit {result['commit']}:",
            "",
            *table(
                ["ranks", "tokens/s", "times", "one request, ms a token", "times"],
                [
                    [
                        name,
                        number(case["output_tok_s"]),
                        times_of(many, first[0]),
                        number(case["ms_a_token"]),
                        times_of(alone, first[1]),
                    ]
                    for name, case in zip(names, cases, strict=True)
                    for many, alone in [rates_of(case)]
                ],
                numbers=True,
            ),
        ]
        for ranks, by_way in result["sums"].items():
            line, ways = result["collectives"][ranks], list(reversed(by_way))
            times = {way: {one["bytes"]: one["us"] for one in by_way[way]} for way in ways}
            lines += [
                "",
                f"A sum over {ranks} ranks, us; the line through those {SUMMED[ways[0]]} is "
                f"{line['all_reduce_ns'] / 1e3:,.1f} us and what goes over the link at {line['link'] / 1e9:,.2f} GB/s:",
                "",
                *table(
                    ["bytes", *(SUMMED[way] for way in ways)],
                    [
                        [f"{size:,}", *(number(times[way][size]) if size in times[way] else NOTHING for way in ways)]
                        for size in sorted({size for own in times.values() for size in own})
                    ],
                    numbers=True,
                ),
            ]
    return "\n".join([*lines, "", ""])


def ranks_window(found: list[dict[str, Any]]) -> str:
    """What a window of traffic took that several devices served, and what simulations of it said."""
    lines: list[str] = []
    for result in found:
        decisions = result["decisions"]
        lines += [
            f"{result['requests']} requests of the Azure conversation trace in {result['duration_s']:.0f} s of real "
            f"time, {result['model']} on {result['device']}: {decisions['equal']:,} of "
            f"{decisions['recorded']:,} decisions are made again from the record. Simulated with a profile of the two, "
            f"and with the roofline, which has the line of sums from above; by `python "
            f"benchmarks/tensor_parallel_window.py`:",
            "",
            *table(
                ["", "served", *result["errors"]],
                [
                    [metric, quantity_of(metric, value), *(f"{own[metric]:+.1%}" for own in result["errors"].values())]
                    for metric, value in result["served"].items()
                ],
                numbers=True,
            ),
        ]
    return "\n".join([*lines, "", ""]) if lines else ""


def quantity_of(metric: str, value: float) -> str:
    """A metric of a run: seconds as milliseconds."""
    return number(value) if metric.endswith("tok_s") else f"{1e3 * value:,.1f} ms"


def times_of(rates: list[float], first: list[float]) -> str:
    """How many times as fast as the first of a table; nothing for the first itself."""
    if rates == first:
        return ""
    return quantity(compared("", [one / other for one in rates for other in first], "x"))


def rates_of(case: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Tokens a second of each repeat at a number of ranks: of the workload, and of one request alone."""
    many, alone = (case["repeats"][which] for which in ("many", "alone"))
    return [one["output_tok_s"] for one in many], [one["output_tokens"] / one["seconds"] for one in alone]


def cost_of_http(found: list[dict[str, Any]]) -> str:
    """What HTTP costs on each device, and beside each served run its twin: of the repeat in the middle by its cost."""
    if not found:
        return "Not measured on a GPU yet.\n"
    lines: list[str] = []
    for result in found:
        options, repeats = result["options"], sorted(result["repeats"], key=lambda one: one["overhead"])
        middle = repeats[(len(repeats) - 1) // 2]
        exact = all(one["replay"]["exact"] for one in repeats)
        lines += [
            f"{options['model']} on {options['device']}, {options['streams']} streams of which "
            f"{options['max_num_seqs']} run, prompts of {options['prompt_tokens']} tokens and answers of "
            f"{options['output_tokens']}, {len(repeats)} turns of each, by `{result['command']}` (commit "
            f"{result['commit']}). {'Every' if exact else 'Not every'} served record is decided again exactly.",
            "",
            *table(
                ["turn", "run, tokens/s", "over HTTP, tokens/s", "HTTP costs", "seen by clients, tokens/s"],
                [
                    [
                        str(place),
                        number(one["run"]["full_tok_s"]),
                        number(one["http"]["full_tok_s"]),
                        f"{one['overhead']:.1%}",
                        number(one["seen_tok_s"]),
                    ]
                    for place, one in enumerate(result["repeats"], start=1)
                ],
                numbers=True,
            ),
            *beside_twin(middle),
        ]
    return "\n".join(lines)


def beside_twin(repeat: dict[str, Any]) -> list[str]:
    """The table of a served run and its twin, or why it has none."""
    if not repeat["twin"]:
        return [f"No twin: {repeat['no_twin']}.", ""]
    rows = [
        [name, number(pair["real"]), number(pair["sim"]), f"{pair['sim'] / pair['real'] - 1:+.1%}"]
        for name in TWIN
        if (pair := repeat["twin"][name])["real"] and pair["sim"] is not None
    ]
    return table(["the served run in the middle", "served", "its twin", "error"], rows, numbers=True)


def cost_beside_vllm(policies: dict[str, Any]) -> str:
    """What a step of 256 decodes costs in vLLM's schedulers and here: a table, and where it was measured."""
    measured = policies.get("vllm_step_us", {})
    rows = [
        [f"vLLM {version}, {how}", number(cost["min"])]
        for version, costs in sorted(measured.items())
        for how, cost in costs.items()
    ]
    if not measured:
        known = {name: other["step_us"].get("16", {}).get("256") for name, other in policies["elsewhere"].items()}
        rows = [[f"{name}, on a like machine", number(cost)] for name, cost in known.items() if cost is not None]
    own = {name: copy for name, copy in in_turns(policies).items() if name in ("interpreted", "compiled")}
    rows += [[f"here, {name}", number(copy["step_us"]["16"]["256"])] for name, copy in own.items()]
    lines = table(["", "microseconds"], rows, numbers=True)
    return "\n".join([*lines, circumstances(policies), ""])


def policies_section(policies: dict[str, Any]) -> str:
    """What a step of the policies costs, by copy, beside others' policies."""
    copies = in_turns(policies)
    elsewhere = policies["elsewhere"]
    rows = []
    for what, words in STEPS.items():
        for size, costs in policies[what].items():
            for running in costs:
                cells = [number(copy[what][size][running]) for copy in copies.values()]
                if what == "step_us":
                    cells += [
                        number_or_nothing(other["step_us"].get(size, {}).get(running)) for other in elsewhere.values()
                    ]
                else:
                    cells += [NOTHING] * len(elsewhere)
                rows.append([words, size, f"{int(running):,}", *cells])
    lines = [
        "## A step of the policies",
        "",
        f"Microseconds of `schedule` and `postprocess`. {circumstances(policies)} The least of {policies['repeats']} "
        f"repeats; the median of {policies['turns']} such turns. What others take was measured with their own code, as "
        "shipped, on a like machine.",
        "",
        *table(["Step", "Block size", "Running", *copies, *elsewhere], rows, numbers=True),
    ]
    return "\n".join(lines)


def simulator_section(simulator: dict[str, Any]) -> str:
    """What the simulator takes for two runs, by copy and beside others, and how that grows."""
    rows = []
    for point, (what, *limits) in SIMULATIONS.items():
        for name, runs in in_turns(simulator).items():
            if point in runs:
                run = runs[point]
                who = f"{name} {run['version']}" if "version" in run else name
                rows.append([f"({point}) {what}", who, *simulation_cells(run, limits if name == "compiled" else None)])
    growth = []
    for run in simulator.get("growth", {}).values():
        each = f"{number(1e6 * run['loop_s'] / run['requests'])} us"
        counts = [f"{run['requests']:,}", f"{run['steps']:,}"]
        growth.append(
            [*counts, seconds(run["loop_s"]), each, megabytes(run["peak_rss_mb"]), megabytes(run["record_mb"])]
        )
    earlier = [
        f"{who} {' and '.join(f'{seconds(value)} for ({point})' for point, value in taken.items())}"
        for who, taken in simulator["elsewhere_s"].items()
    ]
    heads = ["Run", "Simulator", "Steps", "Simulation", "Whole process", "Of that on the core", "Memory"]
    lines = [
        "## The simulator",
        "",
        f"{circumstances(simulator)} Medians of {simulator['repeats']} runs, taken in turns on the same core, limits "
        "in brackets. The simulation goes from the first arrival to the last answer, metrics and the record's rows "
        "included; the whole process has Python's start, reading the trace and the record on disk beside it. Other "
        "work on the machine lengthens both, and hardly what of them the process had the core. ai-dynamo replays the "
        "same requests with the same settings in virtual time; its latency is its own polynomial, it does not count "
        "steps, and it prints a summary where the others write a record of every step.",
        "",
        *table(heads, rows),
        f"Measured earlier with others' own code, as shipped: {'; '.join(earlier)}.",
        "",
    ]
    if growth:
        lines += [f"Growth of (a), {simulator['policies']}, with its requests, each measured once:", ""]
        lines += table(["Requests", "Steps", "Simulation", "A request", "Memory", "Record"], growth, numbers=True)
    return "\n".join(lines)


def simulation_cells(run: dict[str, Any], limits: list[float] | None) -> list[str]:
    """A run's steps, seconds and memory, with whether limits are kept."""
    loop_s, wall_s, memory_mb = run["loop_s"], run["wall_s"], run["peak_rss_mb"]
    told = ["", "", ""]
    if limits is not None:
        words = (seconds, seconds, megabytes)
        told = [within(*one) for one in zip((loop_s, wall_s, memory_mb), limits, words, strict=True)]
    return [
        f"{run['steps']:,}" if "steps" in run else NOTHING,
        f"{seconds(loop_s)}{told[0]}",
        f"{seconds(wall_s)}{told[1]}",
        seconds(run["cpu_s"]),
        f"{megabytes(memory_mb)}{told[2]}",
    ]


def number_or_nothing(value: float | None) -> str:
    """A number, where there is one."""
    return NOTHING if value is None else number(value)


def within(value: float, limit: float, words: Callable[[float], str]) -> str:
    """The limit and whether the value keeps it."""
    return f" ({words(limit)}: {'kept' if value <= limit else 'missed'})"


def section(cycles: list[dict[str, Any]]) -> str:
    """The results of one model on one device."""
    first = cycles[0]
    header = ["Cycle", "What", "Latency", "Throughput", "Memory"]
    header += ["Over the cycle before", "Over cycle 1 (another process)", "The guide expects", "Seen", "Met"]
    rows = [table_row(result, cycles) for result in cycles]
    figures = [(str(result["cycle"]), *line) for result in cycles for line in listed(result)]
    included = [f"- Cycle {result['cycle']}: {result['timing']}." for result in cycles]
    lines = [
        f"## {title(first)}",
        "",
        f"Weights: {first['weights']}, {first['dtype']}. The requests: {first['yardstick']}. {measured_with(cycles)}",
        "",
        *table(header, rows),
        f"Memory: {first['memory_is']}.",
        "",
        "What the guide lists:",
        "",
        *table(["Cycle", "Measured", "Figure"], figures),
        "What each time includes:",
        "",
        *included,
    ]
    return "\n".join(lines) + "\n"


def title(result: dict[str, Any]) -> str:
    """The model and what it ran on."""
    return f"{result['model']} on {result['machine']}"


def measured_with(cycles: list[dict[str, Any]]) -> str:
    """Versions and commits, each said once."""
    versions = unique(", ".join(f"{name} {number}" for name, number in r["versions"].items()) for r in cycles)
    commits = unique(result["commit"] for result in cycles)
    word = "Commit" if len(commits) == 1 else "Commits"
    return f"{'; '.join(versions)}. {word} {', '.join(commits)}."


def table_row(result: dict[str, Any], cycles: list[dict[str, Any]]) -> list[str]:
    """A cycle's row of the table."""
    expected = result["expectations"]
    return [
        str(result["cycle"]),
        result["what"],
        spread_of(result),
        f"{number(result['tokens_per_s'])} tok/s",
        f"{number(result['memory_mb'])} MB",
        over_before(result),
        over(result, cycles, 1),
        "<br>".join(one["text"] for one in expected),
        "<br>".join(one["seen"] or NOTHING for one in expected),
        "<br>".join(verdict(one["met"]) for one in expected),
    ]


def over_before(result: dict[str, Any]) -> str:
    """How many times faster the same requests were served than by the cycle before, in turns with it."""
    return quantity(result["before"]["speed_up"]) if "before" in result else NOTHING


def over(result: dict[str, Any], cycles: list[dict[str, Any]], cycle: int) -> str:
    """How many times faster the same requests were served than by `cycle`, which was measured in another process."""
    for other in cycles:
        if other["cycle"] == cycle < result["cycle"] and other["yardstick"] == result["yardstick"]:
            ratios = [slow / fast for slow in other["repeats_s"] for fast in result["repeats_s"]]
            return quantity(compared("", ratios, "x"))
    return NOTHING


def verdict(met: bool | None) -> str:
    """Whether an expectation was met, in a word."""
    return NOTHING if met is None else "yes" if met else "no"


def with_figures(page: str, results: list[dict[str, Any]]) -> str:
    """`page` with the figures of its cycle between its marks."""
    return MARKED.sub(lambda found: f"{found[1]}\n{cycle_figures(int(found[2]), results)}\n{found[3]}", page)


def cycle_figures(cycle: int, results: list[dict[str, Any]]) -> str:
    """A cycle's figures: a column for each model on each device."""
    measured = [result for result in results if result["cycle"] == cycle]
    columns = [dict(figure_lines(result, same_subject(result, results))) for result in measured]
    names = merged([list(column) for column in columns])
    rows = [[name, *(column.get(name, NOTHING) for column in columns)] for name in names]
    lines = table(["Measured", *map(title, measured)], rows) if measured else []
    lines += [
        f"- {title(result)}: {result['dtype']}, weights {result['weights']}, {result['yardstick']}; commit "
        f"{result['commit']}"
        for result in measured
    ]
    there = {result["device"] for result in measured}
    lines += [f"- {words}: not measured yet" for device, words in DEVICES.items() if device not in there]
    return "\n".join([*lines, ""])


def same_subject(result: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All cycles of the same model on the same device."""
    return [one for one in results if (one["device"], one["model"]) == (result["device"], result["model"])]


def merged(lists: list[list[str]]) -> list[str]:
    """The names of all lists, each once: as in the first, and what only a later one has behind its neighbour there."""
    names: list[str] = []
    for own in lists:
        place = 0
        for name in own:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    return names


def figure_lines(result: dict[str, Any], cycles: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A cycle's figures of one model on one device: what, and how much."""
    lines = [(YARDSTICK, duration(result))]
    if "before" in result:
        lines.append(("as the cycle before serves them", spread_of(result["before"])))
        lines.append(("their speed-up over the cycle before", over_before(result)))
    if result["cycle"] > 1:
        lines.append(("their speed-up over cycle 1, another process", over(result, cycles, 1)))
    lines += listed(result)
    for one in result["expectations"]:
        if one["seen"]:
            met = "" if one["met"] is None else f" ({verdict(one['met'])})"
            lines.append((f"the guide: {one['text']}", one["seen"] + met))
    return lines


def listed(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the guide lists for a cycle, as measured: what, and how much."""
    times = [(one["name"], duration(one)) for one in result["cases"]]
    return times + [(one["name"], quantity(one)) for one in result["figures"]]


def unique(values: Iterable[str]) -> list[str]:
    """The values, each once, in their order."""
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    sys.exit(main())
