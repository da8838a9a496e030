"""The block quantiser (arXiv 2412.19437, section 3.3): E4M3 codes and one FP32 scale for each block of a matrix.

Pure functions in plain torch on any device: what checkpoints are made with, and what faster kernels are tested against.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = (128, 128)  # of weights, in released checkpoints; (1, 128) gives the tiles of activations
E4M3_MAX = 448.0
MANTISSA = 0x7FFFFF  # bits of an FP32 number
TINY = 2.0**-100  # taken for the largest value of a block of zeros; far from FP32's subnormal numbers


def quantize_blocks(weight: Tensor, block: tuple[int, int] = BLOCK, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """weight # [.., M, K] -> codes float8_e4m3fn # [.., M, K], scale_inv float32 # [.., ceil(M/bm), ceil(K/bk)].

    weight is about codes * scale_inv: it multiplies, whatever its published name says. scale_inv = max|block| / 448;
    with ue8m0 it is rounded up to a power of two, all that one exponent byte can hold. Edge blocks may be partial.

    Quantising again what was dequantised (in FP32, or in BF16 if the weight was BF16) gives the same codes and scales:
    the largest code is 448, and a scale times 448 over 448 rounds to itself. With ue8m0 a scale may halve and its
    codes double, which is the same values. A block with a NaN or an infinity becomes NaN, scale and codes.
    """
    blocks = _cut(weight.float(), block)  # [.., R, bm, C, bk]
    largest = torch.maximum(blocks.amax((-3, -1)), -blocks.amin((-3, -1)))  # [.., R, C]
    scale_inv = scale_of(largest, ue8m0)
    codes = (blocks / scale_inv[..., :, None, :, None]).to(torch.float8_e4m3fn)  # at most 448, so none saturates
    return _join(codes, weight.shape), scale_inv


def scale_of(largest: Tensor, ue8m0: bool) -> Tensor:
    """Scales of blocks whose largest absolute values are given, float32 of any shape; NaN for a NaN or an infinity."""
    scale_inv = largest.clamp(min=TINY) / torch.full_like(largest, E4M3_MAX)  # CUDA multiplies by 1 / a plain number
    if ue8m0:
        # Exact, which log2 is not: a mantissa that is not zero carries into the exponent, then goes.
        scale_inv = ((scale_inv.view(torch.int32) + MANTISSA) & ~MANTISSA).view(torch.float32)
    return torch.where(largest < torch.inf, scale_inv, torch.nan)


def dequantize_blocks(
    codes: Tensor, scale_inv: Tensor, block: tuple[int, int] = BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codes # [.., M, K], scale_inv # [.., ceil(M/bm), ceil(K/bk)] -> codes * scale_inv in dtype # [.., M, K].

    Multiplied in FP32, then rounded once. Raises ValueError when the shapes disagree.
    """
    if scale_inv.shape != (expected := scale_shape(codes.shape, block)):
        raise ValueError(f"scale_inv has shape {tuple(scale_inv.shape)}: codes {tuple(codes.shape)} need {expected}")
    blocks = _cut(codes.float(), block)  # fresh memory, so the product needs no more
    blocks *= scale_inv.float()[..., :, None, :, None]
    return _join(blocks.to(dtype), codes.shape)


def scale_shape(shape: Sequence[int], block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    """Shape of the scales of a matrix, or of a stack of matrices, of this shape."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _cut(x: Tensor, block: tuple[int, int]) -> Tensor:
    """x # [.., M, K] -> # [.., R, bm, C, bk], partial blocks filled up with zeros."""
    rows, columns = x.shape[-2:]
    if rows % block[0] or columns % block[1]:
        x = F.pad(x, (0, -columns % block[1], 0, -rows % block[0]))
    return x.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))


def _join(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_cut`: # [.., R, bm, C, bk] -> # [.., M, K]."""
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]].contiguous()
