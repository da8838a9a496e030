"""Peer: seconds of a GRPO step of TRL's GRPOTrainer. Run by benchmarks.common.run_peer in .venv-peers.

python -m benchmarks.peers.trl_step MODEL_DIR PROMPTS.json '{"threads": 2, ...}'
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.common import quartiles, versions


@dataclass(frozen=True)
class Settings:
    """beta 0 and no gradient checkpointing: TRL at its fastest on this size."""

    threads: int = 1
    experts: str = "grouped_mm"  # transformers' experts_implementation
    steps: int = 20  # that count
    warmup: int = 4  # before them
    prompts_per_step: int = 16
    num_generations: int = 8
    microbatch: int = 128  # samples of a forward and backward pass
    max_completion_length: int = 12
    learning_rate: float = 1e-6  # small: the weights, and so the lengths, stay what they are
    seed: int = 0


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main(model_dir: str, prompts_file: str, settings: Settings) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    with open(prompts_file) as file:
        prompts = json.load(file)
    samples = settings.prompts_per_step * settings.num_generations
    assert samples % settings.microbatch == 0, f"{samples=} {settings.microbatch=}"
    lengths: list[list[int]] = []  # of the completions of each step

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Says nothing about quality; a fixed function of the text, so that groups have variance and a gradient."""
        lengths.append([len(ids) for ids in completion_ids])
        return [float(zlib.crc32(text.encode()) % 2) for text in completions]

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, experts_implementation=settings.experts
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_steps=settings.warmup + settings.steps,
            per_device_train_batch_size=settings.microbatch,
            gradient_accumulation_steps=samples // settings.microbatch,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=1.0,
            beta=0.0,
            gradient_checkpointing=False,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=settings.seed,
        )
        trainer = GRPOTrainer(
            model=model,
            args=arguments,
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            callbacks=[clock],
        )
        trainer.train()
    assert not model.is_activation_checkpointing, "TRL turned activation checkpointing on"
    first = settings.warmup
    seconds = [after - before for before, after in zip(clock.ends[first - 1 :], clock.ends[first:])]
    assert len(seconds) == settings.steps and len(lengths) == len(clock.ends), f"{len(seconds)=} {len(lengths)=}"
    counted = lengths[first:]
    return {
        "peer": "trl",
        "settings": asdict(settings),
        "seconds": quartiles(seconds),
        "tokens_per_second": quartiles([sum(step) / took for step, took in zip(counted, seconds)]),
        "mean_length": sum(map(sum, counted)) / (samples * len(counted)),
        "max_length": max(map(max, counted)),
        "all_seconds": [round(value, 5) for value in seconds],
        "versions": versions("trl", "torch", "transformers", "accelerate"),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Settings(**json.loads(sys.argv[3])))))
