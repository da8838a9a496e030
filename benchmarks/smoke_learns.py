"""Claim: the smoke recipe learns. Seeds 0, 1, 2 gain 30 points or more of held-out greedy accuracy; with rewards
permuted within each group (the control) the same run gains at most 5.

    python -m benchmarks.smoke_learns [--seeds 0,1,2] [--control-seeds 0]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import RESULTS, machine, write_result
from grpo import GRPOTrainer
from grpo.cluster import Cluster
from grpo.log import load_metrics
from rewards import RewardInput, Score


def permuted_score(self: Cluster, inputs: Sequence[RewardInput], original: Any = Cluster.score) -> list[Score]:
    """The scores of a group handed to its samples in another order; evaluations (groups of one) are untouched."""
    scores = original(self, inputs)
    rng = np.random.default_rng(len(inputs))
    places: dict[str, list[int]] = {}
    for place, given in enumerate(inputs):
        places.setdefault(given.group, []).append(place)
    result = list(scores)
    for group in places.values():
        for place, source in zip(group, rng.permutation(group)):
            result[place] = scores[source]
    return result


def train(seed: int, directory: Path, control: bool, config: str = "configs/smoke.yaml") -> dict[str, Any]:
    name = f"{'control' if control else 'seed'}-{seed}"
    overrides = [f"--run.seed={seed}", f"--run.output_dir={directory / name}"]
    began = time.perf_counter()
    with mock.patch.object(Cluster, "score", permuted_score if control else Cluster.score):
        result = GRPOTrainer(config, overrides).train()
    before, after = result.accuracy_before or 0.0, result.accuracy_after or 0.0
    row = {
        "seed": seed,
        "rewards": "permuted within groups" if control else "as scored",
        "accuracy_before": before,
        "accuracy_after": after,
        "gain_points": round(100 * (after - before), 1),
        "seconds": round(time.perf_counter() - began, 1),
        **figures(load_metrics(directory / name)),
    }
    print(json.dumps(row), flush=True)
    return row


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the metrics of a smoke run, whatever engine and precision it had."""
    return {
        "accuracy_curve": {row["step"]: row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None},
        "step_seconds_median": float(np.median([row["step_time"] for row in rows if row.get("step_time")])),
        "logp_difference_max": max(row.get("sampling/sampling_logp_difference/max", 0.0) for row in rows),
    }


def against_recorded(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(mean accuracy of these runs at the end, percentage points above that of smoke_learns.json)."""
    recorded = json.loads((RESULTS / "smoke_learns.json").read_text())["results"]["runs"]
    plain = [run["accuracy_after"] for run in recorded if run["rewards"] == "as scored"]
    mean = float(np.mean([run["accuracy_after"] for run in runs]))
    return mean, round(100 * (mean - float(np.mean(plain))), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--control-seeds", default="0")
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = [train(int(seed), Path(folder), False) for seed in args.seeds.split(",")]
        rows += [train(int(seed), Path(folder), True) for seed in args.control_seeds.split(",") if seed]
    print(write_result("smoke_learns", __doc__ or "", before, {"runs": rows}))


if __name__ == "__main__":
    main()
