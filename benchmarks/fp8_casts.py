"""FP8 casts and SwiGLU's kernels on one Hopper GPU: GB/s as a share of a device copy's, one pass against two.

Run `pytest tests/model/test_fp8_kernels.py` on the same machine first: it compares every kernel with the reference.
Prints a line a measurement and writes results/fp8_casts.json. Usage: python -m benchmarks.fp8_casts
"""

# What is timed is called before its loop variables change or are deleted.
# ruff: noqa: B023, F821

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import Times, bench, normal, record, report, shares
from model.fp8 import kernels
from model.fp8.forms import Recipe

CLAIM = "FP8 casts move bytes at four fifths (both forms) to all (one form) of the rate of a device copy."


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

    rows, ends = 65536, shares(64, 65536)
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


if __name__ == "__main__":
    record("fp8_casts", __doc__, CLAIM, casts)
