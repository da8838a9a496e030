"""The reward lab on GSM8K's 5,276 labelled solutions: what it finds and how fast. Writes results/reward_lab.json.

    python -m benchmarks.reward_lab

Runs `grpo rewards evaluate` as a user does on the published file as it is: three times with the cheap rule, and once
with math_answer beside it, whose checker runs in two processes. The labels come from the same "A: n" convention as the
golds, so full agreement can be reached, and anything less is a fault of the reward.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, machine, quartiles, write_result

CLAIM = (
    "On GSM8K's 5,276 labelled solutions gsm8k_answer agrees with the labels 100.0 %, 44.6 % of the groups of 4 have "
    "zero variance, and the whole evaluation takes under 60 s on 2 cores."
)
DATA = ROOT.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"
CASES = {"gsm8k_answer": 3, "gsm8k_answer,math_answer": 1}  # rewards -> rounds
KEPT = ("accuracy", "fpr", "fnr", "youden_j", "confusion", "zero_variance_share", "all_zero_share", "all_one_share",
        "run_ms", "samples_per_s", "seconds_per_step")  # fmt: skip


def evaluate(rewards: str, rounds: int) -> dict[str, Any]:
    """The numbers of the last report, and the wall time of every whole command."""
    seconds, printed, report = [], "", {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "grpo.cli", "rewards", "evaluate", str(DATA), "--reward", rewards]
            start = time.perf_counter()
            done = subprocess.run([*command, "--out", out], cwd=ROOT, capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - start)
            report, printed = json.loads((Path(out) / "report.json").read_text()), done.stdout.replace(out, "OUT")
    blocks = {
        name: {key: block[key] for key in KEPT}
        | {"ci": {key: block["ci"][key] for key in ("accuracy", "zero_variance_share")}}
        for name, block in report["rewards"].items()
    }
    result = {"wall_seconds": quartiles(seconds), "seconds": report["seconds"], "samples": report["data"]["samples"]}
    print(printed)
    curve = {key: report["curves"]["label"][key] for key in ("pass_at_1", "pass_at_k", "maj_at_k")}
    return result | {"rewards": blocks, "label_curve": curve, "agreement": report["agreement"], "printed": printed}


def main() -> None:
    if not DATA.is_file():
        raise SystemExit(
            f"error: {DATA} is missing; put openai/grade-school-math's example_model_solutions.jsonl there"
        )
    before = machine()
    results = {case: evaluate(case, rounds) for case, rounds in CASES.items()}
    found = results["gsm8k_answer"]
    block = found["rewards"]["gsm8k_answer"]
    held = (
        block["accuracy"] == 1.0
        and round(block["zero_variance_share"]["4"], 3) == 0.446
        and found["wall_seconds"]["median"] < 60
    )
    print(f"claim {'holds' if held else 'FAILS'}: agreement {100 * block['accuracy']:.1f} %, zero variance at G=4 "
          f"{100 * block['zero_variance_share']['4']:.1f} %, {found['wall_seconds']['median']:.1f} s")  # fmt: skip
    print(write_result("reward_lab", CLAIM, before, {**results, "held": held}))


if __name__ == "__main__":
    main()
