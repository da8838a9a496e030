"""Launching kernels from a host that has thousands to launch in a step.

Before each launch Triton looks at every argument, finds the kernel that was compiled for such ones, makes tensor maps
and asks its hooks. What it looks for is little: here it is looked for in less time. A map is kept with all it was made
of: the caching allocator gives the same addresses again in every micro-batch, and a map says nothing of what lies
there.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

INTERPRET = knobs.runtime.interpret
# What a compiled kernel has inside is called as Triton 3.6 calls it. With another version Triton does it all.
DIRECT = triton.__version__.startswith("3.6.") and not INTERPRET
MAPS = 8192  # are kept before all are forgotten


class _Compiled(NamedTuple):
    """A compiled kernel without what Triton makes anew for each launch."""

    call: Any  # C function of the grid, the stream, what is fixed, arguments and constants
    fixed: tuple[Any, ...]
    tensor_maps: tuple[Any, ...]  # what Triton knows of the map of each descriptor
    kernel: Any  # kept, so that no other gets its id


# Triton's functions of these names are for kernels as well, and take several microseconds.
def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The first power of two that is not below n > 0."""
    return 1 << (n - 1).bit_length()


_compiled: dict[tuple[Any, ...], _Compiled | None] = {}
_maps: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: tuple[Any, ...], **options: Any
) -> None:
    """kernel[grid](*args, *constants, **options). Arguments are numbers, tensors, TensorDescriptors, None and pairs
    (tensor, dtype), which stand for tensor.view(dtype) without making one.

    A kernel is compiled for dtypes, whether pointers are aligned to 16 bytes, whether an integer is 1, a multiple of 16
    or has 64 bits, the tiles of descriptors, the constants and the options.
    """
    if not DIRECT:
        kernel[grid](*_plain(args), *constants, **options)
        return
    device = torch._C._cuda_getDevice()
    key: list[Any] = [id(kernel), device, constants, *options.items()]
    values: list[Any] = []  # of the arguments, as the C function takes them
    tiled: list[int] = []  # places of descriptors
    for x in args:
        kind = type(x)
        if kind is int:
            key.append(x == 1 or 2 * (x % 16 == 0))
            if x >= 1 << 31:
                key.append("64 bits")
        elif kind is float or x is None:
            key.append(kind)
        elif kind is tuple or isinstance(x, Tensor):
            x, dtype = x if kind is tuple else (x, x.dtype)
            key += dtype, x.is_cuda  # of other memory Triton says so, and the C function not
            x = x.data_ptr()
            if x % 16:
                key.append(-(x % 16))  # not all can be viewed: Triton's first launch of each finds out
        else:
            key.append((x.base.dtype, x.base.is_cuda, *x.block_shape, x.layout))
            tiled.append(len(values))
        values.append(x)
    found = tuple(key)
    compiled = _compiled.get(found)
    hooks = knobs.runtime  # a profiler's, which Triton calls
    if compiled is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
        made = kernel[grid](*_plain(args), *constants, **options)
        if found not in _compiled:
            _compiled[found] = _taken_apart(kernel, made, len(tiled))
        return
    if tiled:
        for i in reversed(range(len(tiled))):
            x = values[tiled[i]]
            values[tiled[i] : tiled[i] + 1] = _map_of(x, compiled.tensor_maps[i])
    x, y, z = (*grid, 1, 1)[:3]
    compiled.call(x, y, z, torch._C._cuda_getCurrentRawStream(device), *compiled.fixed, *values, *constants)


def _plain(args: tuple[Any, ...]) -> list[Any]:
    return [x[0].view(x[1]) if type(x) is tuple else x for x in args]


def _taken_apart(kernel: Any, made: Any, descriptors: int) -> _Compiled | None:
    """What Triton 3.6 returns of a launch, without its CompiledKernel.__getitem__ and CudaLauncher.__call__; None for a
    kernel that needs memory of its own for a launch, or has descriptors but not by maps.
    """
    run, tensor_maps = made.run, tuple(getattr(made.metadata, "tensordesc_meta", None) or ())
    if run.global_scratch_size or run.profile_scratch_size or len(tensor_maps) != descriptors:
        return None
    call = run.launch
    if tensor_maps:  # a function in Python, which makes the maps, around the one in C
        call = call.__closure__[call.__code__.co_freevars.index("launcher")].cell_contents
    # None: two scratch memories; what hooks are told, and the hooks
    fixed = made.function, run.launch_cooperative_grid, run.launch_pdl, None, None, made.packed_metadata, *[None] * 3
    return _Compiled(call, fixed, tensor_maps, kernel)


def _map_of(x: Any, known: Any) -> tuple[Any, ...]:
    """A descriptor as the C function takes it: map, shape and strides."""
    base = x.base
    key = base.data_ptr(), base.dtype, x.shape, x.strides, *x.block_shape, x.layout
    found = _maps.get(key)
    if found is None:
        if len(_maps) >= MAPS:
            _maps.clear()
        found = _maps[key] = _new_map(x, known)
    return found


def _new_map(x: Any, known: Any) -> tuple[Any, ...]:
    from triton.backends.nvidia import driver

    return tuple(driver.make_tensordesc_arg(x, known))
