"""vLLM with matrices in FP8, set up as for a released FP8 checkpoint: it takes codes and scales, and casts no weight.

By itself `quantization: fp8_per_block` makes vLLM cast what it is given, with bytes that nobody else knows. Told that
its checkpoint has codes and `weight_scale_inv` of 128 x 128 blocks, it keeps them as they come. What it has in FP8 is
read from the live modules: the layers of `Fp8Config` (MLA, MLPs, experts, the draft model's too).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from model.fp8.published import in_blocks
from model.fp8.quantize import BLOCK
from model.names import stored_in_fp8
from rollout.vllm_proof import parts

SERIALIZED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
METHODS = ("Fp8LinearMethod", "Fp8MoEMethod")  # of layers whose codes come with the weights


def engine_options(options: Mapping[str, Any], published: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """vllm.LLM's options where `options` ask for FP8 by blocks; None where they do not, or blocks do not fit, or on a
    GPU after Hopper, for which vLLM casts the weights again.

    Weights are then not read by vLLM, which would copy BF16 numbers where codes belong.
    """
    if options.get("quantization") != "fp8_per_block" or not _fits(published):
        return None
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] > 9:
        return None
    overrides = {**options.get("hf_overrides", {}), "quantization_config": SERIALIZED}
    return {**options, "quantization": None, "hf_overrides": overrides, "load_format": "dummy"}


def keep_scales() -> None:
    """To be called before an engine is built. On Hopper DeepGEMM would have vLLM cast FP8 weights again, to scales that
    are powers of two, and activations too."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        os.environ.setdefault("VLLM_USE_DEEP_GEMM_E8M0", "0")


def _fits(published: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether blocks end where matrices do that vLLM puts on top of each other, and tiles of activations in rows."""
    upper = ("gate_proj.weight", "q_a_proj.weight", "k_proj.weight")
    if any(name.endswith("k_proj.weight") for name in published):
        upper += ("q_proj.weight",)
    shapes = [(name.endswith(upper), shape) for name, shape in published.items() if stored_in_fp8(name)]
    return all(shape[1] % BLOCK[1] == 0 and not (is_upper and shape[0] % BLOCK[0]) for is_upper, shape in shapes)


def names(model: torch.nn.Module, published: Collection[str]) -> set[str]:
    """Those of the published names that this model has in FP8, in blocks of 128 x 128."""
    found = set()
    modules: Any = model.named_modules()
    for name, module in modules:
        layer = getattr(module, "routed_experts", module)
        method: Any = getattr(layer, "quant_method", None)
        if type(method).__name__ not in METHODS or list(method.weight_block_size or ()) != list(BLOCK):
            continue
        if layer is not module:
            found |= {key for key in published if key.startswith(f"{name}.") and key.endswith("_proj.weight")}
        else:
            found |= set(parts(name, published))
    return found


def read(
    directory: Path, in_fp8: Collection[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a directory that has no FP8, one at a time, as an engine takes them. What it has in FP8 is cast
    from `dtype`, as by a learner that reads the directory in that dtype."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key).to(device)
                yield from in_blocks([(key, tensor.to(dtype) if key in in_fp8 else tensor)], in_fp8)
