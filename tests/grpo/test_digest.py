"""The digest sees every bit, is the same wherever and however a tensor lies, and is the sum that its docstring says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo import digest
from grpo.digest import WIDTH, digests

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def slow(words: np.ndarray) -> int:
    """The definition, in whole numbers without a limit."""
    words = np.pad(words, (0, -len(words) % WIDTH)).reshape(-1, WIDTH)
    result = 0
    for which in range(2):
        inner, outer = (
            np.frombuffer(np.random.Generator(np.random.PCG64([level, which])).bytes(8 * count), dtype="<i8").tolist()
            for level, count in ((0, WIDTH), (1, 64))
        )
        rows = [sum(m * x for m, x in zip(inner, row)) % 2**64 >> 32 for row in words.tolist()]
        result = result << 32 | sum(m * x for m, x in zip(outer, rows)) % 2**64 >> 32
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, WIDTH - 1, WIDTH, WIDTH + 1, 5 * WIDTH + 17])
def test_it_is_the_sum_it_says(size: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(size).integers(-(2**31), 2**31, size, dtype=np.int32)
    tensor = torch.from_numpy(words).to(device)
    assert digests([tensor]) == [slow(words)]
    monkeypatch.setattr(digest, "BLOCK", {device: 2})  # more blocks than one
    assert digests([tensor.view(torch.float32)]) == [slow(words)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (203 * dtype.itemsize,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    seen = {digests([raw.view(dtype)])[0]}
    for bit in range(8 * len(raw)):
        other = raw.clone()
        other[bit // 8] ^= 1 << bit % 8
        seen.add(digests([other.view(dtype)])[0])
    assert len(seen) == 1 + 8 * len(raw)


def test_order_counts_within_and_between_rows() -> None:
    tensor = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    swapped = [tensor[[1, 0, 2, 3]], tensor[:, torch.arange(WIDTH).roll(1)], tensor.flip(0, 1), tensor + 0.0]
    found = digests([tensor, *swapped])
    assert len(set(found)) == 4 and found[-1] == found[0]
    assert digests([torch.tensor([0.0])]) != digests([torch.tensor([-0.0])])


def test_strides_and_places_do_not_count() -> None:
    tensor = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    flat = torch.cat([torch.zeros(1, dtype=torch.bfloat16), tensor.flatten()])
    odd = flat[1:].view(6, 10)  # starts in the middle of a word
    assert digests([tensor.T.contiguous().T, odd]) == digests([tensor, tensor])
    assert digests([]) == [] and len(digests([torch.empty(0), torch.tensor(1.0)])) == 2
