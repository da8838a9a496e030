"""Log-softmax at one token a row and its gradient, in one pass over the logits each (Triton)."""

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import ceil_div, power_of_two

BLOCK = 4096  # logits of a row at a time


@triton.jit
def _forward_kernel(logits, target, logprobs, entropy, norm, V, inverse_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * V
    columns = tl.arange(0, BLOCK)
    most, total, mean = -float("inf"), 0.0, 0.0  # max x, sum of exp(x - max), sum of exp(x - max) x
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        x = tl.load(start + first + columns, inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        before, most = most, tl.maximum(most, tl.max(x, 0))
        share = tl.exp(x - most)
        kept = tl.exp(before - most)
        total = total * kept + tl.sum(share, 0)
        mean = mean * kept + tl.sum(tl.where(inside, share * x, 0.0), 0)
    log_norm = most + tl.log(total)
    chosen = tl.load(start + tl.load(target + row)).to(tl.float32) * inverse_temperature
    tl.store(logprobs + row, chosen - log_norm)
    tl.store(entropy + row, log_norm - mean / total)
    tl.store(norm + row, log_norm)


@triton.jit
def _backward_kernel(logits, target, norm, grad, V, inverse_temperature, BLOCK: tl.constexpr):
    blocks = tl.cdiv(V, BLOCK)  # in one grid, as its second axis ends at 65,535
    row = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    where = logits + row.to(tl.int64) * V + columns
    x = tl.load(where, columns < V, other=0.0).to(tl.float32) * inverse_temperature
    share = tl.exp(x - tl.load(norm + row))
    value = (tl.where(columns == tl.load(target + row), 1.0, 0.0) - share) * tl.load(grad + row) * inverse_temperature
    tl.store(where, value.to(logits.dtype.element_ty), columns < V)


def chosen_logprobs(
    logits: Tensor, target: Tensor, temperature: float, logprobs: Tensor, entropy: Tensor, norm: Tensor
) -> None:
    """logits # [R, V], target # [R] int64 -> log-softmax(logits / temperature) at target, its entropy, and the log of
    its normaliser, written to logprobs, entropy and norm # [R] float32."""
    R, V = logits.shape
    if R:
        block = min(BLOCK, power_of_two(V))
        _forward_kernel[(R,)](logits, target, logprobs, entropy, norm, V, 1 / temperature, block, num_warps=8)


def logits_gradient_(logits: Tensor, target: Tensor, temperature: float, norm: Tensor, grad: Tensor) -> Tensor:
    """In place of logits # [R, V] what a gradient # [R] float32 of their log-probabilities at target becomes."""
    R, V = logits.shape
    if R:
        block = min(BLOCK, power_of_two(V))
        grid = (ceil_div(V, block) * R,)
        _backward_kernel[grid](logits, target, norm, grad.contiguous(), V, 1 / temperature, block, num_warps=8)
    return logits
