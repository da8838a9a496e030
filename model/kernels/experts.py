"""What surrounds the products of experts: rows to experts and back, and the gated activation (Triton, with gradients).

Every function is differentiable and reads its inputs once; sums are FP32 and rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import ceil_div, launch, power_of_two

BLOCK = 1024  # channels of a row at a time


@triton.jit
def _combine_kernel(y, inverse, out, D, TOP: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(D, BLOCK)  # in one grid, as its second axis ends at 65,535
    token, columns = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP):
        row = tl.load(inverse + token * TOP + k).to(tl.int64)
        total += tl.load(y + row * D + columns, columns < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + columns, total.to(out.dtype.element_ty), columns < D)


def combine(y: Tensor, inverse: Tensor) -> Tensor:
    """y # [M, d], inverse # [T, K] int64 -> y[inverse].sum(1) # [T, d], summed in FP32, rounded once. No gradient."""
    T, K = inverse.shape
    y, out = y.contiguous(), torch.empty(T, y.shape[1], dtype=y.dtype, device=y.device)
    if T:
        block = min(2048, power_of_two(y.shape[1]))
        grid, D = (ceil_div(y.shape[1], block) * T,), y.shape[1]
        launch(_combine_kernel, grid, (y, inverse, out, D), (K, block), num_warps=8)
    return out


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return combine(grads[0], *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return combine(y, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


def spread(x: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """x # [T, d], token # [M = T K] of each row, inverse # [T, K] the rows of a token -> x[token] # [M, d]."""
    return _Spread.apply(x, token, inverse)  # type: ignore[no-any-return]


def collect(y: Tensor, token: Tensor, inverse: Tensor) -> Tensor:
    """The other way: y # [M, d] -> sums over the rows of a token # [T, d]."""
    return _Collect.apply(y, token, inverse)  # type: ignore[no-any-return]


@triton.jit
def _gated_kernel(gate, up, weight, out, stride, I, WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(I, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < I
    g = tl.load(gate + row * stride + columns, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + columns, inside, other=0.0).to(tl.float32)
    act = g * tl.sigmoid(g) * u
    if WEIGHT:
        act *= tl.load(weight + row)
    tl.store(out + row * I + columns, act.to(out.dtype.element_ty), inside)


@triton.jit
def _gated_backward_kernel(
    gate, up, weight, grad, d_gate, d_up, d_weight, stride, I, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(weight + row) if WEIGHT else 1.0
    share = tl.zeros([BLOCK], tl.float32)
    for first in range(0, I, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < I
        g = tl.load(gate + row * stride + columns, inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * stride + columns, inside, other=0.0).to(tl.float32)
        d = tl.load(grad + row * I + columns, inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        share += d * silu * u
        d *= scale
        slope = sigmoid * (1 + g * (1 - sigmoid))
        tl.store(d_gate + row * stride + columns, (d * u * slope).to(d_gate.dtype.element_ty), inside)
        tl.store(d_up + row * stride + columns, (d * silu).to(d_up.dtype.element_ty), inside)
    if WEIGHT:
        tl.store(d_weight + row, tl.sum(share, 0))


def _forward(gate: Tensor, up: Tensor, weight: Tensor | None) -> Tensor:
    (M, I), stride = gate.shape, gate.stride(0)
    out = torch.empty(M, I, dtype=gate.dtype, device=gate.device)
    if M:
        block = min(BLOCK, power_of_two(I))
        routed = gate if weight is None else weight
        grid, constants = (ceil_div(I, block) * M,), (weight is not None, block)
        launch(_gated_kernel, grid, (gate, up, routed, out, stride, I), constants)
    return out


def _backward(
    gate: Tensor, up: Tensor, weight: Tensor | None, grad: Tensor, d_gate: Tensor, d_up: Tensor
) -> Tensor | None:
    (M, I), stride, grad = gate.shape, gate.stride(0), grad.contiguous()
    assert d_gate.stride(0) == d_up.stride(0) == stride
    d_weight = None if weight is None else torch.empty_like(weight)
    if M:
        block = min(BLOCK, power_of_two(I))
        routed, d_routed = (gate, grad) if weight is None else (weight, d_weight)
        args = (gate, up, routed, grad, d_gate, d_up, d_routed, stride, I)
        launch(_gated_backward_kernel, (M,), args, (weight is not None, block))
    return d_weight


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _forward(gate, up, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _backward(gate, up, None, grads[0], d_gate, d_up)
        return d_gate, d_up


class _GatedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
        gate_up, weight = gate_up.contiguous(), weight.contiguous()
        ctx.save_for_backward(gate_up, weight)
        return _forward(*gate_up.chunk(2, -1), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weight = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        d_weight = _backward(*gate_up.chunk(2, -1), weight, grads[0], *d_gate_up.chunk(2, -1))
        return d_gate_up, d_weight


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all # [M, I]."""
    return _Gated.apply(gate, up)  # type: ignore[no-any-return]


def gated_rows(gate_up: Tensor, weight: Tensor) -> Tensor:
    """gate_up # [M, 2I], gates first, weight # [M] float32 -> weight * silu(gate) * up # [M, I]."""
    return _GatedRows.apply(gate_up, weight)  # type: ignore[no-any-return]
