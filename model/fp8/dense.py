"""Products of a single group by F.scaled_mm (cuBLAS), which is faster than grouped kernels at the shapes that it takes.

Its block scales are those of model/fp8/forms.py: a 1 x 128 tile's are M-major; a block's have padding.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

PAD = 4  # numbers of scales along the contracted dimension are a multiple of this in memory


def takes(rows: int, n: int, k: int) -> bool:
    """Whether F.scaled_mm multiplies # [rows, k] by # [n, k] transposed: scales of 128 numbers begin at 16 bytes.

    What it does not take it refuses with an error (torch 2.11, CUDA 13.0), so all others are the grouped kernel's.
    """
    return rows > 0 and k > 0 and rows % 4 == 0 and n % 16 == 0 and k % 16 == 0


class Operand(NamedTuple):
    """A weight as F.scaled_mm wants it."""

    codes: Tensor  # [K, N], a view of # [N, K]
    scales: Tensor  # [blocks along K with padding, blocks along N], K-major
    of: Tensor  # the scales that it was made of


def operand(codes: Tensor, scales: Tensor) -> Operand | None:
    """codes # [1, N, K] and scales # [1, N/128, K/128] of a weight, which has it made once; None: there is no padding
    in memory.
    """
    kept: Any = codes.__dict__
    found = kept.get("operand")
    if found is None or found.of is not scales:
        _, n, k = scales.shape
        width = -(-k // PAD) * PAD
        if scales.stride()[1:] != (width, 1):
            return None
        # `data`: views that do not hold on to the tensor which keeps them
        transposed, padded = codes.data[0].t(), scales.data[0].as_strided((width, n), (1, width))
        found = kept["operand"] = Operand(transposed, padded, scales)
    return found


def product(codes: Tensor, scales: Tensor, weight: Operand, dtype: torch.dtype) -> Tensor:
    """codes # [M, K], scales # [M, K/128], weight of # [N, K] -> # [M, N] in dtype."""
    tile, block = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    if scales.stride(0) != 1:  # the reference's; kernels write them M-major
        scales = scales.t().contiguous().t()
    return F.scaled_mm(codes, weight.codes, scales, tile, weight.scales, block, output_dtype=dtype)


def outer(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """a # [N, P], its scales # [P/128, N], b # [K, P] and its own -> # [N, K] in dtype."""
    tile = ScalingType.BlockWise1x128
    a_scales, b_scales = a_scales.contiguous().t(), b_scales.contiguous().t()
    return F.scaled_mm(a, b.t(), a_scales, tile, b_scales, tile, output_dtype=dtype)
