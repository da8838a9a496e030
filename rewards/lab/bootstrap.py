"""95 % intervals by the bootstrap over prompts: samples of one prompt are no independent evidence and stay together.

A metric that is a function of sums over samples needs one matrix product for all draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

CONFIDENCE = 0.95
CELLS = 20_000_000  # of the matrix draws x prompts; more prompts get fewer draws, as their intervals are narrow anyway


def draw_weights(groups: int, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """[draws, groups]: how often each prompt is in a draw of `groups` prompts with replacement."""
    draws = max(100, min(draws, CELLS // max(1, groups)))
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, groups), dtype=np.float32)
    for row in weights:
        row[:] = np.bincount(rng.integers(groups, size=groups), minlength=groups)
    return weights


def sums_by_group(columns: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """[groups, m] sums of the columns [n, m] over the samples of each group; NaN counts as 0."""
    columns = np.nan_to_num(np.asarray(columns, dtype=np.float64))
    return np.stack([np.bincount(group, column, minlength=groups) for column in columns.T], axis=1)


def interval(values: np.ndarray) -> list[float] | None:
    """[low, high] of the draws' values; None where most draws could not say."""
    values = np.asarray(values, dtype=np.float64)
    known = values[np.isfinite(values)]
    if len(known) < len(values) / 2 or not len(known):
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(known, [tail, 100 - tail])
    return [float(low), float(high)]


def estimate(
    metric: Callable[..., Any], columns: np.ndarray, group: np.ndarray, weights: np.ndarray
) -> tuple[float | None, list[float] | None]:
    """(value, interval) of metric(*sums), which takes numbers or arrays: sums of the columns over all samples."""
    sums = sums_by_group(columns, group, weights.shape[1])
    with np.errstate(all="ignore"):
        value, drawn = metric(*sums.sum(0)), metric(*(weights @ sums).T)
    return (float(value), interval(drawn)) if np.isfinite(value) else (None, None)
