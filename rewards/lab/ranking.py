"""Statistics of scores that rank: ROC, pairs within a prompt, best of n, calibration, correlation. NaN: unknown."""

from __future__ import annotations

from itertools import pairwise
from math import comb

import numpy as np


def auc(values: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve, ties counted half: the chance that a right sample scores above a wrong one.

    `weights` [draws, n] or [n]: how often each sample counts.
    """
    order = np.argsort(values, kind="stable")
    ranked, positive = values[order], right[order].astype(float)
    weights = np.ones(len(values)) if weights is None else weights[..., order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    positives = np.add.reduceat(weights * positive, starts, axis=-1, dtype=np.float64)
    negatives = np.add.reduceat(weights * (1 - positive), starts, axis=-1, dtype=np.float64)
    below = np.cumsum(negatives, axis=-1) - negatives
    with np.errstate(all="ignore"):
        return (positives * (below + negatives / 2)).sum(-1) / (positives.sum(-1) * negatives.sum(-1))


def roc(values: np.ndarray, right: np.ndarray, points: int = 200) -> list[list[float]]:
    """[false positive rate, true positive rate] for every threshold from the highest down, at most `points` of them."""
    if right.all() or not right.any():
        return []
    order = np.argsort(-values, kind="stable")
    last = np.flatnonzero(np.concatenate([values[order][1:] != values[order][:-1], [True]]))
    hits = np.cumsum(right[order])[last] / right.sum()
    alarms = np.cumsum(~right[order])[last] / (~right).sum()
    curve = np.concatenate([[[0.0, 0.0]], np.stack([alarms, hits], axis=1)])
    return curve[np.unique(np.linspace(0, len(curve) - 1, min(points, len(curve))).astype(int))].tolist()


def pair_counts(values: np.ndarray, labels: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """[groups, 3]: pairs of samples of a group with different labels; scored in the labels' order; scored equal."""
    counts = np.zeros((groups, 3))
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        levels = np.unique(labels[members])
        for low, high in ((low, high) for i, high in enumerate(levels) for low in levels[:i]):
            better, worse = values[members[labels[members] == high]], np.sort(values[members[labels[members] == low]])
            below, to = np.searchsorted(worse, better, "left"), np.searchsorted(worse, better, "right")
            counts[group[members[0]]] += [len(better) * len(worse), below.sum(), (to - below).sum()]
    return counts


def best_of_n(values: np.ndarray, labels: np.ndarray, n: int) -> float:
    """Mean label of the highest-scored of n samples drawn without replacement from one prompt's; exact.

    Ties are broken at random. NaN where the prompt has fewer than n samples.
    """
    total = len(values)
    if total < n:
        return float("nan")
    levels, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    means = np.bincount(place, labels, minlength=len(levels)) / counts
    upto = np.concatenate([[0], np.cumsum(counts)])
    ways = [comb(int(high), n) - comb(int(low), n) for low, high in pairwise(upto)]
    return float(sum(way / comb(total, n) * mean for way, mean in zip(ways, means)))


def isotonic(values: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(levels, fitted) of the least-squares fit that never falls as the value rises (pool adjacent violators)."""
    levels, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    means = np.bincount(place, targets, minlength=len(levels)) / counts
    blocks: list[list[float]] = []  # mean, weight, number of levels
    for mean, count in zip(means, counts):
        blocks.append([float(mean), float(count), 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (m1, w1, n1), (m2, w2, n2) = blocks[-2:]
            blocks[-2:] = [[(m1 * w1 + m2 * w2) / (w1 + w2), w1 + w2, n1 + n2]]
    return levels, np.repeat([block[0] for block in blocks], [int(block[2]) for block in blocks])


def calibrated(values: np.ndarray, right: np.ndarray, group: np.ndarray, folds: int = 5) -> np.ndarray:
    """The chance that each sample is right, by an isotonic fit to the samples of other prompts. NaN with one prompt."""
    names = np.unique(group)
    folds = min(folds, len(names))
    predicted = np.full(len(values), np.nan)
    if folds < 2:
        return predicted
    fold = np.random.default_rng(0).permutation(len(names))[np.searchsorted(names, group)] % folds
    for held_out in range(folds):
        levels, fitted = isotonic(values[fold != held_out], right[fold != held_out].astype(float))
        predicted[fold == held_out] = np.interp(values[fold == held_out], levels, fitted)
    return predicted


def calibration_columns(predicted: np.ndarray, right: np.ndarray, bins: int = 10) -> np.ndarray:
    """[n, 3 bins + 1]: for `ece_of` and the Brier score: per bin of prediction a count, the prediction and the label;
    last the squared error."""
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    inside = np.eye(bins)[place]
    return np.concatenate(
        [inside, inside * predicted[:, None], inside * right[:, None], ((predicted - right) ** 2)[:, None]], axis=1
    )


def ece_of(*sums: np.ndarray) -> np.ndarray:
    """Expected calibration error from sums of `calibration_columns` without the last: mean |predicted - observed|."""
    counts, predicted, observed = np.split(np.asarray(sums), 3)
    return np.abs(predicted - observed).sum(0) / counts.sum(0)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties share their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def correlation_columns(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 6] whose sums `correlation_of` takes. Of ranks it is Spearman's."""
    a, b = a - a.mean(), b - b.mean()  # numerically kinder; the result is the same
    return np.stack([np.ones(len(a)), a, b, a * a, b * b, a * b], axis=1)


def correlation_of(
    n: np.ndarray, a: np.ndarray, b: np.ndarray, aa: np.ndarray, bb: np.ndarray, ab: np.ndarray
) -> np.ndarray:
    """Pearson's correlation from sums; NaN where a side does not vary."""
    return (n * ab - a * b) / np.sqrt((n * aa - a * a) * (n * bb - b * b))
