"""Our side: seconds of a GRPO step of a whole GRPOTrainer run, through Ray. See peers/trl_step.py.

python -m benchmarks.ours.grpo_step MODEL_DIR PROMPTS.json '{"threads": 1, ...}'
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpo.loop
from benchmarks.common import quartiles, versions
from grpo import GRPOTrainer
from grpo.log import load_metrics

STAGES = ("rollout", "rewards", "learner", "sync")


@dataclass(frozen=True)
class Settings:
    """As the peer's. A step is a step of the real run: its log is written, the weights have reached every engine."""

    threads: int = 1  # of each process
    workers: int = 1  # rollout processes
    placement: str = "separate"
    steps: int = 20
    warmup: int = 4
    prompts_per_step: int = 16
    num_generations: int = 8
    max_completion_length: int = 12
    learning_rate: float = 1e-6
    seed: int = 0


def config(model_dir: str, prompts: Path, run_dir: Path, settings: Settings) -> dict[str, Any]:
    return {
        "run": {
            "cluster": "ray",
            "output_dir": str(run_dir),
            "threads": settings.threads,
            "placement": settings.placement,
            "seed": settings.seed,
            "save_steps": 0,
        },
        "model": {"path": model_dir},
        "data": {"path": str(prompts), "answer_column": "", "holdout": 0.0},
        "rollout": {"num_workers": settings.workers, "max_completion_length": settings.max_completion_length},
        "rewards": {"coin": {"weight": 1.0, "function": str(Path(__file__).with_name("coin.py")) + ":coin"}},
        "grpo": {
            "max_steps": settings.warmup + settings.steps,
            "learning_rate": settings.learning_rate,
            "prompts_per_step": settings.prompts_per_step,
            "num_generations": settings.num_generations,
        },
    }


def noting(ends: list[float], log_step: Callable[..., None]) -> Callable[..., None]:
    """log_step, noting when each step ended."""

    def noted(*arguments: Any) -> None:
        log_step(*arguments)
        ends.append(time.perf_counter())

    return noted


def main(model_dir: str, prompts_file: str, settings: Settings) -> dict[str, Any]:
    ends: list[float] = []  # the first is that of step 0, which only evaluates
    grpo.loop.log_step = noting(ends, grpo.loop.log_step)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "prompts.jsonl"
        texts = json.loads(Path(prompts_file).read_text())
        rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        run_dir = Path(folder) / "run"
        GRPOTrainer(config(model_dir, rows, run_dir, settings)).train()
        metrics = load_metrics(run_dir)[1 + settings.warmup :]
    seconds = [after - before for before, after in pairwise(ends)][settings.warmup :]
    assert len(seconds) == len(metrics) == settings.steps, f"{len(seconds)=} {len(metrics)=}"
    tokens = [m["num_tokens"] for m in metrics]
    return {
        "side": "ours",
        "settings": asdict(settings),
        "seconds": quartiles(seconds),
        "stages": {stage: quartiles([m[f"time/{stage}"] for m in metrics])["median"] for stage in STAGES},
        "tokens_per_second": quartiles([count / took for count, took in zip(tokens, seconds)]),
        "mean_length": sum(tokens) / len(tokens) / (settings.prompts_per_step * settings.num_generations),
        "max_length": max(m["completions/max_length"] for m in metrics),
        "all_seconds": [round(value, 5) for value in seconds],
        "versions": versions("torch", "ray"),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3])))))
