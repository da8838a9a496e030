"""Claim: configs/yarn.yaml takes a model to 4 times its length. Seeds 0, 1, 2: needle accuracy at that length is under
30 % before and at least 80 % after, and a seed takes at most 10 minutes on 2 cores, training the short model included.

    python -m benchmarks.yarn [--seeds 0,1,2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_result
from grpo.config import load_config
from grpo.extend import run_extend
from grpo.prepare import fresh_run_dir, model_directory


def extend(seed: int, directory: Path) -> dict[str, Any]:
    """One seed from nothing: what `grpo pretrain configs/yarn.yaml --run.seed=SEED` does, and its needle.json."""
    began = time.perf_counter()
    config = load_config("configs/yarn.yaml", [f"--run.seed={seed}", f"--run.output_dir={directory / str(seed)}"])
    result = run_extend(config, model_directory(config), fresh_run_dir(config))
    row = {"seed": seed, "seconds_in_all": round(time.perf_counter() - began, 1), **result}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    before = machine()
    with tempfile.TemporaryDirectory() as directory:
        rows = [extend(int(seed), Path(directory)) for seed in parser.parse_args().seeds.split(",")]
    short, long = (str(length) for length in rows[0]["lengths"])

    def of(check: str, length: str) -> list[float]:
        return [row["checks"][check][length]["accuracy"] for row in rows]

    summary = {
        "short_length_before": of("before", short),
        "before_max": max(of("before", long)),
        "yarn_without_training": of("yarn", long),
        "after_min": min(of("after", long)),
        "seconds_max": max(row["seconds_in_all"] for row in rows),
    }
    summary["holds"] = summary["before_max"] < 0.3 and summary["after_min"] >= 0.8 and summary["seconds_max"] <= 600
    print(json.dumps(summary), flush=True)
    claim = "YaRN extends the context 4 times: needle accuracy there under 30 % before, at least 80 % after"
    write_result("yarn", claim, before, {"summary": summary, "runs": rows})


if __name__ == "__main__":
    main()
