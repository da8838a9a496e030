"""vLLM as the rollout engine: token ids in, completions out, in this process, stepped by us.

Every sample is a request of its own with a seed of its own, so a draw does not depend on what else is in the batch.
vLLM's worker gets rollout/vllm_worker.py beside it, which takes over weights and records what vLLM does not return.
One engine a process: vLLM's process groups and its random state are the process's.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.family import eos_token_ids, published_shapes, read_config
from model.fp8.quantize import scale_shape
from model.lora import adapter_shapes
from model.names import SCALE_SUFFIX, load_unit
from rollout import vllm_fp8, vllm_lora
from rollout.draws import sample_seeds, seed_of
from rollout.records import (
    Completion,
    Rerouted,
    SamplingParams,
    WeightFault,
    begun_samples,
    check_base,
    check_prompt,
    complete,
)
from rollout.vllm_start import engine_options, has_gpu, load_vllm


class VllmEngine:
    """See rollout.engine.Engine. ValueError: vLLM is not installed, or it refuses the model."""

    def __init__(
        self,
        model_dir: str | Path,
        dtype: str = "auto",
        max_num_seqs: int = 256,
        max_model_len: int = 0,
        enable_return_routed_experts: bool = False,
        kv_cache_gb: float = 0.0,
        speculative_tokens: int = 0,
        lora: Mapping[str, Any] | None = None,
        sleep_mode: bool = False,
        **options: Any,
    ) -> None:
        """max_model_len 0: the model's. kv_cache_gb 0: a share of the memory on a GPU, 1 on a CPU. speculative_tokens:
        drafted at a time by the model's MTP layer. lora: fields of peft's LoraConfig of an adapter that will be pushed,
        if that is possible (`why_merged`). sleep_mode: `sleep` can be called. `options` go to vllm.LLM as they are.
        """
        LLM = load_vllm().LLM
        on_cpu = not has_gpu()
        defaults = engine_options(kv_cache_gb, max_model_len, enable_return_routed_experts, sleep_mode)
        self.speculative_tokens = speculative_tokens
        self.published = published_shapes(Path(model_dir))
        if speculative_tokens:
            if not any(".eh_proj." in name for name in self.published):
                raise ValueError(f"{str(model_dir)!r} has no MTP layer to draft with; set speculative_tokens to 0")
            defaults["speculative_config"] = {"method": "mtp", "num_speculative_tokens": speculative_tokens}
        self.lora = self._room_for(lora, Path(model_dir), dtype, options)
        if self.lora is not None:
            defaults |= vllm_lora.engine_options(self.lora["r"])
        vllm_fp8.keep_scales()
        in_fp8 = vllm_fp8.engine_options(options, self.published)
        self.lora_request: Any = None  # once an adapter has been loaded
        try:
            self.llm = LLM(
                str(model_dir),
                dtype=dtype,
                max_num_seqs=max_num_seqs,
                skip_tokenizer_init=True,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                worker_extension_cls="rollout.vllm_worker.WorkerExtension",
                **{**defaults, **(in_fp8 or options)},
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"vLLM does not take {str(model_dir)!r}: {' '.join(str(error).split())[:400]}") from error
        self.engine = self.llm.llm_engine
        config = self.engine.model_config
        self.max_model_len = int(config.max_model_len)
        self.vocab_size = int(config.get_vocab_size())
        self.eos_token_ids = eos_token_ids(model_dir)
        self.return_routed_experts = enable_return_routed_experts
        self.dense_layers = int(getattr(config.hf_config, "first_k_dense_replace", 0))
        if getattr(config.hf_config, "tie_word_embeddings", False):  # some checkpoints hold the copy all the same
            self.published.pop("lm_head.weight", None)
        self.policy_version = 0
        self.whole = True  # False once a load has failed: the weights are then of two versions
        self._next_id = 0
        # what add_request took and step has not returned: how to sample it, and its samples so far
        self.open: dict[int, tuple[SamplingParams, list[Completion]]] = {}
        self.rpc("watch", enable_return_routed_experts and on_cpu)
        # what comes as codes and scales; codes stand in it under the name of their matrix
        found: list[set[str]] = self.llm.collective_rpc("fp8_names", args=(list(self.published),))
        self.fp8_names = frozenset().union(*found)
        self.published |= {name + SCALE_SUFFIX: scale_shape(self.published[name]) for name in self.fp8_names}
        if in_fp8 and options.get("load_format") != "dummy":
            self.rpc("load_directory", str(model_dir), self.fp8_names)

    def _room_for(
        self, lora: Mapping[str, Any] | None, model_dir: Path, dtype: str, options: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """The adapter, whose tensors then are published ones too; None with `why_merged` where it cannot be had."""
        self.why_merged = "" if lora is not None else "rollout.lora is merged"
        if lora is None:
            return None
        config = read_config(model_dir)
        shapes = adapter_shapes(config, lora)
        names = [*self.published, *shapes]
        self.why_merged = vllm_lora.why_merged(config, names, lora, dtype, options, on_cpu=not has_gpu())
        if self.why_merged:
            return None
        self.published |= shapes
        return dict(lora)

    def rpc(self, method: str, *args: Any) -> Any:
        """Calls a method of the worker extension."""
        return self.llm.collective_rpc(method, args=args)[0]

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See rollout.engine.Engine."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(
                f"{len(each)} SamplingParams for {len(prompts)} prompts; give one for all, or one for each"
            )
        for number, (prompt, wanted) in enumerate(zip(prompts, each)):
            self._check(prompt, wanted, f"prompt {number}")  # all of them before any work
        ids = [self.add_request(prompt, wanted) for prompt, wanted in zip(prompts, each)]
        results: dict[int, list[Completion]] = {}
        try:
            while len(results) < len(ids):
                results |= self.step()
        except BaseException:
            self.abort()
            raise
        return [results[number] for number in ids]

    def add_request(self, prompt: Sequence[int], params: SamplingParams, begun: Sequence[Completion] = ()) -> int:
        """See rollout.engine.Engine. A sample that goes on after k tokens has the draws of (its seed, k)."""
        self._check(prompt, params, "the prompt")
        samples = begun_samples(begun, params)
        number = self._next_id
        self._next_id += 1
        self.open[number] = params, samples
        seed = secrets.randbits(63) if params.seed is None else params.seed
        for index, (own, sample) in enumerate(zip(sample_seeds(seed, params.n), samples)):
            if sample.finish_reason == "abort":
                start = len(sample.token_ids)
                # vLLM counts draws from a request's start: the same seed would draw the first tokens' numbers again
                wanted = self._params(params, seed_of(int(own), start) if start else int(own) >> 1, start)
                ids = {"prompt_token_ids": [*prompt, *sample.token_ids]}
                self.engine.add_request(f"{number}.{index}", ids, wanted, lora_request=self.lora_request)
        return number

    def step(self) -> dict[int, list[Completion]]:
        """See rollout.engine.Engine."""
        assert self.engine.has_unfinished_requests(), "vLLM lost a sample: it has nothing left to do"
        done: dict[int, list[Completion]] = {}
        for output in self.engine.step():
            if output.finished:
                number, index = map(int, output.request_id.split("."))
                params, samples = self.open[number]
                samples[index] = self._completion(output, params, samples[index])
                if complete(samples):
                    done[number] = samples
                    del self.open[number]
        return done

    def abort(self) -> dict[int, list[Completion]]:
        """See rollout.engine.Engine. vLLM tells nothing of a request that it aborts, so its state is read before."""
        stopped = {number: samples for number, (_, samples) in self.open.items()}
        processor, names = self.engine.output_processor, []
        for number, (params, samples) in self.open.items():
            for index, sample in enumerate(samples):
                if sample.finish_reason == "abort":
                    names.append(name := f"{number}.{index}")
                    kept = self.rpc("drop", name)
                    for own in processor.external_req_ids.get(name, ()):
                        state = processor.request_states[own]
                        tokens = tuple(state.detokenizer.output_token_ids)
                        numbers = _numbers(state.logprobs_processor.logprobs, tokens, kept, params)
                        samples[index] = sample.extended(tokens, *numbers, "abort", self.policy_version)
        self.engine.abort_request(names)
        self.open = {}
        return stopped

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, base: int | None = None) -> None:
        """See rollout.engine.Engine."""
        weights = list(weights)
        if base is not None and not self.whole:
            raise ValueError("the last load of weights failed half-way; load a whole version first")
        check_base(self.policy_version, version, base)
        self._check_names(weights, partial=base is not None)
        self.whole = False
        _, adapter = vllm_lora.apart(weights)
        if adapter:  # on the base that vLLM has read: check_weights says whether it is the learner's
            self.rpc("load_adapter", adapter, self.lora)
            self.lora_request = vllm_lora.request()
        elif weights:
            self.rpc("load", weights)
        self.llm.reset_prefix_cache()
        self.policy_version, self.whole = version, True

    def check_weights(self, weights: Sequence[tuple[str, Any]]) -> None:
        """See rollout.engine.Checked."""
        base, adapter = vllm_lora.apart(weights)
        found = self.rpc("faults", base)
        if self.lora is not None and adapter:
            found += self.rpc("adapter_faults", adapter, self.lora["lora_alpha"] / self.lora["r"])
        if found:
            self.whole = False
            raise WeightFault(f"weights of version {self.policy_version} in vLLM: {found[0]}{_more(found)}")

    def check_canary(self, prompts: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> Rerouted | None:
        """See rollout.engine.Checked. Caps: float32 1e-4 at most, lower precisions 5e-2 on average, and 0.4 where vLLM
        computes in FP8 (seen with random weights: 0.11 at 4 layers of Moonlight, 0.27 at 27). Below float32, routers
        with near ties choose other experts here than in the learner: where routes are recorded, the learner judges with
        them what passes its cap.
        """
        got, routes = self.read_prompts(prompts)
        errors = np.abs(np.concatenate([np.subtract(a, b) for a, b in zip(got, logprobs, strict=True)]))
        exact = self.engine.model_config.dtype.itemsize == 4
        lower = 5e-2 if self.engine.model_config.quantization is None else 0.4
        error, cap = (errors.max(), 1e-4) if exact else (errors.mean(), lower)
        if error <= cap:
            return None
        if not exact and routes is not None and np.isfinite(error):
            return Rerouted(tuple(map(tuple, got)), tuple(routes), lower)
        self.whole = False
        raise WeightFault(
            f"canary prompts under version {self.policy_version}: log-probabilities of vLLM differ from the "
            f"learner's by {error:.2g} ({'at most' if exact else 'on average'} {cap:g} is allowed)"
            + ("" if exact else "; rollout.replay_routing would tell whether other experts are all the reason")
        )

    def sleep(self, level: int) -> None:
        """See rollout.engine.Sleeping."""
        assert not self.open, "an engine sleeps between generations only"
        self.whole = self.whole and level < 2
        self.llm.sleep(level=level)

    def wake_up(self, tags: Sequence[str]) -> None:
        """See rollout.engine.Sleeping."""
        self.llm.wake_up(tags=list(tags))

    def speculated(self) -> dict[str, float]:
        """See rollout.engine.Speculating."""
        return self.rpc("speculated") if self.speculative_tokens else {}

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[float]], list[np.ndarray] | None]:
        """By a forward pass of the engine: log-softmax(logits) of each prompt's tokens but the first, and where they
        are recorded the experts of its tokens # [tokens, MoE layers, K].
        """
        from vllm import SamplingParams as VllmParams  # pyright: ignore[reportMissingImports]

        wanted = VllmParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        given = [{"prompt_token_ids": list(p)} for p in prompts]
        outputs = self.llm.generate(given, wanted, use_tqdm=False, lora_request=self.lora_request)
        logprobs = [
            [entry[token].logprob for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])]
            for out in outputs
        ]
        routes = [self._routes(out, self.rpc("pop", out.request_id)) for out in outputs]
        return logprobs, None if any(r is None for r in routes) else [r for r in routes if r is not None]

    def _check(self, prompt: Sequence[int], params: SamplingParams, name: str) -> None:
        if not self.whole:
            raise ValueError("the last load of weights failed half-way; load a whole version before sampling")
        if self.speculative_tokens and params.temperature > 0 and _truncates(params):
            raise ValueError(
                f"{name} is to be sampled with top_p, top_k or min_p, and speculative_tokens is "
                f"{self.speculative_tokens}: what they keep of an accepted draft is not known; leave them out"
            )
        check_prompt(name, prompt, params, self.vocab_size, self.max_model_len)

    def _check_names(self, weights: Sequence[tuple[str, Any]], partial: bool) -> None:
        """ValueError unless these are the checkpoint's tensors, each once; parts of a layer would load as garbage.

        partial: those of some load units, each of them whole.
        """
        given: dict[str, Any] = {}
        for name, tensor in weights:
            if name in given:
                raise ValueError(f"{name} was given twice: each tensor may come once per load")
            shape = self.published.get(name)
            if shape is None:
                raise ValueError(f"{name} is no tensor of the model that the engine was built from")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; the engine's model has {shape}")
            if name.endswith("e_score_correction_bias") and tensor.dtype.itemsize != 4:
                raise ValueError(f"{name} came as {tensor.dtype}; the router's bias must be float32")
            if (name in self.fp8_names) != (tensor.dtype.itemsize == 1):
                raise ValueError(
                    f"{name} came as {tensor.dtype}; the engine keeps {len(self.fp8_names)} matrices in "
                    f"FP8, and this is {'one' if name in self.fp8_names else 'none'} of them"
                )
            given[name] = tensor
        units = {load_unit(name): name for name in given}
        for name in self.published:
            if name not in given and not partial:
                raise ValueError(f"{name} is missing: a load takes every tensor of the model")
            if name not in given and load_unit(name) in units:
                raise ValueError(f"{name} is missing: it must come together with {units[load_unit(name)]}")

    def _params(self, params: SamplingParams, seed: int, start: int) -> Any:
        """vLLM's, for a sample that has `start` tokens."""
        from vllm import SamplingParams as VllmParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        stop = sorted({*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)})
        return VllmParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p,
            max_tokens=params.max_tokens - start,
            seed=seed,
            stop_token_ids=stop,
            ignore_eos=True,  # vLLM knows one end token of its own; ours are all in stop_token_ids
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any, params: SamplingParams, begun: Completion) -> Completion:
        [sample] = output.outputs
        tokens = tuple(sample.token_ids)
        record = self.rpc("pop", output.request_id)
        routes = self._routes(output, record)
        numbers = _numbers(sample.logprobs, tokens, record["log_support"], params)
        reason = "stop" if sample.finish_reason == "stop" else "length"
        return begun.extended(tokens, *numbers, reason, self.policy_version, routes)

    def _routes(self, output: Any, record: dict[str, Any]) -> np.ndarray | None:
        """Experts of all tokens but the last # [prompt + T - 1, MoE layers, K], where they are recorded."""
        [sample] = output.outputs
        routes: np.ndarray | None = record["routes"]
        if routes is None and self.return_routed_experts:  # vLLM's own record has a row for dense layers too
            routes = sample.routed_experts[:, self.dense_layers :]
        return None if routes is None else routes[: len(output.prompt_token_ids) + len(sample.token_ids) - 1]


def _numbers(
    reported: Any, tokens: Sequence[int], kept: Sequence[float], params: SamplingParams
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(logprobs, log_support) of drawn tokens, from vLLM's report, after truncation, and the worker's record."""
    drawn = tuple(float(value) for value in reported.logprobs)
    assert len(drawn) == len(tokens), f"{len(drawn)=} {len(tokens)=}"
    support = (0.0,) * len(tokens)
    if params.temperature > 0 and _truncates(params):
        support = tuple(kept[: len(tokens)])
    return tuple(a + b for a, b in zip(drawn, support)), support


def _truncates(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0 or params.min_p > 0


def _more(found: Sequence[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
