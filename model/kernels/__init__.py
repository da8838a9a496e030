"""Fused kernels (Triton) for what torch computes in several passes over memory. Plain torch does the same elsewhere."""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether kernels can compute on x."""
    return x.is_cuda and _installed()
