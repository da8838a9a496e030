"""Proof that vLLM computes with the weights that were pushed: every tensor, as it lies in the engine, after each push.

Where the engine keeps a tensor in its published layout the bytes are compared. Whatever a kernel may have repacked
(linear layers, experts) is asked: fixed random rows go through the live kernel, and the result is compared with the
product of what was pushed. Nothing waits for the device until all checks are under way: on a GPU the proof costs about
as much as reading the weights twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

ROWS = 8  # random rows of a probe
# largest error of a probe, over |row| |weight row|: rounding of the kernel's dtype, and far below one wrong element
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FUSED = {
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
Pushed = Mapping[str, torch.Tensor]  # published name -> tensor
Check = tuple[list[str], torch.Tensor]  # what may be wrong, and [as many] bool that say whether it is


def faults(model: torch.nn.Module, pushed: Pushed) -> list[str]:
    """What of `pushed` the live model does not compute with, in the model's order: a line each, the name first."""
    checks = list(_checks(model, pushed))
    if not checks:
        return []
    device = checks[0][1].device
    wrong = torch.cat([flags.to(device).reshape(-1) for _, flags in checks]).tolist()
    return [line for line, bad in zip((line for lines, _ in checks for line in lines), wrong, strict=True) if bad]


def _checks(model: torch.nn.Module, pushed: Pushed) -> Iterator[Check]:
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    quantized = any(parameter.dtype.itemsize == 1 for parameter in model.parameters())
    for name, module in modules:
        name = name.removesuffix(".base_layer")  # of a layer with room for an adapter
        if hasattr(module, "lora_a_stacked"):
            continue  # the layer in it comes by itself
        if hasattr(module, "routed_experts"):
            yield from _experts(name, module.routed_experts, pushed)
        elif hasattr(module, "num_embeddings"):
            yield from _bytes(f"{name}.weight", module.weight, pushed)
            if name == "lm_head":
                tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
                yield from _head(module, pushed, "model.embed_tokens.weight" if tied else "lm_head.weight")
        elif hasattr(module, "quant_method") and hasattr(module, "input_size"):
            yield from _linear(name, module, pushed)
            bias = getattr(module, "e_score_correction_bias", None)
            if bias is not None:
                yield from _bytes(f"{name}.e_score_correction_bias", bias, pushed)
        elif isinstance(module, torch.nn.Linear) or (
            type(module).__name__.endswith("Norm") and hasattr(module, "weight")
        ):
            yield from _bytes(f"{name}.weight", module.weight, pushed)
        if getattr(module, "W_UK_T", None) is not None:
            yield from _absorbed(name, module, pushed, quantized)


def draft_faults(draft: torch.nn.Module, pushed: Pushed, layers: tuple[str, ...]) -> list[str]:
    """The same for the model that drafts: `layers` are the prefixes of the published MTP layers."""
    own = {}
    for name, tensor in pushed.items():
        for prefix in layers:
            rest = name.removeprefix(prefix)
            if rest == name:
                continue
            if rest.startswith("embed_tokens."):
                own[f"model.{rest}"] = tensor
            elif rest.startswith(("enorm.", "hnorm.", "eh_proj.", "shared_head.")):
                own[name] = tensor
            else:
                own[f"{prefix}mtp_block.{rest}"] = tensor
    return [f"draft model: {line.replace('.mtp_block.', '.')}" for line in faults(draft, own)]


def _differs(live: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    return (live != want.to(live.device, live.dtype)).any()


def _bytes(name: str, live: Any, pushed: Pushed) -> Iterator[Check]:
    if name not in pushed:
        return
    want = pushed[name]
    live = live.detach()[: len(want)]  # an embedding may be padded
    if live.shape != want.shape:
        yield [f"{name} has the shape {tuple(live.shape)} in the engine, not {tuple(want.shape)}"], torch.tensor(True)
        return
    if name.endswith("e_score_correction_bias"):  # it is float32 whatever the model is
        wrong = torch.tensor(live.dtype != torch.float32)
        yield [f"{name} lies in the engine as {live.dtype}; the router's bias must be float32"], wrong
    yield [f"{name} differs from what was pushed"], _differs(live, want)


def _rows(width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[ROWS, width], the same on every call."""
    return torch.randn(ROWS, width, generator=torch.Generator(device).manual_seed(width), device=device).to(dtype)


def _off(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Whether a probe's result is further from the product than rounding takes it. `size`: |row| |weight row|."""
    error = (got.float() - want.float()).abs() / (size.float() + 1e-30)
    return ~(error.amax(dim=(-2, -1)) <= factor * TOLERANCE.get(got.dtype, 1e-2))  # a NaN is a fault


def _linear(name: str, module: Any, pushed: Pushed) -> Iterator[Check]:
    stem, _, leaf = name.rpartition(".")
    names = [f"{stem}.{part}.weight" for part in FUSED.get(leaf, (leaf,))]
    if f"{name}.weight" in pushed:
        names = [f"{name}.weight"]
    if not all(part in pushed for part in names):
        return
    device = module.weight.device
    weights = [pushed[part].to(device) for part in names]
    x = _rows(module.input_size, device, weights[0].dtype)
    out = module.quant_method.apply(module, x, None)
    start = 0
    for part, weight in zip(names, weights):
        rows = slice(start, start := start + len(weight))
        # FP8 rounds rows and weights: in the shortest products (kv_b_proj, 512) that comes to 1e-2 now and then
        yield _product(part, out[:, rows], x, weight, factor=2.0 if module.weight.dtype.itemsize == 1 else 1.0)
        bias = f"{part.removesuffix('weight')}bias"
        if bias in pushed:
            yield from _bytes(bias, module.bias[rows], pushed)


def _head(module: Any, pushed: Pushed, source: str) -> Iterator[Check]:
    """By its kernel, which on a CPU has a packed copy; a head that is tied must compute with the embedding."""
    weight = pushed.get(source)
    if weight is not None:
        weight = weight.to(module.weight.device)
        x = _rows(weight.shape[1], weight.device, weight.dtype)
        out = module.quant_method.apply(module, x, None)
        yield _product("lm_head.weight", out[:, : len(weight)], x, weight)


def _product(name: str, got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factor: float = 1.0) -> Check:
    """got [ROWS, out] against x @ weight.T."""
    size = x.float().norm(dim=1, keepdim=True) * weight.norm(dim=1, dtype=torch.float32)
    return [f"{name} computes something else than what was pushed"], _off(got, F.linear(x, weight), size, factor)


def _experts(name: str, experts: Any, pushed: Pushed) -> Iterator[Check]:
    """Every expert alone: ROWS tokens that may choose no other, with gate weight 1."""
    count = 0
    while f"{name}.{count}.down_proj.weight" in pushed:
        count += 1
    if not count:
        return
    device = next(p.device for p in experts.parameters())
    gates, ups, downs = (
        [pushed[f"{name}.{e}.{part}_proj.weight"].to(device) for e in range(count)] for part in ("gate", "up", "down")
    )
    width = gates[0].shape[1]
    x = _rows(width, device, gates[0].dtype)
    top_k = experts.moe_config.experts_per_token
    ids = (torch.arange(count, device=device)[:, None] + torch.arange(top_k, device=device)) % count  # own first
    ids = ids.repeat_interleave(ROWS, 0).to(getattr(experts.quant_method, "topk_indices_dtype", None) or torch.int32)
    share = torch.zeros(len(ids), top_k, device=device)
    share[:, 0] = 1.0
    out = experts.forward_modular(x.repeat(count, 1), share, ids).view(count, ROWS, width)

    w13 = torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)  # [E, 2 * inner, width]
    w2 = torch.stack(downs)  # [E, width, inner]
    if device.type == "cuda" and experts.w13_weight.shape == w13.shape and experts.w13_weight.dtype == w13.dtype:
        other = (experts.w13_weight != w13).flatten(1).any(1) | (experts.w2_weight != w2).flatten(1).any(1)
        yield [f"{name}.{e}: this expert differs from what was pushed" for e in range(count)], other
    gate, up = torch.matmul(x, w13.transpose(1, 2)).chunk(2, dim=-1)  # [E, ROWS, inner]
    hidden = F.silu(gate) * up
    want = torch.bmm(hidden, w2.transpose(1, 2))
    size = hidden.norm(dim=2, keepdim=True, dtype=torch.float32) * w2.norm(dim=2, dtype=torch.float32)[:, None]
    lines = [f"{name}.{e}: this expert computes something else than what was pushed" for e in range(count)]
    yield lines, _off(out, want, size, factor=3.0)  # rounding of the hidden layer reaches the output


def _absorbed(name: str, module: Any, pushed: Pushed, quantized: bool) -> Iterator[Check]:
    """MLA's products of kv_b_proj: W_UK_T [heads, nope, latent] and W_UV [heads, latent, v]."""
    key = re.sub(r"\.(mla_attn|attn)(\..*)?$", "", name) + ".kv_b_proj.weight"
    if key not in pushed:
        return
    heads, nope, _ = module.W_UK_T.shape
    weight = pushed[key].to(module.W_UK_T.device).view(heads, -1, pushed[key].shape[1])
    pairs = ((module.W_UK_T, weight[:, :nope]), (module.W_UV, weight[:, nope:].transpose(1, 2)))
    # an engine that quantised kv_b_proj absorbs what it rounded it to; a wrong row is far beyond rounding
    gaps = [(live.float() - want.float()).norm(dim=(1, 2)) / want.float().norm(dim=(1, 2)) for live, want in pairs]
    wrong = torch.stack([~(gap <= (0.05 if quantized else 0.0)).all() for gap in gaps]).any()
    yield [f"{key}: the absorbed products in the engine are not those of what was pushed"], wrong
