"""The functions of model/fp8/reference.py on a Hopper GPU: same names, arguments and results, computed by kernels.

Importing this needs Triton; `check` says in one line what a machine lacks.
"""

import torch
import triton
from torch import Tensor

from model.fp8 import casts, dense, reference, swiglu
from model.fp8.both import cast_both
from model.fp8.forms import Columns, Recipe, Rows, Weight
from model.fp8.gemm import grouped_product
from model.fp8.tiles import tiles
from model.fp8.wgrad import grouped_outer
from model.kernels.experts import combine

# what model/fp8/reference.py has
__all__ = ["check", "combine", "grouped_dgrad", "grouped_linear", "grouped_wgrad", "permute_gradient"]
__all__ += ["permute_quantize", "quantize_both", "quantize_gradient", "quantize_rows", "quantize_weight"]
__all__ += ["swiglu_backward", "swiglu_quantize"]


def check() -> None:
    """Raises ValueError on a machine whose GPU cannot run the kernels."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise ValueError(
            "model.fp8 is 'on', but its kernels need a Hopper GPU (compute capability 9.0); set it to emulate"
        )
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 6):
        raise ValueError(f"model.fp8 is 'on', but Triton {triton.__version__} is too old for its kernels; install 3.6")


def quantize_rows(x: Tensor, recipe: Recipe) -> Rows:
    """x # [M, K] FP32 or BF16 -> its row-wise form."""
    return Rows(*casts.cast(x.contiguous(), None, recipe.ue8m0)[0])


def quantize_both(x: Tensor, ends: Tensor | None, recipe: Recipe) -> tuple[Rows, Columns]:
    """x # [M, K] FP32 or BF16, groups that end at ends # [E] -> both forms, in one pass."""
    rows, columns = cast_both(x.contiguous(), tiles(ends, x.shape[0], x.device), recipe.ue8m0)
    return Rows(*rows), Columns(*columns)


def permute_quantize(x: Tensor, token: Tensor, ends: Tensor, recipe: Recipe) -> tuple[Rows, Columns]:
    """Both forms of x[token], x # [T, K], token # [M] int64, in one pass."""
    rows, columns = cast_both(x.contiguous(), tiles(ends, token.shape[0], x.device), recipe.ue8m0, token)
    return Rows(*rows), Columns(*columns)


quantize_gradient, permute_gradient = quantize_both, permute_quantize


def quantize_weight(w: Tensor, recipe: Recipe) -> Weight:
    """w # [E, N, K] FP32 or BF16 -> its blocks and the same bytes transposed, in one pass."""
    return Weight(*casts.cast_weight(w.contiguous(), recipe.ue8m0))


def grouped_linear(x: Rows, w: Weight, ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x # [M, K] times w[e]^T for the rows of group e, w # [E, N, K] -> # [M, N]."""
    return _product(x, w.codes, w.scales, ends, dtype)


def grouped_dgrad(g: Rows, w: Weight, ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    """g # [M, N] times w[e] for the rows of group e, w # [E, N, K] -> # [M, K]."""
    return _product(g, w.codes_t, w.scales_t, ends, dtype)


def _product(x: Rows, codes: Tensor, scales: Tensor, ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = x.codes.shape[0]
    if ends is None and dense.takes(rows, *codes.shape[1:]) and (weight := dense.operand(codes, scales)) is not None:
        return dense.product(*x, weight, dtype)
    return grouped_product(*x, codes, scales, tiles(ends, rows, x.codes.device), dtype)


def grouped_wgrad(
    g: Columns,
    x: Columns,
    dtype: torch.dtype,
    into: Tensor | None = None,
    also: tuple[Columns, Columns] | None = None,
) -> Tensor:
    """g^T x of each group, g # of [M, N], x # of [M, K], with that of another pair also -> # [E, N, K] in dtype,
    or added to into, float32.
    """
    if g.starts.shape[0] == 2 and into is None and also is None and dense.takes(g.codes.shape[0], *x.codes.shape):
        return dense.outer(*g[:2], *x[:2], dtype)[None]
    return grouped_outer([(g, x)] if also is None else [also, (g, x)], dtype, into)


def swiglu_quantize(gate_up: Tensor, recipe: Recipe, weight: Tensor | None = None) -> tuple[Rows, Rows]:
    """gate_up # [M, 2I], weight # [M] -> weight * silu(gate) * up # [M, I] cast from FP32, and gate_up as kept."""
    if gate_up.shape[1] % 256:  # a tile would hold the last gates and the first ups
        return reference.swiglu_quantize(gate_up, recipe, weight)
    codes, scales, saved, saved_scales = swiglu.swiglu_forward(gate_up.contiguous(), weight, recipe.ue8m0)
    return Rows(codes, scales), Rows(saved, saved_scales)


def swiglu_backward(
    saved: Rows, grad: Tensor, ends: Tensor | None, recipe: Recipe, weight: Tensor | None = None
) -> tuple[Columns, Rows, Columns, Tensor | None]:
    """saved # [M, 2I], grad # [M, I] of the activations -> their columns, both forms of gate_up's gradient and
    weight's gradient # [M].
    """
    if grad.shape[1] % 128:
        act, rows, columns, d_weight = reference.swiglu_backward(saved, grad, ends, recipe, weight)
        act, columns = (Columns(c.codes.contiguous(), *c[1:]) for c in (act, columns))
        return act, rows, columns, d_weight
    t = tiles(ends, grad.shape[0], grad.device)
    act, rows, columns, d_weight = swiglu.swiglu_backward(*saved, grad.contiguous(), weight, t, recipe.ue8m0)
    return Columns(*act, t.starts), Rows(*rows), Columns(*columns, t.starts), d_weight
