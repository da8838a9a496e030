"""Claim: a reward model stands in for what it was trained on. From pairs of answers, the better one told by a known
scorer (letters.py), `grpo rewards train` reaches a held-out pair accuracy of 0.9 or more; GRPO on that model alone
raises the known score of sampled answers by one standard deviation of the warm start's or more. With the model's scores
permuted within each group (the control) it does not.

    python -m benchmarks.reward_model [--seeds 0,1,2] [--control-seeds 0]
    python -m benchmarks.reward_model --write runs/letters.jsonl      # the data of configs/reward_model.yaml
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import machine, write_result
from benchmarks.letters import known_score, make_rows
from benchmarks.smoke_learns import permuted_score
from grpo import GRPOTrainer
from grpo.checkpoint import last_checkpoint
from grpo.cluster import Cluster
from grpo.config import load_config
from grpo.log import load_metrics, write_rows
from grpo.preferences import concordance
from grpo.prepare import Prepared, prepare
from grpo.reward_training import train_reward_model
from grpo.stages import warm_start
from rollout import SamplingParams, build_engine
from rollout.draws import seed_of

RECIPE, ROWS, SAMPLES = "configs/reward_model.yaml", 12000, 8


def known_scores(prepared: Prepared, model: Path) -> dict[str, float]:
    """Of answers sampled at temperature 1 to the held-out prompts, and their mean length."""
    length = prepared.config.rollout.max_completion_length
    params = [SamplingParams(n=SAMPLES, max_tokens=length, seed=seed_of(0, "known", p.id)) for p in prepared.held_out]
    groups = build_engine(model).generate([p.token_ids for p in prepared.held_out], params)
    texts = [prepared.tokenizer.batch_decode([c.token_ids for c in g], skip_special_tokens=True) for g in groups]
    scores = [known_score(text, str(p.text)) for p, group in zip(prepared.held_out, texts) for text in group]
    lengths = [len(c.token_ids) for group in groups for c in group]
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores)), "mean_length": float(np.mean(lengths))}


def scorer_auc(path: Path) -> float:
    """AUC of the known scorer itself on the pairs of a file: chosen answers to one prompt are bad ones to another."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scores = [known_score(row[key], row["prompt"]) for row in rows for key in ("chosen", "rejected")]
    return concordance(np.array(scores), np.tile([1.0, 0.0], len(rows)))


def one_seed(seed: int, folder: Path, control: bool) -> dict[str, Any]:
    began, data = time.perf_counter(), folder / f"letters-{seed}.jsonl"
    write_rows(data, make_rows(ROWS, seed))
    model, shared = folder / f"rm-{seed}", [f"--data.path={data}", f"--run.seed={seed}"]
    trained = train_reward_model(load_config(RECIPE, [*shared, f"--run.output_dir={model}"]))
    row: dict[str, Any] = {
        "seed": seed,
        "pairs": {"held_out": trained.num_held_out, **trained.held_out, "auc_of_the_scorer": scorer_auc(data)},
        "accuracy_curve": {m["step"]: m["eval/accuracy"] for m in load_metrics(model) if "eval/accuracy" in m},
        "training_seconds": round(time.perf_counter() - began, 1),
    }
    for name, score in (("grpo", Cluster.score), *([("control", permuted_score)] if control else [])):
        run_dir = folder / f"{name}-{seed}"
        overrides = [*shared, f"--run.output_dir={run_dir}", f"--rewards.reward_model.model={model}"]
        began = time.perf_counter()
        with mock.patch.object(Cluster, "score", score):
            GRPOTrainer(RECIPE, overrides).train()
        seconds = round(time.perf_counter() - began, 1)
        prepared, checkpoint = prepare(load_config(RECIPE, overrides)), last_checkpoint(run_dir)
        assert checkpoint is not None, run_dir
        before, after = known_scores(prepared, warm_start(prepared)), known_scores(prepared, checkpoint[0])
        gain = (after["mean"] - before["mean"]) / before["std"]
        row[name] = {"before": before, "after": after, "gain_in_std": round(gain, 2), "seconds": seconds}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--control-seeds", default="0")
    parser.add_argument("--write", default="", metavar="FILE", help="only write the data")
    args = parser.parse_args()
    if args.write:
        Path(args.write).parent.mkdir(parents=True, exist_ok=True)
        write_rows(Path(args.write), make_rows(ROWS, 0))
        return
    before = machine()
    controls = {int(seed) for seed in args.control_seeds.split(",") if seed}
    with tempfile.TemporaryDirectory() as folder:
        runs = [one_seed(seed, Path(folder), seed in controls) for seed in map(int, args.seeds.split(","))]
    print(write_result("reward_model", __doc__ or "", before, {"runs": runs}))


if __name__ == "__main__":
    main()
