"""Which rows a tile of 128 tokens covers when the rows of E ragged groups stand one after another (Triton).

Tiles never cross groups. Computed on the device from the groups' ends: no host synchronisation, one small launch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128


class Tiles(NamedTuple):
    """Tile t covers rows table[t, 1] : min(table[t, 1] + 128, table[t, 2]) of group table[t, 0]."""

    table: Tensor  # [most, 4] int32: group, first row, end of the group's rows, unused; no rows behind the last tile
    starts: Tensor  # [E + 1] int32: padded start of each group, multiples of 128
    count: Tensor  # [1] int32: tiles in use
    most: int  # (M + 127 E) // 128, known without the device


@triton.jit
def _tiles_kernel(ends, table, starts, count, E, most, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
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


@triton.jit
def _order_kernel(starts, order, E, GROUPS: tl.constexpr):
    groups = tl.arange(0, GROUPS)
    begin = tl.load(starts + groups, groups < E, other=0)
    size = tl.where(groups < E, tl.load(starts + groups + 1, groups < E, other=0) - begin, -1)
    ahead = (size[None, :] > size[:, None]) | ((size[None, :] == size[:, None]) & (groups[None, :] < groups[:, None]))
    tl.store(order + tl.sum(ahead.to(tl.int32), 1), groups, groups < E)


def largest_first(starts: Tensor) -> Tensor:
    """starts # [E + 1] int32 of padded groups -> the groups # [E] int32, those with most tokens first."""
    groups = len(starts) - 1
    order = torch.empty(groups, dtype=torch.int32, device=starts.device)
    _order_kernel[(1,)](starts, order, groups, triton.next_power_of_2(groups), num_warps=8)
    return order


def tiles(ends: Tensor | None, rows: int, device: torch.device) -> Tiles:
    """ends # [E] int32 (None: one group of all rows), rows M -> the tiles of 128 rows that cover the groups."""
    ends = torch.full((1,), rows, dtype=torch.int32, device=device) if ends is None else ends
    groups = len(ends)
    most = (rows + 127 * groups) // TILE
    table = torch.empty(most, 4, dtype=torch.int32, device=device)
    starts = torch.empty(groups + 1, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    block = 32
    grid = (max(1, triton.cdiv(most, block)),)
    _tiles_kernel[grid](ends, table, starts, count, groups, most, triton.next_power_of_2(groups), block)
    return Tiles(table, starts, count, most)
