"""Claim: rejection sampling pays. From the smoke run's warm start, SFT on what `grpo distill` keeps gains 10 points or
more of held-out accuracy, greedy and sampled, for each of seeds 0, 1, 2. Every kept row scores as accepted again, and
kept rows are on average no longer than accepted ones. The control, SFT on the same answers with none rejected, gains
at most 5.

    python -m benchmarks.distill [--seeds 0,1,2] [--control-seeds 0,1,2]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_result
from grpo.config import Config, load_config
from grpo.data import load_rows, make_prompts
from grpo.distill import DistillResult, distill
from grpo.evaluate import evaluate_policy
from grpo.prepare import fresh_run_dir, load_tokenizer
from grpo.stages import run_sft
from rewards import RewardInput, build_rewards

RECIPE, SFT_STEPS = "configs/distill.yaml", 200


def accuracy(model: Path, seed: int) -> dict[str, float]:
    """Of a model on the 400 held-out problems: greedy, and of 8 samples at temperature 1."""
    overrides = ["--sft=null", "--model.init=null", f"--model.path={model}", f"--run.seed={seed}"]
    result = evaluate_policy(RECIPE, overrides, n=8, ks=[1])
    return {"greedy": result["greedy_accuracy"], "sampled": result["pass@1"], "mean_length": result["mean_length"]}


def fine_tune(result: DistillResult, name: str) -> tuple[Config, Path]:
    """SFT as the written sft.yaml has it -> (its configuration, the model)."""
    out = f"{result.run_dir}-{name}"
    config = load_config(
        result.sft, [f"--run.output_dir={out}", "--run.overwrite=true", f"--sft.max_steps={SFT_STEPS}"]
    )
    run_sft(config, Path(config.model.path), fresh_run_dir(config))
    return config, Path(out)


def accepted_again(config: Config, threshold: float) -> float:
    """Share of the rows of data.jsonl, read as SFT reads them, that reach the threshold when they are scored anew."""
    rows, _ = load_rows(config.data)
    prompts = make_prompts(rows, config.data, load_tokenizer(Path(config.model.path)))
    inputs = [RewardInput(p.text, row.columns["completion"], p.fields) for p, row in zip(prompts, rows, strict=True)]
    with build_rewards(config.rewards) as rewards:
        return sum(score.value is not None and score.value >= threshold for score in rewards.score(inputs)) / len(rows)


def gain(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: round(100 * (after[name] - before[name]), 1) for name in ("greedy", "sampled")}


def one_seed(seed: int, control: bool) -> dict[str, Any]:
    began = time.perf_counter()
    overrides = [f"--run.seed={seed}", f"--run.output_dir=runs/bench-distill-{seed}", "--run.overwrite=true"]
    result = distill(RECIPE, ["--run.cluster=inline", *overrides])
    provenance = json.loads((result.run_dir / "provenance.json").read_text())
    config, model = fine_tune(result, "sft")
    before, after = accuracy(Path(config.model.path), seed), accuracy(model, seed)
    row = {
        "seed": seed,
        "before": before,
        "after": after,
        "gain_points": gain(before, after),
        "selection": provenance["selection"],
        "accepted_again": accepted_again(config, provenance["config"]["distill"]["threshold"]),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if control:
        everything = distill(None, ["--distill.threshold=0", "--distill.max_per_prompt=8"], str(result.run_dir))
        _, model = fine_tune(everything, "control")
        after = accuracy(model, seed)
        kept = len(everything.selection.kept)
        row["control"] = {"rows": kept, "after": after, "gain_points": gain(before, after)}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--control-seeds", default="0,1,2")
    args = parser.parse_args()
    before = machine()
    controls = {int(seed) for seed in args.control_seeds.split(",") if seed}
    runs = [one_seed(seed, seed in controls) for seed in map(int, args.seeds.split(","))]
    print(write_result("distill", __doc__ or "", before, {"sft_steps": SFT_STEPS, "runs": runs}))


if __name__ == "__main__":
    main()
