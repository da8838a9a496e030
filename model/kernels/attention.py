"""What surrounds the core of multi-head latent attention: packed tokens to padded rows of queries, keys and values,
with the rotary embedding, and back (Triton, with gradients).

A token that several rows have (of a shared prompt) gets the sum of their gradients, added up in FP32 in a fixed order.
Every bucket of rows has its own tensors, which kernels get all at once: nothing is joined or cut.
n_h: heads, d_n, d_r, d_v: widths of a head without position, with it, and of values. P: positions of all rows.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch, power_of_two
from model.layout import MAX_BUCKETS, SequenceLayout

HEADS = 16  # at a time
WARPS = 4


class Widths(NamedTuple):
    """Of a head; powers of two."""

    heads: int
    nope: int
    rope: int
    value: int


@triton.jit
def _rotate(x, cos, sin):
    """x # [.., d_r] as interleaved pairs, cos and sin # [1, d_r / 2] -> rotated, FP32."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape)


@triton.jit
def _bucket(place, a, b, c, d, end_a, end_b, end_c):
    """Of the buckets' tensors the one that has this place of the concatenated rows, from its first row on."""
    found = tl.where(place < end_a, a, tl.where(place < end_b, b, tl.where(place < end_c, c, d)))
    start = tl.where(place < end_a, 0, tl.where(place < end_b, end_a, tl.where(place < end_c, end_b, end_c)))
    return found, place - start


@triton.jit
def _rows_kernel(
    q, kv, k_rope, cos, sin, index,
    q_a, q_b, q_c, q_d, k_a, k_b, k_c, k_d, v_a, v_b, v_c, v_d, end_a, end_b, end_c, rope_stride, H,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(index + place)
    half = tl.arange(0, ROPE // 2)[None, :]
    c, s = tl.load(cos + token * (ROPE // 2) + half), tl.load(sin + token * (ROPE // 2) + half)
    nope, rope, value = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :], tl.arange(0, VALUE)[None, :]
    key = _rotate(tl.load(k_rope + token * rope_stride + rope).to(tl.float32), c, s)  # [1, d_r]
    out_q, at = _bucket(place, q_a, q_b, q_c, q_d, end_a, end_b, end_c)
    out_k, at = _bucket(place, k_a, k_b, k_c, k_d, end_a, end_b, end_c)
    out_v, at = _bucket(place, v_a, v_b, v_c, v_d, end_a, end_b, end_c)
    WIDTH: tl.constexpr = NOPE + ROPE
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        keep = head < H
        of_q, of_kv = q + (token * H + head) * WIDTH, kv + (token * H + head) * (NOPE + VALUE)
        row = at * H + head
        to_q, to_k, to_v = out_q + row * WIDTH, out_k + row * WIDTH, out_v + row * VALUE
        tl.store(to_q + nope, tl.load(of_q + nope, keep), keep)
        rotated = _rotate(tl.load(of_q + NOPE + rope, keep, other=0.0).to(tl.float32), c, s)
        tl.store(to_q + NOPE + rope, rotated.to(out_q.dtype.element_ty), keep)
        tl.store(to_k + nope, tl.load(of_kv + nope, keep), keep)
        tl.store(to_k + NOPE + rope, tl.broadcast_to(key, (HEADS, ROPE)).to(out_k.dtype.element_ty), keep)
        tl.store(to_v + value, tl.load(of_kv + NOPE + value, keep), keep)


@triton.jit
def _rows_backward_kernel(
    q_a, q_b, q_c, q_d, k_a, k_b, k_c, k_d, v_a, v_b, v_c, v_d, end_a, end_b, end_c,
    cos, sin, uses, starts, out_q, out_kv, out_rope, H,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + token), tl.load(starts + token + 1)
    half = tl.arange(0, ROPE // 2)[None, :]
    # the inverse rotation
    c, s = tl.load(cos + token * (ROPE // 2) + half), -tl.load(sin + token * (ROPE // 2) + half)
    nope, rope, value = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :], tl.arange(0, VALUE)[None, :]
    WIDTH: tl.constexpr = NOPE + ROPE
    key = tl.zeros([1, ROPE], tl.float32)
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        keep = head < H
        q_nope, q_rope = tl.zeros([HEADS, NOPE], tl.float32), tl.zeros([HEADS, ROPE], tl.float32)
        k_nope, v = tl.zeros([HEADS, NOPE], tl.float32), tl.zeros([HEADS, VALUE], tl.float32)
        for use in range(begin, end):
            place = tl.load(uses + use)
            d_q, at = _bucket(place, q_a, q_b, q_c, q_d, end_a, end_b, end_c)
            d_k, at = _bucket(place, k_a, k_b, k_c, k_d, end_a, end_b, end_c)
            d_v, at = _bucket(place, v_a, v_b, v_c, v_d, end_a, end_b, end_c)
            row = at * H + head
            q_nope += tl.load(d_q + row * WIDTH + nope, keep, other=0.0).to(tl.float32)
            q_rope += tl.load(d_q + row * WIDTH + NOPE + rope, keep, other=0.0).to(tl.float32)
            k_nope += tl.load(d_k + row * WIDTH + nope, keep, other=0.0).to(tl.float32)
            k_rope = tl.load(d_k + row * WIDTH + NOPE + rope, keep, other=0.0).to(tl.float32)
            key += tl.sum(k_rope, 0)[None, :]
            v += tl.load(d_v + row * VALUE + value, keep, other=0.0).to(tl.float32)
        to_q, to_kv = out_q + (token * H + head) * WIDTH, out_kv + (token * H + head) * (NOPE + VALUE)
        tl.store(to_q + nope, q_nope.to(out_q.dtype.element_ty), keep)
        tl.store(to_q + NOPE + rope, _rotate(q_rope, c, s).to(out_q.dtype.element_ty), keep)
        tl.store(to_kv + nope, k_nope.to(out_kv.dtype.element_ty), keep)
        tl.store(to_kv + NOPE + value, v.to(out_kv.dtype.element_ty), keep)
    tl.store(out_rope + token * ROPE + rope, _rotate(key, c, s).to(out_rope.dtype.element_ty))


@triton.jit
def _restore_kernel(a, b, c, d, end_a, end_b, end_c, restore, out, D, BLOCK: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    rows, at = _bucket(tl.load(restore + token), a, b, c, d, end_a, end_b, end_c)
    tl.store(out + token * D + columns, tl.load(rows + at * D + columns, columns < D), columns < D)


@triton.jit
def _restore_backward_kernel(
    grad, restore, index, a, b, c, d, end_a, end_b, end_c, D, BLOCK: tl.constexpr
):  # fmt: skip
    place, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    rows, at = _bucket(place, a, b, c, d, end_a, end_b, end_c)
    token = tl.load(index + place)
    # padding, and all rows of a shared prompt but one, are nowhere read
    read = tl.where(tl.load(restore + token) == place, D, 0)
    tl.store(rows + at * D + columns, tl.load(grad + token * D + columns, columns < read, other=0.0), columns < D)


def _heads_first(shape: tuple[int, int], heads: int, width: int, like: Tensor) -> Tensor:
    """# [B, n_h, L, width], where in memory heads come after positions."""
    (B, L), strides = shape, (shape[1] * heads * width, width, heads * width, 1)
    return torch.empty_strided((B, heads, L, width), strides, dtype=like.dtype, device=like.device)


def _in_memory(x: Tensor) -> Tensor:
    """x # [B, n_h, L, width] with memory as `_heads_first` has it."""
    rows = x.transpose(1, 2)
    return x if rows.is_contiguous() else rows.contiguous().transpose(1, 2)


def _four(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return *tensors, *tensors[:1] * (MAX_BUCKETS - len(tensors))


def _ends(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Places before the end of each of the first three buckets."""
    ends = list(accumulate(B * L for B, L in shapes))
    return (ends + ends[-1:] * MAX_BUCKETS)[: MAX_BUCKETS - 1]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout,
        widths: Widths,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        q, kv, (heads, nope, rope, value) = q.contiguous(), kv.contiguous(), widths
        assert k_rope.stride(1) == 1, f"{k_rope.stride()=}"
        shapes = [bucket.shape for bucket in layout.buckets]
        out = [[_heads_first(shape, heads, w, q) for shape in shapes] for w in (nope + rope, nope + rope, value)]
        pointers = [x for tensors in out for x in _four(tensors)]
        args = (q, kv, k_rope, cos, sin, layout.places, *pointers, *_ends(shapes), k_rope.stride(0), heads)
        block = min(HEADS, power_of_two(heads))
        launch(_rows_kernel, (len(layout.places),), args, (nope, rope, value, block), num_warps=WARPS)
        ctx.save_for_backward(cos, sin, layout.uses, layout.use_starts)
        ctx.widths, ctx.ends, ctx.shapes = widths, _ends(shapes), (q.shape, kv.shape, k_rope.shape)
        return *out[0], *out[1], *out[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (heads, nope, rope, value), count = ctx.widths, len(grads) // 3
        out = [torch.empty(shape, dtype=grads[0].dtype, device=grads[0].device) for shape in ctx.shapes]
        given = [_in_memory(grad) for grad in grads]
        pointers = [x for i in range(3) for x in _four(given[i * count : (i + 1) * count])]
        args = (*pointers, *ctx.ends, *ctx.saved_tensors, *out, heads)
        block = min(HEADS, power_of_two(heads))
        launch(_rows_backward_kernel, (len(out[0]),), args, (nope, rope, value, block), num_warps=WARPS)
        return *out, None, None, None, None


def attention_rows(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, layout: SequenceLayout, widths: Widths
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q # [T, n_h (d_n + d_r)] and k_rope # [T, d_r] before rotation, kv # [T, n_h (d_n + d_v)], cos and sin
    # [T, d_r / 2] -> queries and keys # [B, n_h, L, d_n + d_r], values # [B, n_h, L, d_v] of each bucket of the layout.

    Gradients of padding must be zero and are not read.
    """
    parts, count = _Rows.apply(q, kv, k_rope, cos, sin, layout, widths), len(layout.buckets)  # type: ignore[arg-type]
    return [(parts[i], parts[count + i], parts[2 * count + i]) for i in range(count)]


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: SequenceLayout, *rows: Tensor) -> Tensor:
        (_, heads, _, width), T = rows[0].shape, len(layout)
        shapes, D = [bucket.shape for bucket in layout.buckets], heads * width
        ctx.save_for_backward(layout.restore, layout.places)
        ctx.shapes, ctx.heads = shapes, heads
        out = rows[0].new_empty(T, D)
        args = (*_four([_in_memory(x) for x in rows]), *_ends(shapes), layout.restore, out, D)
        launch(_restore_kernel, (T,), args, (power_of_two(D),))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (restore, places), grad = ctx.saved_tensors, grads[0].contiguous()
        D = grad.shape[1]
        out = [_heads_first(shape, ctx.heads, D // ctx.heads, grad) for shape in ctx.shapes]
        args = (grad, restore, places, *_four(out), *_ends(ctx.shapes), D)
        launch(_restore_backward_kernel, (len(places),), args, (power_of_two(D),))
        return None, *out


def restored(rows: Sequence[Tensor], layout: SequenceLayout) -> Tensor:
    """rows # [B, n_h, L, d_v] of each bucket -> # [T, n_h d_v]."""
    return _Restore.apply(layout, *rows)  # type: ignore[no-any-return]
