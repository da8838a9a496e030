"""Kernels for FP8 in 128 x 128 blocks that vLLM lacks on a CPU without AMX, in plain torch: real loading, real layers.

What a layer multiplies by is read from its parameters on every call, as kernels on a GPU do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.fp8.forms import Recipe
from model.fp8.quantize import dequantize_blocks
from model.fp8.reference import dequantize_rows, quantize_rows


def cast(x: torch.Tensor) -> torch.Tensor:
    """x # [M, K] as FP8 operand, float32."""
    return dequantize_rows(quantize_rows(x, Recipe()))


class EmulatedExperts:
    is_monolithic = False
    can_overlap_shared_experts = False
    fused_experts = SimpleNamespace(consumes_expert_mask=False)
    prepare_finalize = SimpleNamespace(topk_indices_dtype=lambda: None)
    output_is_reduced = staticmethod(lambda: False)

    def __init__(self, scales: Any) -> None:
        self.scales = scales

    def apply(
        self, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, share: torch.Tensor, ids: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        first, down = (dequantize_blocks(w, s) for w, s in zip((w13, w2), self.scales()))
        out = torch.zeros(x.shape, dtype=torch.float32)
        rows = cast(x)
        for expert in range(len(w13)):
            token, place = (ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(rows[token], first[expert]).to(x.dtype).float().chunk(2, dim=-1)
            y = F.linear(cast(F.silu(gate) * up), down[expert]).to(x.dtype)
            out.index_add_(0, token, y.float() * share[token, place, None])
        return out.to(x.dtype)


def install(patch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels import linear  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.quantization import fp8  # pyright: ignore[reportMissingImports]
    from vllm.platforms import PlatformEnum  # pyright: ignore[reportMissingImports]

    class EmulatedLinear(linear.Fp8BlockScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability: Any = None) -> tuple[bool, str | None]:
            return True, None

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: Any = None, **_: Any) -> torch.Tensor:
            weight = dequantize_blocks(layer.weight, layer.weight_scale_inv)
            out = F.linear(cast(x.reshape(-1, x.shape[-1])), weight).to(x.dtype)
            return (out if bias is None else out + bias).reshape(*x.shape[:-1], -1)

        def apply_block_scaled_mm(self, *_: Any) -> torch.Tensor:
            raise AssertionError("apply_weights does it")

    class Backend:
        @staticmethod
        def is_monolithic() -> bool:
            return False

    def set_up(self: Any, layer: Any, *_: Any) -> None:
        self.moe_kernel = EmulatedExperts(lambda: (layer.w13_weight_scale_inv, layer.w2_weight_scale_inv))

    triton = fp8.select_fp8_moe_backend.__globals__["Fp8MoeBackend"].TRITON
    patch.setitem(linear._POSSIBLE_FP8_BLOCK_KERNELS, PlatformEnum.CPU, [EmulatedLinear])
    patch.setattr(fp8, "select_fp8_moe_backend", lambda **_: (triton, Backend))
    patch.setattr(fp8.Fp8MoEMethod, "_setup_kernel", set_up)
