"""Casts to E4M3 with a scale a tile, in one pass over their input (Triton); bytes and scales are the reference's.

One kernel writes the row-wise form, the column-wise form or both from a block of 128 tokens x 128 channels, of the rows
as they stand or gathered by token. Scales of rows are M-major and those of columns K-major, as products read them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8.tiles import Tiles

WARPS = 8  # of a program that casts 128 x 128 numbers
GROUP = 8  # neighbouring tokens in one thread's registers: 128 x 128 numbers / 8 warps / 8 channels at a time
REGISTERS = 128  # of a thread, so that two programs fit on a multiprocessor and one loads while the other computes
INTERPRET = triton.knobs.runtime.interpret


@triton.jit
def scale_of(bits, UE8M0: tl.constexpr, INTERPRET: tl.constexpr):
    """Bits of max|x| of a tile -> its scale and 1 / scale. As integers, so that a NaN is the largest and not lost.

    Both are divisions rounded as IEEE does, in few operations (`encode` says how): each thread does its tiles'.
    """
    largest = tl.maximum(bits, 0x0D800000).to(tl.float32, bitcast=True)  # 2^-100
    if INTERPRET:
        scale = tl.div_rn(largest, 448.0 + tl.zeros_like(largest))
    else:
        scale = largest * 0.002232142857142857
        scale = tl.fma(tl.fma(-scale, 448.0, largest), 0.002232142857142857, scale)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(bits < 0x7F800000, scale, float("nan"))
    if INTERPRET:
        inverse = 1.0 / scale
    else:  # an ulp off; no scale is so large or small that this needs care
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [scale], tl.float32, True, 1)
    return scale, tl.fma(tl.fma(-inverse, scale, 1.0), inverse, inverse)


@triton.jit
def magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def encode(x, scale, inverse, UE8M0: tl.constexpr, INTERPRET: tl.constexpr):
    """x / scale as IEEE rounds it, then to E4M3, ties to even. inverse = 1 / scale rounded.

    A quotient from the rounded inverse and one correction by its exact remainder is the rounded one (Markstein 1990):
    3 operations, where the general division takes 8 and a branch. Powers of two need no correction.
    """
    if INTERPRET:  # its fma rounds twice, and its casts to E4M3 do not round to nearest: they are handed E4M3 numbers
        quotient = tl.div_rn(x, scale + tl.zeros_like(x))
        bits = quotient.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = ((tl.abs(quotient) + 24576.0) - 24576.0).to(tl.int32, bitcast=True)  # a multiple of 2^-9
        small = (small | (bits & -0x80000000)).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(quotient) < 0.015625, small, normal).to(tl.float8e4nv)
    quotient = x * inverse
    if not UE8M0:
        quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    return quotient.to(tl.float8e4nv)


@triton.jit
def shuffled(GROUP: tl.constexpr):
    """0 .. 127 in the order in which a tile's tokens are loaded: those that a thread gets, 128 / GROUP apart in the
    tile, are neighbours in memory. Transposed, they are written together and not byte by byte.
    """
    i = tl.arange(0, 128)
    return i % (128 // GROUP) * GROUP + i // (128 // GROUP)


@triton.jit
def in_order(x, GROUP: tl.constexpr):
    """x # [C, 128 shuffled tokens] -> # [C, 128 tokens]"""
    return tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], GROUP, 128 // GROUP)), (0, 2, 1)), x.shape)


@triton.jit
def write_rows(x, codes, scales, rows, columns, block, keep, M, K, UE8M0: tl.constexpr, INTERPRET: tl.constexpr):
    """x # [128, 128] FP32 -> codes # [M, K] and scales # [ceil(K/128), M] of these rows."""
    scale, inverse = scale_of(tl.max(magnitude(x), 1), UE8M0, INTERPRET)
    code = encode(x, scale[:, None], inverse[:, None], UE8M0, INTERPRET)
    tl.store(codes + rows.to(tl.int64)[:, None] * K + columns[None, :], code, keep[:, None] & (columns < K)[None, :])
    tl.store(scales + block.to(tl.int64) * M + rows, scale, keep)


@triton.jit
def write_columns(
    x, codes, scales, tile, columns, K, P, GROUP: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr
):
    """x # [128, 128] FP32 -> codes # [K, P] and scales # [P/128, K] of this tile of tokens."""
    scale, inverse = scale_of(tl.max(magnitude(x), 0), UE8M0, INTERPRET)
    code = encode(x, scale[None, :], inverse[None, :], UE8M0, INTERPRET)
    where = columns.to(tl.int64)[:, None] * P + tile * 128 + tl.arange(0, 128)[None, :]
    tl.store(codes + where, in_order(tl.trans(code), GROUP), (columns < K)[:, None])
    tl.store(scales + tile.to(tl.int64) * K + columns, scale, columns < K)


@triton.jit
def _cast_kernel(
    x, token, table, row_codes, row_scales, column_codes, column_scales, M, K, P,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATHER: tl.constexpr, GROUP: tl.constexpr,
    UE8M0: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    if COLUMNS:
        first = tl.load(table + tile * 4 + 1)
        end = tl.load(table + tile * 4 + 2)
        rows = first + shuffled(GROUP)
    else:
        end = M
        rows = tile * 128 + tl.arange(0, 128)
    keep = rows < end
    source = tl.load(token + rows, keep, other=0) if GATHER else rows
    columns = block * 128 + tl.arange(0, 128)
    where = x + source.to(tl.int64)[:, None] * K + columns[None, :]
    value = tl.load(where, keep[:, None] & (columns < K)[None, :], other=0.0).to(tl.float32)
    if ROWS:
        write_rows(value, row_codes, row_scales, rows, columns, block, keep, M, K, UE8M0, INTERPRET)
    if COLUMNS:
        write_columns(value, column_codes, column_scales, tile, columns, K, P, GROUP, UE8M0, INTERPRET)


def cast(
    x: Tensor, tiles: Tiles | None, ue8m0: bool, rows: bool = True, token: Tensor | None = None
) -> tuple[Any, Any]:
    """x # [M, K] (or [T, K] gathered by token # [M]) -> (codes, scales) of rows, (codes, scales, starts) of columns.

    tiles None leaves the columns out, rows False the rows: None is in their place.
    """
    M, K = len(x) if token is None else len(token), x.shape[1]
    blocks, P = triton.cdiv(K, 128), 0 if tiles is None else tiles.most * 128
    empty = {"device": x.device}
    row = column = (x, x)  # never written
    if rows:
        row = torch.empty(M, K, dtype=torch.float8_e4m3fn, **empty), torch.empty(blocks, M, **empty)
    if tiles is not None:
        column = torch.empty(K, P, dtype=torch.float8_e4m3fn, **empty), torch.empty(P // 128, K, **empty)
    grid = (blocks, triton.cdiv(M, 128) if tiles is None else tiles.most)
    if grid[1]:
        table = x if tiles is None else tiles.table
        _cast_kernel[grid](
            x, x if token is None else token, table, *row, *column, M, K, P,
            rows, tiles is not None, token is not None, GROUP, ue8m0, INTERPRET, num_warps=WARPS,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return (row[0], row[1].t()) if rows else None, None if tiles is None else (*column, tiles.starts)


@triton.jit
def _weight_kernel(
    w, codes, codes_t, scales, N, K, GROUP: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    block, tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tile * 128 + shuffled(GROUP)
    columns = block * 128 + tl.arange(0, 128)
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    where = expert * N * K + rows[:, None] * K + columns[None, :]
    value = tl.load(w + where, mask, other=0.0).to(tl.float32)
    each = tl.max(magnitude(value), 0)  # [128]
    largest = tl.max(each, 0)
    scale, inverse = scale_of(largest, UE8M0, INTERPRET)
    tl.store(codes + where, encode(value, scale, inverse, UE8M0, INTERPRET), mask)
    # The same once more, with equal scales in a vector: Triton 3.6 mixes up bytes of FP32 blocks that are stored both
    # as they are and transposed.
    same, reciprocal = scale_of(tl.maximum(each, largest), UE8M0, INTERPRET)
    code = encode(value, same[None, :], reciprocal[None, :], UE8M0, INTERPRET)
    rows = tile * 128 + tl.arange(0, 128)
    where = expert * N * K + columns[:, None] * N + rows[None, :]
    tl.store(codes_t + where, in_order(tl.trans(code), GROUP), (columns < K)[:, None] & (rows < N)[None, :])
    tl.store(scales + (expert * tl.num_programs(1) + tile) * tl.num_programs(0) + block, scale)


def cast_weight(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
    """w # [E, N, K] -> codes # [E, N, K], scales # [E, ceil(N/128), ceil(K/128)], those transposed # [E, K, N]."""
    E, N, K = w.shape
    codes = torch.empty(E, N, K, dtype=torch.float8_e4m3fn, device=w.device)
    codes_t = torch.empty(E, K, N, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty(E, triton.cdiv(N, 128), triton.cdiv(K, 128), device=w.device)
    grid = (scales.shape[2], scales.shape[1], E)
    _weight_kernel[grid](w, codes, codes_t, scales, N, K, GROUP, ue8m0, INTERPRET, num_warps=WARPS)
    return codes, scales, codes_t
