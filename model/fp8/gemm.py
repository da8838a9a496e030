"""Grouped block-scaled FP8 products for Hopper (Gluon): ragged groups, not padded, tiles found on the device.

A producer warp feeds a ring of shared memory by TMA; two consumer warpgroups, 64 rows of a 128 x 256 tile each, promote
every slab of 128 along K to FP32 registers while the other one keeps the tensor core busy. A slab takes two wgmma of
128 columns, so that 128 promoted and 64 running sums fit in a thread's registers.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from model.fp8.tiles import Tiles
from model.kernels.launch import launch

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 128
STAGES = 3
SUPER = 8  # tiles along M that share their tiles of B in L2
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
# Tiles from and to memory: the names of Triton 3.9, or those before it.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _coordinates(tile, tiles_m, tiles_n, SUPER: gl.constexpr):
    """Tile number -> (m, n): rows of tiles in bands of SUPER, m fastest within a band."""
    band = tile // (SUPER * tiles_n)
    height = gl.minimum(tiles_m - band * SUPER, SUPER)
    inside = tile - band * SUPER * tiles_n
    return band * SUPER + inside % height, inside // height


@gluon.jit
def _produce(a_desc, b_desc, a_ring, b_ring, full, empty, tiles, count, N, slabs, tiles_n, SUPER: gl.constexpr):
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_N: gl.constexpr = b_ring.shape[1]
    BYTES: gl.constexpr = a_ring.shape[1] * a_ring.shape[2] + b_ring.shape[1] * b_ring.shape[2]
    tiles_m = gl.load(count)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _coordinates(tile, tiles_m, tiles_n, SUPER)
        row = gl.load(tiles + 4 * m + 1)
        column = gl.load(tiles + 4 * m) * N + n * BLOCK_N
        for slab in range(slabs):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), BYTES)
            load_tile(a_desc, [row, slab * 128], full.index(stage), a_ring.index(stage))
            load_tile(b_desc, [column, slab * 128], full.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit
def _consume(
    half: gl.constexpr, a_ring, b_ring, full, empty, left_staged, right_staged, out_desc, a_scale, b_scale, out,
    tiles, count, N, slabs, tiles_n, as_m, as_k, bs_e, bs_n, bs_k, STAGED: gl.constexpr, SUPER: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_N: gl.constexpr = b_ring.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    tiles_m = gl.load(count)
    step = 0
    running = gl.zeros([64, 128], gl.float32, ACC)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _coordinates(tile, tiles_m, tiles_n, SUPER)
        group = gl.load(tiles + 4 * m)
        row = gl.load(tiles + 4 * m + 1) + half * 64
        end = gl.load(tiles + 4 * m + 2)
        rows = row + gl.arange(0, 64, ROW)
        a_ptr = a_scale + rows * as_m
        b_ptr = b_scale + group * bs_e + n * (BLOCK_N // 128) * bs_n
        second = gl.where(n * BLOCK_N + 128 < N, bs_n, 0)
        left = gl.zeros([64, 128], gl.float32, ACC)
        right = gl.zeros([64, 128], gl.float32, ACC)
        sa = gl.load(a_ptr, mask=rows < end, other=0.0)
        s0 = gl.load(b_ptr)
        s1 = gl.load(b_ptr + second)
        for slab in range(slabs):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a = a_ring.index(stage).slice(half * 64, 64)
            b = b_ring.index(stage)
            token = warpgroup_mma(a, b.slice(0, 128).permute((1, 0)), running, use_acc=False, is_async=True)
            more = slab + 1 < slabs
            a_ptr += as_k
            b_ptr += bs_k
            sa_next = gl.load(a_ptr, mask=(rows < end) & more, other=0.0)
            s0_next = gl.load(b_ptr, mask=more, other=0.0)
            s1_next = gl.load(b_ptr + second, mask=more, other=0.0)
            scale0 = (sa * s0)[:, None]
            scale1 = (sa * s1)[:, None]
            running = warpgroup_mma_wait(0, deps=[token])
            left += running * scale0
            token = warpgroup_mma(a, b.slice(128, 128).permute((1, 0)), running, use_acc=False, is_async=True)
            running = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(empty.index(stage), count=1)
            right += running * scale1
            sa, s0, s1 = sa_next, s0_next, s1_next
            step += 1
        column = n * BLOCK_N
        if STAGED and row + 64 <= end:  # leaves by itself while the next tile is computed
            tma.store_wait(0)
            left_staged.store(left.to(out.dtype.element_ty))
            right_staged.store(right.to(out.dtype.element_ty))
            fence_async_shared()
            store_tile(out_desc, [row, column], left_staged)
            store_tile(out_desc, [row, column + 128], right_staged)
        else:
            _store(left, out, row, end, column, N)
            _store(right, out, row, end, column + 128, N)
    if STAGED:
        tma.store_wait(0)


@gluon.jit
def _store(acc, out, row, end, column, N):
    rows = row + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
    columns = column + gl.arange(0, 128, gl.SliceLayout(0, acc.type.layout))
    where = out + rows.to(gl.int64)[:, None] * N + columns[None, :]
    gl.store(where, acc.to(out.dtype.element_ty), (rows < end)[:, None] & (columns < N)[None, :])


@gluon.jit
def grouped_kernel(
    a_desc, b_desc, out_desc, a_scale, b_scale, out, tiles, count, N, slabs, as_m, as_k, bs_e, bs_n, bs_k,
    STAGED: gl.constexpr, SUPER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out # [M, N]: rows of group e of a # [M, K] times b # [E N, K] transposed, FP32 scales a slab of 128 along K."""
    BLOCK_M: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = b_desc.block_type.shape[0]
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK_M, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, 128], b_desc.layout)
    staged = gl.allocate_shared_memory(out_desc.dtype, [4 if STAGED else 1, 64, 128 if STAGED else 32], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    half0: gl.constexpr = 0
    half1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (half0, a_ring, b_ring, full, empty, staged.index(0),
                        staged.index(1 if STAGED else 0), out_desc, a_scale, b_scale, out, tiles, count, N, slabs,
                        tiles_n, as_m, as_k, bs_e, bs_n, bs_k, STAGED, SUPER)),
            (_consume, (half1, a_ring, b_ring, full, empty, staged.index(2 if STAGED else 0),
                        staged.index(3 if STAGED else 0), out_desc, a_scale, b_scale, out, tiles, count, N, slabs,
                        tiles_n, as_m, as_k, bs_e, bs_n, bs_k, STAGED, SUPER)),
            (_produce, (a_desc, b_desc, a_ring, b_ring, full, empty, tiles, count, N, slabs, tiles_n, SUPER)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def grouped_product(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, tiles: Tiles, dtype: torch.dtype
) -> Tensor:
    """codes # [M, K], scales # [M, K/128], weight # [E, N, K], its scales # [E, N/128, K/128] -> # [M, N] in dtype.

    Row m is multiplied by the weight of its group, transposed.
    """
    (M, K), N = codes.shape, weight.shape[1]
    out = torch.empty(M, N, dtype=dtype, device=codes.device)
    if M == 0:
        return out
    if K % 16 or N % 16:
        raise ValueError(
            f"model.fp8 is 'on', but a product of {N} by {K} is no multiple of 16 by 16; set it to emulate"
        )
    a_desc = descriptor(codes, [BLOCK_M, BLOCK_K], SHARED)
    b_desc = descriptor(weight, [BLOCK_N, BLOCK_K], SHARED)
    slabs = -(-K // BLOCK_K)
    staged = dtype == torch.bfloat16  # FP32 tiles leave from the registers: there is no room to stage them
    out_desc = descriptor(out, [64, 128 if staged else 32], layout_of(dtype))
    grid = (min(processors(codes.device), tiles.most * -(-N // BLOCK_N)),)
    args = a_desc, b_desc, out_desc, scales, weight_scales, out, tiles.table, tiles.count, N, slabs
    strides = *scales.stride(), *weight_scales.stride()
    launch(grouped_kernel, grid, (*args, *strides), (staged, SUPER, STAGES), num_warps=4)
    return out


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: programs of a persistent grid."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def layout_of(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of tiles in shared memory with rows of 128 bytes, or of several times as many."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=2)


def descriptor(x: Tensor, block_shape: list[int], layout: Any) -> TensorDescriptor:
    """TensorDescriptor.from_tensor of x # [.., K] as a matrix # [.., K], without its checks: x is contiguous, aligned
    and not empty.
    """
    made: Any = object.__new__(TensorDescriptor)
    width = x.shape[-1]
    made.base, made.shape, made.strides = x, (x.numel() // width, width), (width, 1)
    made.block_shape, made.layout = block_shape, layout
    return made
