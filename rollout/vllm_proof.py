"""Proof that vLLM computes with the weights that were pushed: every tensor, as it lies in the engine, after each push.

Where the engine keeps a tensor in its published layout the bytes are compared. Where it has repacked it for a kernel
(linear layers, experts, absorbed MLA products) fixed random rows go through the live kernel and the result is compared
with the product of the pushed tensor. A fault is a line that names tensor, layer and expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

ROWS = 8  # random rows of a probe
# largest error of a probe, over |row| |weight row|: rounding of the kernel's dtype, and far below one wrong element
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_FUSED = {
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}


def faults(model: torch.nn.Module, pushed: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What of `pushed` (published name -> tensor) the live model does not compute with, in the model's order."""
    for name, module in model.named_modules():
        if hasattr(module, "routed_experts"):
            yield from _experts(name, module.routed_experts, pushed)
        elif hasattr(module, "num_embeddings"):
            yield from _bytes(f"{name}.weight", module.weight, pushed)
        elif hasattr(module, "quant_method") and hasattr(module, "input_size"):
            yield from _linear(name, module, pushed)
            bias = getattr(module, "e_score_correction_bias", None)
            if bias is not None:
                yield from _bytes(f"{name}.e_score_correction_bias", bias, pushed)
        elif type(module).__name__.endswith("Norm") and hasattr(module, "weight"):
            yield from _bytes(f"{name}.weight", module.weight, pushed)
        if hasattr(module, "W_UK_T") and hasattr(module, "W_UV"):
            yield from _absorbed(name, module, pushed)


def _bytes(name: str, live: torch.Tensor, pushed: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if name not in pushed:
        return
    want = pushed[name].to(live.device)
    if name.endswith("e_score_correction_bias") and live.dtype != torch.float32:
        yield f"{name} lies in the engine as {live.dtype}; the router's bias must be float32"
    got = live.detach()[: len(want)]  # an embedding may be padded
    if not torch.equal(got, want.to(got.dtype)):
        if got.shape != want.shape:
            yield f"{name} has the shape {tuple(got.shape)} in the engine, not {tuple(want.shape)}"
            return
        row = int((got != want.to(got.dtype)).reshape(len(want), -1).any(1).nonzero()[0])
        yield f"{name} differs from what was pushed, first at row {row}"


def _rows(width: int, like: torch.Tensor) -> torch.Tensor:
    """[ROWS, width], the same on every call and machine."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(ROWS, width, generator=generator).to(like.device, like.dtype)


def _compare(name: str, got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Iterator[str]:
    """got [ROWS, out] against x @ weight.T, each element against the sizes of its row and its column."""
    weight = weight.to(x.device)
    want = x.double() @ weight.to(x.dtype).double().T
    size = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)[None] + 1e-30
    error = ((got.double() - want).abs() / size).nan_to_num(torch.inf).amax(0)
    limit = TOLERANCE.get(x.dtype, 1e-2)
    if got.shape != want.shape or bool((error > limit).any()):
        row = int((error > limit).nonzero()[0])
        yield f"{name} computes something else than what was pushed, first at row {row}"


def _linear(name: str, module: Any, pushed: Mapping[str, torch.Tensor]) -> Iterator[str]:
    stem, _, leaf = name.rpartition(".")
    names = [f"{stem}.{part}.weight" for part in _FUSED.get(leaf, (leaf,))]
    if leaf == "gate_up_proj" and f"{name}.weight" in pushed:
        names = [f"{name}.weight"]
    if not all(part in pushed for part in names):
        return
    x = _rows(module.input_size, pushed[names[0]].to(module_device(module)))
    out = module.quant_method.apply(module, x, None)
    start = 0
    for part in names:
        rows = len(pushed[part])
        yield from _compare(part, out[:, start : start + rows], x, pushed[part])
        start += rows


def _experts(name: str, experts: Any, pushed: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Every expert alone: ROWS tokens whose choice is fixed to it, with gate weight 1."""
    found = {int(m[1]) for key in pushed if (m := re.fullmatch(rf"{re.escape(name)}\.(\d+)\.down_proj\.weight", key))}
    if not found:
        return
    count = max(found) + 1
    first = pushed[f"{name}.0.gate_proj.weight"]
    device = next((p.device for p in experts.parameters() if p.numel()), first.device)
    x = _rows(first.shape[1], first.to(device))
    top_k = experts.moe_config.experts_per_token if hasattr(experts, "moe_config") else experts.top_k
    ids = (
        torch.arange(count, device=device)[:, None] + torch.arange(top_k, device=device)
    ) % count  # [E, K], own first
    ids = ids.repeat_interleave(ROWS, 0).to(getattr(experts.quant_method, "topk_indices_dtype", None) or torch.int32)
    weights = torch.zeros(len(ids), top_k, device=device)
    weights[:, 0] = 1.0
    out = experts.forward_modular(x.repeat(count, 1), weights, ids).view(count, ROWS, -1)
    for expert in sorted(found):
        gate, up, down = (pushed[f"{name}.{expert}.{part}_proj.weight"].to(device) for part in ("gate", "up", "down"))
        hidden = (F.silu(x.float() @ gate.float().T) * (x.float() @ up.float().T)).to(x.dtype)
        # through the kernel, rounding of the hidden layer reaches the output: a looser limit, still far below a swap
        want = hidden.double() @ down.double().T
        size = hidden.double().norm(dim=1)[:, None] * down.double().norm(dim=1)[None] + 1e-30
        error = ((out[expert].double() - want).abs() / size).nan_to_num(torch.inf).max()
        if float(error) > 3 * TOLERANCE.get(x.dtype, 1e-2):
            yield f"{name}.{expert}: this expert computes something else than what was pushed"


def _absorbed(name: str, module: Any, pushed: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """MLA's products of kv_b_proj: W_UK_T [heads, nope, latent] and W_UV [heads, latent, v]."""
    stem = name.rpartition(".")[0] if name.endswith(".attn") or name.endswith(".mla_attn") else name
    key = f"{stem}.kv_b_proj.weight"
    if key not in pushed or module.W_UK_T is None:
        return
    heads, nope, _ = module.W_UK_T.shape
    weight = pushed[key].to(module.W_UK_T.device, module.W_UK_T.dtype).view(heads, -1, pushed[key].shape[1])
    if not torch.equal(module.W_UK_T, weight[:, :nope]) or not torch.equal(
        module.W_UV, weight[:, nope:].transpose(1, 2)
    ):
        yield f"{key}: the absorbed products in the engine are not those of what was pushed"


def module_device(module: torch.nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
