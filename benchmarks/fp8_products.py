"""FP8 products on one Hopper GPU, in one run with their peers: F.grouped_mm and matmul in BF16, DeepGEMM, F.scaled_mm.

Grouped products have skewed groups. DeepGEMM is the copy that vLLM ships, where vLLM is installed (CUDA_HOME names the
toolkit whose nvcc it compiles with); it wants groups padded to its alignment: rows are padded outside the measurement,
its time is counted on the rows there are, and both are measured three times in turn. The first time it compiles, for
about half a minute. Prints a line a measurement and writes results/fp8_products.json.
Usage: python -m benchmarks.fp8_products
"""

# What is timed is called before its loop variables change or are deleted.
# ruff: noqa: B023, F821

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import SKEW, bench, normal, record, report, shares
from model.fp8 import kernels
from model.fp8.forms import Recipe, Rows, Weight

CLAIM = (
    "FP8 products on ragged groups are faster than BF16's and reach three quarters of DeepGEMM's speed on padded ones."
)
# name -> experts, N, K, rows: the two products of an expert of Moonlight and of DeepSeek-V3 (as many as fit)
GROUPED = {
    "moonlight gate_up": (64, 2816, 2048, 65536),
    "moonlight down": (64, 2048, 1408, 65536),
    "moonlight gate_up, 16k": (64, 2816, 2048, 16384),
    "v3 gate_up": (16, 4096, 7168, 32768),
    "v3 down": (16, 7168, 2048, 32768),
}
EQUAL = ("moonlight gate_up",)  # measured with equal groups too
# name -> N, K: Moonlight's linear layers outside the experts
DENSE = {
    "q_proj": (3072, 2048),
    "kv_a_proj_with_mqa": (576, 2048),
    "kv_b_proj": (4096, 512),
    "o_proj": (2048, 2048),
    "shared experts, gate_up": (5632, 2048),
    "shared experts, down": (2048, 2816),
}
ROWS = 8192
BF16, FP32 = torch.bfloat16, torch.float32


def deep_gemm() -> Any:
    """The module, or None without vLLM, which is not imported itself: that would take half a minute."""
    if (vllm := importlib.util.find_spec("vllm")) is None or not vllm.submodule_search_locations:
        print("vLLM is not installed: without DeepGEMM")
        return None
    sys.path.append(f"{vllm.submodule_search_locations[0]}/third_party")
    return importlib.import_module("deep_gemm")


def padded_call(peer: Any, x: Rows, w: Weight, ends: Tensor, ours: Tensor) -> tuple[Callable[[], Any], float]:
    """DeepGEMM's call for the rows of x, padded, and its rows over those of x. Its result must be ours."""
    rows, experts, align = len(x.codes), len(ends), peer.get_mk_alignment_for_contiguous_layout()
    sizes = ends.diff(prepend=ends.new_zeros(1)).long()
    padded = (sizes + align - 1) // align * align
    total = int(padded.sum())
    shift = padded.cumsum(0) - padded - (ends.long() - sizes)
    at = torch.arange(rows, device=ends.device) + torch.repeat_interleave(shift, sizes)
    codes = x.codes.new_zeros(total, x.codes.shape[1], dtype=torch.uint8)
    codes[at] = x.codes.view(torch.uint8)
    scales = x.scales.new_zeros(x.scales.shape[1], total).t()
    scales[at] = x.scales
    group = torch.full((total,), -1, dtype=torch.int32, device=ends.device)  # -1: padding
    group[at] = torch.repeat_interleave(torch.arange(experts, device=ends.device), sizes).int()
    out = ours.new_empty(total, ours.shape[1])
    left, right = (codes.view(torch.float8_e4m3fn), scales), (w.codes, w.scales.contiguous())

    def call() -> None:
        peer.m_grouped_fp8_gemm_nt_contiguous(left, right, out, group, disable_ue8m0_cast=True)

    call()
    error = float((out[at].float() - ours.float()).norm() / ours.float().norm())
    assert error < 1e-3, f"DeepGEMM's result differs by {error}"
    return call, total / rows


def grouped() -> dict[str, Any]:
    """TFLOP/s of the rows there are, and ratios to the peers."""
    results: dict[str, Any] = {}
    if (peer := deep_gemm()) is not None:
        results["deep_gemm_version"] = peer.__version__
    cases = [(name, *shape, SKEW) for name, shape in GROUPED.items()]
    cases += [(f"{name}, equal groups", *GROUPED[name], 0.0) for name in EQUAL]
    for name, experts, n, k, rows, skew in cases:
        ends, recipe = shares(experts, rows, skew), Recipe()
        flops = 2e-9 * rows * n * k
        x, w, g = normal(rows, k), normal(experts, n, k) * 0.02, normal(rows, n)
        x_rows, x_columns = kernels.quantize_both(x, ends, recipe)
        g_rows, g_columns = kernels.quantize_both(g, ends, recipe)
        weight = kernels.quantize_weight(w, recipe)
        swapped = Weight(weight.codes_t, weight.scales_t, weight.codes, weight.scales)
        into = torch.zeros(experts, n, k, device="cuda")
        forward = lambda: kernels.grouped_linear(x_rows, weight, ends, BF16)  # noqa: E731
        dgrad = lambda: kernels.grouped_dgrad(g_rows, weight, ends, BF16)  # noqa: E731
        sizes = ends.diff(prepend=ends.new_zeros(1))
        results[name] = {"largest_over_mean": float(sizes.max() / sizes.float().mean())}
        products = {
            "forward": (forward, lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends), (x_rows, weight)),
            "dgrad": (dgrad, lambda: F.grouped_mm(g, w, offs=ends), (g_rows, swapped)),
        }
        for kind, (action, bf16, operands) in products.items():
            rounds = {"ours": [bench(action)], "bf16": [bench(bf16)]}
            if peer is not None:
                call, padding = padded_call(peer, *operands, ends, action())
                rounds["deep_gemm"] = []
                for _ in range(3):  # the clock falls as the GPU warms up
                    rounds["deep_gemm"].append(bench(call))
                    rounds["ours"].append(bench(action))
            ms = {side: median(times["ms"] for times in all_) for side, all_ in rounds.items()}
            times, more = rounds["ours"][-1] | {"ms": ms["ours"]}, {}
            if peer is not None:
                more = {"deep_gemm": flops / ms["deep_gemm"], "over_deep_gemm": ms["deep_gemm"] / ms["ours"]}
                more["its_rows"] = padding
            results[name][kind] = report(
                f"{name} {kind}", times, tflops=flops / ms["ours"], bf16=flops / ms["bf16"],
                over_bf16=ms["bf16"] / ms["ours"], **more,
            )  # fmt: skip
        # A BF16 learner with FP32 gradients converts or adds what F.grouped_mm gives.
        outer = lambda: F.grouped_mm(g.t(), x, offs=ends)  # noqa: E731
        contract = {"BF16": outer, "FP32": lambda: outer().float(), "added": lambda: into.add_(outer())}
        plain = bench(outer)
        ours = {
            "BF16": lambda: kernels.grouped_wgrad(g_columns, x_columns, BF16),
            "FP32": lambda: kernels.grouped_wgrad(g_columns, x_columns, FP32),
            "added": lambda: kernels.grouped_wgrad(g_columns, x_columns, FP32, into),
        }
        for kind, action in ours.items():
            times, same = bench(action), bench(contract[kind])
            results[name][f"wgrad {kind}"] = report(
                f"{name} wgrad {kind}", times, tflops=flops / times["ms"], bf16=flops / plain["ms"],
                over_bf16=plain["ms"] / times["ms"], over_same_contract=same["ms"] / times["ms"],
            )  # fmt: skip
        # as a learner adds them: of two micro-batches at a time, with groups of other sizes
        others = shares(experts, rows, skew)
        g_other, x_other = (kernels.quantize_both(normal(rows, width), others, recipe)[1] for width in (n, k))
        times, same = (
            bench(lambda: kernels.grouped_wgrad(g_columns, x_columns, FP32, into, (g_other, x_other))),
            bench(contract["added"]),
        )
        results[name]["wgrad added, two at a time"] = report(
            f"{name} wgrad added, two at a time", times, tflops=2 * flops / times["ms"], bf16=flops / plain["ms"],
            over_bf16=2 * plain["ms"] / times["ms"], over_same_contract=2 * same["ms"] / times["ms"],
        )  # fmt: skip
        del x, w, g, weight, swapped, into, x_rows, x_columns, g_rows, g_columns, products, ours, contract
        del g_other, x_other
    return results


def dense() -> dict[str, Any]:
    """One group of 8192 rows, as model/fp8/kernels.py computes it and by the grouped kernels, against matmul."""
    results: dict[str, Any] = {}
    recipe = Recipe()
    for name, (n, k) in DENSE.items():
        x, w, g = normal(ROWS, k), normal(n, k) * 0.02, normal(ROWS, n)
        flops = 2e-9 * ROWS * n * k
        (x_rows, x_columns), (g_rows, g_columns) = (kernels.quantize_both(y, None, recipe) for y in (x, g))
        weight, tiles = kernels.quantize_weight(w[None], recipe), kernels.tiles(None, ROWS, x.device)
        products = {
            "forward": (
                lambda: kernels.grouped_linear(x_rows, weight, None, BF16),
                lambda: kernels.grouped_product(*x_rows, weight.codes, weight.scales, tiles, BF16),
                lambda: x @ w.t(),
            ),
            "dgrad": (
                lambda: kernels.grouped_dgrad(g_rows, weight, None, BF16),
                lambda: kernels.grouped_product(*g_rows, weight.codes_t, weight.scales_t, tiles, BF16),
                lambda: g @ w,
            ),
            "wgrad FP32": (
                lambda: kernels.grouped_wgrad(g_columns, x_columns, FP32),
                lambda: kernels.grouped_outer([(g_columns, x_columns)], FP32),
                lambda: (g.t() @ x).float(),
            ),
        }
        results[name] = {}
        for kind, (action, kernel, bf16) in products.items():
            times, by_kernel, before = bench(action), bench(kernel), bench(bf16)
            results[name][kind] = report(
                f"dense {name} {kind}", times, tflops=flops / times["ms"], bf16=flops / before["ms"],
                over_bf16=before["ms"] / times["ms"], over_our_kernel=by_kernel["ms"] / times["ms"],
            )  # fmt: skip
    return results


def products() -> dict[str, Any]:
    return {"grouped": grouped(), "dense": dense()}


if __name__ == "__main__":
    record("fp8_products", __doc__, CLAIM, products)
