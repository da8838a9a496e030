"""Fused kernels (Triton) for what torch computes in several passes over memory. Plain torch does the same elsewhere."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@cache
def _runs_on(device: torch.device) -> bool:
    """Triton is there, and an NVIDIA GPU of compute capability 8.0 or higher."""
    nvidia = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return nvidia and find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether kernels can compute on x."""
    return x.is_cuda and x.dtype in DTYPES and _runs_on(x.device)


def sum_of(parameter: Tensor) -> Tensor | None:
    """The FP32 sum of a parameter's gradients, for a backward pass that adds to it by itself and leaves autograd none.

    It is the `grad` of what the parameter has as its attribute `master`, if it has one (grpo/policy.py); else None.
    Contiguous.
    """
    master = getattr(parameter, "master", None)
    if master is None:
        return None
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return master.grad
