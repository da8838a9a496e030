"""A reward for random weights: it differs from sample to sample whatever a model says, and needs no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def even_tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """TRL's form. The share of a completion's token ids that are even."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]
