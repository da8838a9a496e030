"""Products of a single group by F.scaled_mm (cuBLAS), which is faster than grouped kernels at the shapes that it takes.

Its block scales are those of model/fp8/forms.py: a 1 x 128 tile's are M-major; a block's have padding.
"""

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


def padded(scales: Tensor) -> Tensor | None:
    """Scales of blocks # [n, k] -> the same with their padding # [k padded, n] as F.scaled_mm wants them, if there is
    any.
    """
    n, k = scales.shape
    width = -(-k // PAD) * PAD
    if scales.stride() != (width, 1):
        return None
    return scales.as_strided((width, n), (1, width))


def product(codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes # [M, K], scales # [M, K/128], weight # [N, K], its padded scales -> # [M, N] in dtype."""
    tile, block = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    scales = scales.t().contiguous().t()  # M-major as kernels write them; a copy of what the reference made
    return F.scaled_mm(codes, weight.t(), scales, tile, weight_scales, block, output_dtype=dtype)


def outer(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """a # [N, P], its scales # [P/128, N], b # [K, P] and its own -> # [N, K] in dtype."""
    tile = ScalingType.BlockWise1x128
    a_scales, b_scales = a_scales.contiguous().t(), b_scales.contiguous().t()
    return F.scaled_mm(a, b.t(), a_scales, tile, b_scales, tile, output_dtype=dtype)
