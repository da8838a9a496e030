"""One AdamW update in one pass over weights, gradients and moments (Triton)."""

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import ceil_div, launch

BLOCK = 2048


@triton.jit
def _adamw_kernel(
    weight, gradient, first, second, N, scale, beta1, beta2, shrink, size, correction2, eps, BLOCK: tl.constexpr
):  # fmt: skip
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = where < N
    grad = tl.load(gradient + where, inside, other=0.0) * scale
    m = tl.load(first + where, inside, other=0.0).to(tl.float32)
    v = tl.load(second + where, inside, other=0.0).to(tl.float32)
    w = tl.load(weight + where, inside, other=0.0)
    m += (1 - beta1) * (grad - m)
    v = v * beta2 + (1 - beta2) * grad * grad
    w = w * shrink - size * m / (tl.sqrt(v / correction2) + eps)
    tl.store(first + where, m.to(first.dtype.element_ty), inside)
    tl.store(second + where, v.to(second.dtype.element_ty), inside)
    tl.store(weight + where, w, inside)


def adamw_(
    weight: Tensor, gradient: Tensor, scale: float, first: Tensor, second: Tensor, step: int, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """weight, gradient (to be multiplied by scale) # [..] float32 and the moments of any dtype, all contiguous and of
    one shape; step from 1.
    """
    n, (beta1, beta2) = weight.numel(), betas
    assert all(t.is_contiguous() for t in (weight, gradient, first, second)), "AdamW's tensors are not contiguous"
    if n:
        numbers = (scale, beta1, beta2, 1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta2**step, eps)
        args = (weight, gradient, first, second, n, *map(float, numbers))
        launch(_adamw_kernel, (ceil_div(n, BLOCK),), args, (BLOCK,), num_warps=8)
