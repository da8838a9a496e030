"""The learner: FP32 master weights, AdamW, schedule, clipping; weights change only here.

`step` is a GRPO step over the micro-batches of one rollout, `update` one optimiser update with any loss. A plain
object; grpo/actors.py hosts it in a Ray actor.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from grpo.auto_policy import AutoPolicy
from grpo.config import GRPOConfig, StageConfig, SupervisedConfig
from grpo.logprobs import token_logprobs
from grpo.losses import LossOptions, policy_loss
from grpo.optimizer import LowMemoryAdamW, build_optimizer, step_with_scales
from grpo.packing import pack
from grpo.placement import release_cache, used_gib
from grpo.policy import AdapterOff, AuxiliaryLosses, DeepseekV3Policy, LossFn, Policy, Stats
from grpo.records import PackedBatch, StepStats, TrainingSample
from grpo.router import router_metrics
from grpo.transport import ObjectStore, Transport
from grpo.weight_sync import Bucket, Canary, Outbox
from model.config import DeepseekV3Config
from model.family import AnyModel, fill_weights, load_model, published_state, save_weights
from model.fp8.modules import Mode, kept_in_fp32, to_fp8, unquantized
from model.fp8.published import computed_state, in_blocks
from model.lora import FOLDER, LoraAdapter, MergedModel
from model.modeling import DeepseekV3PreTrainedModel
from rollout import Rerouted, WeightFault


class Learner:
    """Holds the policy, its optimiser and, where beta > 0, the reference policy."""

    def __init__(
        self,
        model_dir: str | Path,
        config: GRPOConfig | SupervisedConfig,
        dtype: str = "float32",
        temperature: float = 1.0,
        checkpointing: bool = False,
        reference_dir: str | Path | None = None,
        lora: Mapping[str, Any] | None = None,
        seed: int = 0,
        canaries: bool = False,
        model: AnyModel | None = None,
        transport: Transport | None = None,
        delta_sync: bool = True,
        device: torch.device | str = "cpu",
        fp8: Mode = "off",
        fp8_recipe: str = "blockwise",
        exact_sync: bool = False,
        shares_gpu: bool = False,
    ) -> None:
        """`reference_dir`: weights of the reference policy; None: model_dir. `lora`: train an adapter, drawn by `seed`,
        on the weights of model_dir, which are then the reference as well. `canaries`: weights travel with prompts that
        engines are held against. `model`: what to train, where it is not the policy in model_dir. `transport`: takes
        the weights to the engines; None: object_store. `delta_sync`: see `weights`. `device`: where it computes.
        `fp8`, `fp8_recipe`: see to_fp8; what is saved is the parameters in `dtype`, what travels is what layers
        multiply by (model/fp8/published.py). `exact_sync`: what FP8 layers keep in FP32 travels so instead, for engines
        that make the same codes of it. `shares_gpu`: another process or vLLM has the GPU between steps. Raises
        ValueError for a bad directory.
        """
        self.config, self.temperature, self.canaries = config, temperature, canaries
        self.exact_sync, self.shares_gpu = exact_sync, shares_gpu
        self.engine_fp8: frozenset[str] = frozenset()  # published names of what engines have in FP8
        if model is None:
            model = load_model(model_dir, getattr(torch, dtype), device)
            to_fp8(model, fp8, fp8_recipe)
        else:
            model = model.to(device)  # type: ignore[arg-type]
        rl = isinstance(config, GRPOConfig)
        auxiliary = AuxiliaryLosses(
            mtp_loss_weight=config.mtp_loss_weight if isinstance(config, GRPOConfig | StageConfig) else 0.0,
            mtp_detach=rl and config.mtp_detach,
            router_aux_loss_coef=config.router_aux_loss_coef,
        )
        self.adapter = None if lora is None else LoraAdapter(model, lora, model_dir, seed)
        self.sends_adapter = False  # as it is; else merged into the weights
        self.published: AnyModel | MergedModel = model if self.adapter is None else self.adapter.merged
        self.router_policy = config.router_policy if rl else "update"
        self.router_start: torch.Tensor | None = None  # [L_moe, E] tokens per expert in the first step
        self.policy = _policy(model, auxiliary, checkpointing)
        self.reference: Policy | AdapterOff | None = None
        if isinstance(config, GRPOConfig) and config.beta > 0 and self.adapter is not None:
            self.reference = AdapterOff(self.policy, self.adapter)
        elif isinstance(config, GRPOConfig) and config.beta > 0:
            frozen = load_model(reference_dir or model_dir, getattr(torch, dtype), device).requires_grad_(False)
            to_fp8(frozen, fp8, fp8_recipe)
            self.reference = _policy(frozen)
        self.optimizer = build_optimizer(
            self.policy.master,
            config.learning_rate,
            (config.adam_beta1, config.adam_beta2),
            config.weight_decay,
            getattr(torch, config.adam_moment_dtype),
        )
        self.updates = 0  # optimiser updates so far
        self.policy_version = 0
        self.outbox, self.transport = Outbox(delta_sync), transport or ObjectStore()

    def step(
        self, minibatches: Sequence[Sequence[PackedBatch]], rollout_counts: torch.Tensor | None = None
    ) -> StepStats:
        """One GRPO step: every mini-batch (a list of micro-batches) once in each of num_iterations passes.

        rollout_counts [L_moe, up to E]: tokens per expert of the rollout. Under the router policy `rollout` they move
        the biases once, after the last update.
        The first mini-batch of a single pass is used before any weight changes: its old log-probabilities are the
        current ones, so no pass is spent on them.
        """
        config = self.config
        assert isinstance(config, GRPOConfig), f"{type(config).__name__} has no GRPO step"
        prepared = [
            [self._prepare(b, old=index > 0 or config.num_iterations > 1) for b in batches]
            for index, batches in enumerate(minibatches)
        ]
        options = LossOptions(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(LossOptions) if f.name != "epsilon_high"},
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        )

        def loss_fn(hidden: torch.Tensor, head_weight: torch.Tensor, rows: PackedBatch) -> tuple[torch.Tensor, Stats]:
            logprobs, entropy = token_logprobs(hidden[rows.source], head_weight, rows.target, self.temperature)
            loss, stats = policy_loss(logprobs, rows, options)
            stats["sum/entropy"] = entropy.sum()
            return loss, stats

        updates, losses, norms, lr = [], [], [], 0.0
        for _ in range(config.num_iterations):
            for batches in prepared:
                loss, norm, lr, stats = self.update(batches, loss_fn)
                updates.append(stats)
                losses.append(loss)
                norms.append(norm)
        if self.router_policy == "rollout":
            assert rollout_counts is not None, "router policy rollout without the rollout's counts"
            self.policy.balance(rollout_counts, config.router_bias_update_rate)
        self.policy_version += 1
        total = _sum(updates)
        metrics = _combine(updates, total) | self.model_metrics(total)
        metrics |= {"loss": _mean(losses), "grad_norm": _mean(norms), "learning_rate": lr}
        if self.policy.device.type == "cuda":
            metrics["memory/learner_gib"] = used_gib()
        if self.shares_gpu:  # not otherwise: to map the memory again takes a tenth of a step
            release_cache()
        return StepStats(self.policy_version, metrics)

    def update(self, batches: Sequence[PackedBatch], loss_fn: LossFn) -> tuple[float, float, float, Stats]:
        """One optimiser update -> (loss, gradient norm before clipping, learning rate, summed statistics).

        Raises ValueError for a gradient that is not finite, before it touches the weights.
        """
        loss, stats = self.policy.forward_backward(batches, loss_fn)
        parts = [(masters, float(norm)) for masters, norm in self.policy.gradient_norms()]
        norms = [norm for _, norm in parts]
        bad = [norm for norm in norms if not math.isfinite(norm)]
        if bad:  # a step would spread it over every weight
            self.optimizer.zero_grad(set_to_none=True)
            raise ValueError(f"the gradient norm of update {self.updates} is {bad[0]}; the weights are untouched")
        lr = self.learning_rate(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = self.config.max_grad_norm or math.inf
        clipped = {master: min(limit / (norm + 1e-6), 1.0) for masters, norm in parts for master in masters}
        step_with_scales(self.optimizer, clipped)
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.publish()
        total = _sum(stats)
        if self.router_policy == "update" and self.config.router_bias_update_rate > 0 and "sum/expert_counts" in total:
            self.policy.balance(total["sum/expert_counts"], self.config.router_bias_update_rate)
        self.updates += 1
        return loss, norms[0], lr, total

    def model_metrics(self, total: Stats) -> dict[str, float]:
        """Of the statistics of a step: balance of the routers, and multi-token prediction where it is trained."""
        if "sum/expert_counts" not in total:
            return {}
        counts = total["sum/expert_counts"][: self.policy.model.config.num_moe_layers]
        if self.router_start is None and counts.any():
            self.router_start = counts
        metrics = {} if self.router_start is None else router_metrics(counts, self.router_start)
        if "sum/mtp_loss" in total:
            metrics["mtp_loss"] = float(total["sum/mtp_loss"]) / float(total["sum/rows"])
            metrics["mtp/agreement"] = float(total["sum/mtp_agree"]) / max(float(total["sum/mtp_targets"]), 1.0)
        return metrics

    def learning_rate(self, update: int) -> float:
        """Of the update with this number, from 0: linear warm-up, then constant, linear or cosine decay."""
        config = self.config
        per_step = config.updates_per_step if isinstance(config, GRPOConfig) else 1
        warmup, total = config.warmup_steps * per_step, config.max_steps * per_step
        if update < warmup:
            return config.learning_rate * (update + 1) / warmup
        done = min((update - warmup) / max(total - warmup, 1), 1.0)
        end = config.lr_end_ratio
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        share = shape[config.lr_scheduler_type]
        return config.learning_rate * (share if config.lr_scheduler_type == "constant" else end + (1 - end) * share)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, policy: Policy | AdapterOff | None = None) -> torch.Tensor:
        """[R] float32: log-probabilities of a batch's targets, without gradient."""
        policy, batch = policy or self.policy, batch.to(self.policy.device)
        hidden = policy.hidden(batch)[batch.source]
        return token_logprobs(hidden, policy.head_weight, batch.target, self.temperature)[0]

    def _prepare(self, batch: PackedBatch, old: bool) -> PackedBatch:
        return dataclasses.replace(
            batch,
            old_logprobs=self.logprobs(batch) if old else None,
            # the reference routes by itself, also where the policy replays the rollout's routing
            ref_logprobs=None
            if self.reference is None
            else self.logprobs(dataclasses.replace(batch, routed_experts=None), self.reference),
        )

    def weights(self, since: int | None = None, readers: Sequence[str] = ("",)) -> list[Bucket]:
        """The policy under published names, ready to travel to these engines; carries the policy version.

        `since`: a version that every engine holds; where it is the one sent last, only what changed travels.
        After `send_adapter` these are the base's weights, which never change, and the adapter under PEFT's names.
        """
        changes = self.outbox.delta and since is not None and since == self.outbox.version
        plan = self.outbox.plan(self._state(changes), self.policy_version, since, self.transport.proved)
        first, *others = self.transport.post(plan, self._state(changes), readers)
        return [dataclasses.replace(first, canary=self.canary() if self.canaries else None), *others]

    def _state(self, changes: bool) -> Iterable[tuple[str, torch.Tensor]]:
        """What travels; `changes`: after a version that the engines hold."""
        if self.adapter is None or not self.sends_adapter:
            if isinstance(self.published.config, DeepseekV3Config) and not self.exact_sync:
                return computed_state(self.published, self.engine_fp8)
            return in_blocks(published_state(self.published, self.exact_sync), self.engine_fp8)
        if changes:
            return self.adapter.tensors().items()  # a base of many GB need not be digested to know that
        return self.adapter.unmerged()

    def send_adapter(self) -> None:
        """From now on the adapter travels as it is."""
        assert self.adapter is not None, "model.lora is not set"
        self.sends_adapter = True

    def send_fp8(self, names: Collection[str]) -> None:
        """From now on these travel as E4M3 codes and scales of 128 x 128 blocks."""
        self.engine_fp8 = frozenset(names)

    def send_weights(self, posted: Sequence[Bucket]) -> None:
        """While engines load what `weights` gave: what their transport waits for."""
        self.transport.send(posted, self._state(changes=posted[0].base is not None))

    def release_weights(self, posted: Sequence[Bucket]) -> None:
        """Every engine has loaded: what was kept for them goes."""
        self.transport.release(posted)
        if self.shares_gpu:
            release_cache()

    def check_rerouted(self, found: Rerouted) -> None:
        """An engine's canaries against this policy with the engine's routes. Raises WeightFault past their cap."""
        want = self.canary(found.routed_experts).logprobs
        error = float(np.mean([abs(a - b) for x, y in zip(found.logprobs, want, strict=True) for a, b in zip(x, y)]))
        if not error <= found.cap:
            raise WeightFault(
                f"canary prompts under version {self.policy_version}: with the engine's own choice of experts its "
                f"log-probabilities differ from the learner's by {error:.2g} on average ({found.cap:g} is allowed)"
            )

    @torch.no_grad()
    def canary(self, routed_experts: Sequence[np.ndarray] | None = None) -> Canary:
        """Four prompts of random tokens, always the same, and this policy's log-probabilities of them, with these
        experts # [tokens, MoE layers, K] of each where given; activations are cast where engines have FP8 matrices.
        """
        config = self.policy.model.config
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(config.vocab_size, (4, min(24, config.max_position_embeddings - 1)), generator=generator)
        prompts = [tuple(row) for row in drawn.tolist()]
        routes = routed_experts or [None] * len(prompts)
        samples = [
            [TrainingSample(prompt[:1], prompt[1:], 1.0, routed_experts=None if r is None else r[: len(prompt) - 1])]
            for prompt, r in zip(prompts, routes)
        ]
        (batch,) = pack(samples, 1 << 30)
        batch = batch.to(self.policy.device)
        with nullcontext() if self.engine_fp8 else unquantized(self.policy.model):
            hidden = self.policy.hidden(batch)[batch.source]
        logprobs = token_logprobs(hidden, self.policy.head_weight, batch.target)[0]
        return Canary(tuple(prompts), tuple(tuple(row) for row in logprobs.view(len(prompts), -1).tolist()))

    def save(self, directory: str | Path) -> None:
        """Writes a HF model directory and `train_state/`: what `load` needs to go on exactly as if never stopped.

        Under LoRA the weights are merged ones, and `adapter/` has the adapter in PEFT's format.
        """
        directory = Path(directory)
        save_weights(self.published, directory)
        if self.adapter is not None:
            self.adapter.save(directory)
        state = directory / "train_state"
        state.mkdir(exist_ok=True)
        tensors, rounded = {}, kept_in_fp32(self.policy.model)
        for name, parameter, master in zip(self.policy.names, self.policy.parameters, self.policy.master):
            tensors |= {f"{name}|{key}": value for key, value in self.optimizer.state.get(master, {}).items()}
            if parameter is not master or name in rounded:
                tensors[f"{name}|master"] = master.detach()
        save_file({key: value.contiguous() for key, value in tensors.items()}, state / "optimizer.safetensors")
        start = None if self.router_start is None else self.router_start.tolist()
        numbers = {"updates": self.updates, "policy_version": self.policy_version, "router_start": start}
        (state / "learner.json").write_text(json.dumps(numbers))

    def load(self, directory: str | Path) -> int:
        """Goes on from what `save` wrote, at the policy version it returns. Raises ValueError for a directory without
        training state."""
        directory = Path(directory)
        state = directory / "train_state"
        if not (state / "learner.json").is_file():
            raise ValueError(f"{directory} has no train_state/learner.json; it is no training checkpoint")
        if self.adapter is not None:
            self.adapter.load(directory)
        elif (directory / FOLDER).is_dir():
            raise ValueError(
                f"{directory} is a checkpoint of an adapter; go on with the model.lora it was trained with"
            )
        else:
            fill_weights(self.policy.model, directory)
        tensors, rounded = load_file(state / "optimizer.safetensors"), kept_in_fp32(self.policy.model)
        for name, parameter, master in zip(self.policy.names, self.policy.parameters, self.policy.master):
            if parameter is not master or name in rounded:
                with torch.no_grad():  # not by `data`: codes are made anew for what is seen to change
                    master.copy_(tensors.pop(f"{name}|master"))
            values = {k.split("|")[1]: v for k, v in tensors.items() if k.split("|")[0] == name}
            if values:
                step = values.pop("step")
                on_host = isinstance(self.optimizer, LowMemoryAdamW)  # torch's counts on the GPU
                moments = getattr(torch, self.config.adam_moment_dtype)  # which may be another than what was saved
                self.optimizer.state[master] = {
                    "step": step if on_host else step.to(master.device),
                    **{key: value.to(master.device, moments) for key, value in values.items()},
                }
        numbers = json.loads((state / "learner.json").read_text())
        self.updates, self.policy_version = numbers["updates"], numbers["policy_version"]
        start = numbers.get("router_start")
        self.router_start = None if start is None else torch.tensor(start, device=self.policy.model.device)
        return self.policy_version


def nll_loss(hidden: torch.Tensor, head_weight: torch.Tensor, rows: PackedBatch) -> tuple[torch.Tensor, Stats]:
    """Next-token loss of supervised stages: minus the weighted log-probabilities of the targets."""
    logprobs, entropy = token_logprobs(hidden[rows.source], head_weight, rows.target)
    stats = {"sum/nll": -logprobs.detach().sum(), "sum/rows": torch.tensor(len(logprobs)), "sum/entropy": entropy.sum()}
    return -(logprobs * rows.weights).sum(), stats


def _policy(model: AnyModel, auxiliary: AuxiliaryLosses | None = None, checkpointing: bool = False) -> Policy:
    if isinstance(model, DeepseekV3PreTrainedModel):
        return DeepseekV3Policy(model, auxiliary, checkpointing)
    return AutoPolicy(model, checkpointing)


def _sum(stats: Iterable[Stats]) -> Stats:
    """`sum/...` added up and `max/...` maximised."""
    total: Stats = {}
    for stat in stats:
        for key, value in stat.items():
            if key in total:
                value = torch.maximum(total[key], value) if key.startswith("max/") else total[key] + value
            total[key] = value
    return total


def _combine(updates: Sequence[Stats], total: Stats) -> dict[str, float]:
    """Metrics under TRL's names, means over the tokens of a step, from each update's statistics and their total."""
    stats = {key: float(value) for key, value in total.items() if value.dim() == 0}
    tokens, rows = max(stats["sum/tokens"], 1.0), max(stats["sum/rows"], 1.0)
    low, high = stats["sum/clip_low"] / tokens, stats["sum/clip_high"] / tokens
    metrics = {
        "entropy": stats["sum/entropy"] / rows,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        # against the rollout's numbers the first update alone counts: later ones have moved on
        "sampling/sampling_logp_difference/mean": float(updates[0]["sum/logp_difference"])
        / max(float(updates[0]["sum/current"]), 1.0),
        "sampling/sampling_logp_difference/max": float(updates[0]["max/logp_difference"]),
    }
    if "sum/routed" in stats:
        differ, routed = (float(updates[0][f"sum/{key}"]) for key in ("routes_differ", "routed"))
        metrics["sampling/routes_differ"] = differ / max(routed, 1.0)
    if "sum/kl" in stats:
        metrics["kl"] = stats["sum/kl"] / tokens
    if "sum/is_ratio" in stats:
        metrics["sampling/importance_sampling_ratio/mean"] = stats["sum/is_ratio"] / tokens
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
