"""RMSNorm in one pass over its input forward and one backward (Triton, with gradients). FP32 inside.

What a layer does around a norm goes along: the addition before it, and backward the sum of the gradients of all that
read its result, and of what went on past it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import sum_of
from model.kernels.launch import ceil_div, launch, power_of_two

PROGRAMS = 528  # of a backward pass, each with a sum of the weight's gradient: four on each of 132 multiprocessors
COLUMNS, PARTS = 32, 64  # of those sums, added up at a time
MOST_READERS = 3


@triton.jit
def _forward_kernel(
    x, delta, weight, total, out, inverse, stride, D,
    EPS: tl.constexpr, ROUND: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + columns, columns < D, other=0.0)
    if ADD:  # rounded, as the sum that others read is
        more = tl.load(delta + row * D + columns, columns < D, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row * D + columns, value, columns < D)
    value = value.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / D + EPS)
    value *= scale
    if ROUND:  # as transformers: normalised, rounded, then multiplied
        value = value.to(x.dtype.element_ty).to(tl.float32)
    value *= tl.load(weight + columns, columns < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + columns, value.to(out.dtype.element_ty), columns < D)
    tl.store(inverse + row, scale)


@triton.jit
def _backward_kernel(
    x, weight, inverse, first, second, third, past, d_x, d_weight, stride, past_stride, T, D, W,
    READERS: tl.constexpr, PAST: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """`past`: where REST is 0 the gradient of x itself, else that of the columns of x behind the first D."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0).to(tl.int64)
    for turn in range(0, tl.cdiv(T - tl.program_id(0), tl.num_programs(0))):
        row = start + turn * tl.num_programs(0)
        scale = tl.load(inverse + row)
        value = tl.load(x + row * stride + columns, inside, other=0.0).to(tl.float32) * scale
        d = tl.load(first + row * D + columns, inside, other=0.0).to(tl.float32)
        if READERS > 1:
            d += tl.load(second + row * D + columns, inside, other=0.0).to(tl.float32)
        if READERS > 2:
            d += tl.load(third + row * D + columns, inside, other=0.0).to(tl.float32)
        total += d * value
        d *= w
        d = (d - value * (tl.sum(d * value, 0) / D)) * scale
        if PAST and REST == 0:
            d += tl.load(past + row * past_stride + columns, inside, other=0.0).to(tl.float32)
        tl.store(d_x + row * W + columns, d.to(d_x.dtype.element_ty), inside)
        if REST > 0:
            rest = tl.arange(0, REST)
            value = tl.zeros([REST], tl.float32)
            if PAST:
                value += tl.load(past + row * past_stride + rest, rest < W - D, other=0.0).to(tl.float32)
            tl.store(d_x + row * W + D + rest, value.to(d_x.dtype.element_ty), rest < W - D)
    tl.store(d_weight + start * D + columns, total, inside)


@triton.jit
def _weight_gradient_kernel(
    parts, out, P, D, ADD: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, P, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        total += tl.load(parts + part * D + columns, (part < P) & (columns < D), other=0.0)
    value = tl.sum(total, 0)[None, :]
    if ADD:
        value += tl.load(out + columns, columns < D, other=0.0)
    tl.store(out + columns, value.to(out.dtype.element_ty), columns < D)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


class _RMSNorm(torch.autograd.Function):
    """-> (x + delta, or what of x is behind the columns of the norm; the norm, `readers` times)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, readers: int
    ) -> tuple[Tensor, ...]:
        (T, W), D = x.shape, len(weight)
        out, inverse = x.new_empty(T, D), x.new_empty(T, dtype=torch.float32)
        total = x if delta is None else torch.empty_like(out)
        block = power_of_two(D)
        if T:
            more = x if delta is None else delta.contiguous()
            constants = (eps, x.dtype != torch.float32, delta is not None, block)
            args = (x, more, weight, total, out, inverse, x.stride(0), D)
            launch(_forward_kernel, (T,), args, constants, num_warps=_warps(block))
        ctx.save_for_backward(total, weight, inverse)
        ctx.parameter = weight
        ctx.set_materialize_grads(False)
        # one tensor, whose readers' gradients come apart
        return total if W == D else x[:, D:], out, *(out.detach() for _ in range(readers - 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        (T, W), D, past = x.shape, len(weight), grads[0]
        given = [grad.contiguous() for grad in grads[1:] if grad is not None]
        if not given and W == D:
            return past, past if ctx.needs_input_grad[1] else None, None, None, None
        given = given or [x.new_zeros(T, D)]
        if past is not None and past.stride(1) != 1:
            past = past.contiguous()
        d_x, programs = torch.empty(T, W, dtype=x.dtype, device=x.device), min(PROGRAMS, T)
        parts = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        block = power_of_two(D)
        if T:
            three = (*given, *given[:1] * MOST_READERS)[:MOST_READERS]
            other, stride = (given[0], D) if past is None else (past, past.stride(0))
            args = (x, weight, inverse, *three, other, d_x, parts, x.stride(0), stride, T, D, W)
            constants = (len(given), past is not None, block, power_of_two(W - D) if W > D else 0)
            launch(_backward_kernel, (programs,), args, constants, num_warps=_warps(block))
        d_weight = None
        if ctx.needs_input_grad[2]:
            total = sum_of(ctx.parameter)
            d_weight = torch.empty_like(weight) if total is None else None
            args = (parts, d_weight if total is None else total, programs, D)
            launch(_weight_gradient_kernel, (ceil_div(D, COLUMNS),), args, (total is not None, PARTS, COLUMNS))
        return d_x, d_x if ctx.needs_input_grad[1] else None, d_weight, None, None


def _rows(x: Tensor) -> Tensor:
    x = x.flatten(0, -2)  # a view where rows lie at equal distances
    return x if x.stride(1) == 1 else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x # [.., D] -> the same shape and dtype."""
    return _RMSNorm.apply(_rows(x), None, weight, eps, 1)[1].view(x.shape)  # type: ignore[index]


def added_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, readers: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x and delta # [T, D] -> (x + delta, its norm `readers` times: one tensor, whose gradients are added up here)."""
    assert 0 < readers <= MOST_READERS, f"{readers=}"
    total, *normed = _RMSNorm.apply(_rows(x), delta, weight, eps, readers)  # type: ignore[misc]
    return total, tuple(normed)


def front_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x # [T, D + R] -> (the norm of its first D columns # [T, D], the others as they are # [T, R]); D by weight."""
    assert x.shape[1] > len(weight), f"{tuple(x.shape)=} {len(weight)=}"
    rest, normed = _RMSNorm.apply(_rows(x), None, weight, eps, 1)  # type: ignore[misc]
    return normed, rest
