"""Seconds of a GRPO step through Ray against TRL's GRPOTrainer at its best. Writes results/grpo_step.json.

python -m benchmarks.grpo_step [CASE ...]
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.common import (
    STEP_CASES,
    STEP_GRID,
    alternate,
    machine,
    middle,
    points,
    run_ours,
    run_peer,
    sweep,
    write_result,
)
from benchmarks.make_model import make

CLAIM = "A GRPO step of rollout, rewards, update and weight sync through Ray trains on more tokens a second than TRL's."
OURS_GRID = {"workers": (1, 2), "threads": (1, 2)}  # as free a choice as the peer has


def compare(case: str) -> dict[str, Any]:
    kind, settings = STEP_CASES[case]
    folder = make(kind)
    files = folder / "model", folder / "prompts.json"
    short = settings | {"steps": 6, "warmup": 2}  # enough to tell which setting is the best
    swept = {
        "ours": (sweep(run_ours, "grpo_step", *files, short, OURS_GRID), OURS_GRID),
        "trl": (sweep(run_peer, "trl_step", *files, short, STEP_GRID), STEP_GRID),
    }
    best = {side: settings | {k: runs[0]["settings"][k] for k in grid} for side, (runs, grid) in swept.items()}
    rounds = alternate(
        {
            "ours": lambda: run_ours("grpo_step", *files, best["ours"]),
            "trl": lambda: run_peer("trl_step", *files, best["trl"]),
        }
    )
    summary = {side: middle(runs) for side, runs in rounds.items()}
    ratio = summary["ours"]["tokens_per_second"] / summary["trl"]["tokens_per_second"]
    for side, figures in summary.items():
        print(f"grpo_step {case}, {side} with {({k: best[side][k] for k in swept[side][1]})}: "
              f"{figures['seconds'] * 1000:.0f} ms a step, {figures['tokens_per_second']:.0f} tokens/s, "
              f"mean length {figures['mean_length']:.1f}")  # fmt: skip
    print(f"grpo_step {case}: {ratio:.2f} times TRL; our stages {rounds['ours'][0]['stages']}")
    sweeps = {side: points(runs, grid) for side, (runs, grid) in swept.items()}
    return {"summary": summary, "ratio": ratio, "sweeps": sweeps, "rounds": rounds}


def main() -> None:
    before = machine()
    results = {case: compare(case) for case in sys.argv[1:] or STEP_CASES}
    print(write_result("grpo_step", CLAIM, before, results))


if __name__ == "__main__":
    main()
