"""Launching kernels from a host that has thousands to launch in a step.

Before each launch Triton looks at every argument and finds the kernel that was compiled for such ones. What it looks
for is little: here it is looked for in less time.
"""

from typing import Any

import triton
from torch import Tensor
from triton import knobs

INTERPRET = knobs.runtime.interpret
# A compiled kernel is called as Triton 3.6 calls it itself. Where others may do so otherwise, Triton does it all.
DIRECT = triton.__version__.startswith("3.6.") and not INTERPRET
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: tuple[Any, ...], **options: Any
) -> None:
    """kernel[grid](*args, *constants, **options). Arguments are tensors, integers, descriptors and None.

    A kernel is compiled for their dtypes, whether pointers are aligned to 16 bytes, whether an integer is 1, a multiple
    of 16 or has 64 bits, and the constants.
    """
    if not DIRECT:
        kernel[grid](*args, *constants, **options)
        return
    driver: Any = triton.runtime.driver.active
    key: list[Any] = [id(kernel), driver.get_current_device(), constants, *options.values()]
    for x in args:
        if type(x) is int:
            key.append((x == 1) + 2 * (x % 16 == 0) + 4 * (x >= 1 << 31))
        elif isinstance(x, Tensor):
            key += x.dtype, x.data_ptr() % 16 == 0
        else:
            key.append(None if x is None else x.base.dtype)
    found = tuple(key)
    if found in _compiled:
        _compiled[found][(*grid, 1, 1)[:3]](*args, *constants)
    else:
        _compiled[found] = kernel[grid](*args, *constants, **options)
