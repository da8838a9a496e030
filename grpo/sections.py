"""The sections of a configuration, each key with its unit and what 0 or null means. grpo/config.py puts them together.

Nothing here imports torch, so a bad key is found in a blink.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .formats import filled_in


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, validate_default=True)


class RunConfig(Section):
    """Where and how a run takes place."""

    name: str = ""
    """Name shown in logs; empty: the stem of the configuration file."""
    output_dir: str = ""
    """Run directory; empty: `runs/<stem of the configuration file>`."""
    overwrite: bool = False
    """Replace what is in output_dir."""
    cluster: str = "ray"
    """`inline`: one process; `ray`: a local Ray cluster; anything else: the address of a running one (`auto` too)."""
    placement: Literal["separate", "colocated"] = "separate"
    """On Ray: an actor for each role, or one actor that hosts all of them."""
    seed: int = 0
    """Seeds the model's initial weights, the order of the data and every draw."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each process. Results are bit-equal only between runs with the same number."""
    save_steps: int = Field(default=100, ge=0)
    """Steps between checkpoints; one is always written at the end. 0: only that one."""
    eval_steps: int = Field(default=50, ge=0)
    """Steps between greedy evaluations; there is always one at step 0 and at the end. 0: only those."""
    eval_reward: str = ""
    """Reward that evaluations count: an answer is right where it gives 1. Empty: the first one listed."""
    log_samples: int = Field(default=16, ge=0)
    """Samples a step written to samples.jsonl, whole groups first. 0: none."""
    alarms: dict[str, float] = Field(
        default_factory=lambda: {"router/max_violation": 4.0, "router/dead_experts": 0.25, "router/drift": 0.5}
    )
    """Metric -> threshold. The first step with a value above it gets a line of warning, in the report too. {}: none."""
    reward_workers: int = Field(default=2, ge=1)
    """Processes that run answer checkers and functions of your own."""
    reward_cache: str = ""
    """SQLite file that keeps the verdicts of rewards that run in workers, the sandbox or on a model. Empty: none."""
    max_restarts: int = Field(default=2, ge=0)
    """On Ray: how often dead rollout or reward actors are replaced before the run stops. A dead learner stops it."""


class LoraConfig(Section):
    """Low-rank adapters by peft, whose LoraConfig gives the names. Router, norms, embeddings and head take none."""

    r: int = Field(default=16, ge=1)
    """Rank of an adapter; each routed expert has its own."""
    lora_alpha: int = Field(default=32, ge=1)
    """Adapters are scaled by lora_alpha / r."""
    target_modules: list[str] = Field(default_factory=list)
    """Linear layers of the attention, by the end of their names, e.g. `o_proj`. The adapter's product is added to the
    layer's: cheaper than target_parameters, but in bfloat16 the learner then differs a little from the engines."""
    target_parameters: list[str] = Field(default_factory=list)
    """Matrices, by the end of their names, e.g. `self_attn.o_proj.weight`, `shared_experts.up_proj.weight`,
    `experts.gate_up_proj`. With target_modules empty too: all of attention, dense MLPs, shared and routed experts."""


class ModelConfig(Section):
    """The policy."""

    path: str = ""
    """HF model directory to start from."""
    init: str | dict[str, Any] | None = None
    """Instead of `path`: a model YAML (`grpo model init`), or its content, to start from random weights."""
    family: Literal["deepseek_v3", "auto"] = "deepseek_v3"
    """Architectures that the model may have. deepseek_v3: ours; auto: any causal language model of transformers, Qwen
    and Llama for instance (one of the DeepSeek-V3 family is ours still)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of computation. Master weights, gradients accumulated over micro-batches and the optimiser are always float32."""
    fp8: Literal["off"] = "off"
    """FP8 MoE updates."""
    gradient_checkpointing: bool = False
    """Recompute activations of each layer in the backward pass: less memory, about a third more time."""

    lora: LoraConfig | None = None
    """GRPO trains an adapter instead of the weights; the base is the KL reference. Supervised stages and the warm start
    train all weights. null: GRPO trains all weights."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.path and self.init is not None:
            raise ValueError("model.path and model.init are both given; keep one")
        return self


class DataConfig(Section):
    """Prompts to train on and to evaluate on."""

    path: str = ""
    """JSONL or Parquet file, or a directory saved by HF datasets."""
    format: Literal["", "trl", "verl", "openrlhf", "slime"] = ""
    """Whose data set it is: fills in the columns below that are not given. trl: prompt, completion, solution, and
    chosen and rejected; verl: prompt, reward_model.ground_truth; openrlhf: input, label; slime: prompt, label."""
    task: str = ""
    """Instead of `path`: name of a reasoning-gym task, generated on the spot, or `needle` (grpo/needle.py)."""
    task_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task generator."""
    size: int = Field(default=4000, ge=1)
    """Distinct problems drawn from the task. Files are read whole."""
    eval_path: str = ""
    """Held-out file of the same form as `path`; empty: a share of the data itself is held out."""
    holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share held out for evaluation where there is no eval_path, chosen by a hash of a problem's operands (the numbers
    in it, in any order) or of its text if it has none, so that no held-out operands appear in training. 0: none."""
    eval_size: int = Field(default=256, ge=0)
    """Held-out prompts of an evaluation. 0: all."""
    prompt_column: str = "prompt"
    """Column of the prompt: a string, or a list of chat messages. Dots lead into nested columns, as in the next."""
    answer_column: str = "answer"
    """Column of the gold answer, e.g. `answer` or `reward_model.ground_truth`."""
    answer_pattern: str = ""
    """Regular expression with one group that takes the gold answer out of its column, e.g. `#### (.+)` for GSM8K."""
    prompt_pattern: str = ""
    """Regular expression with one group: what it captures in the prompt becomes the prompt."""
    prompt_template: str = ""
    """Text around a string prompt, which stands for `{}`: OpenRLHF's input_template. Empty: none."""
    completion_column: str = ""
    """Column that SFT trains the model to answer with: a string, or one assistant message."""
    completion_template: str = ""
    """Instead of completion_column: built from the row's columns, e.g. `<answer>{answer}</answer>`."""
    text_column: str = "text"
    """Column that pretraining reads."""
    system_prompt: str = ""
    """Put first in chat prompts; makes a chat of a string prompt."""
    chat_template: Literal["auto", "on", "off"] = "auto"
    """Render prompts through the tokenizer's chat template: auto: only lists of messages (or with a system prompt)."""
    max_prompt_length: int = Field(default=0, ge=0)
    """Longer prompts are an error that names the row, unless drop_long_prompts. 0: what the context leaves."""
    drop_long_prompts: bool = False
    """Leave out prompts that are too long, with a count in the log, instead of stopping."""
    shuffle: bool = True
    """Visit the prompts in a new order (by run.seed) each epoch."""

    @model_validator(mode="before")
    @classmethod
    def _format(cls, given: Any) -> Any:
        return filled_in(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.path and self.task:
            raise ValueError("data.path and data.task are both given; keep one")
        for key in ("prompt_pattern", "answer_pattern"):
            pattern = getattr(self, key)
            try:
                groups = re.compile(pattern).groups
            except re.error as err:
                raise ValueError(f"data.{key} {pattern!r} is not a regular expression: {err}") from err
            if pattern and groups != 1:
                raise ValueError(f"data.{key} {pattern!r} must have exactly one (group); it has {groups}")
        template = self.prompt_template
        try:
            filled = [template.format(text) for text in ("a", "b")]
        except (ValueError, IndexError, KeyError, AttributeError):
            filled = []
        if template and len(set(filled)) < 2:
            raise ValueError(
                f"data.prompt_template {template!r} needs one {{}} where the prompt goes, and {{{{ for a plain {{"
            )
        return self


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """embedded: paged latents, continuous batching, on any device. vllm: vLLM in the same process, from an extra."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """vllm: further options of vllm.LLM, e.g. tensor_parallel_size, gpu_memory_utilization, quantization."""
    weight_check: Literal["full", "canary", "off"] = "full"
    """vllm, after each push of weights. full: every tensor as it lies in the engine, and log-probabilities of canary
    prompts; canary: these alone. A mismatch stops the run before a sample is drawn."""
    speculative_tokens: int = Field(default=0, ge=0)
    """vllm: tokens that the MTP layer drafts at a time and the policy then accepts or rejects; samples keep their
    distribution, and greedy its tokens. Not with top_p, top_k or min_p. 0: off."""
    delta_sync: bool = True
    """Leave out of a push the tensors that did not change since the version that the engines hold (an adapter's base,
    a frozen router, an untrained MTP layer). An engine that was replaced gets everything."""
    num_workers: int = Field(default=1, ge=1)
    """Engines. Groups stay together and go to the engine with the fewest outstanding tokens; with vllm or `exact` an
    engine gets as much as it decodes at a time, and more as soon as it has room."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the learner's log-probabilities use the same."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling. 1: off."""
    top_k: int = Field(default=0, ge=-1)
    """Sample among the k likeliest tokens. 0 or -1: off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop tokens below this share of the likeliest token's probability. 0: off."""
    max_completion_length: int = Field(default=256, ge=1)
    """Tokens a completion may have."""
    exact: bool = False
    """Bitwise the same draw whatever else is in the batch, at some cost in speed: every row is a product of its own."""
    replay_routing: bool = False
    """The learner routes each token to the experts it had in the rollout (gate weights are recomputed)."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences decoded at a time by an engine."""
    page_size: int = Field(default=16, ge=1)
    """Tokens in a cache page."""
    num_pages: int = Field(default=0, ge=0)
    """Cache pages of an engine. 0: enough for max_num_seqs sequences of the longest length asked for."""


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
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm. 0: no clipping."""


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
