"""The block of report.json about one reward: which statistics, of which samples, with which intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.lab import bootstrap, classification, group_signal, ranking
from rewards.records import Score, Status

SIZES = (4, 8, 16)
RATES = ("accuracy", "fpr", "fnr", "precision", "mcc", "youden_j")


@dataclass(frozen=True, slots=True)
class Samples:
    """What is known of the samples besides their scores. Arrays of n; NaN: no label."""

    group: np.ndarray  # int, 0 to groups - 1
    labels: np.ndarray
    right: np.ndarray | None  # bool: label of at least 0.5; None where labels are no 0 to 1 scale, or absent
    length: np.ndarray  # characters
    slices: dict[str, Sequence[str | None]]  # source, length, format -> each sample's slice
    weights: np.ndarray  # [draws, groups]

    @property
    def groups(self) -> int:
        return self.weights.shape[1]


def number(value: Any) -> float | None:
    """A float for JSON; None where it is NaN or infinite."""
    return float(value) if value is not None and np.isfinite(value) else None


def block(samples: Samples, values: np.ndarray, bounds: tuple[float, float] | None) -> dict[str, Any]:
    """Everything about one column of values (NaN: no score) but what its Scores say of times and statuses."""
    known = np.isfinite(values)
    kept = values[known]
    binary = bool(len(kept)) and set(np.unique(kept)) <= {0.0, 1.0}
    mean, mean_interval = bootstrap.estimate(
        lambda total, count: total / count, np.stack([values, known], axis=1), samples.group, samples.weights
    )
    ci: dict[str, Any] = {"mean": mean_interval}
    threshold, source = _threshold(samples, values, binary, bounds)
    result = {
        "samples": len(values),
        "mean": mean,
        "std": number(kept.std()) if len(kept) else None,
        "binary": binary,
        "distinct": len(np.unique(kept)),
        "threshold": threshold,
        "threshold_from": source,
    }
    for part in (
        _against_labels(samples, values, threshold),
        _ranking(samples, values),
        _calibration(samples, values),
        _length(samples, values),
        _group_signal(samples, values, binary),
        _fidelity(samples, values),
    ):
        ci |= part.pop("ci", {})
        result |= part
    return {**result, **_histogram(samples, values), "ci": ci}


def operation(scores: Sequence[Score], seconds: float | None, step: int) -> dict[str, Any]:
    """Statuses, reasons and times. `seconds` is what scoring all took; `step` is samples of a training step."""
    statuses = Counter(str(score.status) for score in scores)
    reasons = Counter(
        (str(score.status), " ".join(str(score.info["reason"]).split())[:160])
        for score in scores
        if score.value is None and score.info.get("reason")
    )
    run_ms = np.array([1000 * score.run_s for score in scores])
    rate = len(scores) / seconds if seconds else None
    failed = statuses[Status.ERROR] + statuses[Status.TIMEOUT]
    return {
        "statuses": {str(status): statuses[status] for status in Status},
        "reasons": [
            {"status": status, "reason": why, "count": count} for (status, why), count in reasons.most_common(10)
        ],
        "error_share": failed / len(scores),
        "unscored_share": 1 - statuses[Status.OK] / len(scores),
        "cached": sum(bool(score.info.get("cached")) for score in scores),
        "run_ms": _times(run_ms),
        "queue_ms": _times(np.array([1000 * score.queue_s for score in scores])),
        "latency_ecdf": [[float(np.percentile(run_ms, share)), share / 100] for share in range(1, 101)],
        "samples_per_s": number(rate),
        "seconds_per_step": number(step / rate) if rate else None,
    }


def curves(
    group: np.ndarray, groups: int, right: np.ndarray, answers: Sequence[str | None], weights: np.ndarray
) -> dict[str, Any]:
    """pass@1, pass@k and maj@k over the prompts, k = 1, 2, 4, ... and the largest group; `right` as 0 and 1."""
    size = np.bincount(group, minlength=groups)
    hits = np.bincount(group, right, minlength=groups)
    largest = int(size.max())
    ks = sorted({1 << power for power in range(largest.bit_length())} | {largest})
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(size)[:-1])
    votes = any(answer is not None for answer in answers)

    def point(k: int, of_prompt: np.ndarray) -> dict[str, Any]:
        known = np.isfinite(of_prompt)
        value, between = bootstrap.estimate(
            lambda total, count: total / count, np.stack([of_prompt, known], axis=1), np.arange(groups), weights
        )
        return {"k": k, "value": value, "ci": between}

    passed = [point(k, group_signal.pass_at_k(size, hits, k)) for k in ks]
    majority = [
        point(
            k,
            np.array([group_signal.maj_at_k([answers[i] for i in places], right[places], k) for places in members]),
        )
        for k in ks[1:]
        if votes
    ]
    return {"pass_at_1": passed[0]["value"], "pass_at_k": passed, "maj_at_k": majority, "groups": groups}


def _threshold(
    samples: Samples, values: np.ndarray, binary: bool, bounds: tuple[float, float] | None
) -> tuple[float | None, str | None]:
    """From which value on a sample counts as accepted, and where that comes from."""
    known = np.isfinite(values)
    if binary:
        return 0.5, "values"
    if bounds is not None and np.isfinite(bounds).all():
        return sum(bounds) / 2, "bounds"
    if samples.right is None or not known.any():
        return None, None
    labelled = known & np.isfinite(samples.labels)
    return (
        (classification.best_threshold(values[labelled], samples.right[labelled]), "best")
        if labelled.any()
        else (None, None)
    )


def _against_labels(samples: Samples, values: np.ndarray, threshold: float | None) -> dict[str, Any]:
    if samples.right is None or threshold is None:
        return {**dict.fromkeys(RATES), "confusion": None, "slices": []}
    labelled = np.isfinite(samples.labels)
    use = labelled & np.isfinite(values)
    outcomes = classification.outcomes(values[use] >= threshold, samples.right[use])
    result, ci = _rates(outcomes, samples.group[use], samples.weights)
    counts = dict(zip(("tp", "fp", "fn", "tn"), outcomes.sum(0).astype(int).tolist()))
    slices = []
    for by, names in samples.slices.items():
        mine = np.array([str(name) for name in names])[use]
        for name in np.unique(mine):
            of = mine == name
            if of.all() and by != "source":  # a slice that is everything says nothing
                continue
            part, between = _rates(outcomes[of], samples.group[use][of], samples.weights)
            slices.append(
                {
                    "by": by,
                    "slice": str(name),
                    "samples": int(of.sum()),
                    "label_mean": float(samples.right[use][of].mean()),
                    **{key: part[key] for key in ("accuracy", "fpr", "fnr")},
                    "ci": {key: between[key] for key in ("accuracy", "fpr", "fnr")},
                }
            )
    return {
        **result,
        "confusion": {**counts, "unscored": int(labelled.sum() - use.sum())},
        "slices": slices,
        "ci": ci,
    }


def _rates(outcomes: np.ndarray, group: np.ndarray, weights: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    sums = bootstrap.sums_by_group(outcomes, group, weights.shape[1])
    point, drawn = classification.rates(*sums.sum(0)), classification.rates(*(weights @ sums).T)
    values = {key: number(point[key]) for key in RATES}
    return values, {key: None if values[key] is None else bootstrap.interval(drawn[key]) for key in RATES}


def _ranking(samples: Samples, values: np.ndarray) -> dict[str, Any]:
    nothing = {"auc": None, "auc_within_group": None, "mixed_groups": 0, "pair_accuracy": None, "pairs": 0,
               "ties": None, "best_of_n": [], "roc": []}  # fmt: skip
    use = np.isfinite(values) & np.isfinite(samples.labels)
    if not use.any():
        return nothing
    value, label, group = values[use], samples.labels[use], samples.group[use]
    result, ci = dict(nothing), {}
    if samples.right is not None and 0 < samples.right[use].sum() < use.sum():
        right = samples.right[use]
        rows = max(1, bootstrap.CELLS // len(value))
        drawn = [
            ranking.auc(value, right, samples.weights[start : start + rows][:, group])
            for start in range(0, len(samples.weights), rows)
        ]
        result["auc"], ci["auc"] = float(ranking.auc(value, right)), bootstrap.interval(np.concatenate(drawn))
        result["roc"] = ranking.roc(value, right)
    counts = ranking.pair_counts(value, label, group, samples.groups)
    mixed = counts[:, 0] > 0
    if mixed.any():
        pairs, _, tied = counts.sum(0)
        share = np.zeros(samples.groups)
        share[mixed] = (counts[mixed, 1] + counts[mixed, 2] / 2) / counts[mixed, 0]
        every = np.arange(samples.groups)
        result["auc_within_group"], ci["auc_within_group"] = bootstrap.estimate(
            lambda total, count: total / count, np.stack([share, mixed], axis=1), every, samples.weights
        )
        result["pair_accuracy"], ci["pair_accuracy"] = bootstrap.estimate(
            lambda of, won, _: won / of, counts, every, samples.weights
        )
        result |= {"mixed_groups": int(mixed.sum()), "pairs": int(pairs), "ties": float(tied / pairs)}
    result["best_of_n"] = _best_of_n(value, label, group)
    return {**result, "ci": ci}


def _best_of_n(values: np.ndarray, labels: np.ndarray, group: np.ndarray) -> list[dict[str, Any]]:
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    largest = max(map(len, members))
    rows = []
    for n in (1 << power for power in range(1, largest.bit_length())):
        enough = [places for places in members if len(places) >= n]
        picked, oracle, random = (
            float(np.mean([pick(places) for places in enough]))
            for pick in (
                lambda places, n=n: ranking.best_of_n(values[places], labels[places], n),
                lambda places, n=n: ranking.best_of_n(labels[places], labels[places], n),
                lambda places: labels[places].mean(),
            )
        )
        rows.append({"n": n, "groups": len(enough), "reward": picked, "oracle": oracle, "random": random,
                     "regret": oracle - picked})  # fmt: skip
    return rows


def _calibration(samples: Samples, values: np.ndarray) -> dict[str, Any]:
    nothing = {"ece": None, "brier": None, "reliability": []}
    use = np.isfinite(values) & np.isfinite(samples.labels)
    if samples.right is None or not use.any():
        return nothing
    right, group = samples.right[use], samples.group[use]
    predicted = ranking.calibrated(values[use], right, group)
    if not np.isfinite(predicted).all():
        return nothing
    columns = ranking.calibration_columns(predicted, right)
    ece, ece_interval = bootstrap.estimate(ranking.ece_of, columns[:, :-1], group, samples.weights)
    brier, brier_interval = bootstrap.estimate(
        lambda total, count: total / count,
        np.stack([columns[:, -1], np.ones(len(columns))], axis=1),
        group,
        samples.weights,
    )
    counts, sums, observed = np.split(columns[:, :-1].sum(0), 3)
    reliability = [
        {"predicted": float(p / n), "observed": float(o / n), "count": int(n)}
        for n, p, o in zip(counts, sums, observed)
        if n
    ]
    return {
        "ece": ece,
        "brier": brier,
        "reliability": reliability,
        "ci": {"ece": ece_interval, "brier": brier_interval},
    }


def _length(samples: Samples, values: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(values)

    def spearman(use: np.ndarray) -> tuple[float | None, list[float] | None]:
        if use.sum() < 3:
            return None, None
        columns = ranking.correlation_columns(ranking.ranks(values[use]), ranking.ranks(samples.length[use]))
        return bootstrap.estimate(ranking.correlation_of, columns, samples.group[use], samples.weights)

    both, interval = spearman(known)
    wrong = known & ~samples.right & np.isfinite(samples.labels) if samples.right is not None else known & False
    shown = np.flatnonzero(known)
    shown = shown[np.unique(np.linspace(0, len(shown) - 1, min(400, len(shown))).astype(int))] if len(shown) else shown
    return {
        "spearman_length": both,
        "spearman_length_wrong": spearman(wrong)[0],
        "length_scatter": [[int(samples.length[i]), float(values[i]), number(samples.labels[i])] for i in shown],
        "ci": {"spearman_length": interval},
    }


def _group_signal(samples: Samples, values: np.ndarray, binary: bool) -> dict[str, Any]:
    """Samples without a score leave their group, as they do in training."""
    known = np.isfinite(values)
    group, value = samples.group[known], values[known]
    every = np.arange(samples.groups)
    shares, expected, intervals = {}, {}, {}
    size = np.bincount(group, minlength=samples.groups)
    rate = group_signal.group_means(value, group, samples.groups)
    for g in SIZES:
        chance = group_signal.zero_variance(value, group, samples.groups, g)
        columns = np.stack([chance, np.isfinite(chance)], axis=1)
        shares[str(g)], intervals[str(g)] = bootstrap.estimate(
            lambda total, count: total / count, columns, every, samples.weights
        )
        expected[str(g)] = number(group_signal.expected_zero_variance(rate[size > 0], g).mean()) if binary else None
    several = size > 1
    low, high = np.full(samples.groups, np.inf), np.full(samples.groups, -np.inf)
    np.minimum.at(low, group, value)
    np.maximum.at(high, group, value)
    flat = several & (high - low <= 1e-9 * (1 + np.abs(low)))
    count = int(several.sum())

    def share(of: np.ndarray) -> float | None:
        return float(of.sum() / count) if count else None

    by = rate
    if samples.right is not None:
        labelled = np.isfinite(samples.labels)
        by = group_signal.group_means(samples.right[labelled].astype(float), samples.group[labelled], samples.groups)
    bins = []
    if binary or samples.right is not None:
        place = np.minimum(np.nan_to_num(by * 10 + 1e-9).astype(int), 9)
        for i in range(10):
            inside = several & (place == i) & np.isfinite(by)
            bins.append({"from": i / 10, "to": (i + 1) / 10, "groups": int(inside.sum()),
                         "zero_variance": int((inside & flat).sum())})  # fmt: skip
    return {
        "zero_variance_share": shares,
        "expected_zero_variance": expected,
        "zero_variance_observed": share(flat),
        "all_zero_share": share(flat & (high == 0)) if binary else None,
        "all_one_share": share(flat & (low == 1)) if binary else None,
        "effective_groups": int(count - flat.sum()),
        "pass_rate_bins": bins,
        "ci": {"zero_variance_share": intervals},
    }


def _fidelity(samples: Samples, values: np.ndarray) -> dict[str, Any]:
    metrics = {
        "advantage_fidelity": group_signal.fidelity_of,
        "sign_errors": group_signal.sign_errors_of,
        "no_signal": group_signal.no_signal_of,
        "signal_share": group_signal.signal_share_of,
        "snr": group_signal.snr_of,
    }
    use = np.isfinite(values) & np.isfinite(samples.labels)
    if not use.any():
        return dict.fromkeys(metrics)
    group = samples.group[use]
    columns = group_signal.fidelity_columns(values[use], samples.labels[use], group, samples.groups)
    found = {key: bootstrap.estimate(metric, columns, group, samples.weights) for key, metric in metrics.items()}
    return {key: value for key, (value, _) in found.items()} | {"ci": {key: ci for key, (_, ci) in found.items()}}


def _histogram(samples: Samples, values: np.ndarray) -> dict[str, Any]:
    kept = values[np.isfinite(values)]
    edges = np.histogram_bin_edges(kept, 20 if len(np.unique(kept)) > 2 else 2) if len(kept) else np.array([0.0, 1.0])
    labelled = np.isfinite(samples.labels) & (samples.right is not None)
    right = labelled & samples.right if samples.right is not None else labelled
    counts = {
        name: np.histogram(values[of & np.isfinite(values)], edges)[0].tolist()
        for name, of in (("right", right), ("wrong", labelled & ~right), ("unlabelled", ~labelled))
    }
    return {"histogram": {"edges": edges.tolist(), **counts}}


def _times(milliseconds: np.ndarray) -> dict[str, float]:
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(milliseconds.max()),
            "mean": float(milliseconds.mean())}  # fmt: skip
