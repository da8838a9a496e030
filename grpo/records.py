"""Records of the loop: one frozen record per arrow.

    Prompt -> (Completion) -> (Score) -> Sample -> Group -> TrainingSample -> PackedBatch -> StepStats

Completion belongs to rollout, Score to rewards. R: completion tokens of a batch; T: packed tokens; S: segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from model.layout import moved
from rewards.records import Score
from rollout.records import Completion


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of the data source, rendered and tokenised."""

    id: str  # stable over runs: position of the row in its source
    text: str | Sequence[Mapping[str, str]]  # as the data has it: a string or chat messages
    token_ids: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)  # every column of the row; "answer" is the gold
    visit: int = 0  # how often the prompt was sampled before in this run


@dataclass(frozen=True, slots=True)
class Sample:
    """A scored completion of a prompt. `advantage` is None where no score applies: it leaves the group baseline too."""

    prompt: Prompt
    index: int  # 0 .. num_generations - 1
    completion: Completion
    text: str
    score: Score
    advantage: float | None = None

    @property
    def policy_version(self) -> int:
        return self.completion.policy_version


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one prompt, in index order."""

    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """What packing needs of a sample, or of a supervised example (advantage 1, no rollout)."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    weight: float  # of each of its tokens in the loss of the update; 0: takes no part
    advantage: float = 1.0
    rollout_logprobs: tuple[float, ...] = ()  # one for each completion token, or none
    log_support: tuple[float, ...] = ()
    routed_experts: np.ndarray | None = None  # [prompt + completion - 1, MoE layers, K]
    stale: int = 0  # completion tokens, the first ones, that older weights than the current ones sampled


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Samples packed into one row without padding; a micro-batch.

    Segments are cut by `cu_seqlens`. Segment s attends to itself and, before it, to the segment `parent[s]` (a prompt
    that several samples share; -1: none). Every completion token is a row of the loss: the hidden state at `source`
    predicts `target`.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [S + 1] int64
    parent: torch.Tensor  # [S] int64
    source: torch.Tensor  # [R] int64, index into the packed row
    target: torch.Tensor  # [R] int64, token id
    sample: torch.Tensor  # [R] int64, 0 .. num_samples - 1, ascending
    advantages: torch.Tensor  # [R] float32
    weights: torch.Tensor  # [R] float32, share of the row in the loss of the whole step; they carry the normaliser
    rollout_logprobs: torch.Tensor  # [R] float32, as the engine reported them
    log_support: torch.Tensor  # [R] float32
    old_logprobs: torch.Tensor | None = None  # [R] float32; None: the current ones (one update per rollout)
    ref_logprobs: torch.Tensor | None = None  # [R] float32; None: no KL term
    routed_experts: torch.Tensor | None = None  # [T, MoE layers, K] int64; None: the model routes by itself
    stale: torch.Tensor | None = None  # [R] bool, sampled by older weights; None: no token was
    num_samples: int = 0

    def to(self, device: torch.device) -> PackedBatch:
        """On another device; nothing waits. cu_seqlens and parent stay on the host: the layout is made of them."""
        if self.input_ids.device == device:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("cu_seqlens", "parent")}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **dict(zip(tensors, moved(list(tensors.values()), device))))


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one learner step did. `metrics` are named as in TRL."""

    policy_version: int  # of the weights after the step
    metrics: Mapping[str, float]
