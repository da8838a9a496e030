"""Forward and backward passes of FP8 layers as autograd functions: which form of what is multiplied, kept and added.

`ops` has the functions of model/fp8/reference.py. Kept for a backward pass are column-wise forms of inputs, and the
input of SwiGLU in FP8, which is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.fp8.forms import Columns, Recipe, Rows, Weight

# parameter -> ops and operands of the product that is still to be added to its gradient
Waiting = dict[Tensor, tuple[Any, Columns, Columns]]


class LinearFunction(torch.autograd.Function):
    """x # [M, K] -> # [M, N]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, codes: Weight, ops: Any, recipe: Recipe, shared: list[Any] | None
    ) -> Tensor:
        before = shared.pop() if shared else None
        if before is not None and _unchanged(before[0], before[1], x):
            rows, columns = before[2]
        else:
            rows, columns = ops.quantize_both(x, None, recipe)
            if shared is not None:
                shared.append((x, x._version, (rows, columns)))
        ctx.save_for_backward(*columns)
        ctx.codes, ctx.ops, ctx.recipe, ctx.dtypes = codes, ops, recipe, (x.dtype, weight.dtype)
        return ops.grouped_linear(rows, codes, None, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, grad_x = ctx.ops, None
        rows, columns = ops.quantize_gradient(grads[0], None, ctx.recipe)
        if ctx.needs_input_grad[0]:
            grad_x = ops.grouped_dgrad(rows, ctx.codes, None, ctx.dtypes[0])
        grad_weight = ops.grouped_wgrad(columns, Columns(*ctx.saved_tensors), ctx.dtypes[1])[0]
        return grad_x, grad_weight, None, None, None, None


def _unchanged(of: Tensor, version: int, x: Tensor) -> bool:
    """Whether x is that tensor, or another of the same memory, and nothing has written to it since that version."""
    if of is not x and (of.data_ptr(), of.shape, of.stride(), of.dtype) != (x.data_ptr(), x.shape, x.stride(), x.dtype):
        return False
    return of._version == x._version == version


class MLPFunction(torch.autograd.Function):
    """x # [M, d] -> # [M, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        gate: Tensor,
        up: Tensor,
        codes: tuple[Weight, Weight],
        ops: Any,
        recipe: Recipe,
    ) -> Tensor:
        rows, columns = ops.quantize_both(x, None, recipe)
        gate_up = ops.grouped_linear(rows, codes[0], None, x.dtype)  # [M, 2I]
        act, kept = ops.swiglu_quantize(gate_up, recipe)
        ctx.save_for_backward(*columns, *kept)
        ctx.codes, ctx.ops, ctx.recipe, ctx.dtypes = codes, ops, recipe, (x.dtype, down.dtype)
        return ops.grouped_linear(act, codes[1], None, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, recipe, (up_codes, down_codes), (dtype, weight_dtype) = ctx.ops, ctx.recipe, ctx.codes, ctx.dtypes
        saved = ctx.saved_tensors  # where layers are recomputed it can be read once only
        inputs, kept = Columns(*saved[:3]), Rows(*saved[3:])
        rows, columns = ops.quantize_gradient(grads[0], None, recipe)
        grad_act = ops.grouped_dgrad(rows, down_codes, None, dtype)  # [M, I]
        act, up_rows, up_columns, _ = ops.swiglu_backward(kept, grad_act, None, recipe)
        grad_down = ops.grouped_wgrad(columns, act, weight_dtype)[0]
        grad_gate, grad_up = ops.grouped_wgrad(up_columns, inputs, weight_dtype)[0].chunk(2)
        grad_x = ops.grouped_dgrad(up_rows, up_codes, None, dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_down, grad_gate, grad_up, None, None, None


class ExpertsFunction(torch.autograd.Function):
    """x # [T, d], weight # [M = T K] float32 of the rows sorted by expert -> sums over the rows of a token # [T, d].

    layer: the Fp8Experts, whose `waiting` is asked in the backward pass (see adding_to_gradients in modules.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        sorting: tuple[Tensor, Tensor, Tensor],
        codes: tuple[Weight, Weight],
        ops: Any,
        recipe: Recipe,
        layer: Any,
    ) -> Tensor:
        token, inverse, ends = sorting
        rows, columns = ops.permute_quantize(x, token, ends, recipe)
        gate_up = ops.grouped_linear(rows, codes[0], ends, x.dtype)  # [M, 2I]
        act, kept = ops.swiglu_quantize(gate_up, recipe, weight)
        ctx.save_for_backward(weight, *sorting, *columns, *kept)
        ctx.codes, ctx.ops, ctx.recipe, ctx.dtype, ctx.layer = codes, ops, recipe, x.dtype, layer
        ctx.parameters = gate_up_proj, down_proj  # not their values: where gradients are added up
        return ops.combine(ops.grouped_linear(act, codes[1], ends, x.dtype), inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, recipe, (up_codes, down_codes), dtype = ctx.ops, ctx.recipe, ctx.codes, ctx.dtype
        weight, token, inverse, ends, *rest = ctx.saved_tensors
        inputs, kept = Columns(*rest[:3]), Rows(*rest[3:])
        rows, columns = ops.permute_gradient(grads[0], token, ends, recipe)
        grad_act = ops.grouped_dgrad(rows, down_codes, ends, dtype)  # [M, I], of the weighted activations
        act, up_rows, up_columns, grad_weight = ops.swiglu_backward(kept, grad_act, ends, recipe, weight)
        (gate_up, down), waiting = ctx.parameters, ctx.layer.waiting
        grad_x = grad_gate_up = grad_down = None
        # of a new gradient down's first product is computed at once: later on one of them waits when the other does not
        if ctx.needs_input_grad[3]:
            grad_down = _weight_gradient(ops, columns, act, down, waiting, first_waits=False)  # [E, d, I]
        if ctx.needs_input_grad[2]:
            grad_gate_up = _weight_gradient(ops, up_columns, inputs, gate_up, waiting, first_waits=True)  # [E, 2I, d]
        if ctx.needs_input_grad[0]:
            grad_x = ops.combine(ops.grouped_dgrad(up_rows, up_codes, ends, dtype), inverse)
        return grad_x, grad_weight, grad_gate_up, grad_down, None, None, None, None, None


def _weight_gradient(
    ops: Any, grad: Columns, x: Columns, parameter: Tensor, waiting: Waiting | None, first_waits: bool
) -> Tensor | None:
    """Of stacked experts # [E, N, K]; None where it is added to the parameter's own, now or later."""
    if waiting is None or not parameter.is_leaf or parameter.dtype != torch.float32:
        return ops.grouped_wgrad(grad, x, parameter.dtype)
    if parameter.grad is None and not first_waits:
        return ops.grouped_wgrad(grad, x, torch.float32)
    if parameter in waiting:
        _, *earlier = waiting.pop(parameter)
        parameter.grad = ops.grouped_wgrad(grad, x, torch.float32, parameter.grad, tuple(earlier))
    else:
        waiting[parameter] = ops, grad, x
    return None
