"""FP8 kernels on one Hopper GPU: casts, grouped products and the expert block against copies and F.grouped_mm in BF16.

Run `pytest tests/model/test_fp8_kernels.py` on the same machine first: it compares every kernel with the reference.
Random normal data, skewed groups, medians of triton.testing.do_bench; both sides of a ratio are measured in one run.
Prints a line a measurement and writes results/fp8_kernels.json.
Usage: python -m benchmarks.fp8_kernels [casts grouped block]
"""

# What is timed is called before its loop variables change or are deleted.
# ruff: noqa: B023, F821

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from benchmarks.common import machine, write_result
from model.config import DeepseekV3Config
from model.fp8 import kernels
from model.fp8.forms import Recipe
from model.fp8.modules import Fp8Experts
from model.moe import Experts, Routing

# name -> experts, N, K, rows: the two products of an expert of Moonlight and of DeepSeek-V3 (as many as fit)
PRODUCTS = {
    "moonlight gate_up": (64, 2816, 2048, 65536),
    "moonlight down": (64, 2048, 1408, 65536),
    "moonlight gate_up, 16k": (64, 2816, 2048, 16384),
    "v3 gate_up": (16, 4096, 7168, 32768),
    "v3 down": (16, 7168, 2048, 32768),
}
# TFLOP/s of DeepGEMM 2.5.0's contiguous kernel on such a GPU in another run: equal groups of 1024, so nothing to pad
EQUAL = {"moonlight gate_up": 1066, "moonlight down": 977}
# name -> hidden size, expert size, experts, experts a token, tokens
BLOCKS = {
    "moonlight, 8k tokens": (2048, 1408, 64, 6, 8192),
    "moonlight, 16k tokens": (2048, 1408, 64, 6, 16384),
    "v3, 16 experts, 4k tokens": (7168, 2048, 16, 8, 4096),
}
SKEW = 0.8  # of the logarithm of an expert's share: the largest group is 3 to 10 times the mean
Times = dict[str, float]


def bench(action: Callable[[], Any]) -> Times:
    """Milliseconds: median and the 10th and 90th percentile."""
    low, middle, high = do_bench(action, warmup=20, rep=80, quantiles=[0.1, 0.5, 0.9])
    return {"ms": middle, "p10": low, "p90": high}


def shares(experts: int, rows: int, skew: float) -> Tensor:
    """Ends # [E] int32 of groups of random sizes."""
    share = torch.exp(skew * torch.randn(experts))
    sizes = (share / share.sum() * rows).floor().long()
    sizes[0] += rows - sizes.sum()
    return sizes.cumsum(0).int().cuda()


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def report(name: str, times: Times, **figures: float) -> dict[str, float]:
    values = times | figures
    print(f"{name:52s}", *(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
    return values


def casts() -> dict[str, Any]:
    """GB/s, bytes read once and written once, and the share of a device copy's."""
    results: dict[str, Any] = {}
    source, recipe = normal(1 << 30), Recipe()
    target = torch.empty_like(source)
    times = bench(lambda: target.copy_(source))
    copy = 2 * source.nbytes / times["ms"] / 1e6
    results["copy"] = report("copy", times, gbps=copy)
    del source, target

    def measure(name: str, size: float, action: Callable[[], Any]) -> Times:
        times = bench(action)
        rate = size / times["ms"] / 1e6
        results[name] = report(name, times, gbps=rate, of_copy=rate / copy)
        return times

    rows, ends = 65536, shares(64, 65536, SKEW)
    for width in (2048, 7168):
        for dtype, each in ((torch.bfloat16, 2), (torch.float32, 4)):
            x, count, at = normal(rows, width, dtype=dtype), rows * width, f"{rows}x{width} {str(dtype)[6:]}"
            one = measure(f"rows {at}", count * (each + 1), lambda: kernels.quantize_rows(x, recipe))
            both = measure(f"both {at}", count * (each + 2), lambda: kernels.quantize_both(x, ends, recipe))
            only = measure(
                f"columns {at}", count * (each + 1), lambda: kernels.casts.cast(
                    x, kernels.tiles(ends, rows, x.device), False, rows=False
                ),
            )  # fmt: skip
            powers = Recipe(ue8m0=True)
            measure(f"both, powers of two {at}", count * (each + 2), lambda: kernels.quantize_both(x, ends, powers))
            results[f"both {at}"]["two_casts_over_one"] = (one["ms"] + only["ms"]) / both["ms"]
            print(f"    two casts over one: {(one['ms'] + only['ms']) / both['ms']:.3f}")
    w = normal(64, 2816, 2048, dtype=torch.float32)
    measure("weight 64x2816x2048 float32, both directions", w.numel() * 6, lambda: kernels.quantize_weight(w, recipe))
    inner, weight = 1408, torch.rand(rows, device="cuda")
    gate_up, grad = normal(rows, 2 * inner), normal(rows, inner)
    measure("SwiGLU forward", rows * inner * 7, lambda: kernels.swiglu_quantize(gate_up, recipe, weight))
    saved = kernels.swiglu_quantize(gate_up, recipe, weight)[1]
    measure("SwiGLU backward", rows * inner * 9, lambda: kernels.swiglu_backward(saved, grad, ends, recipe, weight))
    x, token = normal(rows // 8, 2048), torch.randint(0, rows // 8, (rows,), device="cuda")
    measure("permute", rows * 2048 * 4, lambda: kernels.permute_quantize(x, token, ends, recipe))
    y, inverse = normal(rows, 2048), torch.randperm(rows, device="cuda").view(-1, 8)
    measure("combine", rows * 2048 * 2.25, lambda: kernels.combine(y, inverse))
    return results


def grouped() -> dict[str, Any]:
    """TFLOP/s of the rows there are, and the ratio to F.grouped_mm in BF16."""
    results: dict[str, Any] = {}
    cases = [(name, *shape, SKEW) for name, shape in PRODUCTS.items()]
    cases += [(f"{name}, equal groups", *PRODUCTS[name], 0.0) for name in EQUAL]

    for name, experts, n, k, rows, skew in cases:
        ends, recipe, bf16 = shares(experts, rows, skew), Recipe(), torch.bfloat16
        flops = 2e-9 * rows * n * k
        x, w, g = normal(rows, k), normal(experts, n, k) * 0.02, normal(rows, n)
        x_rows, x_columns = kernels.quantize_both(x, ends, recipe)
        g_rows, g_columns = kernels.quantize_both(g, ends, recipe)
        weight = kernels.quantize_weight(w, recipe)
        into = torch.zeros(experts, n, k, device="cuda")
        peers = {
            "forward": lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
            "dgrad": lambda: F.grouped_mm(g, w, offs=ends),
            "wgrad": lambda: F.grouped_mm(g.t(), x, offs=ends),
        }
        ours = {
            "forward": lambda: kernels.grouped_linear(x_rows, weight, ends, bf16),
            "dgrad": lambda: kernels.grouped_dgrad(g_rows, weight, ends, bf16),
            "wgrad": lambda: kernels.grouped_wgrad(g_columns, x_columns, bf16),
            "wgrad FP32": lambda: kernels.grouped_wgrad(g_columns, x_columns, torch.float32),
            "wgrad FP32 added": lambda: kernels.grouped_wgrad(g_columns, x_columns, torch.float32, into),
        }
        base = {kind: bench(action) for kind, action in peers.items()}
        sizes = ends.diff(prepend=ends.new_zeros(1))
        results[name] = {"largest_over_mean": float(sizes.max() / sizes.float().mean())}
        for kind, action in ours.items():
            before, times = base[kind.split()[0]], bench(action)
            results[name][kind] = report(
                f"{name} {kind}", times, tflops=flops / times["ms"], bf16=flops / before["ms"],
                over_bf16=before["ms"] / times["ms"],
            )  # fmt: skip
        if (known := EQUAL.get(name.split(",")[0])) and not skew:
            print(f"    DeepGEMM, earlier: {known}; ours is {results[name]['forward']['tflops'] / known:.3f} of it")
        del x, w, g, weight, into, x_rows, x_columns, g_rows, g_columns, peers, ours
    return results


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
        sides = {"BF16": low, "FP8, BF16 parameters": low_fp8, "FP8, FP32 parameters": master}

        def step(layer: Experts, backward: bool = True) -> Tensor:
            out = layer(x, routing)
            if backward:
                wanted = [x, weights, *layer.parameters()]
                return torch.autograd.grad(out, wanted, grad)[0]
            return out

        with torch.no_grad():
            exact, close = step(low, False).float(), step(low_fp8, False).float()
        error = float((exact - close).norm() / exact.norm())
        times = {side: (bench(lambda: step(layer, False)), bench(lambda: step(layer))) for side, layer in sides.items()}
        for side, (forward, both) in times.items():
            results[f"{name}, {side}"] = report(
                f"{name}, {side}", both, forward_ms=forward["ms"], over_bf16=times["BF16"][1]["ms"] / both["ms"],
                forward_over_bf16=times["BF16"][0]["ms"] / forward["ms"], error=error,
            )  # fmt: skip
    return results


def main() -> None:
    before = machine()
    torch.manual_seed(0)
    wanted = sys.argv[1:] or ["casts", "grouped", "block"]
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem,power.draw,driver_version", "--format=csv,noheader"]
    gpu = [subprocess.run(query, capture_output=True, text=True).stdout.strip()]
    results = {part: {"casts": casts, "grouped": grouped, "block": block}[part]() for part in wanted}
    gpu.append(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    print(*gpu, sep="\n")
    claim = "FP8 products and expert blocks on ragged groups are faster than BF16's, casts counted."
    results |= {"gpu_before_and_after": gpu, "triton": triton.__version__, "cuda": torch.version.cuda}
    write_result("fp8_kernels", claim, before, results)


if __name__ == "__main__":
    main()
