"""An adapter in vLLM as an adapter: whether it can be one, how its tensors get into the engine, and the proof of it.

    (PEFT name, tensor) --load--> lora_a_stacked, lora_b_stacked [slots, 1, ...] of each layer <--faults-- what was sent

vLLM lays q, k and v (gate and up) of a layer side by side, fills ranks up with zeros and multiplies B by
lora_alpha / r. The engine has one adapter, in one slot, and every request names it. Base weights are not loaded a
second time (before 0.32 vLLM cannot, under layers with room for an adapter): they are checked as it has read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from model.config import DeepseekV3Config
from model.names import PEFT_PREFIX
from rollout.vllm_proof import FUSED, Pushed

ADAPTER = 1  # vLLM's number for it
_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_ALONE = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "quantization": None}  # and nothing else


def why_merged(
    config: Any, names: Iterable[str], lora: Mapping[str, Any], dtype: str, options: Mapping[str, Any], on_cpu: bool
) -> str:
    """Why this engine should get merged weights instead of the adapter; empty: it takes the adapter as it is.

    config: the model's. names: published tensors, and the adapter's under PEFT's names. lora: fields of peft's
    LoraConfig. options: further ones of vllm.LLM. Says no wherever vLLM's kernels would compute something else than
    the learner.
    """
    if isinstance(config, DeepseekV3Config) or any(".experts." in name for name in names):
        return "vLLM takes adapters on dense models only; MLA and routed experts get weights"
    others = {name.split(".")[-3] for name in names if name.startswith(PEFT_PREFIX)} - _LAYERS
    if others:
        return f"the adapter sits on {', '.join(sorted(others))}, which vLLM may hold under another name"
    for key, value in _ALONE.items():
        if options.get(key, value) != value:
            return f"with rollout.engine_options.{key} the engine holds other tensors than the learner"
    if dtype == "float32" and not on_cpu:
        return "vLLM's kernels for adapters take no float32 on a GPU"
    if dtype != "float32" and (lora.get("target_parameters") or not lora.get("target_modules")):
        return f"in {dtype} the learner multiplies by merged matrices; only what target_modules names it adds, as vLLM"
    if not _rank(lora["r"]):
        return f"model.lora.r {lora['r']} is more than vLLM has room for"
    return _unsupported(getattr(config, "architectures", None) or [])


def _unsupported(architectures: Iterable[str]) -> str:
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]

    for name in architectures:
        entry = ModelRegistry.models.get(name)
        if entry is None or not getattr(entry.load_model_cls(), "supports_lora", False):
            return f"vLLM takes no adapters on {name}"
    return ""


def _rank(r: int) -> int:
    """The smallest rank that vLLM has room for and that holds r; 0: none does."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks  # pyright: ignore[reportMissingImports]

    return min((rank for rank in get_args(MaxLoRARanks) if rank >= r), default=0)


def engine_options(r: int) -> dict[str, Any]:
    """Of vllm.LLM. Only layers that adapters sit on get room for one; embeddings and the head stay as they are."""
    layers = sorted({*_LAYERS, *FUSED} - {"fused_qkv_a_proj"})
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(r), "lora_target_modules": layers}


def request() -> Any:
    """What a request names the adapter with. It is in memory: its path is never read."""
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    return LoRARequest("policy", ADAPTER, "in memory")


def apart(weights: Sequence[tuple[str, Any]]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The base's tensors, and the adapter's."""
    base = [pair for pair in weights if not pair[0].startswith(PEFT_PREFIX)]
    return base, [pair for pair in weights if pair[0].startswith(PEFT_PREFIX)]


def load(runner: Any, weights: Pushed, lora: Mapping[str, Any]) -> None:
    """Puts the adapter in the place of the one before. Raises ValueError where the engine has none to put it in."""
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.peft_helper import PEFTHelper  # pyright: ignore[reportMissingImports]

    manager = runner.lora_manager._adapter_manager
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER,
        {name: tensor.clone() for name, tensor in weights.items()},  # vLLM scales B in place
        PEFTHelper.from_dict({"r": lora["r"], "lora_alpha": lora["lora_alpha"], "target_modules": sorted(_LAYERS)}),
        device=str(manager.device),
        dtype=manager.lora_config.lora_dtype,
    )
    manager.remove_adapter(ADAPTER)
    manager.add_adapter(adapter)
    manager.activate_adapter(ADAPTER)


def faults(runner: Any, pushed: Pushed, scaling: float) -> list[str]:
    """What of `pushed` does not lie in the engine, or lies there without having been pushed: a line each."""
    manager = runner.lora_manager._adapter_manager
    if ADAPTER not in manager.lora_index_to_id:
        return [f"{next(iter(pushed))}: the engine samples without the adapter"]
    slot = manager.lora_index_to_id.index(ADAPTER)
    found, seen = [], set()
    for name, module in manager.modules.items():
        stem, _, leaf = name.rpartition(".")
        for index, part in enumerate(FUSED.get(leaf, (leaf,))):
            for kind, stacked, factor in (
                ("lora_A", module.lora_a_stacked, 1.0),
                ("lora_B", module.lora_b_stacked, scaling),
            ):
                key = f"{PEFT_PREFIX}{stem}.{part}.{kind}.weight"
                seen.add(key)
                line = _fault(stacked[index][slot, 0], pushed.get(key), factor)
                found += [f"{key} {line}"] if line else []
    return found + [f"{key} has no layer in the engine" for key in pushed if key not in seen]


def _fault(live: torch.Tensor, tensor: torch.Tensor | None, factor: float) -> str:
    """live [rank, in] or [out, rank], filled up with zeros, against what was pushed, times `factor`."""
    want = torch.zeros_like(live)
    if tensor is not None:
        if any(have < need for have, need in zip(live.shape, tensor.shape)):
            return f"has room for {tuple(live.shape)} in the engine, not for {tuple(tensor.shape)}"
        # rounded first, then scaled, as vLLM does it
        want[: tensor.shape[0], : tensor.shape[1]] = tensor.to(live.device, live.dtype) * factor
    if torch.equal(live, want):
        return ""
    size = want.float().norm()
    ratio = float(live.float().norm() / size) if size else 0.0
    if ratio and torch.allclose(live.float(), ratio * want.float(), rtol=1e-2, atol=0.0):
        return f"is scaled by {ratio * factor:.4g} in the engine, not by lora_alpha / r = {factor:.4g}"
    return "differs from what was pushed" if tensor is not None else "was not pushed, but the engine holds one"
