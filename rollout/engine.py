"""The engine protocol, and how to build one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from model import DeepseekV3ForCausalLM
from model.family import load_model
from model.fp8.modules import to_fp8
from rollout.records import Completion, Rerouted, SamplingParams


class Engine(Protocol):
    """Tokens in, completions out. An engine samples with whole versions of the weights only."""

    policy_version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt, in order. `params` is one for all prompts or one for each.

        Raises ValueError that names the prompt when one is malformed or too long; then nothing was sampled.
        """
        ...

    def add_request(self, prompt: Sequence[int], params: SamplingParams, begun: Sequence[Completion] = ()) -> int:
        """Queues a prompt and returns its number. Raises ValueError for a bad one; other requests are not touched.

        `begun`: its samples as `abort` returned them, perhaps under older weights. Unfinished ones go on after their
        tokens, whose cache the engine's weights compute anew, by draws that are a function of (seed, position).
        """
        ...

    def step(self) -> dict[int, list[Completion]]:
        """Goes on with what is queued, a token or so each; returns the requests that are complete."""
        ...

    def abort(self) -> dict[int, list[Completion]]:
        """Forgets every unfinished request; returns its samples as far as they got."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, base: int | None = None) -> None:
        """Takes over a complete set of (published name, tensor); from then on completions carry `version`.

        With `base`, what changed since that version, which the engine must hold (or hold `version` itself); then
        tensors that are loaded as one (model.names.load_unit) come together. Raises ValueError otherwise.
        """
        ...


@runtime_checkable
class Checked(Protocol):
    """An engine with a runtime of its own, which can prove that it computes with the weights it was given.

    Both raise WeightFault.
    """

    def check_weights(self, weights: Sequence[tuple[str, Any]]) -> None:
        """Every tensor of the last load, as it lies in the engine."""
        ...

    def check_canary(self, prompts: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> Rerouted | None:
        """The engine's log-probabilities of the prompts' tokens but the first, against the learner's. What only the
        learner can judge comes back."""
        ...


@runtime_checkable
class Sleeping(Protocol):
    """An engine that can give back its GPU memory while it does not sample."""

    def sleep(self, level: int) -> None:
        """1: the cache, and weights to host memory; 2: both are dropped, and the next load must be whole."""
        ...

    def wake_up(self, tags: Sequence[str]) -> None:
        """`weights` before a load, `kv_cache` after it."""
        ...


@runtime_checkable
class Speculating(Protocol):
    """An engine that may draft tokens with an MTP layer."""

    def speculated(self) -> dict[str, float]:
        """{"drafted", "accepted"} tokens since the last call; nothing where it does not speculate."""
        ...


@runtime_checkable
class Adapted(Protocol):
    """An engine that may sample with an adapter on its weights: tensors under PEFT's names, loaded like the others."""

    why_merged: str  # what keeps it from that; empty: nothing


@runtime_checkable
class Quantized(Protocol):
    """An engine that may keep matrices in FP8, and then takes them so: codes, and scales of 128 x 128 blocks."""

    fp8_names: frozenset[str]  # published names of those matrices


def build_engine(model_or_dir: Any, engine: str = "embedded", **options: Any) -> Engine:
    """An engine over a model (model.family.AnyModel) or a HF directory.

    Options of "embedded": max_num_seqs, page_size, num_pages, exact, enable_return_routed_experts, eos_token_ids; of a
    directory dtype, device, and fp8 and fp8_recipe (model.fp8.modules.to_fp8). A model of another architecture than
    DeepSeek-V3 gets a plain engine over transformers, which has no pages and returns no experts. Options of "vllm" (a
    directory only): see rollout.vllm_engine. Raises ValueError for an unknown engine.
    """
    if engine == "vllm":
        from rollout.vllm_engine import VllmEngine

        if not isinstance(model_or_dir, str | Path):
            raise ValueError("vLLM reads a model from a directory; save_pretrained it first")
        return VllmEngine(model_or_dir, **options)
    if engine != "embedded":
        raise ValueError(f"rollout.engine is {engine!r}; the engines are 'embedded' and 'vllm'")
    dtype, device = options.pop("dtype", None), options.pop("device", "cpu")
    fp8, recipe = options.pop("fp8", "off"), options.pop("fp8_recipe", "blockwise")
    if isinstance(model_or_dir, str | Path):
        model_or_dir = load_model(model_or_dir, dtype, device)
        to_fp8(model_or_dir, fp8, recipe)
    if not isinstance(model_or_dir, DeepseekV3ForCausalLM):
        from rollout.auto_engine import AutoEngine

        if options.pop("enable_return_routed_experts", False):
            raise ValueError(f"routes of {type(model_or_dir).__name__} are not recorded; only those of DeepSeek-V3 are")
        paged = ("page_size", "num_pages")
        return AutoEngine(model_or_dir, **{key: value for key, value in options.items() if key not in paged})
    from rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(model_or_dir, **options)
