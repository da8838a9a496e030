"""The sections about training: supervised stages, reward models, distillation, context extension, and GRPO itself.

The base class and the other sections are in grpo/sections.py.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .sections import Section

MAX_BETA2_BF16 = 0.996  # a number of 8 bits that shrinks by less than 1/256 in a step may round back to itself


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    max_steps: int = Field(default=100, ge=1)
    """Optimiser steps."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after warm-up, down to lr_end_ratio of the peak at max_steps."""
    lr_end_ratio: float = Field(default=0.1, ge=0, le=1)
    """Last learning rate as a share of the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's, on matrices only."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's beta1."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's beta2."""
    adam_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of AdamW's moments between steps. bfloat16 halves their memory (8 to 4 bytes a weight), as DeepSeek-V3 did; beta2
    is then at most 0.996, as BF16 could not hold a slower decay."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm. 0: no clipping."""

    @model_validator(mode="after")
    def _moments_can_decay(self) -> Self:
        if self.adam_moment_dtype == "bfloat16" and self.adam_beta2 > MAX_BETA2_BF16:
            raise ValueError(
                f"adam_beta2 {self.adam_beta2} is above {MAX_BETA2_BF16}, too slow a decay for adam_moment_dtype "
                "bfloat16; lower it, or take float32"
            )
        return self


class SupervisedConfig(OptimizerConfig):
    """What training on given examples shares."""

    max_steps: int = Field(default=300, ge=1)
    """Optimiser steps."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(default=64, ge=1)
    """Samples (SFT), blocks (pretraining), pairs or labelled completions (reward models) a step."""
    max_tokens_per_microbatch: int = Field(default=16384, ge=1)
    """Tokens in a micro-batch; a longer sample has one of its own."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the sequence-wise balance loss (DeepSeek-V3 eq. 17). 0: none."""
    router_bias_update_rate: float = Field(default=0.001, ge=0)
    """Auxiliary-loss-free balancing by the tokens of an update: change of a router bias in it. 0: frozen."""


class StageConfig(SupervisedConfig):
    """Supervised stages (`grpo sft`, `grpo pretrain`) and the warm start of `grpo train`."""

    block_size: int = Field(default=512, ge=2)
    """Pretraining: tokens in a block of packed text."""
    mtp_loss_weight: float = Field(default=0.1, ge=0)
    """Weight of the multi-token-prediction loss (DeepSeek-V3 eq. 25); it reaches the trunk. 0: none."""
    stop_accuracy: float = Field(default=0.0, ge=0, le=1)
    """SFT stops once the sampled accuracy on training prompts that SFT does not see passes this. 0: runs max_steps."""
    eval_every: int = Field(default=25, ge=1)
    """Steps between the checks of stop_accuracy."""


class RewardModelConfig(SupervisedConfig):
    """`grpo rewards train`: a reward model from preference pairs, or from completions with labels. run.eval_steps says
    how often it is evaluated on the held-out rows; rows that are too long follow data.drop_long_prompts."""

    loss_type: Literal["bradley_terry", "mse", "bce"] = "bradley_terry"
    """bradley_terry: -log sigmoid(score(chosen) - score(rejected) - margin) of a pair. Of a completion with a label:
    mse, squared error of the score; bce, cross-entropy of sigmoid(score) against a label from 0 to 1."""
    center_rewards_coefficient: float = Field(default=0.0, ge=0)
    """Weight of (score(chosen) + score(rejected))^2, which keeps scores around 0 (2312.09244, eq. 2). 0: none."""
    chosen_column: str = "chosen"
    """Column of the preferred completion: text, or a list of one assistant message."""
    rejected_column: str = "rejected"
    """Column of the other one."""
    margin_column: str = "margin"
    """Column of the difference of scores that a pair asks for. Rows without it ask for 0."""
    label_column: str = "label"
    """Column of the label; the completion is in data.completion_column (empty: `completion`)."""
    max_length: int = Field(default=0, ge=0)
    """Tokens of prompt and completion together; longer is an error, unless data.drop_long_prompts. 0: the context."""


class DistillConfig(Section):
    """`grpo distill`: rejection sampling of SFT data from a policy. A step samples a share of the prompts."""

    num_generations: int = Field(default=8, ge=1)
    """Samples for each prompt (G)."""
    threshold: float = Field(default=1.0, allow_inf_nan=False)
    """Answers whose total reward reaches this (to 1e-9) are accepted, if they ended by themselves and are not empty."""
    max_per_prompt: int = Field(default=1, ge=1)
    """Different accepted answers that are kept of a prompt at most, the shortest first (k)."""
    cap_mean_length: bool = True
    """Drop the longest of those until kept answers are on average no longer than accepted ones, in which prompts that
    are right more often (easy ones, with short answers) count more often. False: only within each prompt."""
    max_prompts: int = Field(default=0, ge=0)
    """Training prompts sampled, in the order of data.shuffle. 0: all."""
    prompts_per_step: int = Field(default=256, ge=1)
    """Prompts sampled, scored and written at a time: what a killed run loses at most."""

    @model_validator(mode="after")
    def _enough_samples(self) -> DistillConfig:
        if self.max_per_prompt > self.num_generations:
            raise ValueError(
                f"distill.max_per_prompt {self.max_per_prompt} is more than distill.num_generations "
                f"{self.num_generations}; lower it or sample more"
            )
        return self


class ExtendConfig(Section):
    """Context extension by YaRN (`grpo pretrain`), with needle-retrieval checks before and after."""

    factor: float = Field(default=4.0, gt=1)
    """Of the context: YaRN's s, the same in every phase."""
    original_length: int = Field(default=0, ge=0)
    """Tokens of the context that the model was trained with. 0: max_position_embeddings, or what its YaRN names."""
    phases: list[StageConfig] = Field(min_length=1)
    """Training stages, one after the other, as a rule at growing block_size."""
    check_size: int = Field(default=200, ge=1)
    """Needle prompts of a check, at either length."""


class GRPOConfig(OptimizerConfig):
    """The algorithm and its optimiser. Names are TRL's where TRL has one. A step is one rollout-and-update cycle."""

    max_steps: int = Field(default=100, ge=1)
    """Rollout-and-update cycles."""
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    """AdamW's beta2."""
    num_generations: int = Field(default=8, ge=2)
    """Samples in a group (G)."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts (groups) in a step."""
    minibatches_per_step: int = Field(default=1, ge=1)
    """Optimiser updates over the samples of a step, each on its own share of the prompts."""
    num_iterations: int = Field(default=1, ge=1)
    """Passes over the samples of a step (mu in the paper)."""
    max_tokens_per_microbatch: int = Field(default=16384, ge=1)
    """Tokens in a micro-batch; a group is only split where it is longer than that by itself."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term against the reference policy (the weights at the start). 0: no reference is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term (Schulman): k1 log-ratio, k2 half its square, k3 the unbiased positive one."""
    epsilon: float = Field(default=0.2, ge=0)
    """Ratios are clipped below at 1 - epsilon."""
    epsilon_high: float | None = Field(default=None, ge=0)
    """And above at 1 + epsilon_high (clip-higher; CISPO's cap is epsilon_high itself). null: epsilon."""
    delta: float | None = Field(default=None, gt=1)
    """Dual clip: upper bound on the ratio of samples with a negative advantage. null: none."""
    loss_type: Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo"] = "dapo"
    """How tokens are averaged over the samples of an update. grpo: mean over samples of each one's token mean; dr_grpo:
    sum over (samples x max_completion_length); bnpo, dapo: mean over tokens (normalisers are global here, so the two
    are one); cispo: mean over tokens of the clipped, detached ratio times log-probability."""
    advantage_estimator: Literal["grpo", "rloo"] = "grpo"
    """Baseline of a sample: the mean of its group, or of the others in it (leave-one-out)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the standard deviation within the group, within the batch, or not at all (Dr. GRPO)."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: normalise their weighted sum, or sum what each is after normalising within the group (GDPO)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios per token, or per sequence as their geometric mean (GSPO)."""
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    """Weight tokens by learner over rollout probability: truncated at the cap, or masked above it."""
    importance_sampling_cap: float = Field(default=3.0, gt=0)
    """Cap of the correction."""
    correct_truncation: bool = False
    """The correction takes the rollout's probability after top-p, top-k and min-p (logprobs - log_support)."""
    mask_truncated_completions: bool = False
    """Completions that ran into max_completion_length get no gradient (they stay in the group's baseline)."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and sample more prompts instead (DAPO)."""
    max_refills: int = Field(default=4, ge=0)
    """Extra rollouts of a step under dynamic sampling; after that the step takes what it has."""
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    """The run stops when a larger share of a step's samples could not be scored because of errors."""
    router_policy: Literal["frozen", "update", "rollout"] = "frozen"
    """What moves the bias that balances the experts. frozen: nothing, as in every recipe for this family. update: at
    each optimiser update, the tokens it trained on. rollout: once a step, the tokens that the rollout workers' experts
    got, i.e. prompts and completions of all samples drawn, also of those that dynamic sampling drops."""
    router_bias_update_rate: float = Field(default=0.001, gt=0)
    """gamma: how far an expert's bias moves at a time, up below the mean load, down above it. Not used when frozen."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the sequence-wise balance loss (DeepSeek-V3 eq. 17). 0: none."""
    mtp_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of the multi-token-prediction loss on the sampled tokens. 0: MTP layers stay as they are, at no cost."""
    mtp_detach: bool = True
    """The MTP loss trains the MTP layers only. false: it reaches the trunk, embedding and head, as in pretraining."""

    @model_validator(mode="after")
    def _divisible(self) -> GRPOConfig:
        if self.prompts_per_step % self.minibatches_per_step:
            raise ValueError(
                f"grpo.prompts_per_step {self.prompts_per_step} is not divisible by grpo.minibatches_per_step "
                f"{self.minibatches_per_step}; choose a multiple"
            )
        default = type(self).model_fields["router_bias_update_rate"].default
        if self.router_policy == "frozen" and self.router_bias_update_rate != default:
            raise ValueError(
                f"grpo.router_bias_update_rate is {self.router_bias_update_rate}, but grpo.router_policy is frozen; "
                "set it to update or rollout, or leave the rate out"
            )
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("grpo.epsilon_high is null; it is the cap of CISPO's ratio: set it, e.g. to 5")
        return self

    @property
    def updates_per_step(self) -> int:
        return self.minibatches_per_step * self.num_iterations
