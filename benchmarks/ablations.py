"""Two ablations of the DeepSeek-V3 report at small scale, by `grpo pretrain` on packed text of six domains.

    python -m benchmarks.ablations [--seeds 0,1,2,3,4] [--steps 350]

Multi-token prediction on against off (Table 4): the main model's loss at equal steps. The router bias against the
auxiliary loss, and against neither (Table 5, section 4.5.3): held-out loss and MaxVio. The arms of a seed share initial
weights, text, its order and held-out text, so differences are taken within seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.common import ROOT, machine, write_result
from grpo.config import load_config
from grpo.data import load_rows, text_blocks
from grpo.learner import nll_loss
from grpo.log import load_metrics
from grpo.packing import pack
from grpo.policy import DeepseekV3Policy
from grpo.prepare import load_tokenizer
from grpo.records import TrainingSample
from grpo.router import router_metrics
from grpo.stages import run_pretrain
from model import DeepseekV3ForCausalLM
from model.create import create_model

MODEL = {  # of configs/tiny_v3.yaml, with more and smaller experts: balance is harder for them
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 16, "n_group": 1,
}  # fmt: skip
BLOCK, BATCH = 64, 16
COMMON = {"mtp_loss_weight": 0.0, "router_bias_update_rate": 0.0, "router_aux_loss_coef": 0.0}
ARMS: dict[str, dict[str, float]] = {
    "bias": COMMON | {"router_bias_update_rate": 0.001},
    "bias, mtp": COMMON | {"router_bias_update_rate": 0.001, "mtp_loss_weight": 0.3},
    "aux loss 0.001": COMMON | {"router_aux_loss_coef": 0.001},
    "aux loss 0.01": COMMON | {"router_aux_loss_coef": 0.01},
    "neither": COMMON,
}
# (name, arm, against which, metric): a negative difference says that the first arm's number is lower
COMPARISONS = (
    ("mtp on - off: held-out loss", "bias, mtp", "bias", "held_out_loss"),
    ("mtp on - off: training loss at half the steps", "bias, mtp", "bias", "loss_at_half"),
    ("bias - aux loss 0.001: held-out loss", "bias", "aux loss 0.001", "held_out_loss"),
    ("bias - aux loss 0.01: held-out loss", "bias", "aux loss 0.01", "held_out_loss"),
    ("bias - neither: held-out loss", "bias", "neither", "held_out_loss"),
    ("bias - aux loss 0.001: max violation", "bias", "aux loss 0.001", "held_out_max_violation"),
    ("bias - aux loss 0.01: max violation", "bias", "aux loss 0.01", "held_out_max_violation"),
    ("bias - neither: max violation", "bias", "neither", "held_out_max_violation"),
)
WORDS = (
    "the",
    "a",
    "red",
    "old",
    "small",
    "dog",
    "cat",
    "bird",
    "sees",
    "hears",
    "and",
    "then",
    "near",
    "under",
    "tree",
)


def line(domain: str, rng: random.Random) -> str:
    """One line of a domain's documents."""
    if domain == "sums":
        a, b = rng.randrange(100), rng.randrange(100)
        return f"{a}+{b}={a + b}"
    if domain == "products":
        a, b = rng.randrange(20), rng.randrange(10)
        return f"{a}*{b}={a * b}"
    if domain == "series":
        a, d = rng.randrange(40), rng.randrange(1, 9)
        return " ".join(str(a + d * i) for i in range(6))
    if domain == "sorting":
        digits = [str(rng.randrange(10)) for _ in range(5)]
        return f"({''.join(digits)}) {''.join(sorted(digits))}"
    if domain == "reversal":
        word = "".join(rng.choice("abcdefghij") for _ in range(5))
        return f"{word}:{word[::-1]}"
    assert domain == "words", f"{domain=}"
    return " ".join(rng.choice(WORDS) for _ in range(6))


def write_text(path: Path, documents: int, seed: int) -> None:
    """Documents of eight lines, each of one domain."""
    rng = random.Random(seed)
    domains = ("sums", "products", "series", "sorting", "reversal", "words")
    with path.open("w") as file:
        for _ in range(documents):
            domain = rng.choice(domains)
            file.write(json.dumps({"text": ". ".join(line(domain, rng) for _ in range(8))}) + "\n")


def held_out(model_dir: Path, blocks: Sequence[Sequence[int]]) -> dict[str, float]:
    """Loss a token and MaxVio (worst layer) of a model on held-out blocks."""
    policy = DeepseekV3Policy(DeepseekV3ForCausalLM.from_pretrained(model_dir).requires_grad_(False))
    samples = [[TrainingSample(tuple(b[:1]), tuple(b[1:]), 1.0)] for b in blocks]
    _, stats = policy.forward_backward(pack(samples, 4096), nll_loss)
    counts = torch.stack([s["sum/expert_counts"] for s in stats]).sum(0)
    loss = sum(float(s["sum/nll"]) for s in stats) / sum(float(s["sum/rows"]) for s in stats)
    metrics = router_metrics(counts, counts)
    return {
        "held_out_loss": loss,
        "held_out_max_violation": metrics["router/max_violation"],
        "held_out_dead_experts": metrics["router/dead_experts"],
    }


def train(arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    model_dir, out = folder / f"model-{seed}", folder / f"{arm}-{seed}".replace(" ", "_")
    if not model_dir.is_dir():
        spec = yaml.safe_load((ROOT / "configs" / "tiny_v3.yaml").read_text())
        create_model(spec | {"config": spec["config"] | MODEL}, model_dir, seed)
        write_text(folder / f"train-{seed}.jsonl", documents=steps * BATCH * BLOCK // 100, seed=seed)
        write_text(folder / f"held-{seed}.jsonl", documents=600, seed=1000 + seed)
    stage = {"max_steps": steps, "batch_size": BATCH, "block_size": BLOCK, "learning_rate": 2e-3, "warmup_steps": 30}
    stage |= {"lr_scheduler_type": "cosine", **ARMS[arm]}
    content = {
        "run": {"seed": seed, "output_dir": str(out), "alarms": {}},
        "data": {"path": str(folder / f"train-{seed}.jsonl"), "holdout": 0.0},
        "pretrain": stage,
    }
    config = load_config(content)
    began = time.process_time()
    run_pretrain(config, model_dir, out)
    seconds = time.process_time() - began
    held = load_config(content, [f"--data.path={folder / f'held-{seed}.jsonl'}"]).data
    blocks = text_blocks(load_rows(held)[0], held, load_tokenizer(model_dir), BLOCK)
    rows = load_metrics(out)

    def near(step: int, name: str) -> float:
        """Mean over the 25 steps up to this one."""
        return float(np.mean([row[name] for row in rows if step - 25 < row["step"] <= step]))

    result = {
        "arm": arm,
        "seed": seed,
        **held_out(out, blocks),
        "loss_at_half": near(steps // 2, "loss"),
        "loss_at_end": near(steps, "loss"),
        "training_max_violation": near(steps, "router/max_violation"),
        "cpu_seconds": round(seconds, 1),
    }
    print(json.dumps(result), flush=True)
    return result


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error of the mean."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "standard_error": error, "seeds": len(values)}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def by_arm(arm: str, name: str) -> list[float]:
        return [run[name] for run in runs if run["arm"] == arm]

    names = [name for name, value in runs[0].items() if isinstance(value, float)]
    arms = {arm: {name: mean_and_error(by_arm(arm, name)) for name in names} for arm in ARMS}
    differences = {
        title: mean_and_error(np.subtract(by_arm(first, name), by_arm(second, name)).tolist())
        for title, first, second, name in COMPARISONS
    }
    return {"arms": arms, "differences_within_seeds": differences, "in_words": [*map(sentence, differences.items())]}


T_95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # two-sided Student quantile by number of seeds


def sentence(difference: tuple[str, Mapping[str, float]]) -> str:
    """What a difference shows at a level of 95 %."""
    title, value = difference
    clear = abs(value["mean"]) > T_95[int(value["seeds"])] * value["standard_error"]
    return (
        f"{title}: {value['mean']:+.4f} +- {value['standard_error']:.4f}, "
        + (("lower" if value["mean"] < 0 else "higher") if clear else "no difference that these seeds can show")
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--steps", type=int, default=350)
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        runs = [train(arm, int(seed), args.steps, Path(folder)) for seed in args.seeds.split(",") for arm in ARMS]
    summary = summarise(runs)
    print(*summary["in_words"], sep="\n")
    settings = {"steps": args.steps, "tokens_a_step": BATCH * BLOCK, "model": MODEL, "arms": ARMS}
    print(write_result("ablations", __doc__ or "", before, {"settings": settings, **summary, "runs": runs}))


if __name__ == "__main__":
    main()
