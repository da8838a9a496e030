"""What the benchmarks on one GPU share: medians of triton's do_bench, random data, ragged groups, the GPU's state.

Random normal data, for zeros run faster; both sides of a ratio are measured in one run.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from benchmarks.common import machine, write_result

SKEW = 0.8  # of the logarithm of an expert's share: the largest group is 3 to 10 times the mean
Times = dict[str, float]


def bench(action: Callable[[], Any]) -> Times:
    """Milliseconds: median and the 10th and 90th percentile."""
    low, middle, high = do_bench(action, warmup=15, rep=50, quantiles=[0.1, 0.5, 0.9])
    return {"ms": middle, "p10": low, "p90": high}


def shares(experts: int, rows: int, skew: float = SKEW) -> Tensor:
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


def state() -> str:
    """Name, clocks, power and driver of the GPUs."""
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem,power.draw,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def record(name: str, about: str | None, claim: str, measure: Callable[[], Mapping[str, Any]]) -> None:
    """Reads the command line, measures from a fixed seed and writes results/NAME.json, with what the GPU was before and
    after.
    """
    argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit(f"error: benchmarks.{name} needs a Hopper GPU (compute capability 9.0)")
    before, gpu = machine(), [state()]
    torch.manual_seed(0)
    results = dict(measure())
    gpu.append(state())
    results |= {"gpu_before_and_after": gpu, "triton": triton.__version__, "cuda": torch.version.cuda}
    write_result(name, claim, before, results)
