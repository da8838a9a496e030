"""Supervised stages with the learner of GRPO: `grpo sft` (also the warm start of `grpo train`) and `grpo pretrain`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from grpo.alarms import Alarms
from grpo.config import Config, ConfigError, StageConfig
from grpo.data import load_rows, make_prompts, sft_examples, text_blocks
from grpo.evaluate import is_right
from grpo.learner import Learner, nll_loss
from grpo.log import RunLog
from grpo.packing import pack
from grpo.placement import compute_device
from grpo.prepare import Prepared, cached, load_tokenizer, reward_resources
from grpo.progress import Progress
from grpo.records import Prompt, TrainingSample
from grpo.steps import reward_inputs
from model.family import read_config, save_weights
from rewards import build_rewards
from rollout import SamplingParams, build_engine
from rollout.draws import seed_of

PROBE_SIZE = 256  # training prompts kept from SFT to measure stop_accuracy on

Example = tuple[Sequence[int], Sequence[int]]  # prompt ids, completion ids
T = TypeVar("T")


def warm_start(prepared: Prepared) -> Path:
    """The model after SFT on the training rows; kept, so a second run with the same settings starts at once."""
    config = prepared.config
    assert config.sft is not None, "no sft section"
    key = {
        "model": str(prepared.model_dir.name if config.model.init is not None else prepared.model_dir.resolve()),
        "sft": config.sft.model_dump(),
        "data": config.data.model_dump(),
        "rewards": config.rewards,
        "run": [config.run.seed, config.run.threads, config.run.eval_reward, *config.model.precision],
    }

    def build(out: Path) -> None:
        print(f"warm start: SFT for at most {config.sft.max_steps if config.sft else 0} steps", flush=True)
        run_sft(config, prepared.model_dir, out, prepared)

    return cached(config, "sft", key, build)


def run_sft(config: Config, model_dir: Path, out: Path, prepared: Prepared | None = None) -> None:
    """Trains on the data's completions and writes the model, its tokenizer and metrics to `out`.

    Raises ValueError for a configuration without `sft` or without completions.
    """
    if config.sft is None:
        raise ConfigError("the configuration has no sft section; add one, e.g. `sft: {max_steps: 300}`")
    torch.set_num_threads(config.run.threads)
    tokenizer = load_tokenizer(model_dir)
    rows = prepared.train_rows if prepared else load_rows(config.data)[0]
    context = read_config(model_dir, config.model.family).max_position_embeddings
    probe: list[Prompt] = []
    if config.sft.stop_accuracy > 0:
        if not config.rewards:
            raise ConfigError("sft.stop_accuracy needs rewards to say what is right; add them or set it to 0")
        held = min(PROBE_SIZE, len(rows) // 10)
        probe = make_prompts(rows[-held:], config.data, tokenizer, context - config.rollout.max_completion_length)
        rows = rows[:-held]
    examples = sft_examples(rows, config.data, tokenizer, context)
    _train(config, config.sft, model_dir, out, examples, tokenizer, probe)


def run_pretrain(config: Config, model_dir: Path, out: Path) -> None:
    """Next-token training on blocks of packed text. Raises ValueError for a configuration without `pretrain`."""
    if config.pretrain is None:
        raise ConfigError("the configuration has no pretrain section; add one, e.g. `pretrain: {max_steps: 1000}`")
    torch.set_num_threads(config.run.threads)
    context = read_config(model_dir, config.model.family).max_position_embeddings
    if config.pretrain.block_size > context:
        raise ConfigError(
            f"pretrain.block_size {config.pretrain.block_size} is more than the context of {context}; lower it"
        )
    tokenizer = load_tokenizer(model_dir)
    blocks = text_blocks(load_rows(config.data)[0], config.data, tokenizer, config.pretrain.block_size)
    _train(config, config.pretrain, model_dir, out, [(b[:1], b[1:]) for b in blocks], tokenizer, [])


def _train(
    config: Config,
    stage: StageConfig,
    model_dir: Path,
    out: Path,
    examples: Sequence[Example],
    tokenizer: Any,
    probe: Sequence[Prompt],
) -> None:
    learner = Learner(
        model_dir,
        stage,
        dtype=config.model.dtype,
        checkpointing=config.model.gradient_checkpointing,
        device=compute_device(config.model.device),
        fp8=config.model.fp8,
        fp8_recipe=config.model.fp8_recipe,
    )
    batches = shuffled_batches(examples, stage.batch_size, config.run.seed)
    # where a router comes from random weights, that it leaves them is no alarm
    alarms = Alarms({name: value for name, value in config.run.alarms.items() if name != "router/drift"})
    with RunLog(out) as log, Progress(stage.max_steps) as progress:
        for step in range(1, stage.max_steps + 1):
            chosen = next(batches)
            weight = 1.0 / sum(len(completion) for _, completion in chosen)
            samples = [[TrainingSample(tuple(p), tuple(c), weight)] for p, c in chosen]
            packed = pack(samples, stage.max_tokens_per_microbatch)
            _, norm, lr, stats = learner.update(packed, nll_loss)
            rows = float(stats["sum/rows"])
            metrics = {"step": step, "loss": float(stats["sum/nll"]) / rows, "grad_norm": norm, "learning_rate": lr}
            metrics |= learner.model_metrics(stats)
            reached = 0.0
            if probe and (step % stage.eval_every == 0 or step == stage.max_steps):
                reached = metrics["sampled_accuracy"] = sampled_accuracy(config, learner, probe, tokenizer)
            log.metrics(metrics)
            progress.step(metrics)
            for line in alarms.check(metrics):
                progress.warn(line)
            if probe and reached >= stage.stop_accuracy:
                break
    save_weights(learner.policy.model, out)
    tokenizer.save_pretrained(out)
    (out / "stage.json").write_text(json.dumps({"steps": step, **metrics}))


def shuffled_batches(examples: Sequence[T], size: int, seed: int) -> Iterator[list[T]]:
    """Batches for ever, in a new seeded order each epoch; batches run across the ends of epochs."""
    if not examples:
        raise ConfigError("there is nothing to train on; check data.path")
    waiting: list[T] = []
    epoch = 0
    while True:
        while len(waiting) < size:
            order = np.random.default_rng(seed_of(seed, "stage", epoch)).permutation(len(examples))
            waiting += [examples[i] for i in order]
            epoch += 1
        yield waiting[:size]
        waiting = waiting[size:]


def sampled_accuracy(config: Config, learner: Learner, prompts: Sequence[Prompt], tokenizer: Any) -> float:
    """Share of right answers among one sample (temperature 1) for each prompt, from the learner's own weights."""
    engine = build_engine(learner.policy.model)
    params = [
        SamplingParams(max_tokens=config.rollout.max_completion_length, seed=seed_of(config.run.seed, "probe", p.id))
        for p in prompts
    ]
    completions = engine.generate([p.token_ids for p in prompts], params)
    with closing(build_rewards(config.rewards, **reward_resources(config.model.dtype))) as rewards:
        scores = rewards.score(reward_inputs(prompts, completions, tokenizer))
    return float(np.mean([is_right(config, score) for score in scores]))
