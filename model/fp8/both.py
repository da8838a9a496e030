"""Both forms of a matrix in one pass over it (Gluon, Hopper); bytes and scales are the reference's.

A program has a block of 128 tokens x 128 channels in shared memory and reads it twice, each time with the threads where
a form wants them: for rows 8 lanes on 8 rows, which the swizzle keeps free of bank conflicts, for columns a warp on its
own channels and all tokens. So no maximum crosses warps, and four tokens' codes are together in a thread when they are
made. Codes are staged and leave as whole lines by TMA, those of columns from where the block was.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, tma

from model.fp8 import casts
from model.fp8.casts import (
    empty_columns,
    empty_form,
    inverse_of,
    largest_half,
    numbers,
    packing,
    quotient,
    scale_of,
    two_codes,
)
from model.fp8.gemm import descriptor, store_tile
from model.fp8.tiles import Tiles
from model.kernels.launch import INTERPRET, ceil_div, launch

WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
PAIRS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# the name of Triton 3.9, or that before it
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
# Of a program, by whether x is BF16. Four or two programs of 64 registers a thread fit on a multiprocessor.
WARPS, REGISTERS = {True: 8, False: 16}, 64


@gluon.constexpr_function
def _row_layout(half: Any) -> Any:
    """For rows: which words # [R, 64] of two BF16 (half) or # [R, 128] of one FP32 a thread has."""
    words, warps = (6, 3) if half else (7, 4)  # powers of two
    lanes = [[1, 0], [2, 0], [4, 0], [0, 1 << (words - 2)], [0, 1 << (words - 1)]]
    across, down = [[0, 1 << i] for i in range(words - 2)], [[8 << i, 0] for i in range(warps)]
    return gl.DistributedLinearLayout(across, lanes, down, [], [8 << warps, 1 << words])


@gluon.constexpr_function
def _column_layout(half: Any) -> Any:
    """For columns: # [128, 64] or # [128, 128], fours of neighbouring tokens."""
    words, warps = (6, 3) if half else (7, 4)
    tokens, lanes = [[1, 0], [2, 0], [16, 0], [32, 0], [64, 0]], [[0, 1], [0, 2], [0, 4], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(tokens, lanes, [[0, 8 << i] for i in range(warps)], [], [128, 1 << words])


@gluon.jit
def larger(a, b):
    """Of two magnitudes, NaN if one is; integers would need another instruction to lose their sign."""
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def four_tokens(x):
    """Quotients # [T, C] -> codes # [T / 4, C] int32 of four tokens each."""
    x = x.reshape([x.shape[0] // 4, 2, 2, x.shape[1]]).permute((0, 3, 1, 2))
    a, b = gl.split(x)
    a, b = gl.split(two_codes(a, b, False))
    return gl.inline_asm_elementwise("mov.b32 $0, {$1, $2};", "=r,h,h", [a, b], gl.int32, True, 1)


@gluon.jit
def _rows(block, staged, scales, first, end, ROWS: gl.constexpr, HALF: gl.constexpr, UE8M0: gl.constexpr):
    R: gl.constexpr = ROWS.shape[0]
    for part in gl.static_range(128 // R):
        words = block.slice(part * R, R).load(ROWS)
        if HALF:
            even, odd = numbers(words, True)
            a, b = largest_half(words, 1, False)
            bits = gl.maximum(a, b)
        else:
            even, odd = gl.split(words.reshape([R, 64, 2]))
            even, odd = even.to(gl.float32, bitcast=True), odd.to(gl.float32, bitcast=True)
            bits = gl.reduce(larger(tl.abs(even), tl.abs(odd)), 1, larger).to(gl.int32, bitcast=True)
        scale = scale_of(bits, UE8M0, False)
        inverse, other = inverse_of(scale, HALF, False)
        a = quotient(even, scale[:, None], inverse[:, None], other[:, None], HALF, UE8M0, False)
        b = quotient(odd, scale[:, None], inverse[:, None], other[:, None], HALF, UE8M0, False)
        staged.slice(part * R, R).store(two_codes(a, b, False))
        row = first + part * R + gl.arange(0, R, gl.SliceLayout(1, a.type.layout))
        gl.store(scales + row, scale, row < end)


@gluon.jit
def _columns(words, scales, first, K, COLUMNS: gl.constexpr, HALF: gl.constexpr, UE8M0: gl.constexpr):
    """Words of a block -> codes # [128, 32] int32 of four tokens each; writes the scales of channels from first on."""
    if HALF:
        channel = first + 2 * gl.arange(0, 64, gl.SliceLayout(0, COLUMNS))
        a, b = largest_half(words, 0, False)
        a, b = scale_of(a, UE8M0, False), scale_of(b, UE8M0, False)
        gl.store(scales + channel, a, channel < K)
        gl.store(scales + channel + 1, b, channel < K)
        even, odd = numbers(words, True)
        inverse, other = inverse_of(a, True, False)
        even = four_tokens(quotient(even, a[None, :], inverse[None, :], other[None, :], True, UE8M0, False))
        inverse, other = inverse_of(b, True, False)
        odd = four_tokens(quotient(odd, b[None, :], inverse[None, :], other[None, :], True, UE8M0, False))
        return gl.join(even, odd).reshape([32, 128]).permute((1, 0))
    else:
        channel = first + gl.arange(0, 128, gl.SliceLayout(0, COLUMNS))
        x = words.to(gl.float32, bitcast=True)
        a = scale_of(gl.reduce(tl.abs(x), 0, larger).to(gl.int32, bitcast=True), UE8M0, False)
        gl.store(scales + channel, a, channel < K)
        inverse, other = inverse_of(a, False, False)
        x = quotient(x, a[None, :], inverse[None, :], other[None, :], False, UE8M0, False)
        return four_tokens(x).permute((1, 0))


@gluon.jit(do_not_specialize=["K"])
def _both_kernel(
    x, token, table, row_desc, row_scales, column_desc, column_scales, M, K,
    GATHER: gl.constexpr, HALF: gl.constexpr, UE8M0: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """x is of words, codes of rows are of pairs of channels, those of columns of four tokens."""
    W: gl.constexpr = 64 if HALF else 128
    LINE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    COLUMNS: gl.constexpr = _column_layout(HALF)
    block = gl.allocate_shared_memory(gl.int32, [128, W], WORDS)
    staged = gl.allocate_shared_memory(gl.int16, [128, 64], PAIRS)
    at, tile = gl.program_id(0), gl.program_id(1)
    first = gl.load(table + tile * 4 + 1)
    end = gl.load(table + tile * 4 + 2)
    row = first + gl.arange(0, 128, gl.SliceLayout(1, LINE))
    keep = row < M  # behind the end too: their codes are written by two programs, the same bytes
    if GATHER:
        row = gl.load(token + row, keep, other=0)
    word = at * W + gl.arange(0, W, gl.SliceLayout(0, LINE))
    pitch = K // 16 * (W // 8)  # words of a row; written so that Triton knows how they are aligned
    where = x + row.to(gl.int64)[:, None] * pitch + word[None, :]
    copy_async(block, where, keep[:, None] & (word < pitch)[None, :])  # zeros elsewhere
    async_copy.commit_group()
    async_copy.wait_group(0)
    _rows(block, staged, row_scales + at.to(gl.int64) * M, first, end, _row_layout(HALF), HALF, UE8M0)
    fence_async_shared()
    store_tile(row_desc, [first, at * 64], staged)
    words = block.load(COLUMNS)
    if first + 128 > end:
        words = gl.where((first + gl.arange(0, 128, gl.SliceLayout(1, COLUMNS)) < end)[:, None], words, 0)
    codes = gl.allocate_shared_memory(gl.int32, [128, 32], WORDS)  # where the block was
    codes.store(_columns(words, column_scales + tile.to(gl.int64) * K, at * 128, K, COLUMNS, HALF, UE8M0))
    fence_async_shared()
    store_tile(column_desc, [at * 128, tile * 32], codes)
    tma.store_wait(0)
    staged._keep_alive()  # Triton would put the columns there while it leaves


def cast_both(
    x: Tensor, tiles: Tiles, ue8m0: bool, token: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x # [M, K] (or [T, K] gathered by token # [M]), BF16 or FP32 -> (codes, scales) of rows, (codes, scales, starts)
    of columns. Where lines of x do not begin at multiples of 16 bytes, or there are none, casts.py does it.
    """
    M, K = (x if token is None else token).shape[0], x.shape[1]
    if INTERPRET or M == 0 or K % 16 or x.data_ptr() % 16:  # no tensor map describes nothing
        return casts.cast(x, tiles, ue8m0, token=token)
    half, device = packing(x)[0], x.device
    (codes, scales), (codes_t, scales_t) = empty_form(M, K, device), empty_columns(K, tiles.most * 128, device)
    if tiles.most:
        row_desc = descriptor(codes.view(torch.int16), [128, 64], PAIRS.value)
        column_desc = descriptor(codes_t.view(torch.int32), [128, 32], WORDS.value)
        words = x, torch.int32
        launch(
            _both_kernel, (ceil_div(K, 128), tiles.most),
            (words, words if token is None else token, tiles.table, row_desc, scales, column_desc, scales_t, M, K),
            (token is not None, half, ue8m0, WARPS[half]), num_warps=WARPS[half], maxnreg=REGISTERS,
        )  # fmt: skip
    return (codes, scales), (codes_t, scales_t, tiles.starts)
