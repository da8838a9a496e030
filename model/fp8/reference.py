"""The FP8 recipe of DeepSeek-V3 (arXiv 2412.19437, section 3.3) in plain torch, on any device.

The oracle of every kernel, and the emulation that trains where there is no FP8 hardware. Operands really are E4M3 codes
and scales; a product multiplies what they stand for in FP32. That equals the sums over slabs of one tile, each times
the two scales and added up in FP32 registers, but for the rounding of FP32 (tests/model/test_fp8_reference.py).

A tile with a NaN or an infinity is NaN as a whole, and so is whatever is computed from it. The largest value of a tile
is not clamped at 1e-4, as some do: gradients of a mean over many tokens are smaller than that throughout.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8.forms import ALIGN, Columns, Recipe, Rows, Weight
from model.fp8.quantize import quantize_blocks, scale_of
from model.moe import grouped_linear as grouped_mm

# ------------------------------------------------------------------------------------------------------------- casts


def quantize_rows(x: Tensor, recipe: Recipe) -> Rows:
    """x # [M, K] -> tiles of 1 x recipe.tile; a partial last tile is filled up with zeros."""
    width = x.shape[-1]
    tiles = F.pad(x, (0, -width % recipe.tile)) if width % recipe.tile else x
    codes, scales = _quantize(tiles.unflatten(-1, (-1, recipe.tile)), -1, recipe.ue8m0)
    return Rows(codes.flatten(-2)[..., :width].contiguous(), scales)


def quantize_columns(x: Tensor, ends: Tensor | None, recipe: Recipe) -> Columns:
    """x # [M, K], rows ends[e-1]:ends[e] of group e -> tiles of recipe.tile x 1; ends None: one group.

    The number of places depends on shapes alone, so that nothing has to wait for `ends` to reach the host.
    """
    rows, starts = len(x), _starts(x, ends)
    groups = len(starts) - 1
    places = (rows + (ALIGN - 1) * groups) // ALIGN * ALIGN  # P
    if places != rows:
        padded = x.new_zeros(places, x.shape[1])
        x = padded.index_copy_(0, torch.arange(rows, device=x.device) + _shift(rows, starts, ends), x)
    codes, scales = _quantize(
        x.unflatten(0, (places // recipe.tile, recipe.tile)), 1, recipe.ue8m0
    )  # [P / tile, tile, K]
    return Columns(codes.flatten(0, 1).t(), scales, starts)


def quantize_both(x: Tensor, ends: Tensor | None, recipe: Recipe) -> tuple[Rows, Columns]:
    """Both forms of x # [M, K], each from x itself: a second rounding of the first would add its own error."""
    return quantize_rows(x, recipe), quantize_columns(x, ends, recipe)


def permute_quantize(x: Tensor, token: Tensor, ends: Tensor, recipe: Recipe) -> tuple[Rows, Columns]:
    """Both forms of the rows token # [M], sorted by group, of x # [T, K]; a row is cast once and taken many times."""
    rows = quantize_rows(x, recipe)
    # as bytes: index_select knows no FP8
    codes = rows.codes.view(torch.uint8).index_select(0, token).view(rows.codes.dtype)
    taken = Rows(codes, rows.scales.index_select(0, token))
    return taken, quantize_columns(x.index_select(0, token), ends, recipe)


# what comes from above in the backward pass is cast as activations are; names of its own for comparisons
quantize_gradient, permute_gradient = quantize_both, permute_quantize


def quantize_weight(w: Tensor, recipe: Recipe) -> Weight:
    """w # [E, N, K] -> its blocks for products over K and, the same bytes where blocks are square, over N."""
    codes, scales = quantize_blocks(w, recipe.weight_block, recipe.ue8m0)
    if recipe.weight_block[0] == recipe.weight_block[1]:
        return Weight(codes, scales, codes.transpose(1, 2), scales.transpose(1, 2))
    return Weight(codes, scales, *quantize_blocks(w.transpose(1, 2), recipe.weight_block, recipe.ue8m0))


def dequantize_rows(x: Rows) -> Tensor:
    """What x stands for, float32 # [M, K]."""
    tile, width = _size(x.codes.shape[-1], x.scales.shape[-1]), x.codes.shape[-1]
    values = _values(x.codes)
    if width % tile:
        values = F.pad(values, (0, -width % tile))
    return (values.unflatten(-1, (-1, tile)) * _scaled(x.scales)[..., None]).flatten(-2)[..., :width]


def dequantize_columns(x: Columns) -> Tensor:
    """What x stands for, float32 # [P, K]."""
    values = _values(x.codes.t()).unflatten(0, (len(x.scales), _size(x.codes.shape[1], len(x.scales))))
    return (values * _scaled(x.scales)[:, None]).flatten(0, 1)


def dequantize_weight(w: Weight, transposed: bool = False) -> Tensor:
    """What w stands for in products over K, float32 # [E, N, K], or in those over N # [E, K, N]."""
    codes, scales = (w.codes_t, w.scales_t) if transposed else (w.codes, w.scales)
    for dim in (-2, -1):
        if scales.shape[dim] != codes.shape[dim]:
            size = _size(codes.shape[dim], scales.shape[dim])
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
    return _values(codes) * _scaled(scales)


# ---------------------------------------------------------------------------------------------------------- products


def grouped_linear(x: Rows, w: Weight, ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x # [M, K], w # [E, N, K] -> rows of group e times w[e]^T, in dtype # [M, N]; ends None: one group."""
    return _product(dequantize_rows(x), dequantize_weight(w), ends).to(dtype)


def grouped_dgrad(g: Rows, w: Weight, ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    """g # [M, N], w # [E, N, K] -> rows of group e times w[e], in dtype # [M, K]."""
    return _product(dequantize_rows(g), dequantize_weight(w, transposed=True), ends).to(dtype)


def grouped_wgrad(
    g: Columns,
    x: Columns,
    dtype: torch.dtype,
    into: Tensor | None = None,
    also: tuple[Columns, Columns] | None = None,
) -> Tensor:
    """g # of [M, N], x # of [M, K] -> g^T x of each group, in dtype # [E, N, K]; zeros for one without tokens.

    into # [E, N, K] float32: added to it instead. also: another pair (g, x), of as many groups and as wide, whose
    product is added up with the first one's.
    """
    if also is not None:
        return grouped_wgrad(g, x, torch.float32, grouped_wgrad(*also, torch.float32, into)).to(dtype)
    if into is not None:
        return into.add_(grouped_wgrad(g, x, into.dtype))
    left, right, starts = dequantize_columns(g), dequantize_columns(x), g.starts  # [P, N], [P, K]
    if len(starts) == 2:
        return (left.t() @ right)[None].to(dtype)
    if all(len(codes) % 4 == 0 for codes in (g.codes, x.codes)) and hasattr(F, "grouped_mm") and left.is_cpu:
        return F.grouped_mm(left.t(), right, offs=starts[1:]).to(dtype)
    bounds = starts.tolist()
    return torch.stack([left[a:b].t() @ right[a:b] for a, b in itertools.pairwise(bounds)]).to(dtype)


# ------------------------------------------------------------------------------------------------------------ SwiGLU


def swiglu_quantize(gate_up: Tensor, recipe: Recipe, weight: Tensor | None = None) -> tuple[Rows, Rows]:
    """gate_up # [M, 2I] -> weight * silu(gate) * up # [M, I], cast from FP32, and gate_up as kept for the backward.

    weight # [M] float32 is a row's share in its token's output. Before the cast it changes scales, hardly codes, and
    the product that follows has to be added up only.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    act = F.silu(gate) * up
    return quantize_rows(act if weight is None else act * weight[:, None], recipe), quantize_rows(gate_up, recipe)


def swiglu_backward(
    saved: Rows, grad: Tensor, ends: Tensor | None, recipe: Recipe, weight: Tensor | None = None
) -> tuple[Columns, Rows, Columns, Tensor | None]:
    """saved # [M, 2I], grad # [M, I] of the activations -> the activations again, both forms of gate_up's gradient, and
    weight's gradient # [M]."""
    act, grad_gate_up, grad_weight = swiglu_gradient(saved, grad, weight)
    return quantize_columns(act, ends, recipe), *quantize_gradient(grad_gate_up, ends, recipe), grad_weight


def swiglu_gradient(saved: Rows, grad: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> (activations # [M, I], gradients of gate_up # [M, 2I] and of weight # [M]), float32, of the gate_up kept."""
    gate, up = dequantize_rows(saved).chunk(2, dim=-1)
    share, grad, grad_weight = gate.sigmoid(), grad.float(), None
    silu = gate * share
    act = silu * up
    if weight is not None:
        grad_weight = (grad * act).sum(-1)
        act, grad = act * weight[:, None], grad * weight[:, None]
    return act, torch.cat((grad * up * share * (1 + gate * (1 - share)), grad * silu), dim=-1), grad_weight


def combine(y: Tensor, inverse: Tensor) -> Tensor:
    """y # [M, d], inverse # [T, K]: the rows of each token -> their sums in FP32, in y's dtype # [T, d]."""
    rows = y.index_select(0, inverse.flatten()).unflatten(0, inverse.shape)
    return rows.sum(1, dtype=torch.float32).to(y.dtype)


# ----------------------------------------------------------------------------------------------------------- details


def _quantize(tiles: Tensor, dim: int, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """Tiles along a dimension of their own -> codes of the same shape, scales without that dimension."""
    tiles = tiles.float()
    scales = scale_of(tiles.abs().amax(dim), ue8m0)
    return (tiles / scales.unsqueeze(dim)).to(torch.float8_e4m3fn), scales


def _values(codes: Tensor) -> Tensor:
    """Codes as float32 times 2^-8: an E4M3 number is the FP16 number with the same bits, whose exponent is off by 8.

    Torch takes 40 times as long on a CPU. NaN becomes 480; its tile's scale is NaN.
    """
    bits = (codes.view(torch.int8).to(torch.int16) << 7) & ~0x4000  # the sign was copied to bit 14
    return bits.view(torch.float16).float()


def _scaled(scales: Tensor) -> Tensor:
    return scales * 256.0  # what `_values` leaves out; exact


def _size(numbers: int, tiles: int) -> int:
    """Of a tile, from how many cover so many numbers: sizes are 128 and 32; a single one may be as wide as it likes."""
    return next((size for size in (32, 128) if -(-numbers // size) == tiles), numbers)


def _starts(x: Tensor, ends: Tensor | None) -> Tensor:
    """[E + 1] int32: where groups begin in a column-wise form."""
    if ends is None:
        return torch.tensor([0, -(-len(x) // ALIGN) * ALIGN], dtype=torch.int32, device=x.device)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    padded = (sizes + ALIGN - 1) // ALIGN * ALIGN
    return F.pad(padded.cumsum(0), (1, 0)).to(torch.int32)


def _shift(rows: int, starts: Tensor, ends: Tensor | None) -> Tensor:
    """[M] int64: how much further down each row lies in a column-wise form."""
    if ends is None:
        return starts.new_zeros(rows, dtype=torch.int64)
    begins = F.pad(ends, (1, 0))[:-1]
    group = torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)
    return (starts[:-1] - begins).long()[group]


def _product(x: Tensor, w: Tensor, ends: Tensor | None) -> Tensor:
    return x @ w[0].t() if ends is None else grouped_mm(x, w, ends)
