"""Statistics of accept-or-reject: a reward against labels, and two rewards against each other. NaN: cannot be said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def rates(tp: Any, fp: Any, fn: Any, tn: Any) -> dict[str, Any]:
    """Accuracy, FPR, FNR, precision, Matthews correlation and Youden's J from counts; numbers or arrays of draws.

    J = 1 - FPR - FNR scales the expected, un-normalised advantage of a binary verifier; below 0 it reverses learning.
    """
    with np.errstate(all="ignore"):
        tp, fp, fn, tn = (np.asarray(count, dtype=np.float64) for count in (tp, fp, fn, tn))
        fpr, fnr = fp / (fp + tn), fn / (fn + tp)
        spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return {
            "accuracy": (tp + tn) / (tp + fp + fn + tn),
            "fpr": fpr,
            "fnr": fnr,
            "precision": tp / (tp + fp),
            "mcc": (tp * tn - fp * fn) / spread,
            "youden_j": 1 - fpr - fnr,
        }


def outcomes(accepted: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[n, 4] of 0 and 1: true positive, false positive, false negative, true negative."""
    return np.stack([accepted & right, accepted & ~right, ~accepted & right, ~accepted & ~right], axis=1).astype(float)


def best_threshold(values: np.ndarray, right: np.ndarray) -> float:
    """The value from which on accepting makes most verdicts right; of several the lowest. It flatters: it has seen
    the labels that it is measured on."""
    levels, place = np.unique(values, return_inverse=True)
    positives = np.bincount(place, right, minlength=len(levels))
    negatives = np.bincount(place, ~right, minlength=len(levels))
    hits = np.concatenate([[0.0], np.cumsum(negatives)[:-1]]) + np.cumsum(positives[::-1])[::-1]
    return float(levels[int(np.argmax(hits))])


def kappa(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Cohen's kappa of two rewards' verdicts; NaN where chance alone makes them agree."""
    total = both + only_a + only_b + neither
    if not total:
        return math.nan
    a, b = (both + only_a) / total, (both + only_b) / total
    chance = a * b + (1 - a) * (1 - b)
    return ((both + neither) / total - chance) / (1 - chance) if chance < 1 else math.nan


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p value of McNemar's test that two rewards accept equally often; exact up to 1,000 disagreements."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    if n <= 1000:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    z = max(0.0, abs(only_a - only_b) - 1) / math.sqrt(n)
    return math.erfc(z / math.sqrt(2))
