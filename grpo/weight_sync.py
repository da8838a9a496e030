"""Weights from the learner to the engines: buckets of (published name, tensor), with a version.

Invariant: an engine takes over a whole version or none. A bucket says which of how many it is, and carries a digest
of each tensor; `unpack` refuses a set that is incomplete, mixes versions or was damaged before one tensor is loaded.
Where the engines hold a version already, what did not change since is left out (`Outbox`); such buckets name a base.
With the weights go canaries: prompts and what the learner makes of them, for the engine to be held against.

Here is what is sent and what is proved of it; how bytes get from one process to the other is grpo/transport.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from grpo.digest import as_bytes, digests
from model.names import load_unit

BUCKET_BYTES = 64 << 20
ALIGNMENT = 16  # bytes; every tensor of a bucket starts at a multiple, so that it can be used where it lies
Pairs = Iterable[tuple[str, torch.Tensor]]  # (published name, tensor)


@dataclass(frozen=True, slots=True)
class Canary:
    """Fixed prompts and the learner's log-probabilities (temperature 1) of their tokens but the first."""

    prompts: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a bucket."""

    name: str  # published
    dtype: str  # torch's, e.g. "bfloat16"
    shape: tuple[int, ...]
    digest: int | None = None  # of its bytes (grpo.digest); None: the tensor itself changes hands

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some tensors of a version, and what its transport made of their bytes."""

    version: int
    index: int
    count: int
    entries: tuple[Entry, ...]
    base: int | None = None  # the version that these are the changes to; None: every tensor of the model
    canary: Canary | None = None  # in the first bucket, where engines are checked
    payload: Any = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def digested(self) -> bool:
        return any(entry.digest is not None for entry in self.entries)


class Outbox:
    """What was sent last, as digests: the sender's side of the delta sync."""

    def __init__(self, delta: bool = True) -> None:
        """delta False: nothing is remembered, every version is sent whole."""
        self.delta = delta
        self.version: int | None = None
        self.digests: dict[str, int] = {}

    def plan(
        self, pairs: Pairs, version: int, since: int | None = None, proved: bool = True, max_bytes: int = BUCKET_BYTES
    ) -> list[Bucket]:
        """Buckets without payload of what changed since version `since`: whole load units (model.names.load_unit).

        Of everything where `since` is None or not what was sent last. `proved`: entries get digests. Tensors are looked
        at one bucket's worth at a time, and not kept.
        """
        entries = list(_entries(pairs, digested=proved or self.delta, max_bytes=max_bytes))
        base = since if self.delta and since is not None and since == self.version else None
        sent = entries
        if base is not None:
            moved = {load_unit(e.name) for e in entries if self.digests.get(e.name) != e.digest}
            sent = [entry for entry in entries if load_unit(entry.name) in moved]
        if self.delta:
            self.version, self.digests = version, {e.name: e.digest for e in entries if e.digest is not None}
        if not proved:
            sent = [replace(entry, digest=None) for entry in sent]
        groups = _cut(sent, max_bytes)
        return [Bucket(version, i, len(groups), tuple(group), base) for i, group in enumerate(groups)]


def _entries(pairs: Pairs, digested: bool, max_bytes: int) -> Iterator[Entry]:
    """Digests of a bucket's worth at a time: the device is waited for once for each, and merged weights may go."""
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in pairs:
        held.append((name, tensor))
        size += tensor.nbytes
        if size >= max_bytes:
            yield from _described(held, digested)
            held, size = [], 0
    yield from _described(held, digested)


def _described(held: Sequence[tuple[str, torch.Tensor]], digested: bool) -> Iterator[Entry]:
    found = digests(tensor for _, tensor in held) if digested else [None] * len(held)
    for (name, tensor), digest in zip(held, found, strict=True):
        yield Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digest)


def _cut(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """In order; a group has at most max_bytes, or one larger tensor. A version without any change is one empty one."""
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + _padded(entry) > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += _padded(entry)
    return groups


def _padded(entry: Entry) -> int:
    return -(-entry.nbytes // ALIGNMENT) * ALIGNMENT


def grouped(plan: Sequence[Bucket], pairs: Pairs) -> Iterator[list[torch.Tensor]]:
    """The tensors of each bucket of a plan, one bucket at a time, out of `pairs` in the order that it was made of."""
    names = {entry.name for bucket in plan for entry in bucket.entries}
    wanted = (pair for pair in pairs if pair[0] in names)
    for bucket in plan:
        taken = list(islice(wanted, len(bucket.entries)))
        assert [name for name, _ in taken] == [entry.name for entry in bucket.entries], f"{bucket.version=} {names=}"
        yield [tensor.detach() for _, tensor in taken]


def flats(plan: Sequence[Bucket], pairs: Pairs) -> Iterator[torch.Tensor]:
    """[bytes] uint8 of each bucket of a plan, a copy where the tensors lie, one bucket at a time."""
    for bucket, tensors in zip(plan, grouped(plan, pairs), strict=True):
        flat = torch.zeros(flat_bytes(bucket), dtype=torch.uint8, device=tensors[0].device if tensors else "cpu")
        start = 0
        for entry, tensor in zip(bucket.entries, tensors):
            flat[start : start + entry.nbytes] = as_bytes(tensor)
            start += _padded(entry)
        yield flat


def flat_bytes(bucket: Bucket) -> int:
    """Bytes of a bucket whose tensors are laid end to end, each at its alignment."""
    return sum(map(_padded, bucket.entries))


def views(bucket: Bucket, flat: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a bucket, as views of its bytes. ValueError where there are too few or too many."""
    if len(flat) != flat_bytes(bucket):
        raise ValueError(f"{len(flat)} of {flat_bytes(bucket)} bytes of a bucket of version {bucket.version} came")
    found, start = [], 0
    for entry in bucket.entries:
        found.append(flat[start : start + entry.nbytes].view(getattr(torch, entry.dtype)).view(entry.shape))
        start += _padded(entry)
    return found


def check_whole(received: Sequence[Bucket], version: int) -> None:
    """ValueError unless these are all buckets of that version, each tensor once. What they carry is not looked at."""
    versions, found = {bucket.version for bucket in received}, sorted(bucket.index for bucket in received)
    if not received or len(versions) != 1 or found != list(range(received[0].count)):
        raise ValueError(f"weights of versions {sorted(versions)} with buckets {found}: not one whole version")
    if versions != {version}:
        raise ValueError(f"weights of version {received[0].version} came where {version} was expected")
    if len({bucket.base for bucket in received}) != 1:
        raise ValueError(f"weights of version {version} on several bases: not one whole version")
    names = Counter(entry.name for bucket in received for entry in bucket.entries)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{twice[0]} came twice in one version")


def unpack(
    received: Sequence[Bucket], version: int, fetch: Callable[[Bucket], Sequence[torch.Tensor]]
) -> list[tuple[str, torch.Tensor]]:
    """The (published name, tensor) pairs of a whole version; `fetch` (grpo.transport) gives a bucket's tensors.

    Raises ValueError that says what is wrong: an incomplete or mixed set, another version, a damaged tensor.
    """
    check_whole(received, version)
    weights: list[tuple[str, torch.Tensor]] = []
    for bucket in sorted(received, key=lambda bucket: bucket.index):
        tensors = fetch(bucket)
        arrived = _described([(e.name, t) for e, t in zip(bucket.entries, tensors, strict=True)], bucket.digested)
        for entry, got in zip(bucket.entries, arrived):
            if got != entry:
                raise ValueError(f"{entry.name} of version {version} was damaged on its way: its checksum differs")
        weights += [(entry.name, tensor) for entry, tensor in zip(bucket.entries, tensors)]
    return weights
