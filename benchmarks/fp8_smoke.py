"""Claim: the smoke task is learnt with model.fp8 emulate as it is without: the mean accuracy of three seeds is within 5
points of smoke_learns.json.

    python -m benchmarks.fp8_smoke [--seeds 0,1,2] [--max-steps 350]

The warm start is in FP8 as well, and the embedded engine computes in FP8 what the learner computes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, machine, write_result
from benchmarks.smoke_learns import against_recorded, figures
from grpo import GRPOTrainer
from grpo.log import load_metrics


def train(seed: int, max_steps: int, folder: Path) -> dict[str, Any]:
    run = folder / f"seed-{seed}"
    overrides = [
        "--model.fp8=emulate",
        f"--run.seed={seed}",
        f"--run.output_dir={run}",
        f"--grpo.max_steps={max_steps}",
    ]
    result = GRPOTrainer(ROOT / "configs" / "smoke.yaml", overrides).train()
    rows = load_metrics(run)
    steps = [row for row in rows if row.get("step_time")]
    row = {
        "seed": seed,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "seconds": round(result.seconds, 1),
        "logp_difference_mean": float(np.mean([row["sampling/sampling_logp_difference/mean"] for row in steps])),
        **figures(rows),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--max-steps", type=int, default=350)
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        runs = [train(int(seed), args.max_steps, Path(folder)) for seed in args.seeds.split(",")]
    mean, above = against_recorded(runs)
    results = {"runs": runs, "mean_accuracy_after": mean, "points_above_plain": above}
    print(write_result("fp8_smoke", __doc__ or "", before, results))


if __name__ == "__main__":
    main()
