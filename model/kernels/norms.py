"""RMSNorm in one pass over its input forward and one backward (Triton, with gradients). FP32 inside."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch, power_of_two

PROGRAMS = 528  # of a backward pass, each with a sum of the weight's gradient: four on each of 132 multiprocessors


@triton.jit
def _forward_kernel(x, weight, out, inverse, stride, D, eps: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + columns, columns < D, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    value *= scale
    if ROUND:  # as transformers: normalised, rounded, then multiplied
        value = value.to(x.dtype.element_ty).to(tl.float32)
    value *= tl.load(weight + columns, columns < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + columns, value.to(out.dtype.element_ty), columns < D)
    tl.store(inverse + row, scale)


@triton.jit
def _backward_kernel(x, weight, grad, inverse, d_x, d_weight, stride, T, D, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for turn in range(0, tl.cdiv(T - tl.program_id(0), tl.num_programs(0))):
        row = first + turn * tl.num_programs(0)
        scale = tl.load(inverse + row)
        value = tl.load(x + row * stride + columns, inside, other=0.0).to(tl.float32) * scale
        d = tl.load(grad + row * D + columns, inside, other=0.0).to(tl.float32)
        total += d * value
        d *= w
        d = (d - value * (tl.sum(d * value, 0) / D)) * scale
        tl.store(d_x + row * D + columns, d.to(d_x.dtype.element_ty), inside)
    tl.store(d_weight + first * D + columns, total, inside)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        T, D = x.shape
        out = torch.empty(T, D, dtype=x.dtype, device=x.device)
        inverse = torch.empty(T, dtype=torch.float32, device=x.device)
        block = power_of_two(D)
        if T:
            args, constants = (x, weight, out, inverse, x.stride(0), D), (eps, x.dtype != torch.float32, block)
            launch(_forward_kernel, (T,), args, constants, num_warps=_warps(block))
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        (T, D), grad = x.shape, grads[0].contiguous()
        d_x, programs = torch.empty(T, D, dtype=x.dtype, device=x.device), min(PROGRAMS, T)
        d_weight = torch.empty(programs, D, dtype=torch.float32, device=x.device)
        block = power_of_two(D)
        if T:
            args = (x, weight, grad, inverse, d_x, d_weight, x.stride(0), T, D)
            launch(_backward_kernel, (programs,), args, (block,), num_warps=_warps(block))
        return d_x, d_weight.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x # [.., D] -> the same shape and dtype."""
    rows = x.flatten(0, -2)  # a view where rows lie at equal distances
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return _RMSNorm.apply(rows, weight, eps).view(x.shape)  # type: ignore[no-any-return]
