"""docs/engine.md and a page for each card, from the results of throughput.py, latency.py, step_kernels.py, serving.py.

python benchmarks/engine_page.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from environment import ROOT
from pages import prose, table, write_or_check
from result_files import RESULTS
from served import HEADS, cells
from svg import INK, Drawing

PAGE = ROOT / "docs" / "engine.md"
CARDS = ("h200", "h100")
"""Folders of results, by whose cards the pages are called; the newest first."""

PRODUCTS = "matrix products (cuBLAS)"
FEW_PRODUCTS = "product"
COLOURS = {
    "decode": "#4c78a8",
    "merge": "#9ecae9",
    PRODUCTS: "#f58518",
    FEW_PRODUCTS: "#ffbf79",
    "attend": "#2f5f8f",
    "rms_norm": "#54a24b",
    "rotate_and_store": "#b279a2",
    "silu_and_mul": "#eeca3b",
}
OTHER, HOST = "#888888", {"decide": "#e45756", "launch": "#72b7b2", "wait": "#d8d8d8", "commit": "#b07d62"}
STEPS_SHOWN = 3


LATENCIES = (
    ("one request, ms a token", "batch1_ms_per_token", 2),
    ("first token of 1,024, ms", "ttft_1024_ms", 2),
    ("process start to first token, s", "ready_s", 1),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    arguments = parser.parse_args()
    texts = {PAGE: page()}
    for card in CARDS:
        folder = PAGE.with_suffix("")
        texts[folder / f"{card}.md"] = card_page(card)
        texts[folder / f"timeline-{card}.svg"] = picture(read(f"{card}/timeline.json")["events"])
    return write_or_check(texts, check=arguments.check)


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def read_if_there(name: str) -> Any:
    return read(name) if (RESULTS / name).exists() else None


def page() -> str:
    return "\n".join([*_opening(), *_at_a_glance(), *_eight_bits(), *_ending()])


def card_page(card: str) -> str:
    """What was measured on a card."""
    kernels, measured = read(f"{card}/kernels.json"), read(f"{card}.json")
    return "\n".join(
        [
            f"# The CUDA engine on one {measured['card']}",
            "",
            *prose(
                """Made by `python benchmarks/engine_page.py` from `benchmarks/results`. Everything here, unless it says
                otherwise: random weights of the Qwen3-0.6B shape in bfloat16; the files name versions, commit and
                command. [What a step is](../engine.md)."""
            ),
            *_figures(card, measured, step_of(kernels)),
            *_traffic(RESULTS / card),
            *_simulated(card),
            *_larger(RESULTS / card / "decode-llama-3-8b.json"),
            *_formats(RESULTS / card),
            *_ablation(card, measured.get("batch1_without"), formats=any((RESULTS / card).glob("w256-*.json"))),
            *_kernels(kernels),
            *_timeline(card),
        ]
    )


def _at_a_glance() -> list[str]:
    """The figures of all cards beside each other."""
    measured = {card: read(f"{card}.json") for card in CARDS}
    steps = {card: step_of(read(f"{card}/kernels.json")) for card in CARDS}
    rows = [
        ["W256, output tokens/s", *(f"{one['w256_output_tok_s']:,.0f}" for one in measured.values())],
        *(
            [name, *(f"{one[key]:.{digits}f}" for one in measured.values())]
            for name, key, digits in LATENCIES
        ),
        ["decode step, 131 rows at 920, ms", *(f"{step['us'] / 1e3:.2f}" for step in steps.values())],
    ]  # fmt: skip
    links = [f"[{one['card']}](engine/{card}.md)" for card, one in measured.items()]
    return [
        "## Figures",
        "",
        *table(["", *links], rows),
        *prose(
            """Random weights of the Qwen3-0.6B shape in bfloat16. W256 is 256 requests at once of 100 to 1,024 tokens
            in and out, sampled at temperature 0.6. The pages of the cards have the repeats, the kernels, what each
            thing buys, and a larger model."""
        ),
    ]


def step_of(kernels: Any, decodes: int = 131) -> dict[str, Any]:
    """The step of so many decodes."""
    return next(row for row in kernels["steps, triton"] if row["decodes"] == decodes)


def _opening() -> list[str]:
    return [
        "# The CUDA engine",
        "",
        "## A step",
        "",
        *prose(
            """On CUDA, `LLM` and `twinserve run` take this path unless `--execution eager` is given. What a step needs
            lies on the device (`engine/graphs/device_rows.py`): a row for each running sequence has its last token, its
            length, its block table, its temperature and seed. The policies' deltas (admitted, grown, left, preempted)
            change rows by one copy and one small kernel; a decision that changes nothing copies nothing. The step
            itself is one CUDA graph (`graph_runner.py`): it reads its rows, runs the layers, samples, and writes the
            sampled tokens back into the rows, so the next step can be launched before anybody has read them. With
            `--pipeline-depth 1` the next step is decided and launched while this one runs.""",
            """Decodes are captured for every number of rows up to 4, every multiple of 8 up to 256 and of 32
            beyond; steps with prompts by how many tokens they have. In these the decodes lie first and the
            prompts right behind them, so that a step is padded once, to a size that suits the products of
            matrices; how many rows attend as decodes is a number of its own. Up to 2,048 tokens are captured,
            and more where launching a small model's kernels one by one would take longer than running them. A
            layer is nine kernels: four matrix products by cuBLAS, and ours in Triton for residual and norm
            (twice), query-key norm with rotation and KV store, attention, and the gated activation. Decode
            attention has all query heads of a KV head in one program and splits long contexts where few rows
            would leave the device idle; prompts have a kernel of their own. Any block size that is a multiple
            of 16 is served; flash-attn can be chosen for blocks of 256 (`--attention flash`).""",
            """A step of a few rows waits for kernels to start and end more than for its weights. From Hopper on it has
            kernels of its own (`engine/kernels/few_rows.py`): a layer is six, as norm, activation and residual belong
            to the products beside them, and rotation and KV store to attention. Each starts while the one before it
            runs, asks for its weights, or for keys and values of earlier steps, and only then waits for its input
            (programmatic dependent launch). Products of one row are made so for every model, of 2 and 4 where a layer
            is small; attention up to 8 rows.""",
            """The graph samples the best token of a row, or one by temperature, `top_k`, `top_p` and `min_p`, without
            a sort: it searches for the least logit that is kept. Rows that ask for more (penalties, `logit_bias`,
            `min_tokens`, `logprobs`) are sampled again behind it, by the kernels of the eager path. For one with a
            repetition penalty the device keeps which tokens came before, a byte for each of the vocabulary.
            Log-probabilities come to the host with the tokens of their step, into `Completion.logprobs`.""",
        ),
    ]


def _timeline(card: str) -> list[str]:
    return [
        "## Host and device",
        "",
        f"![Host and device over three steps](timeline-{card}.svg)",
        "",
        *prose(
            """Three decode steps of 64 sequences, one step ahead, from a profiler's trace. The profiler itself makes
            launches slow."""
        ),
    ]


def _figures(card: str, measured: dict[str, Any], step: dict[str, Any]) -> list[str]:
    spreads = measured["repeats"]
    w256 = ", ".join(f"{one['output_tok_s']:,.0f}" for one in spreads["w256"])
    rows = [["W256, output tokens/s", f"{measured['w256_output_tok_s']:,.0f}", w256]]
    throughput = read_if_there(f"{card}/w256.json") or read(f"{card}/throughput.json")
    if kept := throughput.get("w256_kept"):
        rates = [one["output_tok_s"] for one in kept["repeats"]]
        how = f"top_k {kept['top_k']}, top_p {kept['top_p']}"
        rows.append([f"W256 with {how}", f"{median(rates):,.0f}", ", ".join(f"{rate:,.0f}" for rate in rates)])
    for name, key, digits in LATENCIES:
        rows.append([name, f"{measured[key]:.{digits}f}", spread(spreads[key])])
    alone = f"its bytes alone: {step['limit_us'] / 1e3:.2f}"
    rows.append(["decode step, 131 rows at 920, ms", f"{step['us'] / 1e3:.2f}", alone])
    return [
        "## Figures",
        "",
        *table(["", "measured", "repeats"], rows),
        *_peer([throughput, read_if_there(f"{card}/throughput-peer.json")]),
        *_served(read_if_there(f"{card}/azure-window.json")),
    ]


def _peer(runs: list[dict[str, Any] | None]) -> list[str]:
    """Of transformers' continuous batching, where it was measured."""
    beside = "; ".join(
        f"{max(one['output_tok_s'] for one in served['repeats']):,.0f} tokens/s with `{served['attention']}` (the "
        f"better of {len(served['repeats'])}), and this engine "
        f"{median(one['output_tok_s'] for one in run['w256']):,.0f} (the median of {len(run['w256'])})"
        for run in runs
        if run is not None
        for served in run.get("transformers", ())
    )
    said = f"Of W256 transformers' continuous batching served, on the same card in the same run: {beside}."
    return [*prose(said)] if beside else []


def _served(window: dict[str, Any] | None) -> list[str]:
    """Of a window that was served in real time, where it was."""
    if window is None:
        return []
    summary, replay = window["summary"], window["replay"]
    return [
        *prose(
            f"""A 60-second window of the Azure conversation trace, served in real time one step ahead:
            {summary["finished"]} requests, first token after {summary["ttft_s"]["p50"] * 1e3:.1f} ms (median; p99
            {summary["ttft_s"]["p99"] * 1e3:.1f}). `twinserve replay` makes {replay["equal"]:,} of
            {replay["recorded"]:,} decisions again from the record's facts."""
        )
    ]


def _traffic(folder: Path) -> list[str]:
    """Of requests that were served in real time, by this engine and by others, where they were."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("serving-*.json"))]
    lines = [line for file in files for line in _at_rates(file["shape"], list(file["repeats"].values()))]
    opening = """The same requests at the same times, so many a second. Queue is the mean time until a request was first
        scheduled, where that is known."""
    return ["## Served traffic", "", *prose(opening), *lines] if lines else []


def _at_rates(shape: str, entries: list[dict[str, Any]]) -> list[str]:
    """Of requests to one shape; what was recorded elsewhere stands beside what was served here."""
    here = [entry for entry in entries if "recorded" not in entry]
    if not here:
        return []
    replays = [entry["replay"] for entry in here if "replay" in entry]
    assert all(replay["exact"] for replay in replays), "a run was not decided again"
    commands = dict.fromkeys(f"`{entry['command']}` (commit {entry['commit']})" for entry in here)
    limits = dict.fromkeys(entry["attainment"]["limits"] for entry in here)
    again = f"{sum(replay['equal'] for replay in replays):,} decisions of the engine are made again from its records."
    return [
        *prose(
            f"""The {shape} shape, by {"; ".join(commands)}. Within limits: {"; ".join(limits)}.
            {again if replays else ""}"""
        ),
        *table(list(HEADS), cells(entries), numbers=True),
        *prose(*dict.fromkeys(entry["about"] for entry in entries if "about" in entry)),
    ]


def _simulated(card: str) -> list[str]:
    """What the simulator says of windows that this engine served."""
    if (RESULTS / card / "fidelity.json").exists():
        said = "What the simulator says of windows that this engine served is on [a page of its own](../fidelity.md)."
        return ["## As simulated", "", *prose(said)]
    windows = read(f"{card}/windows-qwen3-0.6b.json")
    metrics = ("ttft_s.p50", "ttft_s.p99", "tpot_s.mean", "tpot_s.p99", "e2e_s.mean", "output_tok_s")
    served = {name: window for name, window in windows.items() if isinstance(window, dict) and "replay" in window}
    assert all(window["replay"]["exact"] for window in served.values()), "a window was not decided again"
    rows = [
        [name, str(window["requests"]), *(f"{window['metrics'][metric]['error']:+.1%}" for metric in metrics)]
        for name, window in served.items()
    ]
    device = {steps: windows["residuals"][steps]["device"]["mean_abs"] for steps in ("decode", "prompt")}
    waits = [window["metrics"]["device_wait_share"]["real"] for window in served.values()]
    return [
        "## As simulated",
        "",
        *prose(
            f"""`twinserve profile` measures steps as this path runs them; the model that ships as `--latency
            qwen3-0.6b-{card}` comes of it, and held-out steps take on average {device["decode"]:.1%} (decodes) and
            {device["prompt"]:.1%} (with prompts) more or less than it says. Windows of public traces, served in real
            time just after, against what the simulator says with that model: its errors.""",
        ),
        *table(["window", "requests", *metrics], rows, numbers=True),
        *prose(
            f"""All their decisions are made again from the facts. The device waited for the host
            {min(waits):.1%} to {max(waits):.1%} of the time. What is missed where many requests come at once are steps
            with prompts. The last few tokens of a long prompt are one such: few programs attend to them, each of which
            walks the whole context, while the model counts pairs of tokens, of which there are few.""",
        ),
    ]


def _larger(path: Path) -> list[str]:
    """Steps of a larger shape, where they have been measured."""
    if not path.exists():
        return []
    measured = json.loads(path.read_text(encoding="utf-8"))
    steps = measured["steps"]
    rows = [
        [
            f"{step['decodes']} x {step['context']}",
            f"{step['us'] / 1e3:.2f}",
            f"{step['limit_us'] / 1e3:.2f}",
            f"{step['us'] / step['limit_us']:.2f}",
            f"{step['decodes'] / step['us'] * 1e6:,.0f}",
        ]
        for step in steps
    ]
    tokens = measured.get("batch1_ms_per_token")
    alone = f" One request has a token in {median(tokens):.2f} ms ({spread(tokens)})." if tokens else ""
    return [
        "## A larger model",
        "",
        *prose(
            f"""Decode steps of the {measured["shape"]} shape with random weights in bfloat16, by
            `{measured["command"]}`. A step reads {steps[0]["weight_bytes"] / 1e9:.1f} GB of weights; the limit is its
            weights and KV read once at {measured["read_gb_s"]:,.0f} GB/s.{alone}"""
        ),
        *table(["rows x context", "step, ms", "bytes alone, ms", "step / bytes", "tokens/s"], rows, numbers=True),
    ]


def _formats(folder: Path) -> list[str]:
    """W256 with numbers in float8, by the shapes with which it was measured."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("w256-*.json"))]
    if not files:
        return []
    rates = [{name: [one["output_tok_s"] for one in runs] for name, runs in file["formats"].items()} for file in files]
    medians = [{name: median(repeats) for name, repeats in own.items()} for own in rates]
    rows = [
        [name, *(f"{own[name]:,.0f} ({own[name] / own['bfloat16']:.2f})" for own in medians)] for name in medians[0]
    ]
    commands = "; ".join(f"`{file['command']}` (commit {file['commit']})" for file in files)
    return [
        "## Numbers in float8",
        "",
        *prose(
            f"""W256, output tokens/s, the median of {len(rates[0]["bfloat16"])}, the first among them; in brackets
            against bfloat16. By {commands}."""
        ),
        *table(["", *(file["shape"] for file in files)], rows, numbers=True),
    ]


def _ablation(card: str, without: dict[str, Any] | None, *, formats: bool) -> list[str]:
    """W256, and one request where that was measured, with one thing switched off.

    Args:
        formats: W256 was measured with numbers in float8 as well, later.
    """
    measured = read(f"{card}/throughput.json")
    runs = measured["ablation"]
    rates = {name: median(one["output_tok_s"] for one in repeats) for name, repeats in runs.items()}
    rows = [[name, f"{rate:,.0f}", f"{rate / rates['as it is'] - 1:+.1%}"] for name, rate in rates.items()]
    return [
        "## What each thing buys",
        "",
        *prose(
            f"""W256 with one thing switched off, at commit {measured["commit"]}, repeats:
            {min(map(len, runs.values()))}; a difference of some percent may be chance (see the repeats above; [cycle
            8](../cycles/cycle8.md) has the spread, by card)."""
        ),
        *table(["", "output tokens/s", "against the whole"], rows),
        *(prose("Numbers in float8 have kernels of their own since; how they do is above.") if formats else []),
        *_one_request(without),
    ]


def _one_request(without: dict[str, Any] | None) -> list[str]:
    if without is None:
        return []
    rows = [[name, f"{median(repeats):.2f}", spread(repeats)] for name, repeats in without.items()]
    return ["One request, milliseconds a token:", "", *table(["", "measured", "repeats"], rows)]


def _kernels(kernels: dict[str, Any]) -> list[str]:
    step, bytes_per_us = step_of(kernels), kernels["read_gb_s"] * 1e3
    us = kernel_us(step)
    attention = us["decode"] / (step["kv_bytes"] / bytes_per_us)
    products = us[PRODUCTS] / (step["weight_bytes"] / bytes_per_us)
    attending = ["limit_us", "ours, blocks of 16", "ours, blocks of 256", "flash-attn, blocks of 256"]
    of_prompts = ["prompts", "ours_us", "ours_tflop_s", "flash-attn_us", "flash-attn_tflop_s"]
    return [
        "## Where a step's time goes",
        "",
        *prose(
            f"""Decodes by number and context: the step, what reading its weights and KV once would take at the
            {kernels["read_gb_s"]:,.0f} GB/s that this card reads, and the kernels, all in microseconds."""
        ),
        *table(
            ["rows x context", "step", "bytes alone", "attention", "matrix products", "norms", "rotation and store",
             "activation"],
            map(step_cells, kernels["steps, triton"]),
        ),
        "Attention alone, a layer, in microseconds:",
        "",
        *table(
            ["rows x context", "bytes alone", *attending[1:]],
            [[str(row[name]) for name in ("batch x context", *attending)] for row in kernels["decode_attention"]],
        ),
        *table(
            ["prompts", "ours, us", "TFLOP/s", "flash-attn, us", "TFLOP/s"],
            [[str(row[name]) for name in of_prompts] for row in kernels["prefill_attention"]],
        ),
        *prose(
            f"""At 131 rows attention takes {attention:.2f} times what its bytes would, and the matrix products
            {products:.1f} times what their weights would; each product is too short to fill the card. Kernels
            that start while the one before them runs are counted from their start, so they may add up to more than the
            step."""
        ),
    ]  # fmt: skip


def _eight_bits() -> list[str]:
    """Weights in eight bits, and the perplexity that they leave where that was measured."""
    measured = [found for place in ("cpu", *CARDS) if (found := read_if_there(f"{place}/quantization.json"))]
    rows = [
        [
            f"{one['model']} in {one['dtype']} on {one['device']}",
            *(f"{kind['perplexity']:.2f}, {kind['memory_mb']:,.0f} MB" for kind in one["weights"].values()),
        ]
        for one in measured
    ]
    return [
        "## Weights in eight bits",
        "",
        *prose(
            """`--quantization int8` keeps linear layers and the embedding in int8 ([cycle 7](cycles/cycle7.md)): half
            the memory of 16 bits. `--quantization fp8` keeps the linear layers of the decoder
            layers in float8 (e4m3) with a scale a row, and leaves embedding, norms and output projection alone, as vLLM
            does. What these layers are given is rounded to float8 as well, each token by its own largest number, so
            that the matrix units multiply float8 by float8 (`torch._scaled_mm`); the kernel that makes it rounds it:
            norm, gated activation, or one behind attention. On CUDA that takes compute capability 8.9, bfloat16, and
            layers of multiples of 16; a CPU computes the same numbers in float32.""",
            """A checkpoint that is in float8 already is loaded as it is, whatever `--quantization` says but int8:
            compressed-tensors' `float-quantized` with a scale a channel or a tensor, and `quant_method` `fp8` with a
            scale a tensor. Scales of activations in it (`input_scale`) are not used: each token has its own. Scales a
            block, of 128 by 128 say, scales of keys and values, and layers that were left out are refused by name.""",
            f"""Perplexity of [a text](../tests/data/held_out.txt) of {measured[0]["tokens"]} tokens and the
            model's megabytes, by `{measured[0]["command"]}`:""",
        ),
        *table(["", *(f"weights {name}" for name in measured[0]["weights"])], rows),
    ]


def _ending() -> list[str]:
    return [
        "## Right tokens",
        "",
        *prose(
            """`tests/gpu` holds, on the device: in float32 every token is transformers' own, whatever is chunked,
            shared or preempted around it, at both depths; in bfloat16 log-probabilities are as near to float32 as those
            of transformers; fifty decode steps are fifty graph launches, in which nothing waits but for the tokens of
            the step before; a seeded request draws the same tokens whatever runs beside it, as far as the batch's size
            changes no logit by rounding."""
        ),
        "## Drafts",
        "",
        *prose(
            """With `--speculative-config` a step verifies drafts ([policies.md](policies.md)): a row has the last known
            token and up to k drafts behind it. In graphs each of these tokens attends as a decode does, over the
            context up to itself; all keys and values of a layer are written before any token attends. So a step
            without prompts is one graph launch, of which graph only the number of tokens decides; one with prompts is a
            graph as others with prompts are. Sampling and comparing, behind the model, are not captured. What of a step
            was accepted is worked out on the device. Drafts that are looked up in the text are proposed by the host,
            which waits for what each step samples: what is saved is steps. A model that drafts runs in graphs too: one
            for what the step has computed, and then one a draft, each of which leaves on the device what the next
            begins with; and the next step is laid out and launched before the host knows what was accepted, as far as
            no sequence has left, and no row has a seed, penalties or log-probabilities. [When that
            pays](studies/speculation.md) was measured on an H200. `tests/gpu/test_speculation.py` compares the tokens
            with those of eager steps."""
        ),
        "## Not there yet",
        "",
        *prose(
            """A short chunk behind a long context is attended by few programs: the context is not split for it, as it
            is for decodes."""
        ),
    ]


def spread(values: list[float]) -> str:
    return f"{min(values):g} to {max(values):g}, of {len(values)}"


def kernel_us(step: dict[str, Any]) -> dict[str, float]:
    """Microseconds of a step in each of its kernels."""
    return {kernel["kernel"]: kernel["us"] for kernel in step["kernels"]}


def products_us(us: dict[str, float]) -> float:
    return us.get(PRODUCTS, 0.0) + us.get(FEW_PRODUCTS, 0.0)


def step_cells(step: dict[str, Any]) -> list[str]:
    us = kernel_us(step)
    attention = sum(us.get(name, 0.0) for name in ("decode", "attend", "merge"))
    others = (us.get(name, 0.0) for name in ("rms_norm", "rotate_and_store", "silu_and_mul"))
    cells = (step["us"], step["limit_us"], round(attention, 1), round(products_us(us), 1), *others)
    return [f"{step['decodes']} x {step['context']}", *map(str, cells)]


def picture(events: list[dict[str, Any]]) -> str:
    """Host and device over some steps, as SVG."""
    begins = [event["start_us"] for event in events if event["name"] == "decide"]
    first = begins[len(begins) - STEPS_SHOWN - 1]
    end = begins[-1]
    width, left, top = 960, 70, 26
    scale = (width - left - 10) / (end - first)
    drawing = Drawing(width, 190, f"Host and device over {STEPS_SHOWN} decode steps")
    for lane, y in (("host", top), ("device", top + 50)):
        drawing.text(8, y + 24, lane)
        for event in events:
            start, stop = max(event["start_us"], first), min(event["start_us"] + event["us"], end)
            if event["lane"] == lane and start < stop:
                colour = HOST[event["name"]] if lane == "host" else COLOURS.get(event["name"], OTHER)
                drawing.rectangle(left + (start - first) * scale, y, max((stop - start) * scale, 0.3), 38, colour)
    for number in range(int((end - first) // 1000) + 1):
        x = left + number * 1000 * scale
        drawing.line([(x, top + 92), (x, top + 98)], INK)
        drawing.text(x, top + 112, f"{number} ms", anchor="middle")
    x, y = 8, top + 134
    for name, colour in (HOST | COLOURS | {"other": OTHER}).items():
        label = name.replace("_", " ")
        if x + 24 + 7 * len(label) > width:
            x, y = 8, y + 18
        drawing.rectangle(x, y - 10, 11, 11, colour)
        drawing.text(x + 15, y, label)
        x += 28 + 7 * len(label)
    return drawing.svg()


if __name__ == "__main__":
    sys.exit(main())
