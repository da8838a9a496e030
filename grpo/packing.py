"""Packing: samples side by side in one row without padding, a group's prompt stored once.

    [ prompt without its last token | last prompt token, completion of sample 0 | ... of sample 1 | ... ]

Every sample starts with the last token of the prompt, so whatever looks ahead from there (the first completion token,
multi-token prediction) is its own; its last token predicts nothing and is left out: it is a target only. A micro-batch
takes whole groups as long as they fit; only a group longer than max_tokens by itself is split, and its prompt repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from grpo.records import PackedBatch, TrainingSample


def pack(groups: Sequence[Sequence[TrainingSample]], max_tokens: int) -> list[PackedBatch]:
    """Micro-batches of at most max_tokens packed tokens each (a longer sample has one of its own), in order.

    The samples of a group have the same prompt. Raises ValueError for a sample without prompt or completion tokens.
    """
    batches: list[list[list[TrainingSample]]] = [[]]
    room = max_tokens
    for group in groups:
        for piece in _split(list(group), max_tokens):
            size = _tokens(piece)
            if size > room and batches[-1]:
                batches.append([])
                room = max_tokens
            batches[-1].append(piece)
            room -= size
    return [_assemble(pieces) for pieces in batches if pieces]


def _tokens(group: Sequence[TrainingSample]) -> int:
    """Packed tokens of a group."""
    shared = len(group[0].prompt_ids) - 1
    return shared + sum(len(sample.completion_ids) for sample in group)


def _split(group: list[TrainingSample], max_tokens: int) -> list[list[TrainingSample]]:
    pieces: list[list[TrainingSample]] = []
    for sample in group:
        if not sample.prompt_ids or not sample.completion_ids:
            raise ValueError("a sample needs at least one prompt token and one completion token")
        if pieces and _tokens([*pieces[-1], sample]) <= max_tokens:
            pieces[-1].append(sample)
        else:
            pieces.append([sample])
    return pieces


def _assemble(groups: Sequence[Sequence[TrainingSample]]) -> PackedBatch:
    ids: list[int] = []
    positions, sources, lengths, parents, routes = [], [], [], [], []
    samples = [sample for group in groups for sample in group]
    for group in groups:
        prompt = group[0].prompt_ids
        alone = len(group) == 1
        shared = 0 if alone else len(prompt) - 1
        parent = -1
        if shared:
            parent = len(lengths)
            ids += prompt[:-1]
            lengths.append(shared)
            parents.append(-1)
            positions.append(np.arange(shared))
            routes.append(None if group[0].routed_experts is None else group[0].routed_experts[:shared])
        for sample in group:
            own = [*prompt[shared:], *sample.completion_ids[:-1]]
            start = len(ids) + len(prompt) - shared - 1  # of the last prompt token, which predicts the first target
            ids += own
            lengths.append(len(own))
            parents.append(parent)
            positions.append(np.arange(shared, shared + len(own)))
            sources.append(np.arange(start, start + len(sample.completion_ids)))
            routes.append(None if sample.routed_experts is None else sample.routed_experts[shared:])
    counts = np.array([len(s.completion_ids) for s in samples])

    def spread(values: list[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), counts))

    def tokens(name: str) -> torch.Tensor:
        rows = [getattr(s, name) or (0.0,) * len(s.completion_ids) for s in samples]
        return torch.from_numpy(np.concatenate(rows).astype(np.float32))

    replay = all(route is not None for route in routes)
    return PackedBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        cu_seqlens=torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))),
        parent=torch.tensor(parents),
        source=torch.from_numpy(np.concatenate(sources)),
        target=torch.tensor([t for s in samples for t in s.completion_ids]),
        sample=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        advantages=spread([s.advantage for s in samples]),
        weights=spread([s.weight for s in samples]),
        rollout_logprobs=tokens("rollout_logprobs"),
        log_support=tokens("log_support"),
        routed_experts=torch.from_numpy(np.concatenate(routes).astype(np.int64)) if replay else None,
        stale=_stale(samples) if any(s.stale for s in samples) else None,
        num_samples=len(samples),
    )


def _stale(samples: Sequence[TrainingSample]) -> torch.Tensor:
    """[R] bool."""
    return torch.from_numpy(np.concatenate([np.arange(len(s.completion_ids)) < s.stale for s in samples]))
