"""results.md and the figures in the pages of the seven cycles and of vLLM, from the JSON files of the benchmarks alone.

    python benchmarks/render.py [--results FOLDER] [--out FILE] [--pages FOLDER] [--vllm-page FILE]
                                [--serving-page FILE] [--check]

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
from typing import Any

from pages import table

HERE = Path(__file__).resolve().parent
MARKED = re.compile(r"(<!-- figures of cycle (\d+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
RANKS = re.compile(
    r"(<!-- figures of tensor parallelism -->\n).*?(<!-- end of figures of tensor parallelism -->)", re.DOTALL
)
DRAFTS = re.compile(r"(<!-- figures of speculation -->\n).*?(<!-- end of figures of speculation -->)", re.DOTALL)
HTTP = re.compile(r"(<!-- what HTTP costs -->\n).*?(<!-- end of what HTTP costs -->)", re.DOTALL)
TWIN = ("ttft_s.mean", "ttft_s.p99", "tpot_s.mean", "tpot_s.p99", "e2e_s.mean", "e2e_s.p99", "output_tok_s")
"""The metrics of which the page on serving shows the twin's."""
COSTS = re.compile(r"(<!-- what a step costs -->\n).*?(<!-- end of what a step costs -->)", re.DOTALL)
DEVICES = {"cpu": "a CPU", "h100": "an H100"}
"""The devices that every page tells of, measured or not, in this order."""
NOTHING = "–"
SIMULATIONS: dict[str, tuple[str, float, float, float]] = {
    "a": ("10,000 requests of the Azure conversation trace, 1 replica", 0.5, 0.9, 150.0),
    "b": ("the Mooncake conversation trace, 12,031 requests, 8 replicas", 3.0, 3.6, 150.0),
}
"""What benchmarks/simulator.py runs; at most how many seconds of simulation, seconds in all, and MB that may take with
compiled policies."""
STEPS = {"step_us": "decodes alone", "mixed_step_us": "decodes beside a chunk of 256 tokens"}
"""What benchmarks/policies.py runs, of which the page shows the cost of a step."""

INTRODUCTION = """\
# What each cycle buys

Rendered from the files in `benchmarks/results` by `python benchmarks/render.py`; `make bench` measures and renders.

Latency, throughput and memory of a row are those of the same requests in every row, served with what the cycle adds to
the one before it; so the speed-ups compare like with like. Latency is the time until the last token of the last
request. The figures below a table are what the learning guide lists for each cycle, with its own prompts and lengths.
"""


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--results", type=Path, default=HERE / "results")
    parsing.add_argument("--out", type=Path, default=HERE / "results.md")
    parsing.add_argument("--pages", type=Path, default=HERE.parent / "docs" / "cycles")
    parsing.add_argument("--vllm-page", type=Path, default=HERE.parent / "docs" / "vllm.md")
    parsing.add_argument("--serving-page", type=Path, default=HERE.parent / "docs" / "serving.md")
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
    for name, marks, figures in (
        ("speculation", DRAFTS, drafts_figures),
        ("tensor-parallel", RANKS, ranks_figures),
    ):
        beside = arguments.pages / f"{name}.md"
        if beside.exists():
            files = sorted(arguments.results.glob(f"*/{name}-*.json"))
            shown = figures([json.loads(path.read_text()) for path in files])
            texts[beside] = marks.sub(
                lambda match, shown=shown: match[1] + shown + match[2],  # type: ignore[misc]
                beside.read_text(encoding="utf-8"),
            )
    if "policies" in costs and arguments.vllm_page.exists():
        page = arguments.vllm_page.read_text(encoding="utf-8")
        texts[arguments.vllm_page] = COSTS.sub(
            lambda found: found[1] + cost_beside_vllm(costs["policies"]) + found[2], page
        )
    if arguments.serving_page.exists():
        page = arguments.serving_page.read_text(encoding="utf-8")
        found = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("*/http-overhead.json"))]
        texts[arguments.serving_page] = HTTP.sub(lambda match: match[1] + cost_of_http(found) + match[2], page)
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        print(path)
        if not arguments.check:
            path.write_text(texts[path], encoding="utf-8")
    return 1 if arguments.check and changed else 0


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


def in_turns(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The copies that were measured in turns, by name, the imported one last."""
    return measured["others"] | {measured["policies"]: measured}


def circumstances(measured: dict[str, Any]) -> str:
    """On what, when and by what something was measured, and how busy the machine was with other work."""
    machine = measured["machine"]
    return (
        f"On one of {machine['cores']} cores ({machine['cpu']}), Python {machine['python']}, {measured['date']}, by "
        f"`{measured['command']}`; the load average before was {number(measured['load_before'])}."
    )


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
                        seconds(case["without_s"]),
                        seconds(case["with_s"]),
                        f"{number(case['speed_up'])}x",
                        f"{case['speculation']['acceptance_rate']:.0%}" if case["speculation"] else NOTHING,
                        number(case["speculation"]["tokens_per_step"]) if case["speculation"] else NOTHING,
                    ]
                    for case in result["cases"]
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
        cases, first = result["cases"], result["cases"][0]
        lines += [
            "",
            f"{result['model']} with random weights, {result['workload']}, {cases[-1]['machine']}, medians of "
            f"{result['repeats']}, load before {result['load_before']:.1f}, commit {result['commit']}:",
            "",
            *table(
                ["ranks", "tokens/s", "times", "one request, ms a token", "times"],
                [
                    [
                        str(case["ranks"]),
                        number(case["output_tok_s"]),
                        f"{number(case['output_tok_s'] / first['output_tok_s'])}x",
                        number(case["ms_a_token"]),
                        f"{number(first['ms_a_token'] / case['ms_a_token'])}x",
                    ]
                    for case in cases
                ],
                numbers=True,
            ),
        ]
        for ranks, times in result["all_reduce"].items():
            line = result["collectives"][ranks]
            lines += [
                "",
                f"An all-reduce between {ranks} ranks; the line through them is {line['all_reduce_ns'] / 1e3:,.1f} us "
                f"and what goes over the link at {line['link'] / 1e9:,.2f} GB/s:",
                "",
                *table(["bytes", "us"], [[f"{one['bytes']:,}", number(one["us"])] for one in times], numbers=True),
            ]
    return "\n".join([*lines, "", ""])


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
            *table(
                ["the served run in the middle", "served", "its twin", "error"],
                [
                    [name, number(pair["real"]), number(pair["sim"]), f"{pair['sim'] / pair['real'] - 1:+.1%}"]
                    for name in TWIN
                    if (pair := middle["twin"][name])["real"] and pair["sim"] is not None
                ],
                numbers=True,
            ),
        ]
    return "\n".join(lines)


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
    header = ["Cycle", "What", "Latency, median (mean)", "Throughput", "Memory"]
    header += ["Over the cycle before", "Over cycle 1", "The guide expects", "Seen", "Met"]
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
        "What the guide lists, times as median (mean):",
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
        f"{seconds(result['median_s'])} ({seconds(result['mean_s'])})",
        f"{number(result['tokens_per_s'])} tok/s",
        f"{number(result['memory_mb'])} MB",
        speed_up(result, cycles, result["cycle"] - 1),
        speed_up(result, cycles, 1),
        "<br>".join(one["text"] for one in expected),
        "<br>".join(one["seen"] or NOTHING for one in expected),
        "<br>".join(verdict(one["met"]) for one in expected),
    ]


def speed_up(result: dict[str, Any], cycles: list[dict[str, Any]], over: int) -> str:
    """How many times faster than the cycle `over` the same requests were served."""
    for other in cycles:
        if other["cycle"] == over and other["yardstick"] == result["yardstick"]:
            return f"{number(other['median_s'] / result['median_s'])}x"
    return NOTHING


def verdict(met: bool | None) -> str:
    """Whether an expectation was met, in a word."""
    return NOTHING if met is None else "yes" if met else "no"


def with_figures(page: str, results: list[dict[str, Any]]) -> str:
    """`page` with the figures of its cycle between its marks."""
    return MARKED.sub(lambda found: f"{found[1]}\n{cycle_figures(int(found[2]), results)}\n{found[3]}", page)


def cycle_figures(cycle: int, results: list[dict[str, Any]]) -> str:
    """A cycle's figures on every device."""
    devices = unique([*DEVICES, *(result["device"] for result in results)])
    parts = []
    for device in devices:
        of_device = [result for result in results if result["device"] == device]
        measured = [result for result in of_device if result["cycle"] == cycle]
        parts += [figures_table(result, [r for r in of_device if r["model"] == result["model"]]) for result in measured]
        if not measured:
            parts.append(f"On {DEVICES.get(device, device)}: not measured yet.\n")
    return "\n".join(parts)


def figures_table(result: dict[str, Any], cycles: list[dict[str, Any]]) -> str:
    """A cycle's figures of one model on one device."""
    rows = [("the requests that every cycle serves", duration(result))]
    if result["cycle"] > 1:
        rows.append(("their speed-up over the cycle before", speed_up(result, cycles, result["cycle"] - 1)))
        rows.append(("their speed-up over cycle 1", speed_up(result, cycles, 1)))
    rows += listed(result)
    for one in result["expectations"]:
        if one["seen"]:
            met = "" if one["met"] is None else f" ({verdict(one['met'])})"
            rows.append((f"the guide: {one['text']}", one["seen"] + met))
    heading = f"**{title(result)}** ({result['dtype']}, weights {result['weights']}, commit {result['commit']})"
    return "\n".join([heading, "", *table(["Measured", "Median (mean), or figure"], rows)])


def listed(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the guide lists for a cycle, as measured: what, and how much."""
    times = [(one["name"], duration(one)) for one in result["cases"]]
    return times + [(one["name"], quantity(one)) for one in result["figures"]]


def duration(measured: dict[str, Any]) -> str:
    """A measurement's median, mean and, where it counts tokens, throughput."""
    text = f"{seconds(measured['median_s'])} ({seconds(measured['mean_s'])})"
    return f"{text}, {number(measured['tokens_per_s'])} tok/s" if "tokens_per_s" in measured else text


def seconds(value: float) -> str:
    """Seconds, or milliseconds where they are few."""
    return f"{number(value)} s" if value >= 1 else f"{number(1000 * value)} ms"


def megabytes(value: float) -> str:
    """Memory or disk in 10**6 bytes."""
    return f"{number(value)} MB"


def quantity(shown: dict[str, Any]) -> str:
    """A figure with its unit."""
    value = shown["value"]
    text = value if isinstance(value, str) else number(value)
    return text + ("" if shown["unit"] in ("x", "%") else " ") * bool(shown["unit"]) + shown["unit"]


def number(value: float) -> str:
    """A number to three digits, or all digits before the point."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{value:.3g}"


def unique(values: Iterable[str]) -> list[str]:
    """The values, each once, in their order."""
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    sys.exit(main())
