"""Peer: our rewards inside TRL's trainer and verl's reward managers. Run by benchmarks/adapters.py in .venv-rewards.

python -m benchmarks.peers.our_rewards trl|verl MAPPING.json [SAMPLES.json]    # prints what they scored, and how
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.make_model import random_model, tokenizer
from rewards import as_trl, as_verl


class Recorder:
    """The reward function, and a note of every call; picklable as TRL wants it."""

    def __init__(self, reward: Any) -> None:
        self.reward, self.calls, self.__name__ = reward, [], reward.__name__

    def __call__(self, **given: Any) -> list[float | None]:
        values = self.reward(**given)
        columns = ("prompts", "completions", "completion_ids", "answer")
        self.calls.append({key: given[key] for key in columns} | {"values": values})
        return values


def in_trl(mapping: dict[str, Any]) -> dict[str, Any]:
    """Two steps of GRPOTrainer with a tiny model."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    recorder = Recorder(pickle.loads(pickle.dumps(as_trl(mapping, name="ours"))))  # as TRL's async workers get it
    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(10, 26)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=16, num_generations=4,
            max_completion_length=16, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(random_model(), recorder, args=arguments, train_dataset=Dataset.from_list(rows),
                              processing_class=tokenizer())  # fmt: skip
        trainer.train()
        logged = [row for row in trainer.state.log_history if "reward" in row]
    recorder.reward._source.get().close()
    return {"calls": recorder.calls, "logged": logged}


def in_verl(mapping: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The naive and the dapo manager, each with the sync and the async function."""
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    text = tokenizer()
    results: dict[str, Any] = {}

    async def score(manager: Any) -> list[dict[str, Any]]:
        rows = []
        for sample in samples:
            ids = text(sample["completion"], return_tensors="pt")["input_ids"]
            data = DataProto.from_dict(
                tensors={"responses": ids, "attention_mask": torch.ones_like(ids)},
                non_tensors={
                    "data_source": np.array(["sums"], dtype=object),
                    "reward_model": np.array([{"ground_truth": sample["gold"]}], dtype=object),
                    "extra_info": np.array([{}], dtype=object),
                },
            )
            rows.append(await manager.run_single(data))
        return rows

    for name in ("naive", "dapo"):
        for asynchronous in (False, True):
            compute_score = as_verl(mapping, asynchronous=asynchronous, failure_score=-1.0)
            config = OmegaConf.create({"reward": {"reward_kwargs": {}}})

            async def run(name: str = name, compute_score: Any = compute_score, config: Any = config) -> Any:
                return await score(get_reward_manager_cls(name)(config, text, compute_score))

            results[f"{name}, {'async' if asynchronous else 'sync'}"] = asyncio.run(run())
    return results


def main(trainer: str, mapping_file: str, samples_file: str = "") -> dict[str, Any]:
    mapping = json.loads(Path(mapping_file).read_text())
    return in_trl(mapping) if trainer == "trl" else in_verl(mapping, json.loads(Path(samples_file).read_text()))


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))
