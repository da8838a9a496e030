"""SwiGLU with its casts, and its backward with the casts of its gradients, each in one pass (Triton).

Half of a row of gate_up is the gate, half is up, both of I channels, a multiple of 128. The gate_up values are saved in
FP8 and the activation is computed again from them. An optional weight a row (of the router) multiplies the activation.
What is computed here is cast by a reciprocal, an ulp off: another sigmoid differs from the reference's by as much.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8.casts import (
    empty_columns,
    empty_form,
    magnitude,
    numbers,
    packing,
    reciprocal,
    scale_of,
    shuffled,
    two_codes,
    words_of,
    write_columns,
    write_rows,
)
from model.fp8.tiles import Tiles
from model.kernels.launch import INTERPRET, ceil_div, launch


@triton.jit
def sigmoid(x, INTERPRET: tl.constexpr):
    if INTERPRET:
        return tl.sigmoid(x)
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * -1.4426950408889634], tl.float32, True, 1
    )
    return reciprocal(1.0 + power, INTERPRET)


@triton.jit
def near_scale(bits, UE8M0: tl.constexpr, INTERPRET: tl.constexpr):
    """Bits of max|x| of a tile -> its scale and 1 / scale, both an ulp off."""
    if INTERPRET or UE8M0:
        scale = scale_of(bits, UE8M0, INTERPRET)
    else:
        scale = tl.maximum(bits, 0x0D800000).to(tl.float32, bitcast=True) * 0.002232142857142857
        scale = tl.fma(scale, 0.0, scale)  # of an infinity NaN
    return scale, reciprocal(scale, INTERPRET)


@triton.jit
def store_rows(
    even, odd, codes, scales, first, order, keep, pairs, block, M, UE8M0: tl.constexpr, INTERPRET: tl.constexpr
):
    """Even and odd channels # [T, 64] FP32 of a block -> codes # [M, pairs] and scales # [.., M] of these rows."""
    scale, inverse = near_scale(tl.max(tl.maximum(magnitude(even), magnitude(odd)), 1), UE8M0, INTERPRET)
    words = two_codes(even * inverse[:, None], odd * inverse[:, None], INTERPRET)
    where = (codes + first.to(tl.int64) * pairs) + (order[:, None] * pairs + block * 64 + tl.arange(0, 64)[None, :])
    tl.store(where, words, keep[:, None])
    tl.store(scales + block.to(tl.int64) * M + first + order, scale, keep)


@triton.jit
def store_columns(
    even, odd, codes, scales, tile, first, K, P, GROUP: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr
):
    """The same, # [128 shuffled tokens, C] from a first channel on -> codes # [K, P / 4] and scales # [P / 128, K]."""
    a, inverse = near_scale(tl.max(magnitude(even), 0), UE8M0, INTERPRET)
    even = even * inverse[None, :]
    b, inverse = near_scale(tl.max(magnitude(odd), 0), UE8M0, INTERPRET)
    odd = odd * inverse[None, :]
    write_columns(even, odd, a, b, codes, scales, tile, first, K, P, GROUP, INTERPRET)


@triton.jit(do_not_specialize=["I"])
def _forward_kernel(
    gate_up, weight, act_codes, act_scales, saved_codes, saved_scales, M, I,
    WEIGHT: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """gate_up, act_codes and saved_codes are of pairs of channels."""
    block, tile = tl.program_id(0), tl.program_id(1)
    first, order, pair = tile * BLOCK, tl.arange(0, BLOCK), block * 64 + tl.arange(0, 64)
    keep = first + order < M
    # Pairs of I and of 2I channels; written so that Triton loads and stores as many of them as of the other.
    half, pairs = I // VECTOR * (VECTOR // 2), I // (VECTOR // 2) * (VECTOR // 2)
    where = (gate_up + first.to(tl.int64) * half * 2) + (order[:, None] * half * 2 + pair[None, :])
    gate = tl.load(where, keep[:, None], other=0)
    up = tl.load(where + half, keep[:, None], other=0)
    routed = tl.load(weight + first + order, keep, other=0.0)[:, None] if WEIGHT else 1.0
    gate_even, gate_odd = numbers(gate, HALF)
    up_even, up_odd = numbers(up, HALF)
    even = gate_even * sigmoid(gate_even, INTERPRET) * up_even * routed
    odd = gate_odd * sigmoid(gate_odd, INTERPRET) * up_odd * routed
    store_rows(even, odd, act_codes, act_scales, first, order, keep, half, block, M, UE8M0, INTERPRET)
    write_rows(
        gate, saved_codes, saved_scales, first, order, keep, pairs, pair, pair < half, block, M, HALF, UE8M0,
        INTERPRET,
    )  # fmt: skip
    write_rows(
        up, saved_codes, saved_scales, first, order, keep, pairs, pair + half, pair < half, block + I // 128, M, HALF,
        UE8M0, INTERPRET,
    )  # fmt: skip


def swiglu_forward(gate_up: Tensor, weight: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_up # [M, 2I], weight # [M] FP32 -> act codes # [M, I] and scales, gate_up codes # [M, 2I] and scales."""
    (M, width), device = gate_up.shape, gate_up.device
    I, act, saved = width // 2, empty_form(M, width // 2, device), empty_form(M, width, device)
    if M:
        block, (half, vector, _) = 16, packing(gate_up)
        launch(
            _forward_kernel, (I // 128, ceil_div(M, block)),
            (words_of(gate_up), gate_up if weight is None else weight, (act[0], torch.int16), act[1],
             (saved[0], torch.int16), saved[1], M, I),
            (weight is not None, half, vector, ue8m0, INTERPRET, block), num_warps=4,
        )  # fmt: skip
    return *act, *saved


@triton.jit
def two_values(codes, INTERPRET: tl.constexpr):
    """E4M3 in the lower and upper byte of 16 bits -> FP32, FP32."""
    if INTERPRET:
        low, high = (codes & 0xFF).to(tl.uint8), ((codes >> 8) & 0xFF).to(tl.uint8)
        return low.to(tl.float8e4nv, bitcast=True).to(tl.float32), high.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 both; .reg .b16 low, high; cvt.rn.f16x2.e4m3x2 both, $2; mov.b32 {low, high}, both;"
        " cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
        "=r,=r,h", [codes], (tl.float32, tl.float32), True, 1,
    )  # fmt: skip


@triton.jit
def gradients(gate, up, grad, gate_scale, up_scale, weight, INTERPRET: tl.constexpr):
    """gate and up codes' values, grad of the activation, a row's scales and weight; up_scale is times weight -> the
    activation, the gradients of gate and of up, and grad silu(gate) up's code.
    """
    gate = gate * gate_scale
    share = sigmoid(gate, INTERPRET)
    silu, weighted = gate * share, up * up_scale
    shared = grad * silu
    slope = share * tl.fma(gate, 1.0 - share, 1.0)
    return silu * weighted, grad * weighted * slope, shared * weight, shared * up


@triton.jit
def recomputed(
    codes, scales, ss_m, ss_k, grad, weight, first, order, keep, pair, block, I, WEIGHT: tl.constexpr,
    HALF: tl.constexpr, VECTOR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Rows first + order and pairs of channels of a block of 128 -> what `gradients` gives of the even and of the odd
    ones, and the scales of up. codes and grad are of pairs.
    """
    rows = first + order
    # Pairs of I and of 2I channels; written so that Triton loads and stores as many of them as of the other.
    half, pairs = I // VECTOR * (VECTOR // 2), I // (VECTOR // 2) * (VECTOR // 2)
    where = (codes + first.to(tl.int64) * pairs) + (order[:, None] * pairs + pair[None, :])
    gate_even, gate_odd = two_values(tl.load(where, keep[:, None], other=0), INTERPRET)
    up_even, up_odd = two_values(tl.load(where + I // VECTOR * (VECTOR // 2), keep[:, None], other=0), INTERPRET)
    g = tl.load((grad + first.to(tl.int64) * half) + (order[:, None] * half + pair[None, :]), keep[:, None], other=0)
    g_even, g_odd = numbers(g, HALF)
    gate_scale = tl.load(scales + rows * ss_m + block * ss_k, keep, other=0.0)[:, None]
    up_scale = tl.load(scales + rows * ss_m + (block + I // 128) * ss_k, keep, other=0.0)
    routed = tl.load(weight + rows, keep, other=0.0) if WEIGHT else tl.where(keep, 1.0, 0.0)
    both, routed = (up_scale * routed)[:, None], routed[:, None]
    act, gate, up, total = gradients(gate_even, up_even, g_even, gate_scale, both, routed, INTERPRET)
    act_, gate_, up_, total_ = gradients(gate_odd, up_odd, g_odd, gate_scale, both, routed, INTERPRET)
    return act, act_, gate, gate_, up, up_, total + total_, up_scale


@triton.jit(do_not_specialize=["I"])
def _backward_rows_kernel(
    codes, scales, ss_m, ss_k, grad, weight, row_codes, row_scales, d_weight, M, I,
    WEIGHT: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """codes, grad and row_codes are of pairs of channels."""
    block, first, order = tl.program_id(0), tl.program_id(1) * BLOCK, tl.arange(0, BLOCK)
    keep, pair = first + order < M, block * 64 + tl.arange(0, 64)
    _, _, gate, gate_, up, up_, total, up_scale = recomputed(
        codes, scales, ss_m, ss_k, grad, weight, first, order, keep, pair, block, I, WEIGHT, HALF, VECTOR, INTERPRET
    )
    if WEIGHT:
        tl.store(d_weight + block.to(tl.int64) * M + first + order, tl.sum(total, 1) * up_scale, keep)
    pairs = I // (VECTOR // 2) * (VECTOR // 2)
    store_rows(gate, gate_, row_codes, row_scales, first, order, keep, pairs, block, M, UE8M0, INTERPRET)
    store_rows(up, up_, row_codes, row_scales, first, order, keep, pairs, block + I // 128, M, UE8M0, INTERPRET)


@triton.jit(do_not_specialize=["I"])
def _backward_columns_kernel(
    codes, scales, ss_m, ss_k, grad, weight, table, act_codes, act_scales, column_codes, column_scales, I, P,
    WEIGHT: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr, UE8M0: tl.constexpr,
    INTERPRET: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """codes and grad are of pairs of channels, act_codes and column_codes of four tokens."""
    channel, tile = tl.program_id(0) * CHANNELS, tl.program_id(1)
    first, order = tl.load(table + tile * 4 + 1), shuffled(GROUP)
    keep, pair = first + order < tl.load(table + tile * 4 + 2), channel // 2 + tl.arange(0, CHANNELS // 2)
    act, act_, gate, gate_, up, up_, _, _ = recomputed(
        codes, scales, ss_m, ss_k, grad, weight, first, order, keep, pair, channel // 128, I, WEIGHT, HALF, VECTOR,
        INTERPRET,
    )  # fmt: skip
    store_columns(act, act_, act_codes, act_scales, tile, channel, I, P, GROUP, UE8M0, INTERPRET)
    store_columns(gate, gate_, column_codes, column_scales, tile, channel, 2 * I, P, GROUP, UE8M0, INTERPRET)
    store_columns(up, up_, column_codes, column_scales, tile, channel + I, 2 * I, P, GROUP, UE8M0, INTERPRET)


# Of the programs that write rows: rows, warps, registers a thread. Of those that write columns, three outputs of 128
# tokens each: channels, how many a thread has side by side, warps, registers; 4 tokens and 4 channels a thread.
ROWS, COLUMNS = (16, 4, 64), (32, 4, 8, 80)


def swiglu_backward(
    codes: Tensor, scales: Tensor, grad: Tensor, weight: Tensor | None, tiles: Tiles, ue8m0: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | None]:
    """Saved codes # [M, 2I] and scales # [M, 2I/128], grad # [M, I] of the activation, weight # [M] ->
    columns of the activation # [I, P], rows # [M, 2I] and columns # [2I, P] of gate_up's gradient, d_weight # [M].
    """
    (M, I), P, device = grad.shape, tiles.most * 128, grad.device
    act, rows, columns = empty_columns(I, P, device), empty_form(M, 2 * I, device), empty_columns(2 * I, P, device)
    d_weight = grad if weight is None else torch.empty(I // 128, M, dtype=torch.float32, device=device)
    half, vector, _ = packing(grad)
    inputs = (codes, torch.int16), scales, *scales.stride(), words_of(grad), grad if weight is None else weight
    # Two launches that compute the gradients twice: rows and columns together do not fit in the registers.
    if M:
        block, warps, registers = ROWS
        launch(
            _backward_rows_kernel, (I // 128, ceil_div(M, block)),
            (*inputs, (rows[0], torch.int16), rows[1], d_weight, M, I),
            (weight is not None, half, vector, ue8m0, INTERPRET, block), num_warps=warps, maxnreg=registers,
        )  # fmt: skip
        channels, vector, warps, registers = COLUMNS
        launch(
            _backward_columns_kernel, (I // channels, tiles.most),
            (*inputs, tiles.table, (act[0], torch.int32), act[1], (columns[0], torch.int32), columns[1], I, P),
            (weight is not None, half, vector, 4 * channels // (vector * warps), ue8m0, INTERPRET, channels),
            num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    return act, rows, columns, None if weight is None else d_weight.sum(0)
