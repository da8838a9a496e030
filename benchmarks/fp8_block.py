"""One layer's experts, forward and backward, in FP8 against BF16's on F.grouped_mm, on one Hopper GPU.

BF16 twice: as torch's own operations make it, and with this project's fused kernels around its products (what a
learner runs). Everything of a step counts but weight casts, which are made once an optimiser update. Prints a line a
measurement and writes results/fp8_block.json. Usage: python -m benchmarks.fp8_block
"""

# What is timed is called before its loop variables change.
# ruff: noqa: B023

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import SKEW, Times, bench, normal, record, report
from model.config import DeepseekV3Config
from model.fp8 import kernels
from model.fp8.forms import Recipe
from model.fp8.modules import Fp8Experts
from model.kernels import usable
from model.moe import Experts, Routing

CLAIM = "An expert block of ragged groups is faster in FP8 than in BF16, casts counted."
# name -> hidden size, expert size, experts, experts a token, tokens
BLOCKS = {
    "moonlight, 8k tokens": (2048, 1408, 64, 6, 8192),
    "moonlight, 16k tokens": (2048, 1408, 64, 6, 16384),
    "v3, 16 experts, 4k tokens": (7168, 2048, 16, 8, 4096),
}


def block() -> dict[str, Any]:
    """One layer's experts, forward and backward, by the modules that models train with; codes of weights are ready."""
    results: dict[str, Any] = {}
    for name, (hidden, inner, experts, top, tokens) in BLOCKS.items():
        config = DeepseekV3Config(
            hidden_size=hidden, moe_intermediate_size=inner, n_routed_experts=experts, num_experts_per_tok=top,
            n_group=1, topk_group=1, vocab_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
            kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        )  # fmt: skip
        plain = Experts(config).cuda()
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x, grad = normal(tokens, hidden).requires_grad_(), normal(tokens, hidden)
        logits = torch.randn(tokens, experts, device="cuda") + SKEW * torch.randn(experts, device="cuda")
        scores = logits.sigmoid()
        chosen = scores.topk(top).indices
        weights = scores.gather(1, chosen).detach().requires_grad_()
        routing = Routing(chosen, weights, scores, torch.bincount(chosen.flatten(), minlength=experts))
        low = Experts(config).cuda().bfloat16()
        low.load_state_dict(plain.state_dict())
        master = Fp8Experts(plain, kernels, Recipe())
        low_fp8 = Fp8Experts(low, kernels, Recipe())
        sides = {"BF16 in torch": low, "BF16": low, "FP8, BF16 parameters": low_fp8, "FP8, FP32 parameters": master}

        def step(layer: Experts, backward: bool = True) -> Tensor:
            out = layer(x, routing)
            if backward:
                wanted = [x, weights, *layer.parameters()]
                return torch.autograd.grad(out, wanted, grad)[0]
            return out

        def both_ways(side: str, layer: Experts) -> tuple[Times, Times]:
            with mock.patch("model.moe.usable", (lambda _: False) if side == "BF16 in torch" else usable):
                return bench(lambda: step(layer, False)), bench(lambda: step(layer))

        with torch.no_grad():
            exact, close = step(low, False).float(), step(low_fp8, False).float()
        error = float((exact - close).norm() / exact.norm())
        times = {side: both_ways(side, layer) for side, layer in sides.items()}
        for side, (forward, both) in times.items():
            results[f"{name}, {side}"] = report(
                f"{name}, {side}", both, forward_ms=forward["ms"], over_bf16=times["BF16"][1]["ms"] / both["ms"],
                over_torch=times["BF16 in torch"][1]["ms"] / both["ms"],
                forward_over_bf16=times["BF16"][0]["ms"] / forward["ms"], error=error,
            )  # fmt: skip
    return results


if __name__ == "__main__":
    record("fp8_block", __doc__, CLAIM, block)
