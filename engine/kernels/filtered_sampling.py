"""Sampling with top-k, top-p and min-p on the device, without a sort.

Which tokens a row keeps is a question of how far their logits lie below its largest. That distance is no negative
number, so the bits of its float32 are an integer that rises with it: the distance at which as many tokens are kept as
top-k says, or as much probability as top-p, is searched among the integers, eight parts at a time.

What is searched is short. As many blocks of the vocabulary as top-k keeps tokens have a largest logit each, so none of
the tokens that are kept lies below the least of these; where that says nothing, a few rounds among all logits do. What
is left is copied, in the order of the vocabulary, unless it is more than there is room for: then the row's own logits
are searched.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from twinserve.engine.kernels.sampling import BLOCK, uniform_at
from twinserve.engine.online import NOT_SAMPLED
from twinserve.engine.sampler import GREEDY_BELOW

ROOM = 2048
"""Tokens of a row that are copied."""

ROUGH = tl.constexpr(4)
"""Rounds of a search among all of a row's logits, whose result is then searched further where it fits the room."""


@triton.jit
def _distances(source, length, highest, start, BLOCK: tl.constexpr):
    """A block of tokens, how far their logits lie below the largest, and the bits of that; infinity behind the end."""
    places = start + tl.arange(0, BLOCK)
    x = tl.load(source + places, places < length, other=float("-inf")).to(tl.float32)
    distance = highest - x
    return places, distance, distance.to(tl.int32, bitcast=True)


@triton.jit
def _weight_within(source, length, highest, temperature, upper, BLOCK: tl.constexpr):
    """The weight of the tokens within a distance of these bits, where the most probable token weighs 1."""
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        places, distance, bits = _distances(source, length, highest, start, BLOCK)
        found += tl.where(bits <= upper, tl.exp(-distance / temperature), 0.0)
    return tl.sum(found, axis=0)


@triton.jit
def _search(
    source, length, highest, temperature, upper, goal,
    BY_WEIGHT: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The least bits of a distance within which at least `goal` tokens lie, or what they weigh, as far as so many
    rounds tell, of which each leaves an eighth; and what lies nearer. `upper` where there is not so much within."""
    parts = tl.arange(0, 8)
    low, high, below, done = -1, upper, 0.0, 0
    while (high - low > 1) & (done < ROUNDS):
        pivots = tl.minimum(low + (high - low + 7) // 8 * (parts + 1), high)
        found = tl.zeros((8, BLOCK), tl.float32)
        for start in range(0, length, BLOCK):
            places, distance, bits = _distances(source, length, highest, start, BLOCK)
            weight = tl.where(places < length, tl.exp(-distance / temperature) if BY_WEIGHT else 1.0, 0.0)
            found += tl.where(bits[None, :] <= pivots[:, None], weight[None, :], 0.0)
        sums = tl.sum(found, axis=1)
        first = tl.min(tl.where(sums >= goal, parts, 8), axis=0)
        before = parts == first - 1
        if first > 0:
            low = tl.sum(tl.where(before | ((first == 8) & (parts == 7)), pivots, 0), axis=0)
            below = tl.sum(tl.where(before, sums, 0.0), axis=0)
        high = tl.where(first == 8, high, tl.sum(tl.where(parts == first, pivots, 0), axis=0))
        done += 1
    return high, below


@triton.jit
def _filtered_kernel(
    logits, rows, temperatures, filters, seeds, tops, sums, near, near_places, out, tokens, computed, size, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROOM: tl.constexpr, GREEDY_BELOW: tl.constexpr,
    NOT_SAMPLED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(filters + 3 * row)
    top_p = tl.load(filters + 3 * row + 1).to(tl.float32, bitcast=True)
    min_p = tl.load(filters + 3 * row + 2).to(tl.float32, bitcast=True)
    keeps_all = (top_k <= 0) & (top_p >= 1.0) & (min_p <= 0.0)
    if keeps_all | (temperature < GREEDY_BELOW) | (tl.load(out + index) == NOT_SAMPLED):
        return

    own = logits + index * size
    blocks = tl.arange(0, BLOCKS)
    top = tl.load(tops + index * num_blocks + blocks, blocks < num_blocks, other=float("-inf"))
    highest = tl.max(top, axis=0)
    farthest = highest - top
    weights = tl.load(sums + index * num_blocks + blocks, blocks < num_blocks, other=0.0)
    total = tl.sum(tl.exp(-farthest / temperature) * weights, axis=0)

    # Within which distance everything lies that is kept: first what is known of the blocks, else roughly.
    limit = tl.full((), float("inf"), tl.float32)
    if min_p > 0.0:
        limit = -tl.log(min_p) * temperature
    upper = limit.to(tl.int32, bitcast=True)
    nearest = limit
    if (top_k > 0) & (top_k <= num_blocks):
        counts = tl.sum((farthest[None, :] <= farthest[:, None]).to(tl.int32), axis=1)
        nearest = tl.minimum(limit, tl.min(tl.where(counts >= top_k, farthest, float("inf")), axis=0))
    elif top_k > 0:
        rough, nearer = _search(own, size, highest, temperature, upper, top_k.to(tl.float32), False, ROUGH, BLOCK)
        nearest = rough.to(tl.float32, bitcast=True)
    elif min_p <= 0.0:
        rough, nearer = _search(own, size, highest, temperature, upper, top_p * total, True, ROUGH, BLOCK)
        nearest = rough.to(tl.float32, bitcast=True)

    # Copy what lies so near.
    count = 0
    for block in range(num_blocks):
        if highest - tl.load(tops + index * num_blocks + block) <= nearest:
            places, distance, bits = _distances(own, size, highest, block * BLOCK, BLOCK)
            is_near = (distance <= nearest) & (places < size)
            target = count + tl.cumsum(is_near.to(tl.int32), axis=0) - 1
            is_kept = is_near & (target < ROOM)
            tl.store(near + index * ROOM + target, tl.load(own + places, is_kept), is_kept)
            tl.store(near_places + index * ROOM + target, places, is_kept)
            count += tl.sum(is_near.to(tl.int32), axis=0)
    tl.debug_barrier()
    source, length = own, size
    if count <= ROOM:
        source, length = near + index * ROOM, count

    # Top-k, which keeps all that are as probable as the last.
    if top_k > 0:
        upper, nearer = _search(source, length, highest, temperature, upper, top_k.to(tl.float32), False, 32, BLOCK)
    # Top-p, which of equal logits keeps those of the lower ids.
    num_equal = size
    if top_p < 1.0:
        if (top_k > 0) | (min_p > 0.0):
            total = _weight_within(source, length, highest, temperature, upper, BLOCK)
        goal = top_p * total
        upper, nearer = _search(source, length, highest, temperature, upper, goal, True, 32, BLOCK)
        each = tl.exp(-upper.to(tl.float32, bitcast=True) / temperature)
        num_equal = tl.maximum(1, tl.ceil((goal - nearer) / each).to(tl.int32))

    # Draw among them, in the order of the vocabulary.
    target = tl.full((), 0.0, tl.float64)
    token = -1
    for walk in tl.static_range(2):
        mass, left, start = tl.full((), 0.0, tl.float64), num_equal, 0
        while (start < length) & (token < 0):
            places, distance, bits = _distances(source, length, highest, start, BLOCK)
            is_equal = (bits == upper) & (places < length)
            weight = tl.where((bits < upper) | is_equal, tl.exp(-distance / temperature), 0.0).to(tl.float64)
            equal = tl.sum(is_equal.to(tl.int32), axis=0)
            if equal > left:
                weight = tl.where(is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) > left), 0.0, weight)
            inside = tl.sum(weight, axis=0)
            if (walk == 1) & (mass + inside > target):
                # Rounding can leave the number beyond the sum: then it is the last token that can be drawn.
                beyond = tl.max(tl.where(weight > 0.0, places, 0), axis=0)
                is_behind = (mass + tl.cumsum(weight, axis=0) > target) & (weight > 0.0)
                token = tl.min(tl.where(is_behind, places, beyond), axis=0)
            mass += inside
            left = tl.maximum(left - equal, 0)
            start += BLOCK
        target = mass * uniform_at(seeds, row, tl.load(computed + row))
    if count <= ROOM:
        token = tl.load(near_places + index * ROOM + token)
    tl.store(out + index, token)
    tl.store(tokens + row, token)


def sample_filtered_rows(
    logits: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    filters: Tensor,
    seeds: Tensor,
    tokens: Tensor,
    computed: Tensor,
    out: Tensor,
    blocks: tuple[Tensor, Tensor],
    near: tuple[Tensor, Tensor],
) -> None:
    """Sample anew what `sample_rows` has sampled for rows that do not keep all of the vocabulary.

    Args:
        logits, rows, temperatures, seeds, tokens, computed, out: as `sample_rows` has had and left them.
        filters: [device rows, 3], int32: top-k, 0 for all, and the bits of top-p and min-p in float32; as in
            `twinserve.engine.sampler.SamplingPlan`.
        blocks: what `sample_rows` gave.
        near: [at least sampled, ROOM], of the dtype of the logits and int32; room for tokens.
    """
    count, size = logits.shape
    num_blocks = triton.cdiv(size, BLOCK)
    _filtered_kernel[(count,)](
        logits, rows, temperatures, filters, seeds, *blocks, *near, out, tokens, computed, size, num_blocks, BLOCK,
        triton.next_power_of_2(num_blocks), ROOM, GREEDY_BELOW, NOT_SAMPLED, num_warps=8, maxnreg=128,
    )  # fmt: skip
