"""Configuration of every command: pydantic models, one YAML with a section each, `--section.key=value` overrides.

`load_config` reads, overrides and checks; anything wrong is a ConfigError whose one line names key, value and remedy.
The sections and their keys are in grpo/sections.py and grpo/training_sections.py. Nothing here imports torch, so a bad
key is found in a blink.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from .overrides import ConfigError, YamlLoader, one_line, override
from .sections import DataConfig, LoraConfig, ModelConfig, RolloutConfig, RunConfig, Section
from .training_sections import (
    DistillConfig,
    ExtendConfig,
    GRPOConfig,
    RewardModelConfig,
    StageConfig,
    SupervisedConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "ExtendConfig",
    "GRPOConfig",
    "LoraConfig",
    "ModelConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "StageConfig",
    "SupervisedConfig",
    "digest",
    "load_config",
]


class Config(Section):
    """The whole configuration."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, Any] = Field(default_factory=dict)
    """Reward name -> its weight, or a mapping with `weight` and the reward's own options."""
    grpo: GRPOConfig = GRPOConfig()
    sft: StageConfig | None = None
    """`grpo sft`; before `grpo train` and `grpo distill` the warm start (kept under runs/.cache). null: none."""
    pretrain: StageConfig | None = None
    """`grpo pretrain`."""
    distill: DistillConfig | None = None
    """`grpo distill`."""
    reward_model: RewardModelConfig | None = None
    """`grpo rewards train`."""
    extend: ExtendConfig | None = None
    """`grpo pretrain` extends the context: of model.path, or of model.init after the `pretrain` section (kept under
    runs/.cache). null: it runs the `pretrain` section alone."""

    @field_validator("rewards")
    @classmethod
    def _rewards(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, options in value.items():
            if not isinstance(options, int | float | Mapping) or isinstance(options, bool):
                raise ValueError(
                    f"rewards.{name} is {options!r}; give a weight, or a mapping with `weight` and options"
                )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        for name, section in (("grpo", self.grpo), ("distill", self.distill)):
            if section is not None and section.num_generations > self.rollout.max_num_seqs:
                raise ValueError(
                    f"{name}.num_generations {section.num_generations} is more than rollout.max_num_seqs "
                    f"{self.rollout.max_num_seqs}; an engine samples a group at once: raise max_num_seqs"
                )
        if self.model.lora is not None and self.grpo.mtp_loss_weight > 0:
            raise ValueError(
                f"grpo.mtp_loss_weight {self.grpo.mtp_loss_weight} trains MTP layers, which get no adapter under "
                "model.lora; set one of the two to its default"
            )
        rollout, drafts = self.rollout, self.rollout.speculative_tokens
        if rollout.sleep_level and rollout.engine != "vllm":
            raise ValueError(
                f"rollout.sleep_level {rollout.sleep_level} needs rollout.engine vllm, not {rollout.engine}; "
                "set it to 0"
            )
        if drafts and rollout.engine != "vllm":
            raise ValueError(f"rollout.speculative_tokens {drafts} needs rollout.engine vllm, not {rollout.engine}")
        if drafts and (rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0):
            raise ValueError(
                f"rollout.speculative_tokens {drafts} does not go with top_p, top_k or min_p: vLLM does not tell what "
                "mass they kept of an accepted draft; leave them at their defaults"
            )
        if rollout.over_sampling_batch_size and rollout.over_sampling_batch_size < self.grpo.prompts_per_step:
            raise ValueError(
                f"rollout.over_sampling_batch_size {rollout.over_sampling_batch_size} is less than "
                f"grpo.prompts_per_step {self.grpo.prompts_per_step}, which a step needs; raise it, or 0 turns it off"
            )
        kind = rollout.weight_transport
        if kind in (("ipc", "broadcast") if self.one_process else ("in_process",)):
            where = "processes of their own" if self.one_process else "one process"
            raise ValueError(
                f"rollout.weight_transport {kind} is for learner and engines in {where}, but run.cluster is "
                f"{self.run.cluster} and run.placement is {self.run.placement}; leave it at auto"
            )
        if self.run.eval_reward and self.run.eval_reward not in self.rewards:
            raise ValueError(f"run.eval_reward {self.run.eval_reward!r} is not one of the rewards {list(self.rewards)}")
        return self

    @property
    def one_process(self) -> bool:
        """Whether one process hosts the learner and the engines."""
        return self.run.cluster == "inline" or self.run.placement == "colocated"

    @property
    def weight_transport(self) -> str:
        """rollout.weight_transport, with what `auto` comes to."""
        if self.rollout.weight_transport != "auto":
            return self.rollout.weight_transport
        return "in_process" if self.one_process else "object_store"

    def reward_weights(self) -> dict[str, float]:
        """Reward name -> weight."""
        return {
            name: float(given.get("weight", 1.0) if isinstance(given, Mapping) else given)
            for name, given in self.rewards.items()
        }

    def dump(self) -> str:
        """The resolved configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def digest(value: Any) -> str:
    """Short hash of a JSON-like value, for cache keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file (or takes a mapping), applies `--section.key=value` overrides and checks everything.

    Raises ConfigError. Names and paths that the file leaves empty are filled in from its stem.
    """
    if isinstance(source, Mapping):
        stem, content = "run", json.loads(json.dumps(source))
    else:
        path = Path(source)
        if not path.is_file():
            raise ConfigError(f"configuration file {str(path)!r} does not exist; see configs/ for examples")
        try:
            stem, content = path.stem, yaml.load(path.read_text(encoding="utf-8"), YamlLoader) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as err:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(err).split())}") from err
        if not isinstance(content, dict):
            raise ConfigError(f"{path} must be a mapping of sections, not {type(content).__name__}")
    for argument in overrides:
        override(content, argument, Config)
    try:
        config = Config.model_validate(content)
    except ValidationError as err:
        raise ConfigError(one_line(err, Config)) from err
    run = config.run.model_copy(
        update={"name": config.run.name or stem, "output_dir": config.run.output_dir or f"runs/{stem}"}
    )
    return config.model_copy(update={"run": run})
