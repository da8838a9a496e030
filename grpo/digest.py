"""A digest of a tensor's bytes, computed where the tensor lies at about the speed of its memory.

Multilinear hashing (Lemire and Kaser, "Strongly universal string hashing is fast", 2014, 1202.4961): for 32-bit words
x_i and random 64-bit weights m_i, (sum of m_i x_i mod 2^64) >> 32 is the same for two different inputs with probability
2^-32 at most. The low words of such a sum are weak (the lowest bit sees lowest bits alone), so they are dropped.
Here words lie in rows of WIDTH: each row is hashed with one set of weights, then the column of row hashes with another.
Two inputs meet where a row's hashes meet or the column's do: 2^-31 at most. Two such sums with weights of their own
make 2^-62; a run that compares a million tensors in each of a million steps misses a change with probability 2e-7.
The weights are fixed numbers, drawn independently of any data: this finds accidents, it is no defence against forgery.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

WIDTH = 4096  # words in a row
BLOCK = {"cpu": 256, "cuda": 4096}  # rows hashed at a time: products take 8 times their bytes, on a CPU in its cache


def digests(tensors: Iterable[torch.Tensor]) -> list[int]:
    """64 bits of each tensor's bytes, whatever its dtype, strides or device; the host waits for the device once.

    Compares tensors of the same shape and dtype: trailing zero bytes do not count.
    """
    pairs = [_pair(tensor.detach()) for tensor in tensors]  # each [2]
    if not pairs:
        return []
    rows = torch.stack([pair.to(pairs[0].device) for pair in pairs]).tolist()
    return [high << 32 | low for high, low in rows]


def _pair(tensor: torch.Tensor) -> torch.Tensor:
    """[2] int64: two independent hashes below 2^32."""
    raw = as_bytes(tensor)
    words = WIDTH * 4
    whole = len(raw) // words * words
    rows = [raw[:whole].view(torch.int32).view(-1, WIDTH)] if whole else []
    if len(raw) > whole or not rows:  # the last row, filled up with zeros
        rows.append(F.pad(raw[whole:], (0, whole + words - len(raw))).view(torch.int32).view(1, WIDTH))
    inner = _weights(0, WIDTH, tensor.device)  # [2, WIDTH]
    hashed = [
        _high((block[:, None] * inner).sum(-1))  # [rows, 2]
        for part in rows
        for block in part.split(BLOCK.get(tensor.device.type, 4096))
    ]
    column = torch.cat(hashed) if len(hashed) > 1 else hashed[0]
    outer = _weights(1, 1 << max(len(column) - 1, 1).bit_length(), tensor.device)[:, : len(column)]
    return _high((column * outer.T).sum(0))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[bytes] uint8, a view where the tensor is contiguous and starts at a whole word."""
    flat = tensor.detach().contiguous().flatten()
    raw = flat.view(torch.uint8)
    return raw.clone() if raw.storage_offset() % 4 else raw


def _high(sums: torch.Tensor) -> torch.Tensor:
    return (sums >> 32) & 0xFFFFFFFF


@cache
def _weights(level: int, count: int, device: torch.device) -> torch.Tensor:
    """[2, count] int64, the same in every process; the first ones do not depend on count."""
    drawn = [np.random.Generator(np.random.PCG64([level, row])).bytes(8 * count) for row in range(2)]
    return torch.from_numpy(np.stack([np.frombuffer(part, dtype="<i8") for part in drawn])).to(device)
