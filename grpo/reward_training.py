"""`grpo rewards train`: a reward model from preference pairs or labelled completions, with the learner of GRPO.

    rows --> examples --packing--> learner --> model directory

The directory is what the reward `reward_model` reads: weights with the head `score`, tokenizer, and reward_model.json
with the mean and the standard deviation of the scores and what training came to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo.alarms import Alarms
from grpo.config import Config, ConfigError, RewardModelConfig
from grpo.data import load_rows
from grpo.learner import Learner
from grpo.log import RunLog
from grpo.packing import pack
from grpo.placement import compute_device
from grpo.policy import LossFn, Policy, Stats
from grpo.preferences import Example, example_losses, is_paired, measures, read_examples, right
from grpo.prepare import fresh_run_dir, load_tokenizer, model_directory
from grpo.progress import Progress
from grpo.records import PackedBatch, TrainingSample
from grpo.stages import shuffled_batches
from model.config import SCORER_ARCHITECTURE
from model.fp8.modules import to_fp8
from model.reward_head import DeepseekV3ForSequenceClassification, head_scores
from rewards.reward_model import STATISTICS

STATISTICS_SIZE = 256  # training examples that give mean and std where nothing is held out


@dataclass(frozen=True)
class RewardTraining:
    """What training came to. `held_out`: loss, accuracy and auc on `num_held_out` examples; {} without any."""

    out: Path
    held_out: dict[str, float]
    num_held_out: int
    paired: bool

    def describe(self) -> str:
        """One line for the console."""
        if not self.num_held_out:
            return "nothing was held out to evaluate on; see data.holdout and data.eval_path"
        what = "pair accuracy" if self.paired else "accuracy"
        parts = [f"{what} {self.held_out['accuracy']:.3f}"] if "accuracy" in self.held_out else []
        parts += [f"AUC {self.held_out['auc']:.3f}", f"loss {self.held_out['loss']:.4f}"]
        return f"held out: {', '.join(parts)} ({self.num_held_out} {'pairs' if self.paired else 'completions'})"


def train_reward_model(config: Config) -> RewardTraining:
    """Reads and checks everything, then trains and writes to run.output_dir. Raises ValueError for bad input."""
    section = config.reward_model
    if section is None:
        raise ConfigError(
            "the configuration has no reward_model section; add one, e.g. `reward_model: {max_steps: 300}`"
        )
    torch.set_num_threads(config.run.threads)
    model_dir = model_directory(config)
    model = load_reward_model(model_dir, getattr(torch, config.model.dtype), config.run.seed)
    tokenizer = load_tokenizer(model_dir)
    train, held_out = (
        read_examples(rows, config, tokenizer, model.config.max_position_embeddings) for rows in load_rows(config.data)
    )
    if not is_paired(section) and len({example.value for example in train}) < 2:
        raise ConfigError(f"column {section.label_column!r} has one value in all rows; there is nothing to learn")
    to_fp8(model, config.model.fp8, config.model.fp8_recipe)
    out = fresh_run_dir(config)
    learner = Learner(
        model_dir,
        section,
        checkpointing=config.model.gradient_checkpointing,
        seed=config.run.seed,
        model=model,
        device=compute_device(config.model.device),
    )
    final = _train(config, section, learner, out, train, held_out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    chosen = held_out or train[:STATISTICS_SIZE]
    scores = score_examples(learner.policy, chosen, section.max_tokens_per_microbatch)
    content = {
        "scores": {"mean": float(scores.mean()), "std": float(scores.std()), "completions": scores.size},
        "of": "held-out rows" if held_out else "training rows",
        "loss_type": section.loss_type,
        "steps": section.max_steps,
        "held_out": final,
    }
    (out / STATISTICS).write_text(json.dumps(content, indent=2) + "\n")
    return RewardTraining(out, final, len(held_out), is_paired(section))


def load_reward_model(model_dir: Path, dtype: torch.dtype, seed: int) -> DeepseekV3ForSequenceClassification:
    """The reward model in a directory, or the policy in it under a new head. Raises ValueError for neither."""
    try:
        architectures = json.loads((model_dir / "config.json").read_text()).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{model_dir / 'config.json'} cannot be read: {error}") from None
    if SCORER_ARCHITECTURE in architectures:
        return DeepseekV3ForSequenceClassification.from_pretrained(model_dir, dtype)
    return DeepseekV3ForSequenceClassification.from_policy(model_dir, dtype, seed)


def _train(
    config: Config,
    section: RewardModelConfig,
    learner: Learner,
    out: Path,
    train: Sequence[Example],
    held_out: Sequence[Example],
) -> dict[str, float]:
    """All steps; returns the last evaluation on held-out examples, {} without any."""
    batches, loss_fn = shuffled_batches(train, section.batch_size, config.run.seed), reward_loss(section)
    alarms = Alarms({name: value for name, value in config.run.alarms.items() if name != "router/drift"})
    evaluation: dict[str, float] = {}

    def evaluate(step: int) -> dict[str, float]:
        every = config.run.eval_steps
        if not held_out or not (step in (0, section.max_steps) or (every and step % every == 0)):
            return {}
        evaluation.update(evaluate_examples(learner.policy, held_out, section))
        return {f"eval/{name}": value for name, value in evaluation.items()}

    with RunLog(out) as log, Progress(section.max_steps) as progress:
        if before := evaluate(0):
            log.metrics({"step": 0, **before})
        for step in range(1, section.max_steps + 1):
            packed = pack_examples(next(batches), section.max_tokens_per_microbatch)
            loss, norm, lr, stats = learner.update(packed, loss_fn)
            metrics: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": lr}
            metrics |= {
                name.removeprefix("sum/"): float(value) / section.batch_size
                for name, value in stats.items()
                if name in ("sum/accuracy", "sum/margin", "sum/score")
            }
            metrics |= learner.model_metrics(stats) | evaluate(step)
            log.metrics(metrics)
            progress.step(metrics)
            for line in alarms.check(metrics):
                progress.warn(line)
    return evaluation


def pack_examples(examples: Sequence[Example], max_tokens: int) -> list[PackedBatch]:
    """Micro-batches of at most max_tokens tokens, or of the longest example, which is never split.

    Weights carry the normaliser, the number of examples; advantages carry the examples' values. A completion is
    packed with its last token twice, since packing leaves the last one out: it would be a target and no input.
    """
    groups = [
        [
            TrainingSample(e.prompt_ids, (*completion, completion[-1]), 1.0 / len(examples), advantage=e.value)
            for completion in e.completions
        ]
        for e in examples
    ]
    longest = max(len(e.prompt_ids) + sum(len(c) + 1 for c in e.completions) for e in examples)
    return pack(groups, max(max_tokens, longest))


def reward_loss(section: RewardModelConfig) -> LossFn:
    """The loss of a micro-batch of pack_examples, for Learner.update."""

    def loss_fn(hidden: torch.Tensor, head_weight: torch.Tensor, rows: PackedBatch) -> tuple[torch.Tensor, Stats]:
        scores, values, weights = _columns(hidden, head_weight, rows, 2 if is_paired(section) else 1)
        losses = example_losses(scores, values, section)
        found = scores.detach()
        stats = {"sum/score": found.mean(1).sum()}
        verdicts = right(found.cpu().numpy(), values.cpu().numpy(), section)
        if verdicts is not None:
            stats["sum/accuracy"] = torch.tensor(verdicts.sum())
        if is_paired(section):
            stats["sum/margin"] = (found[:, 0] - found[:, 1]).sum()
        return (losses * weights).sum(), stats

    return loss_fn


def _columns(
    hidden: torch.Tensor, head_weight: torch.Tensor, rows: PackedBatch, completions: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [N, C], values [N] and weights [N] of the N examples of a micro-batch, C completions each."""
    ends = torch.bincount(rows.sample, minlength=rows.num_samples).cumsum(0) - 1  # [S]
    scores = head_scores(hidden[rows.source[ends]], head_weight).view(-1, completions)
    return scores, rows.advantages[ends[::completions]], rows.weights[ends[::completions]]


@torch.no_grad()
def score_examples(policy: Policy, examples: Sequence[Example], max_tokens: int) -> np.ndarray:
    """[N, C] float32: the scores of N examples of C completions each."""
    completions = len(examples[0].completions)
    batches = (batch.to(policy.device) for batch in pack_examples(examples, max_tokens))
    found = [_columns(policy.hidden(batch), policy.head_weight, batch, completions)[0] for batch in batches]
    return torch.cat(found).cpu().numpy()


def evaluate_examples(policy: Policy, examples: Sequence[Example], section: RewardModelConfig) -> dict[str, float]:
    """loss, accuracy, auc and margin of examples, see preferences.measures."""
    scores = score_examples(policy, examples, section.max_tokens_per_microbatch)
    return measures(scores, np.array([example.value for example in examples]), section)
