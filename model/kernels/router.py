"""What a router does with its logits, and the sorting of tokens by expert (Triton, with gradients): two kernels forward
and one backward, where torch launches some forty.

T tokens, E experts, K of a token. Scores, weights and their gradients are FP32, as in model/moe.py, the oracle.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import sum_of
from model.kernels.launch import ceil_div, launch, power_of_two

TILE = 2048  # scores at a time
PROGRAMS = 256  # at most: each reads the tokens per expert of all of them


class Choice(NamedTuple):
    """How experts are chosen and weighed; see TopkRouter."""

    top: int
    groups: int
    kept_groups: int
    normalised: bool
    scaling: float


class Chosen(NamedTuple):
    """Of T tokens; rows are their T K choices, sorted by expert, tokens in order within one."""

    row_weights: Tensor  # [T K] float32, with gradient
    weights: Tensor  # [T, K] float32, with gradient
    scores: Tensor  # [T, E] float32, with gradient
    experts: Tensor  # [T, K] int64
    counts: Tensor  # [E] int64, tokens per expert
    token: Tensor  # [T K] int64, of each row
    places: Tensor  # [T, K] int64, the row of each choice
    ends: Tensor  # [E] int32, rows ends[e-1]:ends[e] are expert e's
    differs: Tensor  # [T] bool, a replayed choice that is not the router's own


@triton.jit
def _column(tile, slot, k):
    """tile # [R, K] -> its column k # [R, 1]."""
    return tl.sum(tl.where(slot == k, tile, 0), 1)[:, None]


@triton.jit
def _choose_kernel(
    logits, bias, replay, scores, experts, weights, differs, held, T, E, turns,
    TOP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, NORMALISED: tl.constexpr, SCALING: tl.constexpr,
    REPLAY: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, GROUP_SLOTS: tl.constexpr,
):  # fmt: skip
    """`held` # [programs, E]: choices of each expert among a program's ROWS * turns tokens."""
    column, slot = tl.arange(0, WIDTH)[None, :], tl.arange(0, SLOTS)[None, :]
    lowest = float("-inf")
    found = tl.zeros([WIDTH], tl.int32)
    for turn in range(0, turns):
        token = ((tl.program_id(0) * turns + turn) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (token < T) & (column < E)
        score = tl.sigmoid(tl.load(logits + token * E + column, inside, other=0.0))
        tl.store(scores + token * E + column, score, inside)
        choice = score + tl.load(bias + column, column < E, other=0.0)
        # what is not a number is chosen, as torch's topk does, but never a column that is no expert
        choice = tl.where(column < E, tl.where(choice == choice, choice, float("inf")), lowest)
        if GROUPS > 1:
            group = column // (E // GROUPS)
            group_slot = tl.arange(0, GROUP_SLOTS)[None, :]
            group_scores = tl.full([ROWS, GROUP_SLOTS], lowest, tl.float32)
            for g in tl.static_range(GROUPS):
                of_group = tl.where(group == g, choice, lowest)
                best = tl.argmax(of_group, 1)[:, None]
                second = tl.max(tl.where(column == best, lowest, of_group), 1)
                group_scores = tl.where(group_slot == g, (tl.max(of_group, 1) + second)[:, None], group_scores)
            kept = tl.zeros([ROWS, WIDTH], tl.int32)
            for _ in tl.static_range(KEPT):
                best = tl.argmax(group_scores, 1)[:, None]
                group_scores = tl.where(group_slot == best, lowest, group_scores)
                kept += (group == best).to(tl.int32)
            choice = tl.where(kept > 0, choice, lowest)
        chosen = tl.zeros([ROWS, SLOTS], tl.int64)
        own = tl.zeros([ROWS, WIDTH], tl.int32)
        for k in tl.static_range(TOP):
            best = tl.argmax(choice, 1)[:, None]
            choice = tl.where(column == best, lowest, choice)
            own += (column == best).to(tl.int32)
            chosen = tl.where(slot == k, best.to(tl.int64), chosen)
        if REPLAY:
            recorded = tl.load(replay + token * TOP + slot, (token < T) & (slot < TOP), other=0).to(tl.int64)
            # a row that was not recorded holds -1; what is no expert would be written out of bounds
            bad = tl.max(((recorded < 0) | (recorded >= E)).to(tl.int32), 1)[:, None]
            chosen = tl.where(bad > 0, chosen, recorded)
        total, marks = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, WIDTH], tl.int32)
        weight = tl.zeros([ROWS, SLOTS], tl.float32)
        for k in tl.static_range(TOP):
            hit = column == _column(chosen, slot, k)
            of_k = tl.sum(tl.where(hit, score, 0.0), 1)[:, None]
            marks += hit.to(tl.int32)
            total += of_k
            weight = tl.where(slot == k, of_k, weight)
        if NORMALISED:
            weight = weight / (total + 1e-20)
        where = token * TOP + slot
        tl.store(experts + where, chosen, (token < T) & (slot < TOP))
        tl.store(weights + where, weight * SCALING, (token < T) & (slot < TOP))
        if REPLAY:
            other = tl.max((own != marks).to(tl.int32), 1)[:, None]
            tl.store(differs + token, other.to(tl.int1), token < T)
        found += tl.sum(tl.where(token < T, marks, 0), 0)
    columns = tl.arange(0, WIDTH)
    tl.store(held + tl.program_id(0) * E + columns, found, columns < E)


@triton.jit
def _place_kernel(
    experts, weights, held, counts, ends, token_of, places, row_weights, T, E, turns,
    TOP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A stable sort by counting: an expert's rows begin after those of the experts and programs before."""
    columns, slot = tl.arange(0, WIDTH), tl.arange(0, SLOTS)[None, :]
    total, before = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.int32)
    for first in range(0, tl.num_programs(0), ROWS):
        program = first + tl.arange(0, ROWS)[:, None]
        inside = (program < tl.num_programs(0)) & (columns < E)[None, :]
        part = tl.load(held + program * E + columns[None, :], inside, other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where(program < tl.program_id(0), part, 0), 0)
    end = tl.cumsum(total, 0)
    if tl.program_id(0) == 0:
        tl.store(counts + columns, total.to(tl.int64), columns < E)
        tl.store(ends + columns, end, columns < E)
    start = end - total + before
    column = columns[None, :]
    for turn in range(0, turns):
        token = ((tl.program_id(0) * turns + turn) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (token < T) & (slot < TOP)
        chosen = tl.load(experts + token * TOP + slot, inside, other=-1)
        weight = tl.load(weights + token * TOP + slot, inside, other=0.0)
        marks = tl.zeros([ROWS, WIDTH], tl.int32)
        for k in tl.static_range(TOP):
            marks += (column == _column(chosen, slot, k)).to(tl.int32)
        free = start[None, :] + tl.cumsum(marks, 0) - marks  # of each token, the next row of each expert
        place = tl.zeros([ROWS, SLOTS], tl.int64)
        for k in tl.static_range(TOP):
            hit = column == _column(chosen, slot, k)
            at = tl.sum(tl.where(hit, free, 0), 1)[:, None]
            place = tl.where(slot == k, at.to(tl.int64), place)
            free += hit.to(tl.int32)  # a replay may name an expert twice
        tl.store(places + token * TOP + slot, place, inside)
        tl.store(token_of + place, tl.broadcast_to(token, (ROWS, SLOTS)), inside)
        tl.store(row_weights + place, weight, inside)
        start += tl.sum(marks, 0)


@triton.jit
def _choose_backward_kernel(
    scores, experts, places, of_rows, of_weights, of_scores, out, T, E,
    TOP: tl.constexpr, NORMALISED: tl.constexpr, SCALING: tl.constexpr, OF_ROWS: tl.constexpr, OF_WEIGHTS: tl.constexpr,
    OF_SCORES: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The gradient of logits: FP32 # [T, E], or in PARTS what BF16 holds of it and of the rest # [T, 2 E]."""
    column, slot = tl.arange(0, WIDTH)[None, :], tl.arange(0, SLOTS)[None, :]
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside, chose = (token < T) & (column < E), (token < T) & (slot < TOP)
    score = tl.load(scores + token * E + column, inside, other=0.0)
    chosen = tl.load(experts + token * TOP + slot, chose, other=0)
    grad = tl.zeros([ROWS, SLOTS], tl.float32)
    if OF_ROWS:
        grad += tl.load(of_rows + tl.load(places + token * TOP + slot, chose, other=0), chose, other=0.0)
    if OF_WEIGHTS:
        grad += tl.load(of_weights + token * TOP + slot, chose, other=0.0)
    grad *= SCALING
    if NORMALISED:
        of_chosen = tl.load(scores + token * E + chosen, chose, other=0.0)
        total = tl.sum(of_chosen, 1)[:, None] + 1e-20
        grad = (grad - tl.sum(grad * of_chosen, 1)[:, None] / total) / total
    value = tl.zeros([ROWS, WIDTH], tl.float32)
    if OF_SCORES:
        value += tl.load(of_scores + token * E + column, inside, other=0.0)
    for k in tl.static_range(TOP):
        value += tl.where(column == _column(chosen, slot, k), _column(grad, slot, k), 0.0)
    value *= score * (1 - score)
    if PARTS:
        high = value.to(tl.bfloat16)
        tl.store(out + token * 2 * E + column, high, inside)
        tl.store(out + token * 2 * E + E + column, (value - high.to(tl.float32)).to(tl.bfloat16), inside)
    else:
        tl.store(out + token * E + column, value, inside)


def _tile(E: int, top: int) -> tuple[int, int, int]:
    """Tokens at a time, and powers of two that hold a token's scores and its choices."""
    width = power_of_two(E)
    return max(TILE // width, 1), width, power_of_two(top)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a # [M, K] b # [K, N] of any dtype -> # [M, N] float32, summed in FP32; on a GPU BF16 by its tensor cores."""
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, replay: Tensor | None, choice: Choice
    ) -> tuple[Tensor, ...]:
        logits = product(x, weight.t())  # [T, E]
        (T, E), top, like = logits.shape, choice.top, {"device": x.device}
        rows, width, slots = _tile(E, top)
        turns = max(ceil_div(T, rows * PROGRAMS), 1)
        grid = (max(ceil_div(T, rows * turns), 1),)
        held = torch.empty(grid[0], E, dtype=torch.int32, **like)
        scores, weights = torch.empty_like(logits), torch.empty(T, top, **like)
        experts, places = (torch.empty(T, top, dtype=torch.int64, **like) for _ in range(2))
        differs = torch.empty(T, dtype=torch.bool, **like)
        recorded = experts if replay is None else replay.contiguous()
        args = (logits, bias, recorded, scores, experts, weights, differs, held, T, E, turns)
        tiles = (rows, width, slots, power_of_two(choice.groups))
        launch(_choose_kernel, grid, args, (*choice, replay is not None, *tiles))
        counts, ends = torch.empty(E, dtype=torch.int64, **like), torch.empty(E, dtype=torch.int32, **like)
        token, row_weights = torch.empty(T * top, dtype=torch.int64, **like), torch.empty(T * top, **like)
        args = (experts, weights, held, counts, ends, token, places, row_weights, T, E, turns)
        launch(_place_kernel, grid, args, (top, rows, width, slots))
        ctx.save_for_backward(x, weight, scores, experts, places)
        ctx.choice, ctx.parameter = choice, weight
        ctx.mark_non_differentiable(experts, counts, token, places, ends, differs)
        ctx.set_materialize_grads(False)
        return row_weights, weights, scores, experts, counts, token, places, ends, differs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, weight, scores, experts, places), choice = ctx.saved_tensors, ctx.choice
        given = [grad if grad is None else grad.contiguous() for grad in grads[:3]]
        if all(grad is None for grad in given):
            return None, None, None, None, None
        (T, E), parts = scores.shape, x.dtype == weight.dtype == torch.bfloat16
        # BF16 holds 2^-9 of a number; as the sum of two it is multiplied with an error of 2^-17
        out = torch.empty(T, 2 * E if parts else E, dtype=torch.bfloat16 if parts else torch.float32, device=x.device)
        rows, width, slots = _tile(E, choice.top)
        args = (scores, experts, places, *(scores if grad is None else grad for grad in given), out, T, E)
        flags = (choice.top, choice.normalised, choice.scaling, *(grad is not None for grad in given), parts)
        if T:
            grid = (ceil_div(T, rows),)
            launch(_choose_backward_kernel, grid, args, (*flags, rows, width, slots))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = out @ weight.repeat(2, 1) if parts else (out @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            halves = product(out.t(), x).view(-1, *weight.shape)  # one, or two
            total = sum_of(ctx.parameter)
            if total is None:
                grad_weight = halves.sum(0).to(weight.dtype)
            else:
                for half in halves:
                    total.add_(half)
        return grad_x, grad_weight, None, None, None


def choose(x: Tensor, weight: Tensor, bias: Tensor, replay: Tensor | None, choice: Choice) -> Chosen:
    """x # [T, d], weight # [E, d], bias # [E] float32, replay # [T, K] of integers or None -> Chosen.

    A row of replay with a number that is no expert was not recorded: the router's own choice takes its place.
    """
    return Chosen(*_Choose.apply(x, weight, bias, replay, choice))  # type: ignore[misc]
