"""Weights from the learner to the engines: buckets of (published name, tensor) bytes, with a version.

Invariant: an engine takes over a whole version or none. A bucket says which of how many it is, and carries a checksum
of each tensor; `unpack` refuses a set that is incomplete, mixes versions or was damaged before one tensor is loaded.
With the weights go canaries: prompts and what the learner makes of them, for the engine to be held against.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

BUCKET_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Canary:
    """Fixed prompts and the learner's log-probabilities (temperature 1) of their tokens but the first."""

    prompts: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors laid end to end in `data` [bytes] uint8, which Ray shares between processes without a copy."""

    version: int
    index: int
    count: int
    entries: tuple[tuple[str, str, tuple[int, ...], int], ...]  # (published name, dtype, shape, CRC-32 of its bytes)
    data: np.ndarray
    canary: Canary | None = None  # in the first bucket, where engines are checked


def buckets(pairs: Iterable[tuple[str, torch.Tensor]], version: int, max_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Packs tensors in order; a bucket holds at most max_bytes, or one larger tensor."""
    filled: list[Bucket] = []
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    parts: list[np.ndarray] = []
    size = 0
    for name, tensor in pairs:
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        if entries and size + raw.nbytes > max_bytes:
            filled.append(Bucket(version, len(filled), 0, tuple(entries), np.concatenate(parts)))
            entries, parts, size = [], [], 0
        entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), zlib.crc32(raw.data)))
        parts.append(raw)
        size += raw.nbytes
    filled.append(Bucket(version, len(filled), 0, tuple(entries), np.concatenate(parts)))
    return (replace(bucket, count=len(filled)) for bucket in filled)


def unpack(received: Sequence[Bucket]) -> Iterator[tuple[str, torch.Tensor]]:
    """The (published name, tensor) pairs; tensors are views. Raises ValueError for an incomplete or mixed set."""
    versions = {bucket.version for bucket in received}
    found = sorted(bucket.index for bucket in received)
    if len(versions) != 1 or found != list(range(received[0].count)):
        raise ValueError(f"weights of versions {sorted(versions)} with buckets {found}: not one whole version")
    names = [entry[0] for bucket in received for entry in bucket.entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for i, n in enumerate(names) if n in names[:i])} came twice in one version")
    return _tensors(received)


def _tensors(received: Sequence[Bucket]) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in received:
        offset = 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # shared memory is read-only; so are we
            data = torch.from_numpy(bucket.data)
        for name, dtype_name, shape, checksum in bucket.entries:
            dtype = getattr(torch, dtype_name)
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            piece = data[offset : offset + nbytes]
            offset += nbytes
            if zlib.crc32(piece.numpy().data) != checksum:
                raise ValueError(f"{name} of version {bucket.version} was damaged on its way: its checksum differs")
            if piece.storage_offset() % dtype.itemsize:  # a view needs an aligned start
                piece = piece.clone()
            yield name, piece.view(dtype).view(shape)
