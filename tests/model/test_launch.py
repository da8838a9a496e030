"""Launches that go past Triton to what it compiled: what its cache tells apart, with a kernel that only writes down."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from model.kernels import launch as launching
from model.kernels.launch import ceil_div, launch, power_of_two


class Kernel:
    """What launch sees of a kernel of Triton 3.6; `compiled` by Triton, `calls` of the C function."""

    def __init__(self, descriptors: int = 0, scratch: int = 0) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.calls: list[tuple[Any, ...]] = []

        def launcher(*args: Any) -> None:
            self.calls.append(args)

        def with_maps(*args: Any) -> None:
            launcher(*args)

        run = SimpleNamespace(launch=with_maps if descriptors else launcher, launch_cooperative_grid=0, launch_pdl=1)
        run.global_scratch_size, run.profile_scratch_size = scratch, 0
        metadata = SimpleNamespace(tensordesc_meta=[f"meta {i}" for i in range(descriptors)])
        self.made = SimpleNamespace(run=run, function=11, packed_metadata=(4, 1, 0), metadata=metadata)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compiled(*args: Any, **options: Any) -> Any:
            self.compiled.append((grid, args, options))
            return self.made

        return compiled


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As with Triton 3.6 on a GPU, with stream 7; returns what is asked whether a profiler listens."""
    runtime = SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[]), interpret=False
    )
    monkeypatch.setattr(launching, "DIRECT", True)
    monkeypatch.setattr(launching, "knobs", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_maps", {})
    monkeypatch.setattr(launching, "_new_map", lambda x, meta: (f"{meta} {x.base.dtype}", *x.shape, *x.strides))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return runtime


def tiles_of(x: torch.Tensor, *block: int, layout: str = "swizzled") -> Any:
    return SimpleNamespace(base=x, shape=x.shape, strides=x.stride(), block_shape=list(block), layout=layout)


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """The same, but said to be of a GPU: Triton has to say what it thinks of other memory."""

    class OfGPU(torch.Tensor):
        is_cuda = True

    return x.as_subclass(OfGPU)


def test_the_second_launch_calls_what_the_first_compiled() -> None:
    kernel, x = Kernel(), torch.zeros(8, 4)
    for _ in range(2):
        launch(kernel, (5,), ((x, torch.int32), x, 3, 0.5, None), (True, 16), num_warps=4)
    ((grid, args, options),) = kernel.compiled
    assert (grid, options) == ((5,), {"num_warps": 4})
    assert args[0].dtype == torch.int32 and args[0].data_ptr() == x.data_ptr()
    assert args[1] is x and args[2:] == (3, 0.5, None, True, 16)
    pointer = x.data_ptr()
    # grid, stream, function, cooperative, dependent, two scratch memories, what Triton packed, three of hooks
    fixed = (5, 1, 1, 7, 11, 0, 1, None, None, (4, 1, 0), None, None, None)
    assert kernel.calls == [(*fixed, pointer, pointer, 3, 0.5, None, True, 16)]


def test_a_kernel_is_compiled_for_what_triton_tells_apart() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    x = memory[4 - memory.data_ptr() // 4 % 4 :]
    same = [(x, 2), (x[4:], 6), (x[8:], 1000001)]
    other = [(x[1:], 2), (x.float(), 2), (x, 1), (x, 16), (x, 1 << 31), (x, (1 << 31) + 1), (x, 2.0), (x, None)]
    other += [((x, torch.float32), 32), ((x, torch.int16), 2), (elsewhere(x), 2)]
    kernel = Kernel()
    for args in same:
        launch(kernel, (1,), args, (8,), num_warps=4)
    assert len(kernel.compiled) == 1
    for count, args in enumerate(other, 2):
        for _ in range(2):
            launch(kernel, (1,), args, (8,), num_warps=4)
        assert len(kernel.compiled) == count, args
    count = len(kernel.compiled)
    for constants, options in [((9,), {"num_warps": 4}), ((8,), {"num_warps": 8}), ((8,), {"maxnreg": 8})]:
        launch(kernel, (1,), same[0], constants, **options)
        count += 1
        assert len(kernel.compiled) == count, (constants, options)
    another = Kernel()
    launch(another, (1,), same[0], (8,), num_warps=4)
    assert len(another.compiled) == 1 and not another.calls


def test_a_tensor_map_is_used_again_for_the_same_memory_shape_and_tiles_only() -> None:
    kernel, memory = Kernel(descriptors=2), torch.zeros(64, 64)
    x, y = memory[:32], memory[32:]
    for _ in range(2):
        launch(kernel, (2, 3), (tiles_of(x, 8, 8), 3, tiles_of(y, 8, 8)), ())
    passed = ("meta 0 torch.float32", 32, 64, 64, 1, 3, "meta 1 torch.float32", 32, 64, 64, 1)
    assert kernel.calls[0][13:] == passed and len(launching._maps) == 2
    launch(kernel, (2, 3), (tiles_of(x, 8, 8), 3, tiles_of(y, 8, 8)), ())
    assert kernel.calls[1] == kernel.calls[0] and len(launching._maps) == 2 and len(kernel.compiled) == 1
    of_other_shape = x.as_strided((16, 128), (128, 1))
    launch(kernel, (2, 3), (tiles_of(of_other_shape, 8, 8), 3, tiles_of(x.as_strided((32, 32), (64, 1)), 8, 8)), ())
    passed = ("meta 0 torch.float32", 16, 128, 128, 1, 3, "meta 1 torch.float32", 32, 32, 64, 1)
    assert kernel.calls[-1][13:] == passed and len(launching._maps) == 4 and len(kernel.compiled) == 1
    others = [tiles_of(x.view(torch.int32), 8, 8), tiles_of(x, 8, 16), tiles_of(x, 8, 8, layout="flat")]
    for count, first in enumerate(others, 2):  # compiled for other tiles, and with maps of their own
        for _ in range(2):
            launch(kernel, (2, 3), (first, 3, tiles_of(y, 8, 8)), ())
        assert len(kernel.compiled) == count and len(launching._maps) == 3 + count
    assert kernel.calls[-3][13] == "meta 0 torch.int32"


def test_maps_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MAPS", 3)
    kernel, memory = Kernel(descriptors=1), torch.zeros(64, 64)
    for i in range(10):
        launch(kernel, (1,), (tiles_of(memory[i:], 8, 8),), ())
        assert len(launching._maps) <= 3
    assert len(kernel.calls) == 9


def test_triton_launches_what_has_hooks_or_needs_memory(direct: SimpleNamespace) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    direct.launch_exit_hook.calls.append(print)
    for _ in range(2):
        launch(kernel, (1,), (x,), ())
    assert len(kernel.compiled) == 2 and not kernel.calls
    direct.launch_exit_hook.calls.clear()
    launch(kernel, (1,), (x,), ())
    assert len(kernel.compiled) == 2 and len(kernel.calls) == 1
    for needy, argument in [(Kernel(scratch=128), x), (Kernel(), tiles_of(torch.zeros(8, 8), 8, 8))]:
        for _ in range(3):
            launch(needy, (1,), (argument,), ())
        assert len(needy.compiled) == 3 and not needy.calls


def test_another_triton_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "DIRECT", False)
    kernel, x = Kernel(), torch.zeros(8)
    for _ in range(2):
        launch(kernel, (1,), ((x, torch.int32), 3), (8,), num_warps=2)
    assert len(kernel.compiled) == 2 and not kernel.calls
    assert kernel.compiled[0][1][0].dtype == torch.int32


def test_integers() -> None:
    assert [ceil_div(n, 8) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9, 2048, 2049)] == [1, 2, 4, 8, 16, 2048, 4096]
