"""Claim: a trained multi-token prediction head has the main head's likeliest token on at least 80 % of the answer
tokens that the policy samples on the smoke task (template and end tokens left out).

    python -m benchmarks.mtp_agreement [--runs trained:0,joint:0]

Each run is configs/smoke.yaml with the settings of an arm and a seed; agreement is measured on fresh samples
(temperature 1) of held-out prompts, with the model after the warm start and with the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import machine, write_result
from grpo import GRPOTrainer
from grpo.config import load_config
from grpo.log import load_metrics
from grpo.packing import pack
from grpo.prepare import prepare
from grpo.records import Prompt, TrainingSample
from grpo.stages import warm_start
from model import DeepseekV3ForCausalLM, SequenceLayout
from model.mtp import mtp_loss
from rollout import SamplingParams, build_engine

JOINT = ("--grpo.mtp_loss_weight=0.3", "--grpo.mtp_detach=false")
ARMS = {  # what the MTP layer learns, and whether its loss reaches the trunk in RL too
    "trained": ("--sft.mtp_loss_weight=1.0", "--sft.stop_accuracy=0.6", "--sft.max_steps=3000", *JOINT),
    "joint": ("--sft.mtp_loss_weight=0.3", *JOINT),  # the smoke run's short warm start
    "detached": ("--sft.mtp_loss_weight=0.3", "--grpo.mtp_loss_weight=0.3"),
    "frozen": (),
}


@torch.no_grad()
def agreement(model_dir: Path, prompts: Sequence[Prompt], template_ids: set[int], max_tokens: int) -> dict[str, float]:
    """Share of sampled answer tokens, and of all sampled tokens, where both heads have the same likeliest token."""
    model = DeepseekV3ForCausalLM.from_pretrained(model_dir)
    params = [SamplingParams(max_tokens=max_tokens, seed=i) for i in range(len(prompts))]
    completions = build_engine(model).generate([p.token_ids for p in prompts], params)
    samples = [[TrainingSample(p.token_ids, c.token_ids, 1.0)] for p, (c,) in zip(prompts, completions)]
    (batch,) = pack(samples, 1 << 30)
    layout = SequenceLayout.from_segments(batch.cu_seqlens, batch.parent, batch.position_ids)
    hidden = model.forward_packed(batch.input_ids, layout).hidden
    answer = torch.tensor([t not in template_ids for t in batch.target.tolist()])
    shares = {}
    for name, rows in (("answer", answer), ("all", torch.ones_like(answer))):
        mtp = mtp_loss(model, hidden, batch.input_ids, layout, batch.source[rows], batch.target[rows], detach=True)
        shares[name] = float(mtp.agree.sum() / mtp.count.sum())
    return shares | {"answer_tokens": int(answer.sum())}


def measure(seed: int, arm: str, directory: Path) -> dict[str, Any]:
    run_dir = directory / f"seed-{seed}-{arm}"
    overrides = ["--run.cluster=inline", f"--run.seed={seed}", f"--run.output_dir={run_dir}", *ARMS[arm]]
    config = load_config("configs/smoke.yaml", overrides)
    result = GRPOTrainer(config).train()
    prepared = prepare(config)
    template = config.data.completion_template.replace("{answer}", "")
    template_ids = {*prepared.tokenizer(template)["input_ids"], *prepared.tokenizer.all_special_ids}
    length = config.rollout.max_completion_length
    last = run_dir / "checkpoints" / f"step_{config.grpo.max_steps}"
    rows = [row for row in load_metrics(run_dir) if row.get("step_time")]
    row = {
        "seed": seed,
        "arm": arm,
        "settings": ARMS[arm],
        "after_warm_start": agreement(warm_start(prepared), prepared.held_out, template_ids, length),
        "after_rl": agreement(last, prepared.held_out, template_ids, length),
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "step_seconds_median": float(np.median([r["step_time"] for r in rows])),
        "learner_seconds_median": float(np.median([r["time/learner"] for r in rows])),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="trained:0,trained:1,trained:2,joint:0,frozen:0")
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [run.split(":") for run in args.runs.split(",")]
        runs = [measure(int(seed), arm, Path(folder)) for arm, seed in pairs]
    print(write_result("mtp_agreement", __doc__ or "", before, {"runs": runs}))


if __name__ == "__main__":
    main()
