"""Pushes of weights in one process, as tests want them: bytes in host memory, fetched and proved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.transport import ObjectStore
from grpo.weight_sync import BUCKET_BYTES, Bucket, Outbox, Pairs, unpack


def posted(pairs: Pairs, version: int, max_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Buckets of everything."""
    pairs = list(pairs)
    return ObjectStore().post(Outbox().plan(pairs, version, max_bytes=max_bytes), pairs)


def unpacked(made: Sequence[Bucket]) -> list[tuple[str, torch.Tensor]]:
    """What an engine gets of them."""
    return unpack(made, made[0].version if made else 0, ObjectStore().fetch)
