"""Measures: where lengths have a long tail, what partial rollouts save in decode steps, and in time.

    python -m benchmarks.partial_rollouts [--rounds 2]

A tiny DeepSeek-V3 with random weights draws its end token about once in 50 tokens: lengths are geometric, and the
longest of the 128 samples of a step has about five times the mean. Each side runs the whole loop in one process, with
as many prompts under way as a step needs, or twice as many. The first steps, whose samples are short, do not count.
Decode steps are what a GPU's time goes with while a batch is small; they do not depend on the machine, times do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import ROOT, alternate, machine, write_result
from grpo import GRPOTrainer, loop
from grpo.log import load_metrics
from rollout.embedded import EmbeddedEngine

STEPS, WARMUP = 14, 6


def measure(over_sampling_batch_size: int) -> dict[str, Any]:
    """Seconds and tokens of the steps that count, and how stale their tokens were."""
    counts: list[int] = []  # decode steps so far, at each step of the run
    step, log_step = EmbeddedEngine.step, loop.log_step
    calls: list[int] = []

    def counted(engine: EmbeddedEngine) -> Any:
        calls.append(1)
        return step(engine)

    def logged(*args: Any) -> None:
        counts.append(len(calls))
        log_step(*args)

    EmbeddedEngine.step, loop.log_step = counted, logged  # type: ignore[method-assign]
    spec = yaml.safe_load((ROOT / "configs" / "tiny_v3.yaml").read_text())
    spec["config"]["max_position_embeddings"] = 1024
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "sums.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"{i}+7=", "answer": str(i + 7)}) + "\n" for i in range(500)))
        content = {
            "run": {"cluster": "inline", "output_dir": f"{folder}/run", "save_steps": 0, "eval_steps": 0},
            "model": {"init": spec},
            "data": {"path": str(data), "holdout": 0.0},
            "rollout": {"max_completion_length": 900, "over_sampling_batch_size": over_sampling_batch_size},
            "rewards": {"length": {"weight": 1.0, "max": 900}},
            "grpo": {"max_steps": STEPS, "prompts_per_step": 16, "num_generations": 8, "learning_rate": 1e-9},
        }
        rows = [row for row in load_metrics(GRPOTrainer(content).train().run_dir) if row["step"] > WARMUP]
    EmbeddedEngine.step, loop.log_step = step, log_step  # type: ignore[method-assign]
    tokens = sum(row["num_tokens"] for row in rows)
    return {
        "tokens_per_decode_step": tokens / (counts[-1] - counts[WARMUP]),
        "rollout_seconds_per_step": float(np.mean([row["time/rollout"] for row in rows])),
        "step_seconds": float(np.mean([row["step_time"] for row in rows])),
        "tokens_per_step": tokens / len(rows),
        "rollout_tokens_per_second": tokens / sum(row["time/rollout"] for row in rows),
        "tokens_per_second": tokens / sum(row["step_time"] for row in rows),
        "stale_tokens": float(np.mean([row.get("sampling/stale_tokens", 0.0) for row in rows])),
        "max_staleness": float(max(row.get("sampling/max_staleness", 0.0) for row in rows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds, before = parser.parse_args().rounds, machine()
    sides = alternate({"off": lambda: measure(0), "on": lambda: measure(32)}, rounds)
    means = {side: {key: float(np.mean([run[key] for run in runs])) for key in runs[0]} for side, runs in sides.items()}
    speedups = {
        key: means["on"][key] / means["off"][key]
        for key in ("tokens_per_decode_step", "rollout_tokens_per_second", "tokens_per_second")
    }
    results = {"means": means, "on_over_off": speedups, "runs": sides}
    print(write_result("partial_rollouts", __doc__ or "", before, results))


if __name__ == "__main__":
    main()
