"""The quantised forms of a matrix that FP8 training multiplies: the seam between modules and what computes them.

Each side has the functions of model/fp8/reference.py under the same names; docs/fp8.md says what a form is for.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

ALIGN = 128  # tokens; where a group begins in a column-wise form


@dataclass(frozen=True)
class Recipe:
    """How numbers are quantised (arXiv 2412.19437, section 3.3.2): E4M3 everywhere, scales as below."""

    tile: int = 128  # numbers along the contracted dimension that share a scale, in activations and gradients
    weight_block: tuple[int, int] = (128, 128)  # (1, tile): weights are quantised once for each direction
    ue8m0: bool = False  # scales are powers of two, rounded up


MXFP8 = Recipe(tile=32, weight_block=(1, 32), ue8m0=True)  # OCP microscaling with E4M3 elements, as arXiv 2506.08027


class Rows(NamedTuple):
    """x # [M, K] in tiles of 1 x tile: an operand that is contracted over K."""

    codes: Tensor  # [M, K] float8_e4m3fn
    scales: Tensor  # [M, ceil(K / tile)] float32, of any strides


class Columns(NamedTuple):
    """x # [M, K] of E groups in tiles of tile x 1: an operand that is contracted over a group's tokens.

    Group e has the places starts[e] : starts[e] + its size of P = (M + 127 E) // 128 * 128; starts are multiples of
    ALIGN, so no tile has tokens of two groups, and places without a token hold zeros.
    """

    codes: Tensor  # [K, P] float8_e4m3fn, tokens contiguous where a kernel wrote it
    scales: Tensor  # [P / tile, K] float32
    starts: Tensor  # [E + 1] int32


class Weight(NamedTuple):
    """w # [E, N, K] in blocks. codes_t are the same bytes transposed, unless blocks are (1, tile)."""

    codes: Tensor  # [E, N, K] float8_e4m3fn
    scales: Tensor  # [E, ceil(N / bn), ceil(K / bk)] float32
    codes_t: Tensor  # [E, K, N] float8_e4m3fn
    scales_t: Tensor  # [E, ceil(K / bk), ceil(N / bn)] float32
