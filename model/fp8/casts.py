"""Casts to E4M3 with a scale a tile, in one pass over their input (Triton); bytes and scales are the reference's.

One kernel writes the row-wise form, the column-wise form or both from a block of 128 tokens x 128 channels, of the rows
as they stand or gathered by token. Scales of rows are M-major and those of columns K-major, as products read them.

Instructions count as much as bytes, so channels go in pairs: two BF16 are loaded, compared and masked as one word, and
codes are made two at a time, of neighbouring channels for rows and of neighbouring tokens for columns, which leaves
words of four tokens to be transposed and not bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8.dense import PAD
from model.fp8.tiles import Tiles
from model.kernels.launch import INTERPRET, ceil_div, launch

WARPS = 8  # of a program that casts 128 x 128 numbers
REGISTERS = {True: 80, False: 128}  # of a thread, BF16 or not: three or two programs fit on a multiprocessor


@triton.jit
def reciprocal(x, INTERPRET: tl.constexpr):
    """1 / x, an ulp off; no scale is so large or small that this needs care."""
    if INTERPRET:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


@triton.jit
def scale_of(bits, UE8M0: tl.constexpr, INTERPRET: tl.constexpr):
    """Bits of max|x| of a tile -> its scale, a division by 448 that is rounded as IEEE does. As integers, so that a NaN
    is the largest and not lost.
    """
    largest = tl.maximum(bits, 0x0D800000).to(tl.float32, bitcast=True)  # 2^-100
    if INTERPRET:
        scale = tl.div_rn(largest, 448.0 + tl.zeros_like(largest))
    else:
        scale = largest * 0.002232142857142857
        scale = tl.fma(tl.fma(-scale, 448.0, largest), 0.002232142857142857, scale)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def numbers(bits, HALF: tl.constexpr):
    """Words of two BF16 (HALF) or FP32 -> those of even and of odd channels, FP32."""
    if HALF:
        even, odd = bits << 16, bits & -0x10000
    else:
        even, odd = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)


@triton.jit
def _larger(a, b):
    return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_half(bits, axis: tl.constexpr, INTERPRET: tl.constexpr):
    """Words of two BF16 -> bits of the largest magnitude of the even and of the odd ones along an axis, as FP32's."""
    if INTERPRET:
        return tl.max((bits & 0x7FFF) << 16, axis), tl.max(bits & 0x7FFF0000, axis)
    largest = tl.reduce(bits & 0x7FFF7FFF, axis, _larger)
    return largest << 16, largest & 0x7FFF0000


@triton.jit
def inverse_of(scale, HALF: tl.constexpr, INTERPRET: tl.constexpr):
    """What `quotient` multiplies by: 1 / scale and, of HALF, its upper 16 bits and the rest."""
    inverse = reciprocal(scale, INTERPRET)
    remainder = tl.fma(-inverse, scale, 1.0)
    if HALF:
        high = (inverse.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        return high, tl.fma(inverse, remainder, inverse - high)
    return tl.fma(remainder, inverse, inverse), scale


@triton.jit
def quotient(x, scale, inverse, other, HALF: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr):
    """x / scale as IEEE rounds it, in few operations: the general division takes 8 and a branch.

    Powers of two need no correction. Of HALF (x was BF16): the product with the upper half of the inverse is exact, so
    two operations divide with one rounding (all cases are tested). Otherwise a quotient from the rounded inverse and
    one correction by its exact remainder is the rounded one (Markstein 1990).
    """
    if INTERPRET:  # its fma rounds twice
        return tl.div_rn(x, scale + tl.zeros_like(x))
    if UE8M0:
        return x * inverse
    if HALF:
        return tl.fma(x, other, x * inverse)
    first = x * inverse
    return tl.fma(tl.fma(-first, scale, x), inverse, first)


@triton.jit
def code(x):
    """E4M3 of x as an integer, ties to even: the interpreter's own cast does not round to nearest."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = ((tl.abs(x) + 24576.0) - 24576.0).to(tl.int32, bitcast=True)  # a multiple of 2^-9
    small = (small | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(x) < 0.015625, small, normal)
    return rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int16)


@triton.jit
def two_codes(low, high, INTERPRET: tl.constexpr):
    """FP32 numbers -> E4M3 in the lower and upper byte of 16 bits."""
    if INTERPRET:
        return code(low) | (code(high) << 8)
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,r,r", [low, high], tl.int16, True, 1
    )


@triton.jit
def shuffled(GROUP: tl.constexpr):
    """0 .. 127 in the order in which a tile's tokens are loaded: those that a thread gets, 128 / GROUP apart in the
    tile, are neighbours in memory. Transposed, they are written together and not byte by byte.
    """
    i = tl.arange(0, 128)
    return i % (128 // GROUP) * GROUP + i // (128 // GROUP)


@triton.jit
def four_tokens(x, GROUP: tl.constexpr, INTERPRET: tl.constexpr):
    """x # [128 shuffled tokens, C] quotients -> codes # [128 / GROUP, C, GROUP / 4] int32, of four tokens each."""
    R: tl.constexpr = 128 // GROUP
    C: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, (GROUP, R, C)), (1, 2, 0))
    a, b = tl.split(tl.reshape(x, (R, C, GROUP // 2, 2)))
    a, b = tl.split(tl.reshape(two_codes(a, b, INTERPRET), (R, C, GROUP // 4, 2)))
    if INTERPRET:
        return (a.to(tl.int32) & 0xFFFF) | (b.to(tl.int32) << 16)
    return tl.inline_asm_elementwise("mov.b32 $0, {$1, $2};", "=r,h,h", [a, b], tl.int32, True, 1)


@triton.jit
def transposed(even, odd, GROUP: tl.constexpr, INTERPRET: tl.constexpr):
    """Quotients # [128 shuffled tokens, C] of even and odd channels -> codes # [2 C, 32] int32, of four tokens each."""
    words = tl.join(four_tokens(even, GROUP, INTERPRET), four_tokens(odd, GROUP, INTERPRET))  # [R, C, GROUP / 4, 2]
    return tl.reshape(tl.permute(words, (1, 3, 0, 2)), (2 * even.shape[1], 32))


@triton.jit
def write_columns(
    even, odd, even_scale, odd_scale, codes, scales, tile, first, K, P, GROUP: tl.constexpr, INTERPRET: tl.constexpr
):
    """Quotients # [128 shuffled tokens, C] of the even and odd channels from the first on, their scales # [C] -> codes
    # [K, P / 4] and scales # [P / 128, K].
    """
    words = transposed(even, odd, GROUP, INTERPRET)
    channel = tl.arange(0, 2 * even.shape[1])
    inside = first + channel < K
    start = first.to(tl.int64) * (P // 4) + tile * 32
    where = (codes + start) + (channel[:, None] * (P // 4) + tl.arange(0, 32)[None, :])
    tl.store(where, words, inside[:, None])
    scale = tl.reshape(tl.join(even_scale, odd_scale), (2 * even.shape[1],))
    tl.store(scales + tile.to(tl.int64) * K + first + channel, scale, inside)


@triton.jit
def write_rows(
    bits, codes, scales, first, order, keep, pairs, pair, inside, block, M, HALF: tl.constexpr, UE8M0: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Pairs of numbers # [T, 64] -> codes # [M, pairs] and scales # [.., M] of rows first + order and of a block."""
    even, odd = numbers(bits, HALF)
    if HALF:
        a, b = largest_half(bits, 1, INTERPRET)
        scale = scale_of(tl.maximum(a, b), UE8M0, INTERPRET)
    else:
        scale = scale_of(tl.max(tl.maximum(magnitude(even), magnitude(odd)), 1), UE8M0, INTERPRET)
    inverse, other = inverse_of(scale, HALF, INTERPRET)
    a = quotient(even, scale[:, None], inverse[:, None], other[:, None], HALF, UE8M0, INTERPRET)
    b = quotient(odd, scale[:, None], inverse[:, None], other[:, None], HALF, UE8M0, INTERPRET)
    where = (codes + first.to(tl.int64) * pairs) + (order[:, None] * pairs + pair[None, :])
    tl.store(where, two_codes(a, b, INTERPRET), keep[:, None] & inside[None, :])
    tl.store(scales + block.to(tl.int64) * M + first + order, scale, keep)


@triton.jit(do_not_specialize=["K"])
def _cast_kernel(
    x, token, table, row_codes, row_scales, column_codes, column_scales, M, K, P,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATHER: tl.constexpr, HALF: tl.constexpr, VECTOR: tl.constexpr,
    GROUP: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x and row_codes are of pairs of channels, column_codes of four tokens."""
    block, tile = tl.program_id(0), tl.program_id(1)
    if COLUMNS:
        first = tl.load(table + tile * 4 + 1)
        end = tl.load(table + tile * 4 + 2)
        order = shuffled(GROUP)
    else:
        first = tile * 128
        end = M
        order = tl.arange(0, 128)
    keep = first + order < end
    pairs = K // VECTOR * (VECTOR // 2)  # of a row; written so that Triton knows how far to trust its alignment
    pair = block * 64 + tl.arange(0, 64)
    inside = pair < pairs
    if GATHER:
        where = x + tl.load(token + first + order, keep, other=0)[:, None] * pairs + pair[None, :]
    else:
        where = (x + first.to(tl.int64) * pairs) + (order[:, None] * pairs + pair[None, :])  # 64 bits once
    bits = tl.load(where, keep[:, None] & inside[None, :], other=0)
    if ROWS:
        write_rows(
            bits, row_codes, row_scales, first, order, keep, pairs, pair, inside, block, M, HALF, UE8M0, INTERPRET
        )
    if COLUMNS:
        even, odd = numbers(bits, HALF)
        if HALF:
            a, b = largest_half(bits, 0, INTERPRET)
        else:
            a, b = tl.max(magnitude(even), 0), tl.max(magnitude(odd), 0)
        a, b = scale_of(a, UE8M0, INTERPRET), scale_of(b, UE8M0, INTERPRET)
        inverse, other = inverse_of(a, HALF, INTERPRET)
        even = quotient(even, a[None, :], inverse[None, :], other[None, :], HALF, UE8M0, INTERPRET)
        inverse, other = inverse_of(b, HALF, INTERPRET)
        odd = quotient(odd, b[None, :], inverse[None, :], other[None, :], HALF, UE8M0, INTERPRET)
        write_columns(even, odd, a, b, column_codes, column_scales, tile, block * 128, K, P, GROUP, INTERPRET)


def packing(x: Tensor) -> tuple[bool, int, int]:
    """Whether x # [.., K] is BF16, how many numbers of it are loaded at once, how many tokens a thread gets."""
    assert x.dtype in (torch.float32, torch.bfloat16), f"{x.dtype} is neither float32 nor bfloat16"
    assert x.shape[-1] % 2 == 0, f"numbers are cast in pairs, and {x.shape[-1]} is odd"
    half = x.dtype == torch.bfloat16
    most = 8 if half else 4  # 16 bytes
    return half, most if x.shape[-1] % most == 0 else 2, 128 * 128 // (32 * WARPS) // most


def words_of(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """Pairs of neighbouring numbers as one integer, an argument of `launch`."""
    return x, torch.int32 if x.dtype == torch.bfloat16 else torch.int64


def empty_form(rows: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes # [rows, channels] and scales # [rows, ceil(channels / 128)], M-major, to be written as a row-wise form."""
    codes = torch.empty(rows, channels, dtype=torch.float8_e4m3fn, device=device)
    blocks = -(-channels // 128)
    return codes, torch.empty_strided((rows, blocks), (1, rows), dtype=torch.float32, device=device)


def empty_columns(channels: int, places: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes # [channels, places] and scales # [places / 128, channels] of a column-wise form."""
    codes = torch.empty(channels, places, dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty(places // 128, channels, dtype=torch.float32, device=device)


def cast(
    x: Tensor, tiles: Tiles | None, ue8m0: bool, rows: bool = True, token: Tensor | None = None
) -> tuple[Any, Any]:
    """x # [M, K] (or [T, K] gathered by token # [M]), BF16 or FP32 -> (codes, scales) of rows, (codes, scales, starts)
    of columns.

    tiles None leaves the columns out, rows False the rows: None is in their place.
    """
    M, K = (x if token is None else token).shape[0], x.shape[1]
    P, (half, vector, group), device = 0 if tiles is None else tiles.most * 128, packing(x), x.device
    row = empty_form(M, K, device) if rows else (x, x)  # x: never written
    column = (x, x) if tiles is None else empty_columns(K, P, device)
    grid = (ceil_div(K, 128), ceil_div(M, 128) if tiles is None else tiles.most)
    if grid[1]:
        table = x if tiles is None else tiles.table
        launch(
            _cast_kernel, grid,
            (words_of(x), x if token is None else token, table, (row[0], torch.int16), row[1],
             (column[0], torch.int32), column[1], M, K, P),
            (rows, tiles is not None, token is not None, half, vector, group, ue8m0, INTERPRET),
            num_warps=WARPS, maxnreg=REGISTERS[half],
        )  # fmt: skip
    return row if rows else None, None if tiles is None else (*column, tiles.starts)


@triton.jit(do_not_specialize=["K"])
def _weight_kernel(
    w, codes, codes_t, scales, scales_t, N, K, HALF: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr,
    PAD: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """w and codes are of pairs along K, codes_t of fours along N."""
    block, tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pairs = K // VECTOR * (VECTOR // 2)
    row, pair = tile * 128 + shuffled(GROUP), block * 64 + tl.arange(0, 64)
    mask = (row < N)[:, None] & (pair < pairs)[None, :]
    where = row[:, None] * pairs + pair[None, :]
    even, odd = numbers(tl.load(w + expert * N * pairs + where, mask, other=0), HALF)
    scale = scale_of(tl.max(tl.max(tl.maximum(magnitude(even), magnitude(odd)), 0), 0), UE8M0, INTERPRET)
    inverse, other = inverse_of(scale, HALF, INTERPRET)
    even = quotient(even, scale, inverse, other, HALF, UE8M0, INTERPRET)
    odd = quotient(odd, scale, inverse, other, HALF, UE8M0, INTERPRET)
    tl.store(codes + expert * N * pairs + where, two_codes(even, odd, INTERPRET), mask)
    words, channel, four = transposed(even, odd, GROUP, INTERPRET), tl.arange(0, 128), tile * 32 + tl.arange(0, 32)
    where = (codes_t + (expert * K + block * 128) * (N // 4)) + (channel[:, None] * (N // 4) + four[None, :])
    tl.store(where, words, (block * 128 + channel < K)[:, None] & (four < N // 4)[None, :])
    across, down = tl.num_programs(0), tl.num_programs(1)
    tl.store(scales + (expert * down + tile) * (tl.cdiv(across, PAD) * PAD) + block, scale)
    tl.store(scales_t + (expert * across + block) * (tl.cdiv(down, PAD) * PAD) + tile, scale)


def cast_weight(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w # [E, N, K] -> codes # [E, N, K], scales # [E, ceil(N/128), ceil(K/128)], both transposed # [E, K, N] ..

    In memory rows of scales are padded with zeros, as model/fp8/dense.py reads them.
    """
    E, N, K = w.shape
    codes = torch.empty(E, N, K, dtype=torch.float8_e4m3fn, device=w.device)
    codes_t = torch.empty(E, K, N, dtype=torch.float8_e4m3fn, device=w.device)
    n, k = ceil_div(N, 128), ceil_div(K, 128)
    scales = torch.zeros(E, n, -(-k // PAD) * PAD, device=w.device)
    scales_t = torch.zeros(E, k, -(-n // PAD) * PAD, device=w.device)
    half, vector, group = packing(w)
    launch(
        _weight_kernel, (k, n, E),
        (words_of(w), codes.view(torch.int16), codes_t.view(torch.int32), scales, scales_t, N, K),
        (half, vector, group, PAD, ue8m0, INTERPRET), num_warps=WARPS,
    )  # fmt: skip
    return codes, scales[..., :k], codes_t, scales_t[..., :n]
