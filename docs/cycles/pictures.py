"""The pictures of the nine cycles, of what stands beside them, and of the design.

    python docs/cycles/pictures.py [--check]

Writes cycle1.svg ... cycle9.svg, speculation.svg, tensor-parallel.svg and step.svg into the folder beside it. With
--check nothing is written, and the exit status is 1 where a picture is another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from svg import INK, MUTED, PAPER, Drawing

from twinserve.policies import BlockManager, SamplingParams, Scheduler, Sequence
from twinserve.sim.model_configs import SHAPES
from twinserve.sim.shapes import Attention, FeedForward

FOLDER = Path(__file__).with_name("pictures")
NOW, KEPT, AGAIN = "#93c5fd", "#e5e7eb", "#fcd34d"
OF_SEQUENCE = {"A": "#93c5fd", "B": "#86efac", "C": "#fca5a5", "D": "#fcd34d", "E": "#d8b4fe", "F": "#fdba74"}
WORDS = ["Hello", ",", "I", "am", "a", "model"]


def cycle1() -> Drawing:
    """Every step computes every token."""
    drawing = Drawing(640, 210, "Without a cache, every step computes the whole text again")
    _steps(drawing, before=AGAIN, computed=lambda known: known)
    _legend(drawing, 190, [(NOW, "computed for the first time"), (AGAIN, "computed again")])
    return drawing


def cycle2() -> Drawing:
    """Every step computes what no step has computed."""
    drawing = Drawing(640, 210, "With a KV cache, every token is computed once")
    _steps(drawing, before=KEPT, computed=lambda known: known if known == 3 else 1)
    _legend(drawing, 190, [(NOW, "computed for the first time"), (KEPT, "its keys and values are kept")])
    return drawing


def _steps(drawing: Drawing, *, before: str, computed: Callable[[int], int]) -> None:
    """A prompt of three words and three more steps; words of earlier steps have the colour `before`."""
    for step in range(4):
        known, y = 3 + step, 20 + 40 * step
        drawing.text(20, y + 18, "prefill" if step == 0 else f"decode {step}", color=MUTED)
        for place in range(known):
            is_new = step == 0 or place == known - 1
            drawing.box(90 + 68 * place, y, 60, 28, NOW if is_new else before, WORDS[place])
        count = computed(known)
        drawing.text(620, y + 18, f"{count} token{'s' * (count > 1)}", anchor="end", bold=True)


def _legend(drawing: Drawing, y: int, entries: list[tuple[str, str]]) -> None:
    """What the colours mean."""
    x = 90
    for color, meaning in entries:
        drawing.box(x, y - 10, 12, 12, color)
        drawing.text(x + 18, y, meaning, color=MUTED)
        x += 40 + 7 * len(meaning)


def cycle3() -> Drawing:
    """The longest length in one piece for each sequence; blocks that are taken when they are needed."""
    drawing = Drawing(640, 300, "KV memory reserved in one piece for each sequence, and in blocks of a pool")
    lengths, longest, block = {"A": 9, "B": 3, "C": 6}, 16, 4
    drawing.text(20, 26, "In one piece: the longest length for each, before anything is known of it", bold=True)
    for row, (name, length) in enumerate(lengths.items()):
        drawing.text(20, 57 + 26 * row, name, bold=True)
        for place in range(longest):
            is_used = place < length
            fill = OF_SEQUENCE[name] if is_used else PAPER
            drawing.box(40 + 24 * place, 40 + 26 * row, 22, 22, fill, dashed=not is_used)
    used = sum(lengths.values())
    drawing.text(620, 84, f"{used} of {len(lengths) * longest} places used", anchor="end", color=MUTED)
    drawing.text(20, 148, "In blocks: a block of the pool when the one before it is full", bold=True)
    tables = {"A": [0, 3, 5], "B": [1], "C": [2, 6]}
    for row, (name, table) in enumerate(tables.items()):
        drawing.text(20, 176 + 22 * row, f"{name}: block table {table}", color=INK)
    owners = {number: (name, index) for name, table in tables.items() for index, number in enumerate(table)}
    for number in range(8):
        x = 20 + 76 * number
        drawing.text(x + 34, 286, f"block {number}", anchor="middle", color=MUTED)
        name, index = owners.get(number, ("", 0))
        for place in range(block):
            is_used = bool(name) and index * block + place < lengths[name]
            drawing.box(x + 17 * place, 246, 16, 24, OF_SEQUENCE[name] if is_used else PAPER, dashed=not is_used)
    taken = block * len(owners)
    drawing.text(620, 198, f"{used} of {taken} places used, 2 blocks free", anchor="end", color=MUTED)
    return drawing


def cycle4() -> Drawing:
    """Three seats, six requests: a batch that waits for its longest, and one that changes at every step."""
    drawing = Drawing(640, 290, "A batch that waits for its longest request, and a continuous one")
    lengths = {"A": 3, "B": 8, "C": 5, "D": 6, "E": 3, "F": 4}
    names = list(lengths)
    drawing.text(20, 26, "Batch after batch", bold=True)
    static = {name: (index % 3, 0 if index < 3 else 8) for index, name in enumerate(names)}
    _seats(drawing, 40, lengths, static)
    drawing.text(20, 156, "Continuous", bold=True)
    free_at, continuous = [0, 0, 0], {}
    for name in names:
        seat = free_at.index(min(free_at))
        continuous[name] = (seat, free_at[seat])
        free_at[seat] += lengths[name]
    _seats(drawing, 170, lengths, continuous)
    drawing.arrow(20, 268, 560, 268)
    drawing.text(570, 272, "steps", color=MUTED)
    return drawing


def _seats(drawing: Drawing, y: int, lengths: dict[str, int], places: dict[str, tuple[int, int]]) -> None:
    """Requests as bars, each in its seat from its first step on."""
    last = max(start + lengths[name] for name, (_, start) in places.items())
    for seat in range(3):
        drawing.box(20, y + 28 * seat, 34 * last, 24, PAPER, dashed=True)
    for name, (seat, start) in places.items():
        drawing.box(20 + 34 * start, y + 28 * seat, 34 * lengths[name], 24, OF_SEQUENCE[name], name)
    drawing.text(34 * last + 34, y + 44, f"{last} steps", bold=True)


def cycle5() -> Drawing:
    """Two requests with one system prompt hold the same blocks."""
    drawing = Drawing(640, 250, "Two requests whose prompts begin alike hold the same blocks")
    prompts = {"first": ["system 1/2", "system 2/2", "question A"], "later": ["system 1/2", "system 2/2", "question B"]}
    colors = {"first": ["#93c5fd", "#93c5fd", "#86efac"], "later": [KEPT, KEPT, "#fcd34d"]}
    pool_x = {"system 1/2": 90, "system 2/2": 240, "question A": 390, "question B": 510}
    for y, name in ((40, "first"), (186, "later")):
        drawing.text(20, y + 18, name, bold=True)
        for place, part in enumerate(prompts[name]):
            x = 90 + 150 * place if part != "question B" else pool_x[part]
            drawing.box(x, y, 110, 28, colors[name][place], part)
            held = pool_x[part] + 14
            drawing.arrow(held, y + 28 if y < 100 else y, held, 104 if y < 100 else 144)
    drawing.text(20, 128, "pool", bold=True)
    blocks = [
        ("block 7", "h1 = hash(tokens)"),
        ("block 2", "h2 = hash(h1, tokens)"),
        ("block 5", ""),
        ("block 9", ""),
    ]
    for (part, x), (name, chain) in zip(pool_x.items(), blocks, strict=True):
        drawing.box(x, 108, 110, 32, "#bfdbfe" if part.startswith("system") else PAPER, name)
        drawing.text(x + 24, 166, chain, color=MUTED)
    drawing.text(90, 26, "computed by the first request: 3 blocks", color=MUTED)
    drawing.text(90, 236, "found by hash: 2 blocks, held by both (ref_count 2); computed: 1 block", color=MUTED)
    return drawing


def cycle6() -> Drawing:
    """All scores in memory, and a tile of them at a time."""
    drawing = Drawing(640, 270, "Attention with all scores in memory, and a tile at a time")
    size, cell = 8, 20
    for left, heading, tiled in ((60, "By the definition", False), (380, "Flash attention", True)):
        drawing.text(left, 28, heading, bold=True)
        for row in range(size):
            for column in range(row + 1):
                in_tile = row // 2 == 2 and column // 2 == 1
                is_done = row // 2 < 2 or (row // 2 == 2 and column // 2 < 1)
                fill = AGAIN if not tiled else NOW if in_tile else PAPER if is_done else KEPT
                drawing.box(left + cell * column, 50 + cell * row, cell - 1, cell - 1, fill)
    drawing.text(140, 44, "keys", color=MUTED)
    drawing.text(50, 130, "queries", anchor="end", color=MUTED)
    drawing.text(60, 236, "every score is written to memory, read for the", color=MUTED)
    drawing.text(60, 252, "softmax, written again and read for the sum", color=MUTED)
    drawing.text(380, 236, "one tile of scores on the chip; of the tiles", color=MUTED)
    drawing.text(380, 252, "before it, a running maximum and sum", color=MUTED)
    return drawing


def cycle7() -> Drawing:
    """A row of weights, its scale and its int8 numbers."""
    drawing = Drawing(640, 230, "A row of weights as int8 numbers and a scale")
    weights = [0.30, -0.12, 0.05, -0.62, 0.41]
    scale = max(map(abs, weights)) / 127
    numbers = [round(weight / scale) for weight in weights]
    rows = [
        ("weights, 16 bits each", [f"{weight:.4f}" for weight in weights], KEPT),
        ("int8, 8 bits each", [str(number) for number in numbers], NOW),
        ("int8 x scale", [f"{number * scale:.4f}" for number in numbers], KEPT),
    ]
    for row, (name, cells, color) in enumerate(rows):
        y = 26 + 66 * row
        drawing.text(20, y + 20, name, bold=True)
        for place, cell in enumerate(cells):
            drawing.box(180 + 84 * place, y, 76, 30, color, cell)
    drawing.arrow(218, 58, 218, 88)
    drawing.text(230, 78, f"divided by scale = max |weight| / 127 = {scale:.5f}, rounded", color=MUTED)
    drawing.arrow(218, 124, 218, 154)
    drawing.text(230, 144, "multiplied again where they are used", color=MUTED)
    worst = max(abs(weight - number * scale) for weight, number in zip(weights, numbers, strict=True))
    drawing.text(180, 212, f"off by at most {worst:.5f}, less than half a scale", color=MUTED)
    return drawing


def cycle8() -> Drawing:
    """Two steps of five kernels: launched one by one, as a graph, and as a graph that is launched ahead."""
    drawing = Drawing(700, 330, "Kernels launched one by one, as one graph, and one step ahead")
    kernels, launch, kernel, decide = 5, 34, 22, 30
    headings = ["Kernel by kernel", "One graph a step", "One graph a step, one step ahead"]
    for row, heading in enumerate(headings):
        y = 34 + 96 * row
        drawing.text(20, y - 10, heading, bold=True)
        for lane, place in (("host", y), ("device", y + 34)):
            drawing.text(20, place + 17, lane, color=MUTED)
        host = device = 80
        for step in range(2):
            if row < 2:
                host = max(host, device)
            drawing.box(host, y, decide - 2, 24, AGAIN)
            host += decide
            for number in range(kernels if row == 0 else 1):
                drawing.box(host, y, (launch if row == 0 else launch // 2) - 2, 24, OF_SEQUENCE["E"])
                host += launch if row == 0 else launch // 2
                begins = [number] if row == 0 else range(kernels)
                for _ in begins:
                    device = max(device, host)
                    drawing.box(device, y + 34, kernel - 1, 24, NOW if step == 0 else OF_SEQUENCE["B"])
                    device += kernel
        drawing.text(device + 8, y + 51, "both steps done", color=MUTED)
    entries = [(AGAIN, "decide"), (OF_SEQUENCE["E"], "launch"), (NOW, "first step"), (OF_SEQUENCE["B"], "second step")]
    _legend(drawing, 318, entries)
    return drawing


def cycle9() -> Drawing:
    """Facts come in from one of three worlds, decisions go out, and a record keeps both."""
    drawing = Drawing(700, 250, "One Core; facts come from an engine, a record or a simulator")
    worlds = [("engine", "a model and a clock"), ("replay", "what was recorded"), ("simulator", "a latency model")]
    for row, (name, meaning) in enumerate(worlds):
        y = 40 + 62 * row
        drawing.box(20, y, 150, 40, [NOW, OF_SEQUENCE["D"], OF_SEQUENCE["B"]][row])
        drawing.text(95, y + 17, name, anchor="middle", bold=True)
        drawing.text(95, y + 32, meaning, anchor="middle", color=MUTED)
        drawing.arrow(170, y + 20, 300, 122)
    drawing.text(236, 46, "facts: arrivals, times,", color=MUTED)
    drawing.text(236, 61, "tokens, aborts", color=MUTED)
    drawing.box(304, 84, 130, 76, KEPT)
    drawing.text(369, 112, "Core", anchor="middle", bold=True)
    drawing.text(369, 130, "decides a step", anchor="middle", color=MUTED)
    drawing.text(369, 146, "reads no clock", anchor="middle", color=MUTED)
    drawing.arrow(434, 122, 520, 122)
    drawing.text(440, 112, "decisions", color=MUTED)
    drawing.box(524, 84, 150, 76, PAPER)
    drawing.text(599, 108, "record", anchor="middle", bold=True)
    drawing.text(599, 126, "facts, and a digest", anchor="middle", color=MUTED)
    drawing.text(599, 142, "of each decision", anchor="middle", color=MUTED)
    drawing.text(20, 236, "The same facts give the same decisions; a replay names the first that differs.", color=MUTED)
    return drawing


def speculation() -> Drawing:
    """Three passes over four drafts each: what was drafted, what the model chose, and what came of it."""
    text = ["The", "cat", "sat", "on", "the", "mat", "and", "fell", "asleep", "in", "the", "sun", "."]
    drafted = ["sat on the rug", "and then slept at", "asleep in the sun"]
    drawing = Drawing(760, 310, "Drafts that are verified in one pass: accepted as far as the model says the same")
    known = 2
    for row, drafts in enumerate(words.split() for words in drafted):
        y, x = 34 + 88 * row, 170
        right = next((n for n, word in enumerate(drafts) if word != text[known + n]), len(drafts))
        drawing.text(20, y - 8, " ".join(text[:known]) + " …", color=MUTED)
        drawing.text(20, y + 18, "drafts")
        drawing.text(20, y + 50, "the model, one pass")
        for place, word in enumerate(drafts):
            is_right, is_seen = place < right, place <= right
            fill = OF_SEQUENCE["B"] if is_right else OF_SEQUENCE["C"] if is_seen else PAPER
            drawing.box(x + 92 * place, y, 86, 28, fill, word, dashed=not is_seen)
        for place in range(right + 1):
            fill = OF_SEQUENCE["B"] if place < right else NOW
            drawing.box(x + 92 * place, y + 32, 86, 28, fill, text[known + place])
        known += right + 1
        drawing.text(740, y + 36, f"{right + 1} tokens", anchor="end", bold=True)
    entries = [
        (OF_SEQUENCE["B"], "accepted"),
        (OF_SEQUENCE["C"], "rejected"),
        (PAPER, "behind it, of no use"),
        (NOW, "the model's own token"),
    ]
    _legend(drawing, 300, entries)
    return drawing


def tensor_parallel() -> Drawing:
    """A layer on two ranks: which weights lie where, and what is summed; by the shape of SmolLM2-135M on three."""
    ranks, colors = 3, [OF_SEQUENCE[name] for name in "ABD"]
    shape = SHAPES["smollm2-135m"].layers[0]
    attention, network = shape.mixer, shape.network
    assert isinstance(attention, Attention) and isinstance(network, FeedForward)
    drawing = Drawing(800, 320, f"A layer of SmolLM2-135M on {ranks} ranks: what is split, and what is summed")
    # Each matrix: its name, where it stands, its width and height, whether it is split by columns, and what that means.
    heads = f"{attention.num_heads // ranks} query heads, {attention.num_kv_heads // ranks} KV head"
    inner = f"{network.inner // ranks} of {network.inner}"
    matrices = [
        ("q, k, v", 90, 150, 84, True, f"{heads} each"),
        ("output", 280, 84, 150, False, "the rows of its heads"),
        ("gate, up", 450, 150, 84, True, f"{inner} each"),
        ("down", 640, 84, 150, False, "the rows of those"),
    ]
    for name, x, width, height, by_columns, meaning in matrices:
        y = 150 - height // 2
        drawing.text(x + width // 2, 56, name, anchor="middle", bold=True)
        for rank, color in enumerate(colors):
            if by_columns:
                drawing.box(x + rank * width // ranks, y, width // ranks - 2, height, color, str(rank))
            else:
                drawing.box(x, y + rank * height // ranks, width, height // ranks - 2, color, str(rank))
        drawing.text(x + width // 2, 252, meaning, anchor="middle", color=MUTED)
        how = "split by what it gives" if by_columns else "split by what it takes"
        drawing.text(x + width // 2, 272, how, anchor="middle", color=MUTED)
    drawing.text(20, 154, "hidden", color=MUTED)
    for begin, end in ((66, 86), (242, 276), (366, 446), (602, 636), (726, 786)):
        drawing.arrow(begin, 150, end, 150)
    for x in (406, 756):
        drawing.text(x, 140, "sum", anchor="middle", bold=True)
    drawing.text(20, 26, "Every rank has all of the hidden state, and a part of each matrix", bold=True)
    _legend(drawing, 306, [(color, f"rank {rank}") for rank, color in enumerate(colors)])
    return drawing


def step() -> Drawing:
    """One decision of the policies, as they make it: two decodes, the next piece of a prompt, and who waited."""
    block, budget = 4, 12
    scheduler = Scheduler(
        BlockManager(16, block),
        composition="mixed",
        max_num_batched_tokens=budget,
        enable_chunked_prefill=True,
        long_prefill_token_threshold=6,
    )
    for number, (prompt, max_tokens) in enumerate([(4, 6), (2, 6), (14, 6)]):
        scheduler.add(
            Sequence([100 * number + place for place in range(prompt)], SamplingParams(max_tokens=max_tokens))
        )
    first = scheduler.schedule()
    scheduler.postprocess(first, [7] * first.num_sampled)
    scheduler.add(Sequence([900, 901, 902, 903, 904], SamplingParams(max_tokens=6)))
    held = {seq: len(seq.block_table) for seq in scheduler.running}
    batch = scheduler.schedule()
    drawing = Drawing(720, 268, f"A step: {batch.num_tokens} tokens of {budget}, blocks of {block}")
    drawing.text(20, 26, "running, by admission", color=MUTED)
    drawing.text(165, 26, "tokens", color=MUTED)
    for x, name in ((560, "start"), (610, "tokens"), (665, "samples")):
        drawing.text(x, 26, name, anchor="middle", color=MUTED)
    for place, row in enumerate(batch.rows):
        y = 40 + 46 * place
        name = "admitted" if row in batch.admitted else "prompt, a chunk" if row.is_prompt else "decode"
        drawing.box(20, y, 24, 24, OF_SEQUENCE["ABCD"[place]], "ABCD"[place])
        drawing.text(52, y + 16, name)
        for token in range(row.seq.num_tokens):
            end = row.start + row.num_tokens
            x = 165 + 24 * token + 4 * (token // block)
            fill = KEPT if token < row.start else NOW if token < end else PAPER
            drawing.box(x, y, 22, 24, fill, dashed=token >= end)
        begun = len(row.seq.block_table) - held.get(row.seq, 0)
        if begun:
            drawing.text(
                165, y + 38, f"takes {begun} block{'s' * (begun > 1)}: {row.seq.block_table[-begun:]}", color=MUTED
            )
        for x, value in ((560, row.start), (610, row.num_tokens), (665, "yes" if row.samples else "no")):
            drawing.text(x, y + 16, str(value), anchor="middle")
    _legend(drawing, 248, [(KEPT, "computed before"), (NOW, "computed by this step"), (PAPER, "for later steps")])
    return drawing


PICTURES: dict[str, Callable[[], Drawing]] = {
    "cycle1.svg": cycle1,
    "cycle2.svg": cycle2,
    "cycle3.svg": cycle3,
    "cycle4.svg": cycle4,
    "cycle5.svg": cycle5,
    "cycle6.svg": cycle6,
    "cycle7.svg": cycle7,
    "cycle8.svg": cycle8,
    "cycle9.svg": cycle9,
    "speculation.svg": speculation,
    "tensor-parallel.svg": tensor_parallel,
    "step.svg": step,
}


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a picture is another")
    check = parsing.parse_args().check
    changed = []
    for name, draw in PICTURES.items():
        path, svg = FOLDER / name, draw().svg()
        if path.exists() and path.read_text(encoding="utf-8") == svg:
            continue
        changed.append(path)
        if not check:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(svg, encoding="utf-8")
    print(*changed, sep="\n", end="\n" * bool(changed))
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
