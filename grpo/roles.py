"""What the actors host: plain objects built from a configuration. The learner is grpo.learner.Learner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.config import Config
from grpo.dispatch import Held
from grpo.learner import Learner
from grpo.placement import compute_device, release_cache, used_gib
from grpo.prepare import reward_resources
from grpo.transport import build_transport
from grpo.weight_sync import Bucket, unpack
from rewards import RewardInput, Score, build_rewards
from rollout import Completion, build_engine
from rollout.engine import Adapted, Checked, Quantized, Sleeping, Speculating


class RolloutRole:
    """An engine, and the receiving end of the weight sync."""

    def __init__(self, config: Config, model_dir: str, name: str = "", weight_dir: str = "") -> None:
        """`name`: the role's. `weight_dir`: where `rollout.weight_transport: disk` reads."""
        rollout = config.rollout
        self.engine = build_engine(
            model_dir,
            rollout.engine,
            max_num_seqs=rollout.max_num_seqs,
            enable_return_routed_experts=rollout.replay_routing or config.grpo.router_policy == "rollout",
            **_engine_options(config),
        )
        self.check, self.asleep, self.drops_weights = rollout.weight_check, False, rollout.sleep_level == 2
        self.transport = build_transport(config, name, weight_dir)
        self.begun: dict[tuple[int, int], int] = {}  # (batch, index) -> number of the engine's request

    def advance(self, batch: int, held: Held, everything: bool) -> dict[int, list[Completion]]:
        """Samples `held` until one group is done, or everything -> what is done. What it has begun already goes on.

        `batch` tells one call of Cluster.sample from another. A request that is not in `held` any more is forgotten.
        """
        begun = {key: number for key, number in self.begun.items() if key[0] == batch and key[1] in held}
        if len(begun) < len(self.begun):  # a batch that was given up
            self.engine.abort()
            begun = {}
        done: dict[int, list[Completion]] = {}
        try:
            for index, (prompt, params) in held.items():
                if (batch, index) not in begun:
                    begun[batch, index] = self.engine.add_request(prompt, params)
            places = {number: index for (_, index), number in begun.items()}
            while len(done) < (len(held) if everything else min(1, len(held))):
                done |= {places[number]: group for number, group in self.engine.step().items()}
        except BaseException:
            self.engine.abort()
            self.begun = {}
            raise
        self.begun = {key: number for key, number in begun.items() if key[1] not in done}
        return done

    def why_merged(self) -> str:
        """Why the engine has to get an adapter merged into the weights; empty: it takes the adapter as it is."""
        if self.drops_weights:
            return "rollout.sleep_level 2 drops the weights that it would be added to"
        return self.engine.why_merged if isinstance(self.engine, Adapted) else "only vLLM adds them"

    def fp8_names(self) -> frozenset[str]:
        """Published names of what the engine takes as E4M3 codes and scales."""
        return self.engine.fp8_names if isinstance(self.engine, Quantized) else frozenset()

    def collect(self, held: Held, begun: dict[int, Sequence[Completion]], enough: int) -> dict[int, list[Completion]]:
        """Samples `held`, each going on from `begun`, until `enough` groups are complete -> all of them, the others as
        far as they got. Nothing of them stays here.
        """
        self.engine.abort()  # a batch that was given up
        self.begun = {}
        done: dict[int, list[Completion]] = {}
        try:
            places = {self.engine.add_request(*request, begun[index]): index for index, request in held.items()}
            while len(done) < min(enough, len(held)):
                done |= {places[number]: group for number, group in self.engine.step().items()}
        except BaseException:
            self.engine.abort()
            raise
        return done | {places[number]: group for number, group in self.engine.abort().items()}

    def sleep(self, level: int) -> dict[str, float]:
        """The engine gives back its GPU memory until weights come; does nothing where it sleeps already."""
        assert isinstance(self.engine, Sleeping), f"{type(self.engine).__name__} does not sleep"
        before = used_gib()
        if not self.asleep:
            self.engine.sleep(level)
            release_cache()
        self.asleep = True
        return {"memory/rollout_gib": before, "memory/released_gib": before - used_gib()}

    def _wake(self, *tags: str) -> None:
        if self.asleep:
            assert isinstance(self.engine, Sleeping)
            release_cache()
            self.engine.wake_up(tags)

    def load_weights(self, buckets: Sequence[Bucket], version: int) -> dict[str, Any]:
        """Takes over a whole version, sent whole or as changes -> {"policy_version", "check_seconds", "bytes"},
        "rerouted" canaries that the learner has to judge (or None), "fp8_bytes" of codes where the engine takes some,
        and "drafted" and "accepted" tokens since the last time where it speculates.

        Raises ValueError if the buckets are not that version, WeightFault if the engine does not compute with them,
        ConnectionError if they stopped coming.
        """
        weights = unpack(buckets, version, self.transport.fetch)
        self._wake("weights")
        self.engine.load_weights(weights, version, buckets[0].base)
        self._wake("kv_cache")
        self.asleep = False
        start, canary, rerouted = time.perf_counter(), buckets[0].canary, None
        if isinstance(self.engine, Checked) and self.check != "off":
            if self.check == "full":
                self.engine.check_weights(weights)
            if canary is not None:
                rerouted = self.engine.check_canary(canary.prompts, canary.logprobs)
        return {
            "policy_version": self.engine.policy_version,
            "check_seconds": time.perf_counter() - start,
            "rerouted": rerouted,
            "bytes": sum(bucket.nbytes for bucket in buckets),
            **({"fp8_bytes": sum(map(_code_bytes, buckets))} if self.fp8_names() else {}),
            **(self.engine.speculated() if isinstance(self.engine, Speculating) else {}),
        }


def _code_bytes(bucket: Bucket) -> int:
    return sum(entry.nbytes for entry in bucket.entries if entry.dtype == "float8_e4m3fn")


def _engine_options(config: Config) -> dict[str, Any]:
    rollout, lora = config.rollout, config.model.lora
    if rollout.engine == "vllm":
        return {
            "dtype": config.model.dtype,
            "speculative_tokens": rollout.speculative_tokens,
            # an engine that drops its weights in sleep must get them all again
            "lora": None if lora is None or rollout.lora == "merged" or rollout.sleep_level == 2 else lora.model_dump(),
            "sleep_mode": rollout.sleep_level > 0,
            **rollout.engine_options,
        }
    return {
        "dtype": getattr(torch, config.model.dtype),
        "device": compute_device(config.model.device),
        "fp8": config.model.fp8,
        "fp8_recipe": config.model.fp8_recipe,
        "page_size": rollout.page_size,
        "num_pages": rollout.num_pages,
        "exact": rollout.exact,
    }


class RewardRole:
    """The rewards of a run."""

    def __init__(self, config: Config) -> None:
        self.rewards = build_rewards(
            config.rewards,
            workers=config.run.reward_workers,
            cache=config.run.reward_cache,
            **reward_resources(config.model.dtype),
        )

    def score(self, inputs: Sequence[RewardInput]) -> list[Score]:
        return self.rewards.score(inputs)

    def close(self) -> None:
        self.rewards.close()


def learner_role(config: Config, model_dir: str, reference_dir: str, weight_dir: str) -> Learner:
    return Learner(
        model_dir,
        config.grpo,
        dtype=config.model.dtype,
        temperature=config.rollout.temperature,
        checkpointing=config.model.gradient_checkpointing,
        reference_dir=Path(reference_dir),
        lora=None if config.model.lora is None else config.model.lora.model_dump(),
        canaries=config.rollout.engine == "vllm" and config.rollout.weight_check != "off",
        seed=config.run.seed,
        transport=build_transport(config, "learner", weight_dir),
        delta_sync=config.rollout.delta_sync and config.rollout.sleep_level < 2,  # what is dropped must come back whole
        device=compute_device(config.model.device),
        fp8=config.model.fp8,
        fp8_recipe=config.model.fp8_recipe,
        exact_sync=config.rollout.engine == "embedded",  # it computes in FP8 as the learner does
        # an embedded engine in this process takes its memory from the same allocator
        shares_gpu=config.run.learner_gpus < 1 or (config.one_process and config.rollout.engine == "vllm"),
    )


def build_role(name: str, config: Config, dirs: dict[str, str]) -> Any:
    """The object behind a role name: "learner", "rewards" or "rollout-<n>".

    `dirs`: "model", "reference" and "weights" (which `rollout.weight_transport: disk` writes).
    """
    torch.set_num_threads(config.run.threads)
    if name == "learner":
        return learner_role(config, dirs["model"], dirs["reference"], dirs["weights"])
    if name == "rewards":
        return RewardRole(config)
    assert name.startswith("rollout-"), f"{name=}"
    return RolloutRole(config, dirs["model"], name, dirs["weights"])
