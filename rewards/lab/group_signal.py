"""What a group of samples teaches GRPO: zero-variance groups, advantages against those of the labels, pass@k, maj@k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np

SUBSETS = 200  # drawn where a group has more; maj@k only


def zero_variance(values: np.ndarray, group: np.ndarray, groups: int, size: int) -> np.ndarray:
    """[groups]: the chance that `size` samples drawn without replacement from a group score the same; exact.

    NaN for a group of fewer samples. Each value v that occurs c times adds C(c, size) / C(n, size).
    """
    cells, counts = np.unique(np.stack([group, np.unique(values, return_inverse=True)[1]]), axis=1, return_counts=True)
    total = np.bincount(group, minlength=groups).astype(float)
    chance = np.ones(len(counts))
    for taken in range(size):
        with np.errstate(all="ignore"):
            chance *= np.maximum(counts - taken, 0) / (total[cells[0]] - taken)
    return np.where(total >= size, np.bincount(cells[0], chance, minlength=groups), np.nan)


def expected_zero_variance(pass_rate: np.ndarray, size: int) -> np.ndarray:
    """p^G + (1 - p)^G: the chance that G independent samples of a prompt with that pass rate are all equal."""
    return pass_rate**size + (1 - pass_rate) ** size


def group_means(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """[groups] means; NaN for a group without samples."""
    with np.errstate(all="ignore"):
        return np.bincount(group, values, minlength=groups) / np.bincount(group, minlength=groups)


def advantages(values: np.ndarray, group: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(score less its group's mean; that over the group's standard deviation, 0 in a group of equal scores)."""
    centred = values - group_means(values, group, groups)[group]
    spread = np.sqrt(group_means(centred**2, group, groups))[group]
    flat = spread <= 1e-9 * (1 + np.abs(values))
    centred = np.where(flat, 0.0, centred)
    return centred, np.where(flat, 0.0, centred / np.where(flat, 1.0, spread))


def fidelity_columns(values: np.ndarray, labels: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """[n, 9] whose sums the functions below take: products of both sides' advantages, and of centred scores."""
    (c_r, a_r), (c_l, a_l) = (advantages(side, group, groups) for side in (values, labels))
    matters = a_l != 0
    opposite, silent = matters & (a_r * a_l < 0), matters & (a_r == 0)
    columns = [a_r * a_r, a_l * a_l, a_r * a_l, matters, opposite, silent, c_r * c_r, c_l * c_l, c_r * c_l]
    return np.stack([np.asarray(column, dtype=float) for column in columns], axis=1)


def fidelity_of(rr: np.ndarray, ll: np.ndarray, rl: np.ndarray, *_: np.ndarray) -> np.ndarray:
    """Correlation of the reward's advantages with those that the labels would give. 1: the same update direction."""
    return rl / np.sqrt(rr * ll)


def sign_errors_of(*sums: np.ndarray) -> np.ndarray:
    """Of the samples that the labels would move, the share that the reward moves the other way."""
    return sums[4] / sums[3]


def no_signal_of(*sums: np.ndarray) -> np.ndarray:
    """Of the samples that the labels would move, the share that the reward does not move."""
    return sums[5] / sums[3]


def signal_share_of(*sums: np.ndarray) -> np.ndarray:
    """The share of the reward's variance within groups that the label explains (R squared)."""
    rr, ll, rl = sums[6:9]
    return rl * rl / (rr * ll)


def snr_of(*sums: np.ndarray) -> np.ndarray:
    """Variance within groups that the label explains over the rest; infinite for a reward that is the label."""
    share = signal_share_of(*sums)
    return np.where(share > 1 - 1e-12, np.inf, share / (1 - share))


def gradient_shares(
    terms: Mapping[str, np.ndarray], total: np.ndarray, group: np.ndarray, groups: int
) -> dict[str, float]:
    """Which share of the advantages each weighted term drives; they sum to 1. Below 0: it works against the others.

    Of term t in a group: cov(t, total) / var(total), averaged over the groups that have an advantage at all.
    """
    _, advantage = advantages(total, group, groups)
    spread = np.sqrt(group_means((total - group_means(total, group, groups)[group]) ** 2, group, groups))[group]
    moves = advantage != 0
    whole = float((advantage**2).sum())
    shares = {}
    for name, term in terms.items():
        centred = term - group_means(term, group, groups)[group]
        driven = np.where(moves, centred / np.where(moves, spread, 1.0), 0.0)
        shares[name] = float((advantage * driven).sum() / whole) if whole else float("nan")
    return shares


def pass_at_k(samples: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """[groups] 1 - C(n - c, k) / C(n, k), the unbiased estimate of arXiv 2107.03374 eq. 1; NaN where n < k."""
    return np.array([1 - comb(int(n - c), k) / comb(int(n), k) if n >= k else np.nan for n, c in zip(samples, right)])


def maj_at_k(answers: Sequence[str | None], right: np.ndarray, k: int) -> float:
    """The chance that the most frequent answer of k samples of one prompt is right, ties broken at random.

    Exact up to SUBSETS subsets, else over that many drawn ones. An answer is as right as its samples are on average;
    a sample without an answer has no vote, and where nobody votes the majority is wrong. NaN with fewer than k samples.
    """
    n = len(answers)
    if n < k:
        return float("nan")
    names = sorted({answer for answer in answers if answer is not None})
    if not names:
        return 0.0
    votes = np.array([[answer == name for name in names] for answer in answers], dtype=float)  # [n, answers]
    worth = votes.T @ right / votes.sum(0)
    if comb(n, k) <= SUBSETS:
        subsets = np.array(list(combinations(range(n), k)))
    else:
        rng = np.random.default_rng(0)
        subsets = np.stack([rng.permutation(n)[:k] for _ in range(SUBSETS)])
    counts = votes[subsets].sum(1)  # [subsets, answers]
    winners = (counts == counts.max(1, keepdims=True)) & (counts > 0)
    return float(np.mean(winners @ worth / np.maximum(winners.sum(1), 1)))
