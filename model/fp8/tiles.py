"""Which rows a tile of 128 tokens covers when the rows of E ragged groups stand one after another (Triton).

Tiles never cross groups. Computed on the device from the groups' ends, without host synchronisation, in one launch that
all products and casts of the same ends share.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import ceil_div, launch, power_of_two

TILE = 128


class Tiles(NamedTuple):
    """Tile t covers rows table[t, 1] : min(table[t, 1] + 128, table[t, 2]) of group table[t, 0]."""

    table: Tensor  # [most, 4] int32: group, first row, end of the group's rows, unused; no rows behind the last tile
    starts: Tensor  # [E + 1] int32: padded start of each group, multiples of 128
    count: Tensor  # [1] int32: tiles in use
    most: int  # (M + 127 E) // 128, known without the device


@triton.jit
def _order(size, groups, order, E):
    """Writes the groups with the most tiles first; size is -1 behind the last group."""
    ahead = (size[None, :] > size[:, None]) | ((size[None, :] == size[:, None]) & (groups[None, :] < groups[:, None]))
    tl.store(order + tl.sum(ahead.to(tl.int32), 1), groups, groups < E)


@triton.jit
def _tiles_kernel(ends, table, starts, order, count, E, most, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    groups = tl.arange(0, GROUPS)
    end = tl.load(ends + groups, mask=groups < E, other=0)
    begin = tl.load(ends + groups - 1, mask=(groups > 0) & (groups < E), other=0)
    begin = tl.where(groups < E, begin, end)
    held = (end - begin + 127) // 128  # tiles of a group
    last = tl.cumsum(held, 0)
    total = tl.sum(held, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = (last[None, :] <= tile[:, None]) & (groups < E)[None, :]  # [BLOCK, GROUPS]: end before it
    mine = (last - held <= tile[:, None]) & (tile[:, None] < last[None, :])  # at most one is True
    group = tl.sum(before.to(tl.int32), 1)
    row = tl.sum(tl.where(mine, begin[None, :] + (tile[:, None] - (last - held)[None, :]) * 128, 0), 1)
    stop = tl.sum(tl.where(mine, end[None, :], 0), 1)
    used = tile < most
    tl.store(table + tile * 4, tl.minimum(group, E - 1), used)
    tl.store(table + tile * 4 + 1, row, used)
    tl.store(table + tile * 4 + 2, stop, used)
    if tl.program_id(0) == 0:
        tl.store(starts + groups, (last - held) * 128, groups < E)
        tl.store(starts + E, total * 128)
        tl.store(count, total)
        _order(tl.where(groups < E, held, -1), groups, order, E)


@triton.jit
def _order_kernel(starts, order, E, GROUPS: tl.constexpr):
    groups = tl.arange(0, GROUPS)
    begin = tl.load(starts + groups, groups < E, other=0)
    _order(tl.where(groups < E, tl.load(starts + groups + 1, groups < E, other=0) - begin, -1), groups, order, E)


def largest_first(starts: Tensor) -> Tensor:
    """starts # [E + 1] int32 of padded groups -> the groups # [E] int32, those with most tokens first."""
    order = starts.__dict__.get("order")  # `tiles` has made it already
    if order is None:
        groups = len(starts) - 1
        order = torch.empty(groups, dtype=torch.int32, device=starts.device)
        launch(_order_kernel, (1,), (starts, order, groups), (power_of_two(groups),), num_warps=8)
        starts.__dict__["order"] = order
    return order


def tiles(ends: Tensor | None, rows: int, device: torch.device) -> Tiles:
    """ends # [E] int32 (None: one group of all rows), rows M -> the tiles of 128 rows that cover the groups.

    They are kept with ends, whose numbers must stay as they are.
    """
    if ends is None:
        return _one_group(rows, device)
    found = ends.__dict__.get("tiles")
    if found is None:
        found = ends.__dict__["tiles"] = _tiles(ends, rows)
    return found


@lru_cache(maxsize=256)
def _one_group(rows: int, device: torch.device) -> Tiles:
    with torch.inference_mode(False):  # an engine may be first to ask, for what training saves
        return _tiles(torch.full((1,), rows, dtype=torch.int32, device=device), rows)


def _tiles(ends: Tensor, rows: int) -> Tiles:
    groups = len(ends)
    most = (rows + 127 * groups) // TILE
    wide = (groups + 4) // 4 * 4  # room for a number a group and one more, with the next one aligned to 16 bytes
    sizes = most * 4, wide, wide, 4
    table, starts, order, count = torch.empty(sum(sizes), dtype=torch.int32, device=ends.device).split(sizes)
    starts, order, count = starts[: groups + 1], order[:groups], count[:1]
    block = 32
    grid = (max(1, ceil_div(most, block)),)
    constants = power_of_two(groups), block
    launch(_tiles_kernel, grid, (ends, table, starts, order, count, groups, most), constants, num_warps=4)
    starts.__dict__["order"] = order
    return Tiles(table.view(most, 4), starts, count, most)
