"""Weight gradients of grouped block-scaled FP8 products for Hopper (Gluon): each group's own tokens are contracted.

Both operands are column-wise forms, scaled a column and 128 tokens; groups start at multiples of 128 with zeros behind
them, so a slab belongs to one group. Built as gemm.py is, but both scales of a slab are vectors, which makes twice the
work of promoting it: three consumer warpgroups take turns, each with 64 rows of a tile of 192 x 128.

FP32 results that are added to are more bytes than operands. So one call takes up to two sources (a, b), which are
contracted one after the other: the results of two micro-batches are read and written once.
"""

from collections.abc import Sequence
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

from model.fp8.forms import Columns
from model.fp8.gemm import SHARED, descriptor, layout_of, load_tile, processors, store_tile
from model.fp8.tiles import largest_first
from model.kernels.launch import launch

ROWS, BLOCK_N, BLOCK_K, STAGES = 64, 192, 128, 3  # ROWS of a tile for each consumer
FLAT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.jit
def _turns(total):
    """How many of the tiles 0 .. total this program takes; `_place` says which."""
    programs = gl.num_programs(0)
    waves = total // programs
    return waves + (_position(waves) < total - waves * programs).to(gl.int32)


@gluon.jit
def _position(wave):
    """This program's place in a wave. Every other wave is taken backwards: tiles come with the largest groups first,
    so who had more to do in one wave has less in the next.
    """
    return gl.where(wave % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))


@gluon.jit
def _place(wave, order, tiles_n, tiles_k):
    """The tile of this wave: its group, its number along N and K."""
    tile = wave * gl.num_programs(0) + _position(wave)
    group = gl.load(order + tile // (tiles_n * tiles_k))
    inside = tile % (tiles_n * tiles_k)
    return group, inside % tiles_n, inside // tiles_n


@gluon.jit
def _slabs(starts, group):
    """The first slab of a group and the one behind its last."""
    return gl.load(starts + group) // 128, gl.load(starts + group + 1) // 128


@gluon.jit
def _fetch(a_desc, b_desc, s_desc, slab, n, k, step, a0, a1, a2, b_ring, s_ring, full, empty):
    STAGES: gl.constexpr = b_ring.shape[0]
    BLOCK_K: gl.constexpr = b_ring.shape[1]
    BYTES: gl.constexpr = (192 + BLOCK_K) * 128 + BLOCK_K * 4
    stage = step % STAGES
    bar = full.index(stage)
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(bar, BYTES)
    load_tile(b_desc, [k, slab * 128], bar, b_ring.index(stage))
    load_tile(s_desc, [slab, k], bar, s_ring.index(stage))
    load_tile(a_desc, [n, slab * 128], bar, a0.index(stage))
    load_tile(a_desc, [n + 64, slab * 128], bar, a1.index(stage))
    load_tile(a_desc, [n + 128, slab * 128], bar, a2.index(stage))


@gluon.jit
def _produce(
    a_desc, b_desc, s_desc, a_desc2, b_desc2, s_desc2, a0, a1, a2, b_ring, s_ring, full, empty, starts, starts2, order,
    groups, tiles_n, tiles_k, TWO: gl.constexpr,
):  # fmt: skip
    step = 0
    for wave in range(_turns(groups * tiles_n * tiles_k)):
        group, n, k = _place(wave, order, tiles_n, tiles_k)
        n, k = n * 192, k * b_ring.shape[1]
        first, last = _slabs(starts, group)
        for slab in range(first, last):
            _fetch(a_desc, b_desc, s_desc, slab, n, k, step, a0, a1, a2, b_ring, s_ring, full, empty)
            step += 1
        if TWO:
            first, last = _slabs(starts2, group)
            for slab in range(first, last):
                _fetch(a_desc2, b_desc2, s_desc2, slab, n, k, step, a0, a1, a2, b_ring, s_ring, full, empty)
                step += 1


@gluon.jit
def _consume(
    third: gl.constexpr, a_ring, b_ring, s_ring, full, empty, old, staged, out_desc, a_scale, a_scale2, out, starts,
    starts2, order, groups, tiles_n, tiles_k, N, K, ADD: gl.constexpr, TWO: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = b_ring.shape[0]
    BLOCK_K: gl.constexpr = b_ring.shape[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    step = 0
    running = gl.zeros([64, BLOCK_K], gl.float32, ACC)
    for wave in range(_turns(groups * tiles_n * tiles_k)):
        group, n, k = _place(wave, order, tiles_n, tiles_k)
        n, k = n * 192 + third * 64, k * BLOCK_K
        rows = n + gl.arange(0, 64, ROW)
        first, last = _slabs(starts, group)
        a_ptr = a_scale + first * N + rows
        switch = last
        if TWO:  # slabs of the second source are counted on; its scales lie elsewhere
            first2, last2 = _slabs(starts2, group)
            last += last2 - first2
            a_ptr2 = a_scale2 + first2 * N + rows
            a_ptr = gl.where(first < switch, a_ptr, a_ptr2)
        if ADD:  # what is added to arrives while the tile is computed
            tma.store_wait(0)
            mbarrier.expect(old.index(third), 64 * BLOCK_K * 4)
            load_tile(out_desc, [group * N + n, k], old.index(third), staged)
        acc = gl.zeros([64, BLOCK_K], gl.float32, ACC)
        sa = gl.load(a_ptr, mask=(rows < N) & (first < last), other=0.0)
        for slab in range(first, last):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            b = b_ring.index(stage).permute((1, 0))
            token = warpgroup_mma(a_ring.index(stage), b, running, use_acc=False, is_async=True)
            a_ptr += N
            if TWO:
                a_ptr = gl.where(slab + 1 == switch, a_ptr2, a_ptr)
            sa_next = gl.load(a_ptr, mask=(rows < N) & (slab + 1 < last), other=0.0)
            running = warpgroup_mma_wait(0, deps=[token])
            sb = s_ring.index(stage).load(ACC)
            mbarrier.arrive(empty.index(stage), count=1)
            acc += running * sb * sa[:, None]
            sa = sa_next
            step += 1
        if ADD:
            mbarrier.wait(old.index(third), wave & 1)
            acc += staged.load(ACC)
        if n + 64 <= N:  # leaves by itself while the next tile is computed
            tma.store_wait(0)
            staged.store(acc.to(staged.dtype))
            fence_async_shared()
            store_tile(out_desc, [group * N + n, k], staged)
        elif n < N:  # a copy of 64 rows would reach into the next group's result
            columns = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, ACC))
            where = out + group.to(gl.int64) * N * K + rows[:, None] * K + columns[None, :]
            gl.store(where, acc.to(out.dtype.element_ty), (rows < N)[:, None] & (columns < K)[None, :])
    tma.store_wait(0)


@gluon.jit
def wgrad_kernel(
    a_desc, b_desc, s_desc, a_scale, starts, a_desc2, b_desc2, s_desc2, a_scale2, starts2, out_desc, out, order,
    groups, N, K, STAGES: gl.constexpr, ADD: gl.constexpr, TWO: gl.constexpr,
):  # fmt: skip
    """out # [E, N, K]: a # [N, tokens] times b # [K, tokens] transposed over each group; with TWO plus that of a second
    source, whose arguments are None otherwise; with ADD plus what out holds.
    """
    BLOCK_K: gl.constexpr = b_desc.block_type.shape[0]
    a0 = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 64, 128], a_desc.layout)
    a1 = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 64, 128], a_desc.layout)
    a2 = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 64, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_K, 128], b_desc.layout)
    s_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_K], s_desc.layout)
    staged = gl.allocate_shared_memory(out_desc.dtype, [3, 64, BLOCK_K], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    old = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for third in gl.static_range(3):
        mbarrier.init(old.index(third), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=3)
    fence_async_shared()
    tiles_n = (N + 191) // 192
    tiles_k = (K + BLOCK_K - 1) // BLOCK_K
    third0: gl.constexpr = 0
    third1: gl.constexpr = 1
    third2: gl.constexpr = 2
    gl.warp_specialize(
        [
            (_consume, (third0, a0, b_ring, s_ring, full, empty, old, staged.index(0), out_desc, a_scale, a_scale2,
                        out, starts, starts2, order, groups, tiles_n, tiles_k, N, K, ADD, TWO)),
            (_consume, (third1, a1, b_ring, s_ring, full, empty, old, staged.index(1), out_desc, a_scale, a_scale2,
                        out, starts, starts2, order, groups, tiles_n, tiles_k, N, K, ADD, TWO)),
            (_consume, (third2, a2, b_ring, s_ring, full, empty, old, staged.index(2), out_desc, a_scale, a_scale2,
                        out, starts, starts2, order, groups, tiles_n, tiles_k, N, K, ADD, TWO)),
            (_produce, (a_desc, b_desc, s_desc, a_desc2, b_desc2, s_desc2, a0, a1, a2, b_ring, s_ring, full, empty,
                        starts, starts2, order, groups, tiles_n, tiles_k, TWO)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


def grouped_outer(sources: Sequence[tuple[Columns, Columns]], dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """One or two pairs (a # of [M, N], b # of [M, K]) of E groups -> # [E, N, K] in dtype.

    For each group the sum of a^T b over the pairs, whose groups may have other sizes; zeros for one without rows.
    into # [E, N, K] float32 is added to.
    """
    (first, other), E = sources[0], sources[0][0].starts.shape[0] - 1
    N, K = first.codes.shape[0], other.codes.shape[0]
    out = torch.empty(E, N, K, dtype=dtype, device=first.codes.device) if into is None else into
    assert out.is_contiguous(), f"{out.stride()=}"
    sources = [pair for pair in sources if pair[0].codes.shape[1]]  # no tensor map describes nothing
    if not sources:
        return out.zero_() if into is None else into
    args: list[Any] = []
    for a, b in sources:
        args += descriptor(a.codes, [ROWS, 128], SHARED), descriptor(b.codes, [BLOCK_K, 128], SHARED)
        args += descriptor(b.scales, [1, BLOCK_K], FLAT), a.scales, a.starts
    args += [None] * (10 - len(args))
    args += descriptor(out, [ROWS, BLOCK_K], layout_of(out.dtype)), out, largest_first(sources[0][0].starts), E, N, K
    grid = (min(processors(out.device), E * -(-N // BLOCK_N) * -(-K // BLOCK_K)),)
    launch(wgrad_kernel, grid, tuple(args), (STAGES, into is not None, len(sources) == 2), num_warps=4)
    return out
