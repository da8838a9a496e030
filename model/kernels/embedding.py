"""The gradient of an embedding, added to an FP32 sum in place (Triton): only rows that were read are touched.

As a tensor of its own it is mostly zeros, which take longer to write and to add than everything else: 0.7 GB for
Moonlight's in BF16, and the sum is twice that. Tokens are added up in order, so that numbers do not depend on chance.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from model.kernels import sum_of
from model.kernels.launch import ceil_div, launch

BLOCK = 512  # channels of a row at a time: a frequent token's rows are added up one after another


@triton.jit
def _add_rows_kernel(ids, order, ends, grad, total, D, BLOCK: tl.constexpr):
    """ids # [T] sorted, order # [T] of the tokens, ends # [T]: where the tokens of the same id end."""
    blocks = tl.cdiv(D, BLOCK)
    first = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + first).to(tl.int64)
    before = tl.load(ids + tl.maximum(first - 1, 0)).to(tl.int64)
    if (first == 0) | (before != row):  # one program for all tokens of an id
        value = tl.load(total + row * D + columns, columns < D, other=0.0)
        for at in range(first, tl.load(ends + first)):
            value += tl.load(grad + tl.load(order + at) * D + columns, columns < D, other=0.0).to(tl.float32)
        tl.store(total + row * D + columns, value, columns < D)


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.parameter = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        (ids,), weight, grad = ctx.saved_tensors, ctx.parameter, grads[0].contiguous()
        total = sum_of(weight)
        if total is None:
            return None, torch.ops.aten.embedding_dense_backward(grad, ids, len(weight), -1, False)
        ids, order = ids.to(torch.int32).sort(stable=True)  # half the passes that int64 takes
        ends, (T, D) = torch.searchsorted(ids, ids, right=True), grad.shape
        if T:
            launch(_add_rows_kernel, (T * ceil_div(D, BLOCK),), (ids, order, ends, grad, total, D), (BLOCK,))
        return None, None


def embedded(ids: Tensor, weight: Tensor) -> Tensor:
    """ids # [T] int64, weight # [V, d] -> weight[ids] # [T, d]."""
    return _Embedded.apply(ids, weight)  # type: ignore[no-any-return]
