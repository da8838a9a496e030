"""Weights from the learner to the engines: buckets of (published name, tensor) bytes, with a version.

Invariant: an engine takes over a whole version or none. A bucket says which of how many it is, and carries a checksum
of each tensor; `unpack` refuses a set that is incomplete, mixes versions or was damaged before one tensor is loaded.
Where the engines hold a version already, what did not change since is left out (`Outbox`); such buckets name a base.
With the weights go canaries: prompts and what the learner makes of them, for the engine to be held against.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from model.names import load_unit

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
    base: int | None = None  # the version that these are the changes to; None: every tensor of the model
    canary: Canary | None = None  # in the first bucket, where engines are checked


class Outbox:
    """What was sent last, as digests: the sender's side of the delta sync."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.digests: dict[str, bytes] = {}

    def pack(
        self,
        pairs: Iterable[tuple[str, torch.Tensor]],
        version: int,
        since: int | None = None,
        max_bytes: int = BUCKET_BYTES,
    ) -> list[Bucket]:
        """Buckets of what changed since version `since`: whole load units (model.names.load_unit), in order.

        Of everything where `since` is None or not what was sent last. A checksum of 32 bits tells damage on the way;
        over a long run it would once call a changed tensor unchanged, so here digests are compared.
        """
        on_host = [(name, tensor.detach().cpu().contiguous()) for name, tensor in pairs]
        digests = {name: hashlib.sha256(_raw(tensor).data).digest() for name, tensor in on_host}
        base = since if since is not None and since == self.version else None
        if base is not None:
            moved = {load_unit(name) for name, digest in digests.items() if self.digests.get(name) != digest}
            on_host = [(name, tensor) for name, tensor in on_host if load_unit(name) in moved]
        self.version, self.digests = version, digests
        return [replace(bucket, base=base) for bucket in buckets(on_host, version, max_bytes)]


def _raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def buckets(pairs: Iterable[tuple[str, torch.Tensor]], version: int, max_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Packs tensors in order; a bucket holds at most max_bytes, or one larger tensor."""
    filled: list[Bucket] = []
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    parts: list[np.ndarray] = []
    size = 0
    for name, tensor in pairs:
        raw = _raw(tensor)
        if entries and size + raw.nbytes > max_bytes:
            filled.append(Bucket(version, len(filled), 0, tuple(entries), np.concatenate(parts)))
            entries, parts, size = [], [], 0
        entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), zlib.crc32(raw.data)))
        parts.append(raw)
        size += raw.nbytes
    data = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)  # a version without any change
    filled.append(Bucket(version, len(filled), 0, tuple(entries), data))
    return (replace(bucket, count=len(filled)) for bucket in filled)


def unpack(received: Sequence[Bucket]) -> Iterator[tuple[str, torch.Tensor]]:
    """The (published name, tensor) pairs; tensors are views. Raises ValueError for an incomplete or mixed set."""
    versions = {bucket.version for bucket in received}
    found = sorted(bucket.index for bucket in received)
    if len(versions) != 1 or found != list(range(received[0].count)):
        raise ValueError(f"weights of versions {sorted(versions)} with buckets {found}: not one whole version")
    bases = {bucket.base for bucket in received}
    if len(bases) != 1:
        raise ValueError(f"weights of version {received[0].version} on several bases: not one whole version")
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
