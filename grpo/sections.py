"""The sections of a configuration, each key with its unit and what 0 or null means. grpo/config.py puts them together.

Those about training are in grpo/training_sections.py.

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
    """On Ray: an actor for each role, or one actor that hosts all of them and has the GPUs of the largest."""
    learner_gpus: float = Field(default=1.0, gt=0, le=1)
    """On Ray with GPUs: what the learner's actor asks for. Below 1: a share, of a GPU with others that ask for one."""
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
    """Of computation. Master weights and gradients accumulated over micro-batches are always float32; for AdamW's
    moments see adam_moment_dtype."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner and the embedded engine compute. auto: on a GPU where torch sees one."""
    fp8: Literal["off", "emulate", "on"] = "off"
    """FP8 products in attention's linear layers, MLPs and experts, forward and backward, whose codes engines in FP8 get
    (docs/fp8.md). on: by kernels, on a GPU of compute capability 9.0 or higher; emulate: the same numbers in plain
    torch, anywhere."""
    fp8_recipe: Literal["blockwise", "blockwise_ue8m0", "mxfp8"] = "blockwise"
    """blockwise: DeepSeek-V3's, 1x128 tiles and 128x128 blocks with float32 scales; blockwise_ue8m0: with powers of
    two; mxfp8: tiles of 32 with powers of two, emulated only."""
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

    @model_validator(mode="after")
    def _fp8_fits(self) -> ModelConfig:
        if self.fp8 != "off" and self.lora is not None:
            raise ValueError(f"model.fp8 {self.fp8} trains all weights, model.lora an adapter; set one to its default")
        if self.fp8 != "off" and self.family != "deepseek_v3":
            raise ValueError(f"model.fp8 {self.fp8} needs model.family deepseek_v3, not {self.family}; set it to off")
        if self.fp8 == "on" and self.fp8_recipe == "mxfp8":
            raise ValueError("model.fp8_recipe mxfp8 is emulated only; set model.fp8 to emulate")
        return self

    @property
    def precision(self) -> tuple[str, ...]:
        """What tells one arithmetic from another, for cache keys."""
        return (self.dtype,) if self.fp8 == "off" else (self.dtype, self.fp8, self.fp8_recipe)


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
    gpus_per_worker: float | None = Field(default=None, gt=0)
    """On Ray with GPUs: what an engine's actor asks for; below 1: a share of one. null: vllm: tensor_parallel_size x
    pipeline_parallel_size of engine_options; embedded: 1, or none where model.device is cpu."""
    sleep_level: Literal[0, 1, 2] = 0
    """vllm on a GPU that it shares with the learner: what an engine gives back from the last sample of a step until the
    next weights. 1: its cache, and its weights wait in host memory; 2: both are dropped, and every push sends all
    tensors, whatever delta_sync says. 0: nothing."""
    weight_check: Literal["full", "canary", "off"] = "full"
    """vllm, after each push of weights. full: every tensor as it lies in the engine, and log-probabilities of canary
    prompts; canary: these alone. A mismatch stops the run before a sample is drawn."""
    lora: Literal["auto", "merged"] = "auto"
    """How engines get the adapter of model.lora. auto: as it is where vLLM can add it as the learner does, else merged;
    merged: always as part of the weights. A line at the start says which."""
    speculative_tokens: int = Field(default=0, ge=0)
    """vllm: tokens that the MTP layer drafts at a time and the policy then accepts or rejects; samples keep their
    distribution, and greedy its tokens. Not with top_p, top_k or min_p. 0: off."""
    delta_sync: bool = True
    """Leave out of a push the tensors that did not change since the version that the engines hold (an adapter's base,
    a frozen router, an untrained MTP layer). An engine that was replaced gets everything."""
    weight_transport: Literal["auto", "in_process", "object_store", "ipc", "broadcast", "disk"] = "auto"
    """How weights reach the engines. in_process: the learner's tensors themselves, where one process hosts both.
    object_store: host memory that Ray shares. ipc: memory of the GPU that learner and engine share. broadcast: NCCL
    between GPUs, gloo on CPUs. disk: files in weight_dir. auto: in_process where it can be, else object_store."""
    weight_dir: str = ""
    """disk: a directory of this run alone that all hosts see. Empty: `<run.output_dir>/weights`."""
    broadcast_timeout: float = Field(default=60.0, gt=0)
    """broadcast: seconds that learner and engines wait for one another. An engine that died costs a push as much."""
    num_workers: int = Field(default=1, ge=1)
    """Engines. Groups stay together and go to the engine with the fewest outstanding tokens; with vllm or `exact` an
    engine gets as much as it decodes at a time, and more as soon as it has room."""
    over_sampling_batch_size: int = Field(default=0, ge=0)
    """Prompts under way at a time. Above grpo.prompts_per_step (partial rollouts; the name is slime's) a step ends as
    soon as it has prompts_per_step whole groups; the others are stopped and go first in the next step, on from their
    tokens under the new weights. 0: every step waits for all of its samples."""
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
