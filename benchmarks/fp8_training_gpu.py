"""Claim: FP8 training by DeepSeek-V3's recipe loses as BF16 does on a GPU as well. A V3 of 200M parameters trained for
200 steps of 32,768 tokens: losses smoothed by an exponential moving average (0.9) end less than 0.25 % apart, bound and
smoothing of the V3 report (arXiv 2412.19437, appendix B.1).

    python -m benchmarks.fp8_training_gpu [--seeds 0,1,2] [--continued]      # on Hopper GPUs, a seed on each
    python -m benchmarks.fp8_training_gpu --tiny                             # on a CPU, emulated; writes nothing
    python -m benchmarks.fp8_training_gpu --plot [--continued]               # the kept curves, as a page in runs/

From nothing, or with --continued after 300 steps in BF16 that all share, optimiser and all: the first 200 steps of a
model are its steepest, where whoever is a step late is half a percent behind.

`model.fp8: on` and the plain model, both in BF16 with FP32 master weights, by the learner of `grpo pretrain`. Beside
them, on the same batches: BF16 again with micro-batches half as large, which differs in rounding alone; and the
emulation of FP8 over the first steps, which says whether the kernels compute the recipe. docs/fp8.md tells what else
was tried.

The text is what every machine has: the source files of Python's standard library (without its tests), in the order of
their paths, as bytes. Blocks of it are shuffled by the seed; where they are used up they come again in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import platform
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, ROOT, machine, versions, write_result
from benchmarks.fp8_training import build, mean_loss, updates
from grpo.config import StageConfig
from grpo.learner import Learner
from model.fp8.modules import Mode

# Sizes of DeepSeek-V3 scaled down; all multiples of 128, as its own are, but the rotary part of a head
MODEL = {
    "vocab_size": 256, "hidden_size": 768, "intermediate_size": 2048, "moe_intermediate_size": 256,
    "num_hidden_layers": 10, "first_k_dense_replace": 1, "num_attention_heads": 6, "q_lora_rank": 384,
    "kv_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 32,
    "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 1024,
}  # fmt: skip
SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 128, "kv_lora_rank": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
ARMS = ("bf16", "bf16_rounding", "fp8", "fp8_emulated")
OPTIMIZER = (
    "learning_rate", "warmup_steps", "lr_scheduler_type", "lr_end_ratio", "weight_decay", "adam_beta1", "adam_beta2",
    "max_grad_norm", "router_bias_update_rate",
)  # fmt: skip
EMULATED_STEPS = 5
AT_ONCE = 4  # runs on a GPU, of 8 to 13 GiB each; more take turns and gain nothing
SMOOTHING, BOUND = 0.9, 0.25
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}


@dataclass(frozen=True)
class Setup:
    """What is trained, on what, and for how long."""

    model: Mapping[str, Any]
    batch: int  # blocks a step
    length: int  # tokens of a block that are predicted
    steps: int  # that are compared
    device: str
    fp8: Mode
    learning_rate: float  # at its peak
    warmup_steps: int
    before: int = 0  # steps in BF16 that all arms share
    microbatches: int = 2

    @property
    def stage(self) -> StageConfig:
        """DeepSeek-V3's optimiser; one cosine down to a tenth instead of its many phases."""
        return StageConfig(
            max_steps=self.before + self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
        )


FULL = Setup(MODEL, 32, 1024, steps=200, device="cuda", fp8="on", learning_rate=1e-4, warmup_steps=40)
CONTINUED = replace(FULL, before=300, learning_rate=2.2e-4)
TINY = Setup(MODEL | SMALL, 4, 64, steps=8, device="cpu", fp8="emulate", learning_rate=6e-4, warmup_steps=2)


@cache
def text() -> np.ndarray:
    """[N] uint8"""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in folder.rglob("*.py") if not LEFT_OUT & set(path.relative_to(folder).parts)]
    return np.frombuffer(b"".join(path.read_bytes() for path in sorted(files)), np.uint8)


def batches(text: np.ndarray, seed: int, batch: int, length: int) -> Iterator[np.ndarray]:
    """Batches # [batch, length + 1] of blocks that overlap by the one token that is never predicted, without end."""
    starts, random = np.arange((len(text) - 1) // length) * length, np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < batch:
            order = np.concatenate((order, random.permutation(starts)))
        yield text[order[:batch, None] + np.arange(length + 1)]
        order = order[batch:]


def new_learner(setup: Setup, seed: int, fp8: Mode) -> Learner:
    """With FP32 masters as they were drawn. Rounded to BF16 they would stand on its grid: the first updates, smaller
    than half a step of it, would move the codes that FP8 makes of masters, and hardly a weight in BF16."""
    learner = Learner("", setup.stage, model=build(setup.model, seed, fp8, device=setup.device), device=setup.device)
    drawn = dict(build(setup.model, seed, device=setup.device, dtype=torch.float32).named_parameters())
    with torch.no_grad():
        for name, master in zip(learner.policy.names, learner.policy.master):
            master.copy_(drawn[name])
    learner.policy.publish()
    return learner


def train_before(arm: str, seed: int, setup: Setup, directory: str, gpu: int) -> None:
    """What all arms share, as a training checkpoint for each seed."""
    _use(gpu)
    learner = new_learner(setup, seed, "off")
    for norm, stats in updates(learner, islice(_data(setup, seed), setup.before), setup.microbatches):
        last = f"{arm}, seed {seed}: loss {mean_loss(stats):.4f}, gradient norm {norm:.2f}"
    print(last, file=sys.stderr, flush=True)
    learner.save(Path(directory) / str(seed))


def train(arm: str, seed: int, setup: Setup, directory: str, gpu: int) -> dict[str, Any]:
    """The loss and gradient norm of each step, the tokens of the most loaded expert over the mean, and the median of
    seconds a step."""
    _use(gpu)
    fp8: Mode = {"fp8": setup.fp8, "fp8_emulated": "emulate"}.get(arm, "off")  # type: ignore[assignment]
    learner = new_learner(setup, seed, fp8)
    if setup.before:
        learner.load(Path(directory) / str(seed))
    steps = min(EMULATED_STEPS, setup.steps) if arm == "fp8_emulated" else setup.steps
    data = islice(_data(setup, seed), setup.before, setup.before + steps)
    losses, norms, loads, seconds, start = [], [], [], [], time.perf_counter()
    for norm, stats in updates(learner, data, setup.microbatches * (2 if arm == "bf16_rounding" else 1)):
        losses.append(mean_loss(stats))  # waits for the GPU
        norms.append(norm)
        counts = stats["sum/expert_counts"].float()
        loads.append(float(counts.max() / counts.mean()))
        seconds.append(time.perf_counter() - start)
        start += seconds[-1]
        if len(losses) % 50 in (1, 5, 0):
            print(f"{arm}, seed {seed}, step {len(losses)}: {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return {"losses": losses, "grad_norms": norms, "loads": loads, "seconds": float(np.median(seconds))}


def _use(gpu: int) -> None:
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)


def _data(setup: Setup, seed: int) -> Iterator[np.ndarray]:
    return batches(text(), seed, setup.batch, setup.length)


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Exponential moving average # [steps]."""
    average = [losses[0]]
    for loss in losses[1:]:
        average.append(SMOOTHING * average[-1] + (1 - SMOOTHING) * loss)
    return np.array(average)


def difference(losses: Sequence[float], base: Sequence[float]) -> np.ndarray:
    """Signed relative difference of the smoothed losses in percent # [steps], as many as both have."""
    steps = min(len(losses), len(base))
    a, b = smoothed(losses[:steps]), smoothed(base[:steps])
    return 100 * (a - b) / b


def summary(runs: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Differences in percent: from BF16 at the end and, without sign, the largest of the second half; of the kernels
    from their emulation, not smoothed, the largest of the first steps."""
    found: dict[str, Any] = {"bound_percent": BOUND}
    losses = {key: run["losses"] for key, run in runs.items()}
    for arm in ("bf16_rounding", "fp8"):
        each = [difference(losses[arm, seed], losses["bf16", seed]) for seed in seeds]
        found[arm] = {
            "difference_percent": round(float(np.mean([d[-1] for d in each])), 3),
            "by_seed": [round(float(d[-1]), 3) for d in each],
            "largest_of_second_half": [round(float(np.abs(d[len(d) // 2 :]).max()), 3) for d in each],
        }
    found["fp8_from_emulated"] = {
        "largest_percent_of_first_steps": [
            round(max(abs(100 * (a - b) / b) for a, b in zip(losses["fp8", seed], losses["fp8_emulated", seed])), 4)
            for seed in seeds
        ]
    }
    found["loss_at_the_end"] = {
        arm: [round(float(smoothed(losses[arm, seed])[-1]), 5) for seed in seeds] for arm in ARMS[:3]
    }
    return found


def run_all(
    arms: Sequence[str], seeds: Sequence[int], job: Callable[..., Any], *args: Any
) -> dict[tuple[str, int], Any]:
    """What job(arm, seed, *args, gpu) gives, each in a process of its own, the runs of a seed on one GPU; without a GPU
    one after the other."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return {(arm, seed): job(arm, seed, *args, 0) for arm in arms for seed in seeds}
    with ProcessPoolExecutor(AT_ONCE * min(gpus, len(seeds)), multiprocessing.get_context("spawn")) as pool:
        jobs = {
            (arm, seed): pool.submit(job, arm, seed, *args, index % gpus)
            for arm in arms
            for index, seed in enumerate(seeds)
        }
        return {key: each.result() for key, each in jobs.items()}


def plot(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Smoothed losses, and below them their differences from BF16 of the same seed."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    figure = make_subplots(2, 1, shared_xaxes=True, subplot_titles=("nats a byte, EMA 0.9", "percent from BF16"))
    for name, losses in curves.items():
        arm, seed = name.split(", ")
        steps = np.arange(1, len(losses) + 1)
        figure.add_trace(Scatter(x=steps, y=smoothed(losses), name=name), 1, 1)
        if arm != "bf16":
            apart = difference(losses, curves[f"bf16, {seed}"])
            figure.add_trace(Scatter(x=steps, y=apart, name=name, showlegend=False), 2, 1)
    for bound in (-BOUND, BOUND):
        figure.add_hline(bound, line_dash="dot", row=2, col=1)  # type: ignore[arg-type]
    path.parent.mkdir(exist_ok=True)
    figure.update_layout(height=900).write_html(path, include_plotlyjs=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--continued", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args(arguments)
    name = "fp8_training_gpu_continued" if args.continued else "fp8_training_gpu"
    if args.plot:
        page = ROOT / "runs" / f"{name}.html"
        plot(json.loads((RESULTS / f"{name}.json").read_text())["results"]["curves"], page)
        return print(page)
    setup = CONTINUED if args.continued else FULL
    if args.tiny:
        setup = replace(TINY, before=2 if args.continued else 0)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    before, data, start = machine(), text(), time.perf_counter()
    if setup.device == "cuda" and before["gpu"] is None:
        raise SystemExit("error: there is no GPU here; --tiny runs on a CPU")
    with TemporaryDirectory() as directory:
        if setup.before:
            run_all(["before"], seeds, train_before, setup, directory)
        runs = run_all(ARMS, seeds, train, setup, directory)
    results: dict[str, Any] = {
        "steps": setup.steps,
        "steps_before": setup.before,
        "tokens_a_step": setup.batch * setup.length,
        "optimizer": {key: getattr(setup.stage, key) for key in OPTIMIZER},
        "parameters": build(setup.model, 0, device="meta").num_parameters,
        "model": dict(setup.model),
        "mode": setup.fp8,
        "text": {
            "bytes": len(data),
            "sha256": hashlib.sha256(data.tobytes()).hexdigest(),
            "from": f"Python {platform.python_version()}",
        },
        "versions": versions("triton"),
        **summary(runs, seeds),
    }
    # of all layers, the last step
    results["most_loaded_expert_over_mean"] = {
        arm: [round(runs[arm, seed]["loads"][-1], 2) for seed in seeds] for arm in ARMS[:3]
    }
    # several runs at a time on one GPU, and small matrices: no measurement of speed
    seconds = {arm: np.median([runs[arm, seed]["seconds"] for seed in seeds]) for arm in ARMS}
    results["seconds_a_step"] = {arm: round(float(value), 4) for arm, value in seconds.items()}
    results["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(results, indent=1), flush=True)
    curves = {f"{arm}, seed {seed}": run["losses"] for (arm, seed), run in runs.items()}
    results["curves"] = {name: [round(loss, 4) for loss in losses] for name, losses in curves.items()}
    if not args.tiny:
        print(write_result(name, __doc__ or "", before, results))


if __name__ == "__main__":
    main()
