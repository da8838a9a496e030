"""`--fail-if "fpr>0.02"`: conditions on the numbers of a report, for a check in continuous integration."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
NEED_LABELS = ("accuracy", "fpr", "fnr", "precision", "mcc", "youden_j", "auc", "auc_within_group", "pair_accuracy",
               "ece", "brier", "advantage_fidelity", "sign_errors", "no_signal", "snr", "signal_share")  # fmt: skip
OTHERS = ("mean", "std", "zero_variance_observed", "all_zero_share", "all_one_share", "spearman_length",
          "error_share", "unscored_share", "flips", "probes_failed", "run_ms.p50", "run_ms.p95", "run_ms.p99",
          "run_ms.max", "seconds_per_step", *(f"zero_variance_share.{size}" for size in (4, 8, 16)))  # fmt: skip


class Condition(NamedTuple):
    text: str
    reward: str  # empty: any
    metric: str
    compare: str
    limit: float


def parse(texts: Sequence[str], rewards: Sequence[str], labelled: bool, probes: bool) -> list[Condition]:
    """Conditions such as `fpr>0.02`, `math_answer.fnr >= 0.1`, several with commas. Raises ValueError naming one."""
    conditions = []
    for text in (piece.strip() for given in texts for piece in given.split(",")):
        match = re.fullmatch(r"([\w.\-]+)\s*(>=|<=|==|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)", text)
        if match is None:
            raise ValueError(f'--fail-if {text!r} is no condition; write METRIC>NUMBER, such as "fpr>0.02"')
        path, compare, number, percent = match.groups()
        reward = next((name for name in (*rewards, "total") if path.startswith(f"{name}.")), "")
        metric = path[len(reward) + 1 :] if reward else path
        if metric not in (*NEED_LABELS, *OTHERS):
            near = difflib.get_close_matches(metric, [*NEED_LABELS, *OTHERS], n=1, cutoff=0.0)[0]
            raise ValueError(
                f"--fail-if {text!r}: no metric {metric!r}, did you mean {near!r}? known: "
                f"{', '.join((*NEED_LABELS, *OTHERS))}; a reward's name and a dot may come before it"
            )
        if metric in NEED_LABELS and not labelled:
            raise ValueError(f"--fail-if {text!r} needs labels; name their column with --label")
        if metric == "probes_failed" and not probes:
            raise ValueError(f"--fail-if {text!r} needs --probes")
        conditions.append(Condition(text, reward, metric, compare, float(number) / (100 if percent else 1)))
    return conditions


def holding(conditions: Sequence[Condition], report: Mapping[str, Any]) -> list[str]:
    """A line for each condition that holds, or whose number cannot be said; they are what makes a run fail."""
    blocks = dict(report["rewards"])
    if report["total"] is not None and any(condition.reward == "total" for condition in conditions):
        blocks.setdefault("total", report["total"])
    lines = []
    for condition in conditions:
        chosen = [condition.reward] if condition.reward else list(report["rewards"])
        found = {name: _number(blocks.get(name, {}), condition.metric) for name in chosen}
        for name, value in found.items():
            if value is None:
                lines.append(f"{condition.text}: {name} has no {condition.metric} on these data")
            elif OPERATORS[condition.compare](value, condition.limit):
                lines.append(f"{condition.text}: {name} has {condition.metric} {value:.4g}")
    return lines


def _number(block: Mapping[str, Any], metric: str) -> float | None:
    value: Any = block
    for key in metric.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
