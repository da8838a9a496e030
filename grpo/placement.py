"""GPUs: how many each role asks for, whether a cluster has them, and which device a process computes on.

Where no machine has a GPU every role asks for none, and nothing here changes a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch

from grpo.config import Config, ConfigError
from model.config import DeepseekV3Config
from model.family import AnyConfig
from model.info import tally

LARGEST_GPU_GIB = 288  # of any there is: what a cluster that is not looked into may have at most


def compute_device(name: str) -> torch.device:
    """The device of `model.device` in this process. ConfigError for a GPU that is not there."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("model.device is 'cuda', but torch sees no GPU here; set it to auto or cpu")
    if name == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def gpus_wanted(role: str, config: Config) -> float:
    """GPUs of a role where there are any; below 1: a share of one."""
    rollout, on_cpu = config.rollout, config.model.device == "cpu"
    if role == "learner":
        return 0.0 if on_cpu else config.run.learner_gpus
    if not role.startswith("rollout"):
        return 0.0
    if rollout.gpus_per_worker is not None:
        return rollout.gpus_per_worker
    if rollout.engine == "vllm":
        sizes = (rollout.engine_options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
        return float(next(sizes) * next(sizes))
    return 0.0 if on_cpu else 1.0


def assign_gpus(config: Config, roles: Iterable[str], nodes: Sequence[float]) -> dict[str, float]:
    """Role -> GPUs that its process asks for, out of the GPUs of each node. In one process roles share: each then has
    what the largest asks for.

    ConfigError where a run asks for more than there is.
    """
    roles, rollout = list(roles), config.rollout
    if not sum(nodes):
        if config.model.device == "cuda":
            raise ConfigError("model.device is 'cuda', but there is no GPU; set it to auto or cpu")
        if rollout.sleep_level:
            raise ConfigError(
                f"rollout.sleep_level {rollout.sleep_level} gives back memory of a GPU, and there is none; set it to 0"
            )
        return dict.fromkeys(roles, 0.0)
    wanted = {role: gpus_wanted(role, config) for role in roles}
    largest = max(wanted.values(), default=0.0)
    together = config.one_process
    total = largest if together else sum(wanted.values())
    if total > sum(nodes) or largest > max(nodes):
        per_worker = gpus_wanted("rollout-0", config)
        raise ConfigError(
            f"the run asks for {total:g} GPUs (learner {wanted.get('learner', 0.0):g}, {rollout.num_workers} rollout "
            f"workers of {per_worker:g}), and there are {_listed(nodes)}; lower rollout.num_workers or "
            "engine_options.tensor_parallel_size, or share them: run.placement colocated, or run.learner_gpus and "
            "rollout.gpus_per_worker below 1"
        )
    _check_transport(config, wanted)
    return dict.fromkeys(roles, largest) if together else wanted


def _check_transport(config: Config, wanted: Mapping[str, float]) -> None:
    """ConfigError for a way of the weights that this placement rules out, which would show at the first push only."""
    learner, engine = wanted.get("learner", 0.0), gpus_wanted("rollout-0", config)
    if config.one_process or not learner or not engine:
        return
    kind = config.rollout.weight_transport
    if kind == "ipc" and learner + engine > 1:
        raise ConfigError(
            f"rollout.weight_transport ipc is for a learner and engines on one GPU, but they ask for {learner:g} and "
            f"{engine:g}; set run.learner_gpus and rollout.gpus_per_worker to shares of one, or take broadcast"
        )
    if kind == "broadcast" and learner + engine <= 1:
        raise ConfigError(
            f"rollout.weight_transport broadcast goes by NCCL from GPU to GPU, but learner ({learner:g}) and engine "
            f"({engine:g}) share one; take ipc"
        )


def check_learner_fits(config: Config, model: AnyConfig) -> None:
    """ConfigError where weights, gradients and optimiser alone are more than the memory of one GPU, or of the host.

    The learner is one process: it is not sharded over GPUs. Other architectures than DeepSeek-V3 are not counted.
    """
    if not isinstance(model, DeepseekV3Config):
        return
    counted = tally(model)
    parameters = (counted.main + counted.mtp).parameters
    low = config.model.dtype == "bfloat16"
    each = 2 if low else 4  # bytes a parameter
    if config.model.lora is None:  # master weights and gradients in FP32 beside them, and AdamW's moments
        each += (8 if low else 4) + (4 if config.grpo.adam_moment_dtype == "bfloat16" else 8)
    local = config.run.cluster in ("inline", "ray") and "RAY_ADDRESS" not in os.environ
    gpu = config.model.device != "cpu" and (torch.cuda.is_available() or not local)
    if local and gpu:
        room = torch.cuda.get_device_properties(0).total_memory / 2**30
    elif local:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    else:
        room = float(LARGEST_GPU_GIB) if gpu else float("inf")
    needed = parameters * each / 2**30
    if needed > room:
        raise ConfigError(
            f"the learner needs {needed:,.0f} GiB for {parameters / 1e9:,.1f}B parameters at {each} bytes, and "
            f"{'a GPU' if gpu else 'this machine'} has {room:,.0f}; it is one process and not sharded over GPUs: take "
            f"a smaller model{'' if config.model.lora else ', or model.lora, which leaves the weights frozen'}"
        )


def _listed(nodes: Sequence[float]) -> str:
    if len(nodes) == 1:
        return f"{nodes[0]:g}"
    return f"{sum(nodes):g} ({' + '.join(f'{count:g}' for count in nodes)})"


def used_gib() -> float:
    """Memory in use on this process's GPU, by whomever. 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def release_cache() -> None:
    """Gives back what torch's allocator keeps for later, so that another process or vLLM can have it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
