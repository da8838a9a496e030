"""What surrounds the core of multi-head latent attention: packed tokens to padded rows of queries, keys and values,
with the rotary embedding, and back (Triton, with gradients).

A token that several rows have (of a shared prompt) gets the sum of their gradients, added up in FP32 in a fixed order.
n_h: heads, d_n, d_r, d_v: widths of a head without position, with it, and of values. P: positions of all rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch, power_of_two

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
def _rows_kernel(
    q, kv, k_rope, cos, sin, index, out_q, out_k, out_v, rope_stride, H,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(index + place)
    half = tl.arange(0, ROPE // 2)[None, :]
    c, s = tl.load(cos + token * (ROPE // 2) + half), tl.load(sin + token * (ROPE // 2) + half)
    nope, rope, value = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :], tl.arange(0, VALUE)[None, :]
    key = _rotate(tl.load(k_rope + token * rope_stride + rope).to(tl.float32), c, s)  # [1, d_r]
    WIDTH: tl.constexpr = NOPE + ROPE
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        keep = head < H
        of_q, of_kv = q + (token * H + head) * WIDTH, kv + (token * H + head) * (NOPE + VALUE)
        row = place * H + head
        to_q, to_k, to_v = out_q + row * WIDTH, out_k + row * WIDTH, out_v + row * VALUE
        tl.store(to_q + nope, tl.load(of_q + nope, keep), keep)
        rotated = _rotate(tl.load(of_q + NOPE + rope, keep, other=0.0).to(tl.float32), c, s)
        tl.store(to_q + NOPE + rope, rotated.to(out_q.dtype.element_ty), keep)
        tl.store(to_k + nope, tl.load(of_kv + nope, keep), keep)
        tl.store(to_k + NOPE + rope, tl.broadcast_to(key, (HEADS, ROPE)).to(out_k.dtype.element_ty), keep)
        tl.store(to_v + value, tl.load(of_kv + NOPE + value, keep), keep)


@triton.jit
def _rows_backward_kernel(
    d_q, d_k, d_v, cos, sin, uses, starts, out_q, out_kv, out_rope, H,
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
            row = tl.load(uses + use) * H + head
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


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, index: Tensor, uses: Tensor,
        starts: Tensor, widths: Widths,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, kv, P, (heads, nope, rope, value) = q.contiguous(), kv.contiguous(), len(index), widths
        assert k_rope.stride(1) == 1, f"{k_rope.stride()=}"
        out = [torch.empty(P, heads, width, dtype=q.dtype, device=q.device) for width in (*[nope + rope] * 2, value)]
        block = min(HEADS, power_of_two(heads))
        args = (q, kv, k_rope, cos, sin, index, *out, k_rope.stride(0), heads)
        launch(_rows_kernel, (P,), args, (nope, rope, value, block), num_warps=WARPS)
        ctx.save_for_backward(cos, sin, uses, starts)
        ctx.widths, ctx.shapes = widths, (q.shape, kv.shape, k_rope.shape)
        return out[0], out[1], out[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, nope, rope, value = ctx.widths
        out = [torch.empty(shape, dtype=grads[0].dtype, device=grads[0].device) for shape in ctx.shapes]
        block = min(HEADS, power_of_two(heads))
        args = (*(grad.contiguous() for grad in grads), *ctx.saved_tensors, *out, heads)
        launch(_rows_backward_kernel, (len(out[0]),), args, (nope, rope, value, block), num_warps=WARPS)
        return *out, None, None, None, None, None, None


def attention_rows(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, index: Tensor, uses: Tensor, starts: Tensor,
    widths: Widths,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q # [T, n_h (d_n + d_r)] and k_rope # [T, d_r] before rotation, kv # [T, n_h (d_n + d_v)], cos and sin
    # [T, d_r / 2] -> queries and keys # [P, n_h, d_n + d_r], values # [P, n_h, d_v].

    index # [P] int64: the token of each position. Token t is at the positions uses[starts[t] : starts[t + 1]] that
    count, starts # [T + 1]; gradients of others (padding) must be zero and are not read.
    """
    return _Rows.apply(q, kv, k_rope, cos, sin, index, uses, starts, widths)  # type: ignore[no-any-return]


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        ctx.shape = rows.shape
        return rows.index_select(0, restore)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (restore,), grad = ctx.saved_tensors, grads[0]
        # positions differ: nothing to add up
        return grad.new_zeros(ctx.shape).index_copy_(0, restore, grad), None


def restored(rows: Tensor, restore: Tensor) -> Tensor:
    """rows # [P, n_h, d_v], restore # [T] the position of each token -> # [T, n_h, d_v]."""
    return _Restore.apply(rows, restore)  # type: ignore[no-any-return]
