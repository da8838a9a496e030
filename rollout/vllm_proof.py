"""Proof that vLLM computes with the weights that were pushed: every tensor, as it lies in the engine, after each push.

Where the engine keeps a tensor in its published layout the bytes are compared, FP8 codes and their scales included.
Whatever a kernel may have repacked (linear layers, experts) is asked: fixed random rows go through the live kernel, and
the result is compared with the product of what was pushed. Nothing waits for the device until all checks are under way:
on a GPU the proof costs about as much as reading the weights twice.

Probes of FP8 layers have rows that are E4M3 numbers times a power of two, the largest of each tile 448 times it: the
kernel casts them without an error, so only its sums and the rounding of its result are left (EXACT). Experts cast once
more, between their products; there a number near the edge of two codes may take the other one (EDGES).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from model.fp8.forms import Recipe
from model.fp8.quantize import BLOCK, dequantize_blocks
from model.fp8.reference import dequantize_rows, quantize_rows
from model.names import SCALE_SUFFIX

TILE = BLOCK[1]  # numbers of an activation that share a scale
ROWS = 8  # random rows of a probe
# largest error of a probe, over |row| |weight row|: rounding of the kernel's dtype, and far below one wrong element
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a result, over its size
EXACT = 3e-4  # of FP8 products whose operands are known, over |row| |weight row|: tensor cores keep 14 bits of a sum
EXPERTS = 16  # whose codes are multiplied out at a time
EDGES = 0.2  # the same of experts, over sqrt(I) more
FUSED = {
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
# kernels and backends of vLLM's: these repack what they get, and of experts only these take it as it is published
REPACKED = ("MarlinFP8ScaledMMLinearKernel", "HummingFP8ScaledMMLinearKernel", "CPUFp8BlockScaledMMKernel")
PLAIN = ("TRITON", "BATCHED_TRITON", "DEEPGEMM", "BATCHED_DEEPGEMM")
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
    own = {draft_name(name, layers): tensor for name, tensor in pushed.items() if name.startswith(layers)}
    return [f"draft model: {line.replace('.mtp_block.', '.')}" for line in faults(draft, own)]


def draft_name(name: str, layers: tuple[str, ...]) -> str:
    """A published name of an MTP layer as the drafting model has it."""
    prefix = next((prefix for prefix in layers if name.startswith(prefix)), "")
    rest = name.removeprefix(prefix)
    if not prefix or rest.startswith(("enorm.", "hnorm.", "eh_proj.", "shared_head.")):
        return name
    return f"model.{rest}" if rest.startswith("embed_tokens.") else f"{prefix}mtp_block.{rest}"


def _differs(live: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    if live.dtype.itemsize == 1:  # codes, of which a NaN equals itself
        live, want = live.view(torch.uint8), want.view(torch.uint8)
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


def _rows(width: int, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> torch.Tensor:
    """[ROWS, width], the same on every call; `fp8`: that a cast to FP8 with a scale a tile leaves as they are."""
    rows = torch.randn(ROWS, width, generator=torch.Generator(device).manual_seed(width), device=device)
    if fp8:
        rows = (rows.clamp(-3.5, 3.5) * 128).to(torch.float8_e4m3fn).float() / 128
        rows[:, ::TILE] = 3.5  # 448 / 128
    return rows.to(dtype)


def _off(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, tolerance: float | None = None) -> torch.Tensor:
    """Whether a probe's result is further from the product than rounding takes it. `size`: |row| |weight row|.

    tolerance: of size, beside the rounding of the result; None: TOLERANCE, which has it in it.
    """
    error = (got.float() - want.float()).abs()
    if tolerance is None:
        allowed = TOLERANCE.get(got.dtype, 1e-2) * size.float()
    else:
        allowed = tolerance * size.float() + ROUNDING[got.dtype] * want.float().abs()
    return ~(error <= allowed + 1e-30).flatten(-2).all(-1)  # a NaN is a fault


def _linear(name: str, module: Any, pushed: Pushed) -> Iterator[Check]:
    names = parts(name, pushed)
    if not names:
        return
    device, known = module.weight.device, pushed[names[0]].dtype.itemsize == 1
    x = _rows(module.input_size, device, _probe_dtype(module, pushed[names[0]]), known)
    out = module.quant_method.apply(module, x, None)
    start = 0
    for part in names:
        weight = pushed[part].to(device)
        rows = slice(start, start := start + len(weight))
        if known:
            scales = pushed[part + SCALE_SUFFIX].to(device)
            places = slice(rows.start // BLOCK[0], rows.start // BLOCK[0] + len(scales))
            if type(module.quant_method.fp8_linear).__name__ not in REPACKED:
                yield from _bytes(part, module.weight[rows], pushed)
                yield from _bytes(part + SCALE_SUFFIX, module.weight_scale_inv[places], pushed)
            yield _product(part, out[:, rows], x.float(), dequantize_blocks(weight, scales), EXACT)
        else:  # an engine that casts to FP8 itself rounds rows and weights: 1e-2 now and then where products are short
            yield _product(part, out[:, rows], x, weight, 2e-2 if module.weight.dtype.itemsize == 1 else None)
        bias = f"{part.removesuffix('weight')}bias"
        if bias in pushed:
            yield from _bytes(bias, module.bias[rows], pushed)


def parts(name: str, published: Collection[str]) -> list[str]:
    """The published weights that lie one below the other in a linear layer of vLLM; [] where they are not there."""
    stem, _, leaf = name.rpartition(".")
    whole = [f"{name}.weight"]
    split = [f"{stem}.{part}.weight" for part in FUSED.get(leaf, (leaf,))]
    return next((found for found in (whole, split) if all(part in published for part in found)), [])


def _probe_dtype(module: Any, weight: torch.Tensor) -> torch.dtype:
    """Of a layer's rows: that of its weight, and where those are codes that of activations."""
    return weight.dtype if weight.dtype.itemsize > 1 else module.orig_dtype


def _head(module: Any, pushed: Pushed, source: str) -> Iterator[Check]:
    """By its kernel, which on a CPU has a packed copy; a head that is tied must compute with the embedding."""
    weight = pushed.get(source)
    if weight is not None:
        weight = weight.to(module.weight.device)
        x = _rows(weight.shape[1], weight.device, weight.dtype)
        out = module.quant_method.apply(module, x, None)
        yield _product("lm_head.weight", out[:, : len(weight)], x, weight)


def _product(
    name: str, got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, tolerance: float | None = None
) -> Check:
    """got [ROWS, out] against x @ weight.T."""
    size = x.float().norm(dim=1, keepdim=True) * weight.norm(dim=1, dtype=torch.float32)
    return [f"{name} computes something else than what was pushed"], _off(got, F.linear(x, weight), size, tolerance)


def _experts(name: str, experts: Any, pushed: Pushed) -> Iterator[Check]:
    """Every expert alone: ROWS tokens that may choose no other, with gate weight 1."""
    count = 0
    while f"{name}.{count}.down_proj.weight" in pushed:
        count += 1
    if not count:
        return
    device = next(p.device for p in experts.parameters())
    w13, w2 = _stacked(name, count, "weight", pushed, device)  # [E, 2 * inner, width], [E, width, inner]
    known = w13.dtype.itemsize == 1
    x = _rows(w13.shape[2], device, _probe_dtype(experts, w13), known)
    top_k = experts.moe_config.experts_per_token
    ids = (torch.arange(count, device=device)[:, None] + torch.arange(top_k, device=device)) % count  # own first
    ids = ids.repeat_interleave(ROWS, 0).to(getattr(experts.quant_method, "topk_indices_dtype", None) or torch.int32)
    share = torch.zeros(len(ids), top_k, device=device)
    share[:, 0] = 1.0
    out = experts.forward_modular(x.repeat(count, 1), share, ids).view(count, ROWS, -1)

    compared, scales = [(experts.w13_weight, w13), (experts.w2_weight, w2)], None
    readable = device.type == "cuda" and compared[0][0].shape == w13.shape and compared[0][0].dtype == w13.dtype
    if known:
        scales = _stacked(name, count, "weight" + SCALE_SUFFIX, pushed, device)
        compared += zip((experts.w13_weight_scale_inv, experts.w2_weight_scale_inv), scales, strict=True)
        readable = experts.quant_method.fp8_backend.name in PLAIN
    if readable:
        other = torch.stack([_rows_differ(live, want) for live, want in compared]).any(0)
        yield [f"{name}.{e}: this expert differs from what was pushed" for e in range(count)], other
    lines = [f"{name}.{e}: this expert computes something else than what was pushed" for e in range(count)]
    for some in torch.arange(count).split(EXPERTS if known else count):
        chosen = slice(int(some[0]), int(some[-1]) + 1)
        first, down = w13[chosen], w2[chosen]
        if scales is not None:
            first, down = (dequantize_blocks(w, s[chosen]) for w, s in zip((first, down), scales))
        hidden = _hidden(x, first, known)  # [E, ROWS, inner]
        want = torch.bmm(hidden, down.transpose(1, 2))
        size = hidden.norm(dim=2, keepdim=True, dtype=torch.float32) * down.norm(dim=2, dtype=torch.float32)[:, None]
        if known:
            wrong = _off(out[chosen], want, size, EDGES / down.shape[2] ** 0.5)
        else:  # rounding of the hidden layer reaches the output
            wrong = _off(out, want, 3 * size, 2e-2 if experts.w13_weight.dtype.itemsize == 1 else None)
        yield lines[chosen], wrong


def _stacked(
    name: str, count: int, leaf: str, pushed: Pushed, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of every expert: (gates above ups, downs)."""
    gates, ups, downs = (
        torch.stack([pushed[f"{name}.{e}.{part}_proj.{leaf}"].to(device) for e in range(count)])
        for part in ("gate", "up", "down")
    )
    return torch.cat([gates, ups], dim=1), downs


def _hidden(x: torch.Tensor, w13: torch.Tensor, fp8: bool) -> torch.Tensor:
    """x # [ROWS, width], w13 # [E, 2 I, width] -> what down_proj multiplies # [E, ROWS, I], rounded where vLLM does."""
    if not fp8:
        gate, up = torch.matmul(x, w13.transpose(1, 2)).chunk(2, dim=-1)
        return F.silu(gate) * up
    gate, up = torch.matmul(x.float(), w13.transpose(1, 2)).to(x.dtype).float().chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    rows = quantize_rows(hidden.flatten(0, 1), Recipe())
    return dequantize_rows(rows).view_as(hidden)


def _rows_differ(live: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """[E] bool."""
    if live.dtype.itemsize == 1:
        live, want = live.view(torch.uint8), want.view(torch.uint8)
    return (live != want).flatten(1).any(1)


def _absorbed(name: str, module: Any, pushed: Pushed, quantized: bool) -> Iterator[Check]:
    """MLA's products of kv_b_proj: W_UK_T [heads, nope, latent] and W_UV [heads, latent, v]."""
    key = re.sub(r"\.(mla_attn|attn)(\..*)?$", "", name) + ".kv_b_proj.weight"
    if key not in pushed:
        return
    heads, nope, _ = module.W_UK_T.shape
    weight, known = pushed[key].to(module.W_UK_T.device), pushed[key].dtype.itemsize == 1
    if known:
        weight = dequantize_blocks(weight, pushed[key + SCALE_SUFFIX].to(weight.device))
    weight = weight.view(heads, -1, weight.shape[1])
    pairs = ((module.W_UK_T, weight[:, :nope]), (module.W_UV, weight[:, nope:].transpose(1, 2)))
    if known:  # vLLM reads its codes through the kernel, by products with an identity matrix
        gaps = [((live.float() - want).abs() / (want.abs() + 1e-30)).amax() for live, want in pairs]
        allowed = ROUNDING[module.W_UK_T.dtype]
    else:  # an engine that quantised kv_b_proj absorbs what it rounded it to; a wrong row is far beyond rounding
        gaps = [(live.float() - w.float()).norm(dim=(1, 2)) / w.float().norm(dim=(1, 2)) for live, w in pairs]
        allowed = 0.05 if quantized else 0.0
    wrong = torch.stack([~(gap <= allowed).all() for gap in gaps]).any()
    yield [f"{key}: the absorbed products in the engine are not those of what was pushed"], wrong
