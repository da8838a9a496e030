"""Alarms: metrics that crossed a threshold of `run.alarms`, for the console while a run goes on and for its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

HINTS = {
    "router/max_violation": "an expert takes many times its share of the tokens; see grpo.router_policy",
    "router/dead_experts": "experts get no tokens and learn nothing; see grpo.router_policy",
    "router/drift": "tokens go to other experts than at the start; see the learning rate and grpo.router_policy",
}


class Alarms:
    """Warns once for each metric, the first time that it is above its threshold."""

    def __init__(self, thresholds: Mapping[str, float]) -> None:
        self.waiting = dict(thresholds)

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """One line for each alarm that the metrics of a step raise."""
        lines = []
        for name, threshold in list(self.waiting.items()):
            value = row.get(name)
            if value is not None and value > threshold:
                del self.waiting[name]
                hint = f": {HINTS[name]}" if name in HINTS else ""
                lines.append(f"{name} is {value:.3g} at step {row['step']}, above {threshold:g}{hint}")
        return lines


def raised(rows: Iterable[Mapping[str, Any]], thresholds: Mapping[str, float]) -> list[str]:
    """The lines of a whole run, from the rows of its metrics."""
    alarms = Alarms(thresholds)
    return [line for row in rows for line in alarms.check(row)]
