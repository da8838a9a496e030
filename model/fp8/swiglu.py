"""SwiGLU with its casts, and its backward with the casts of its gradients, each in one pass (Triton).

Half of a row of gate_up is the gate, half is up, both of I channels, a multiple of 128. The gate_up values are saved in
FP8 and the activation is computed again from them. An optional weight a row (of the router) multiplies the activation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8.casts import GROUP, INTERPRET, REGISTERS, WARPS, shuffled, write_columns, write_rows
from model.fp8.tiles import Tiles


@triton.jit
def _forward_kernel(
    gate_up, weight, act_codes, act_scales, saved_codes, saved_scales, M, I,
    WEIGHT: tl.constexpr, UE8M0: tl.constexpr, INTERPRET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    columns = block * 128 + tl.arange(0, 128)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    keep = rows < M
    where = gate_up + rows.to(tl.int64)[:, None] * 2 * I + columns[None, :]
    gate = tl.load(where, keep[:, None], other=0.0).to(tl.float32)
    up = tl.load(where + I, keep[:, None], other=0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate) * up
    if WEIGHT:
        act *= tl.load(weight + rows, keep, other=0.0)[:, None]
    write_rows(act, act_codes, act_scales, rows, columns, block, keep, M, I, UE8M0, INTERPRET)
    write_rows(gate, saved_codes, saved_scales, rows, columns, block, keep, M, 2 * I, UE8M0, INTERPRET)
    write_rows(up, saved_codes, saved_scales, rows, columns + I, block + I // 128, keep, M, 2 * I, UE8M0, INTERPRET)


def swiglu_forward(gate_up: Tensor, weight: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_up # [M, 2I], weight # [M] FP32 -> act codes # [M, I] and scales, gate_up codes # [M, 2I] and scales."""
    M, I = len(gate_up), gate_up.shape[1] // 2
    empty = {"device": gate_up.device}
    act = torch.empty(M, I, dtype=torch.float8_e4m3fn, **empty), torch.empty(I // 128, M, **empty)
    saved = torch.empty(M, 2 * I, dtype=torch.float8_e4m3fn, **empty), torch.empty(2 * I // 128, M, **empty)
    if M:
        block = 64
        _forward_kernel[I // 128, triton.cdiv(M, block)](
            gate_up, gate_up if weight is None else weight, *act, *saved, M, I,
            weight is not None, ue8m0, INTERPRET, block, num_warps=8,
        )  # fmt: skip
    return act[0], act[1].t(), saved[0], saved[1].t()


@triton.jit
def _load_saved(codes, scales, ss_m, ss_k, rows, keep, columns, block, width):
    """A tile of saved values in FP32 # [128, 128]."""
    value = tl.load(codes + rows.to(tl.int64)[:, None] * width + columns[None, :], keep[:, None], other=0.0)
    return value.to(tl.float32) * tl.load(scales + rows * ss_m + block * ss_k, keep, other=0.0)[:, None]


@triton.jit
def _backward_kernel(
    saved_codes, saved_scales, ss_m, ss_k, grad, weight, table, act_codes, act_scales, row_codes, row_scales,
    column_codes, column_scales, d_weight, M, I, P, OUTPUT: tl.constexpr, WEIGHT: tl.constexpr, GROUP: tl.constexpr,
    UE8M0: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    first = tl.load(table + tile * 4 + 1)
    end = tl.load(table + tile * 4 + 2)
    rows = first + shuffled(GROUP)
    keep = rows < end
    columns = block * 128 + tl.arange(0, 128)
    routed = tl.load(weight + rows, keep, other=0.0)[:, None] if WEIGHT else 1.0
    gate = _load_saved(saved_codes, saved_scales, ss_m, ss_k, rows, keep, columns, block, 2 * I)
    share = tl.sigmoid(gate)
    if OUTPUT < 2:
        up = _load_saved(saved_codes, saved_scales, ss_m, ss_k, rows, keep, columns + I, block + I // 128, 2 * I)
    if OUTPUT == 0:
        act = gate * share * up * routed
        write_columns(act, act_codes, act_scales, tile, columns, I, P, GROUP, UE8M0, INTERPRET)
    else:
        g = tl.load(grad + rows.to(tl.int64)[:, None] * I + columns[None, :], keep[:, None], other=0.0).to(tl.float32)
        if OUTPUT == 1:
            if WEIGHT:
                tl.store(d_weight + block.to(tl.int64) * M + rows, tl.sum(g * (gate * share * up), 1), keep)
            g = g * routed * up * share * (1 + gate * (1 - share))
        else:
            g = g * routed * (gate * share)
        columns += (OUTPUT - 1) * I  # of gate_up
        block += (OUTPUT - 1) * (I // 128)
        write_rows(g, row_codes, row_scales, rows, columns, block, keep, M, 2 * I, UE8M0, INTERPRET)
        write_columns(g, column_codes, column_scales, tile, columns, 2 * I, P, GROUP, UE8M0, INTERPRET)


def swiglu_backward(
    codes: Tensor, scales: Tensor, grad: Tensor, weight: Tensor | None, tiles: Tiles, ue8m0: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | None]:
    """Saved codes # [M, 2I] and scales # [M, 2I/128], grad # [M, I] of the activation, weight # [M] ->
    columns of the activation # [I, P], rows # [M, 2I] and columns # [2I, P] of gate_up's gradient, d_weight # [M].
    """
    M, I = grad.shape
    P, empty = tiles.most * 128, {"device": grad.device}
    act = torch.empty(I, P, dtype=torch.float8_e4m3fn, **empty), torch.empty(P // 128, I, **empty)
    rows = torch.empty(M, 2 * I, dtype=torch.float8_e4m3fn, **empty), torch.empty(2 * I // 128, M, **empty)
    columns = torch.empty(2 * I, P, dtype=torch.float8_e4m3fn, **empty), torch.empty(P // 128, 2 * I, **empty)
    d_weight = grad if weight is None else torch.empty(I // 128, M, **empty)
    # Activation, gradient of gate, gradient of up: one launch each, for the three at once do not fit in the registers.
    for output in range(3 if tiles.most else 0):
        _backward_kernel[I // 128, tiles.most](
            codes, scales, *scales.stride(), grad, grad if weight is None else weight, tiles.table, *act, *rows,
            *columns, d_weight, M, I, P, output, weight is not None, GROUP, ue8m0, INTERPRET, num_warps=WARPS,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return act, (rows[0], rows[1].t()), columns, None if weight is None else d_weight.sum(0)
