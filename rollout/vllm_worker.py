"""What runs beside the model inside vLLM's worker: it takes over weights, and records what vLLM does not return.

vLLM mixes WorkerExtension into its Worker, so `self` has `model_runner`, `device` and `reload_weights`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollout import vllm_fp8, vllm_lora, vllm_proof


class WorkerExtension:
    """Methods called through collective_rpc."""

    model_runner: Any  # these are the Worker's
    device: torch.device
    vllm_config: Any
    reload_weights: Any
    model_config: Any

    def watch(self, routes: bool) -> None:
        """Start to record for each request the log of the mass that truncation keeps, and its tokens' experts."""
        self._support: dict[str, list[float]] = defaultdict(list)
        self._routes: dict[str, list[tuple[int, np.ndarray]]] | None = defaultdict(list) if routes else None
        self._speculated: dict[str, Any] = {"drafted": 0, "accepted": 0}
        self._watch_truncation()
        if routes:
            self._watch_routers()
        if self.model_runner.get_draft_model() is not None:
            self._watch_drafts()

    def pop(self, request: str) -> dict[str, Any]:
        """The record of a finished request: log_support [T], routes [prompt + T - 1, MoE layers, K] or None."""
        routes = None if self._routes is None else _assembled(self._routes.pop(request))
        return {"log_support": self._support.pop(request, []), "routes": routes}

    def drop(self, request: str) -> list[float]:
        """Forgets the record of a request that is aborted; returns its log_support."""
        if self._routes is not None:
            self._routes.pop(request, None)
        return self._support.pop(request, [])

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> int:
        """Takes over tensors under published names by vLLM's layerwise reload; returns how many.

        Those of MTP layers go to the draft model, where there is one: the policy's loader leaves them out.
        """
        self._load(lambda: iter(weights))
        return len(weights)

    def load_directory(self, directory: str, in_fp8: frozenset[str]) -> None:
        """The same with what a directory holds, which is read anew for each model."""
        self._load(lambda: vllm_fp8.read(Path(directory), in_fp8, self.device, self.model_config.dtype))

    def _load(self, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        with _packed_anew(self.model_runner.get_model()):
            self.reload_weights(weights_iterator=weights())
        if self.device.type == "cpu":
            self._repack_tied_head()
        draft, layers = self.model_runner.get_draft_model(), self._draft_layers()
        if draft is not None and (drafted := [pair for pair in weights() if pair[0].startswith(layers)]):
            self._load_draft(draft, drafted)

    def fp8_names(self, published: list[str]) -> set[str]:
        """What of these the engine keeps in FP8, its draft model included."""
        found = vllm_fp8.names(self.model_runner.get_model(), published)
        if (draft := self.model_runner.get_draft_model()) is not None:
            own = {vllm_proof.draft_name(name, self._draft_layers()): name for name in published}
            found |= {own[name] for name in vllm_fp8.names(draft, own)}
        return found

    def load_adapter(self, weights: list[tuple[str, torch.Tensor]], lora: dict[str, Any]) -> None:
        """Takes over an adapter under PEFT's names in place of the one before."""
        vllm_lora.load(self.model_runner, dict(weights), lora)

    def adapter_faults(self, weights: list[tuple[str, torch.Tensor]], scaling: float, limit: int = 8) -> list[str]:
        """The first `limit` lines of rollout.vllm_lora.faults for what was pushed."""
        with torch.inference_mode():
            return vllm_lora.faults(self.model_runner, dict(weights), scaling)[:limit]

    def _repack_tied_head(self) -> None:
        """A tied head gets no tensor of its own, so the copy that its kernel packed on a CPU would stay as it was."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if getattr(self.model_config.hf_config, "tie_word_embeddings", False) and head is not None:
            head.quant_method.process_weights_after_loading(head)

    def _load_draft(self, draft: Any, weights: list[tuple[str, torch.Tensor]]) -> None:
        from vllm.config import set_current_vllm_config  # pyright: ignore[reportMissingImports]
        from vllm.model_executor.model_loader import reload  # pyright: ignore[reportMissingImports]

        try:
            from vllm.model_executor.model_loader import mtp_validation  # pyright: ignore[reportMissingImports]

            in_parts = mtp_validation.disable_mtp_completeness_check
        except ImportError:  # earlier versions do not ask for every tensor
            in_parts = nullcontext
        with set_current_vllm_config(self.vllm_config), in_parts(), _packed_anew(draft):
            reload.initialize_layerwise_reload(draft)
            draft.load_weights(iter(weights))
            reload.finalize_layerwise_reload(draft, self.vllm_config.speculative_config.draft_model_config)

    def _draft_layers(self) -> tuple[str, ...]:
        config = self.model_runner.model_config.hf_config
        first, count = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
        return tuple(f"model.layers.{first + k}." for k in range(count))

    def speculated(self) -> dict[str, float]:
        """Drafted and accepted tokens since the last call."""
        counts = {key: float(value) for key, value in self._speculated.items()}
        self._speculated = {"drafted": 0, "accepted": 0}
        return counts

    def faults(self, weights: list[tuple[str, torch.Tensor]], limit: int = 8) -> list[str]:
        """The first `limit` lines of rollout.vllm_proof.faults for what was pushed."""
        pushed, draft = dict(weights), self.model_runner.get_draft_model()
        with torch.inference_mode():
            found = vllm_proof.faults(self.model_runner.get_model(), pushed)
            if draft is not None:
                found += vllm_proof.draft_faults(draft, pushed, self._draft_layers())
            return found[:limit]

    def _watch_truncation(self) -> None:
        runner, sampler = self.model_runner, self.model_runner.sampler
        draw = sampler.topk_topp_sampler.forward
        tempered: list[torch.Tensor] = []
        temper = sampler.apply_temperature

        def apply_temperature(logits: torch.Tensor, *args: Any) -> torch.Tensor:
            logits = temper(logits, *args)
            tempered[:] = [torch.logsumexp(logits, dim=-1)]
            return logits

        def forward(logits: torch.Tensor, generators: Any, k: Any, p: Any) -> Any:
            before = logits.clone() if tempered and self._truncates() else None
            result = draw(logits, generators, k, p)
            if before is not None and result[1] is not None:
                tokens = result[0].view(-1, 1).long()
                kept = before.gather(1, tokens)[:, 0] - tempered[0] - result[1].gather(1, tokens)[:, 0]
                half_read = runner.discard_request_mask.np  # prompts of which a part was read: nothing is drawn yet
                for request, value, skip in zip(runner.input_batch.req_ids, kept.tolist(), half_read):
                    if not skip:
                        self._support[_outer(request)].append(value)
            return result

        sampler.apply_temperature, sampler.topk_topp_sampler.forward = apply_temperature, forward

    def _watch_drafts(self) -> None:
        if self.device.type == "cpu":
            from vllm.v1.sample import rejection_sampler  # pyright: ignore[reportMissingImports]

            rejection_sampler.expand_batch_to_tokens = _expanded
        sampler = self.model_runner.rejection_sampler
        judge = sampler.forward

        def forward(metadata: Any, *args: Any, **kwargs: Any) -> Any:
            output = judge(metadata, *args, **kwargs)
            kept = (output.sampled_token_ids != -1).sum() - len(output.sampled_token_ids)  # one of each row is no draft
            self._speculated["drafted"] += sum(metadata.num_draft_tokens)
            self._speculated["accepted"] += kept
            return output

        sampler.forward = forward

    def _watch_routers(self) -> None:
        runner = self.model_runner
        layers = [m for m in runner.get_model().modules() if hasattr(getattr(m, "router", None), "set_capture_fn")]
        seen: dict[int, torch.Tensor] = {}
        small = np.uint8 if runner.model_config.get_num_experts() <= 256 else np.int16
        for layer in sorted(layers, key=lambda module: module.layer_id):
            layer.router.set_capture_fn(lambda ids, place=layer.layer_id: seen.__setitem__(place, ids.detach().clone()))
        execute = runner.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            seen.clear()
            result = execute(scheduled, *args, **kwargs)
            if seen:
                ids = torch.stack([seen[place] for place in sorted(seen)], dim=1)  # [tokens, L_moe, K]
                ids = ids.cpu().numpy().astype(small)
                row, batch = 0, runner.input_batch
                for index, request in enumerate(batch.req_ids):
                    count = scheduled.num_scheduled_tokens.get(request, 0)
                    start = int(batch.num_computed_tokens_cpu[index])
                    self._routes[_outer(request)].append((start, ids[row : row + count]))  # type: ignore[index]
                    row += count
            return result

        runner.execute_model = execute_model

    def _truncates(self) -> bool:
        batch = self.model_runner.input_batch
        return not (batch.no_top_p and batch.no_top_k) or bool(self._min_p())

    def _min_p(self) -> Any:
        return any(getattr(processor, "min_p_count", 0) for processor in self.model_runner.input_batch.logitsprocs.all)


def _expanded(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """x [requests] for each of their drafted tokens.

    In place of vLLM's own, which on a CPU (0.32) writes floats into a copy: logits were divided by whatever lay in
    memory where the temperature belongs.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return torch.where(expanded == replace_from, replace_to, expanded)


@contextmanager
def _packed_anew(model: torch.nn.Module) -> Iterator[None]:
    """Lets a reload pack experts for their kernel: on a CPU that is done only while a layer has none yet."""
    kernels: dict[Any, Any] = {}
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                kernels[method], method.moe_kernel = method.moe_kernel, None
    try:
        yield
    finally:
        for method, kernel in kernels.items():
            if method.moe_kernel is None:  # a layer that got no weights
                method.moe_kernel = kernel


def _outer(request: str) -> str:
    """The id that was given to add_request; vLLM adds a suffix of its own."""
    return request.split("-")[0]


def _assembled(pieces: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """[tokens, L_moe, K] of pieces that start at these positions; what was computed again counts as it was last."""
    length = max(start + len(ids) for start, ids in pieces)
    routes = np.zeros((length, *pieces[0][1].shape[1:]), dtype=pieces[0][1].dtype)
    for start, ids in pieces:
        routes[start : start + len(ids)] = ids
    return routes
