"""Sampling: logits and a uniform number per row in, a token with its log-probability and log-support out.

By inversion of the cumulative distribution in token-id order, in float64, so that a draw hardly feels rounding
in the logits. Truncation goes as in vLLM: min-p, then top-k, then top-p of what is left. B: rows, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.records import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling settings of a batch as tensors; `truncated` says whether any row needs more than the plain draw."""

    temperature: torch.Tensor | None  # [B, 1] float32; None: 1 everywhere
    greedy: torch.Tensor | None  # [B] bool; None: nowhere
    top_p: torch.Tensor  # [B, 1] float32, infinite where off, as a sum of probabilities may round to 1 too early
    top_k: torch.Tensor  # [B, 1] int64, V where off
    min_p: torch.Tensor  # [B, 1] float32
    truncated: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> SamplingRows:
        def column(values: list[float] | list[int]) -> torch.Tensor:
            return torch.tensor(values, device=device)[:, None]

        greedy = [p.temperature == 0 for p in params]
        plain = all(p.temperature in (0, 1) for p in params)
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        return cls(
            temperature=None if plain else column([p.temperature or 1.0 for p in params]),
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            top_p=column([p.top_p if p.top_p < 1 else math.inf for p in params]),
            top_k=column(top_k),
            min_p=column([p.min_p for p in params]),
            truncated=any(p.top_p < 1 or p.min_p > 0 for p in params) or any(k < vocab_size for k in top_k),
        )


def sample(
    logits: torch.Tensor, rows: SamplingRows, draws: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [B, V], draws [B] float64 in (0, 1) -> tokens [B] int64, logprobs [B], log_support [B] float32.

    A greedy row takes the likeliest token; it is drawn with probability 1, so its log_support equals its logprob.
    """
    logits = logits.float()
    if rows.temperature is not None:
        logits = logits / rows.temperature
    log_all = torch.log_softmax(logits, dim=-1)  # [B, V]
    probs = log_all.exp()
    kept = kept_tokens(probs, rows) if rows.truncated else None  # [B, V]
    if kept is not None:
        probs = probs * kept
    cumulative = probs.double().cumsum(-1)  # [B, V]
    total = cumulative[:, -1:]
    threshold = torch.from_numpy(draws).to(logits.device)[:, None] * total  # [B, 1]
    # first token whose cumulative probability exceeds the threshold: never one that was cut (its step is 0)
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)  # [B, 1]
    log_support = torch.zeros_like(log_all[:, :1])
    if kept is not None:  # exactly 0 for a row that keeps everything: not a matter of rounding or of other rows
        log_support = torch.where(kept.all(-1, keepdim=True), log_support, total.log().float())
    if rows.greedy is not None:
        tokens = torch.where(rows.greedy[:, None], log_all.argmax(-1, keepdim=True), tokens)
    logprobs = log_all.gather(1, tokens)
    if rows.greedy is not None:
        log_support = torch.where(rows.greedy[:, None], logprobs, log_support)
    return tokens[:, 0], logprobs[:, 0], log_support[:, 0]


def kept_tokens(probs: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """[B, V] bool: the tokens that min-p, top-k and top-p keep of probs [B, V]; the likeliest is always among them."""
    ordered, order = probs.sort(dim=-1, descending=True)  # [B, V]
    rank = torch.arange(probs.shape[-1], device=probs.device)
    kept = (ordered >= rows.min_p * ordered[:, :1]) & (rank < rows.top_k)
    left = ordered * kept
    share = left / left.sum(-1, keepdim=True)
    # a token stays while the mass before it is below top_p: the smallest set that reaches top_p
    kept &= (share.cumsum(-1) - share < rows.top_p) | (rank == 0)
    return torch.zeros_like(kept).scatter(1, order, kept)
