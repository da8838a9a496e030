"""Where the time of a learner step goes: kernel time by part of the model and by kind of kernel, from torch.profiler.

Modules and functions open a named range in the forward pass. A backward kernel belongs to the range in which its
forward operation ran: autograd gives both the same sequence number. On a CPU the same is done with operators' own time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch._C._profiler import _RecordFunctionFast
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

import grpo.learner
import model.attention
from grpo.learner import Learner
from grpo.records import PackedBatch
from model.attention import MultiheadLatentAttention
from model.fp8.modules import Fp8Layer
from model.layers import MLP, RMSNorm
from model.moe import Experts, TopkRouter

PREFIX = "part: "
LINEARS, EXPERTS, MLPS = "attention linears", "routed experts", "shared experts, dense MLP"
IN_FP8 = (LINEARS, EXPERTS, MLPS)  # parts whose products FP8 makes faster
OTHER = "residuals, the rest"
PRODUCT = re.compile(r"gemm|nvjet|cutlass|xmma|grouped_kernel|wgrad_kernel|aten::(_?grouped_)?(mm|bmm|addmm)", re.I)
CAST = re.compile(r"_(cast|both|weight)_kernel")
KINDS = ("product", "cast", "other")
NOT_KERNELS = (PREFIX, "Optimizer.", "ProfilerStep")  # ranges, which a trace of the GPU has as well


@contextmanager
def labelled(learner: Learner) -> Iterator[None]:
    """While it lasts the parts of a step open ranges under their names."""
    with ExitStack() as stack:

        def around(owner: Any, name: str, label: str) -> None:
            inner = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                # torch's own record_function leaves out kernels that no operator launches, as Triton's of the optimiser
                with _RecordFunctionFast(PREFIX + label):
                    return inner(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, name, call))

        for module in learner.policy.model.modules():
            for child in module.children():
                label = _label(module, child)
                if label is not None:
                    ways = ("forward", "added", "front") if isinstance(child, RMSNorm) else ("forward",)
                    for name in ways:
                        around(child, name, label)
        around(model.attention, "attention_core", "attention core")
        around(grpo.learner, "token_logprobs", "head and loss")
        around(grpo.learner, "policy_loss", "head and loss")
        around(learner.policy, "gradient_norms", "gradient norms")
        around(learner.policy, "publish", "weight casts")
        around(learner.optimizer, "step", "optimiser")
        for layer in learner.policy.model.modules():
            if isinstance(layer, Fp8Layer):
                around(layer, "codes", "weight casts")
        yield


def _label(parent: nn.Module, child: nn.Module) -> str | None:
    if isinstance(child, MultiheadLatentAttention):
        return "attention, the rest"
    if isinstance(child, Experts):
        return EXPERTS
    if isinstance(child, MLP):
        return MLPS
    if isinstance(child, TopkRouter):
        return "router"
    if isinstance(child, RMSNorm):
        return "norms"
    if isinstance(child, nn.Embedding):
        return "embedding"
    if isinstance(child, nn.Linear) and isinstance(parent, MultiheadLatentAttention):
        return LINEARS
    return None


def profiled(learner: Learner, minibatches: Sequence[Sequence[PackedBatch]]) -> dict[str, Any]:
    """`parts`: milliseconds of a step by part and kind; `kernels`: the 60 that take most; `launches`."""
    cuda = learner.policy.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with labelled(learner), profile(activities=kinds) as prof:
        learner.step(minibatches)
        if cuda:
            torch.cuda.synchronize()
    return _by_part(list(prof.events() or []), cuda)


def occupied(learner: Learner, minibatches: Sequence[Sequence[PackedBatch]]) -> dict[str, Any]:
    """Milliseconds of a step from its first kernel to the end of its last, and of kernels; where it is idle longest:
    (milliseconds, the kernel before, the kernel after) of the ten longest gaps, and gaps by length in microseconds."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        learner.step(minibatches)
        torch.cuda.synchronize()
    on_device = [e for e in prof.events() or [] if e.device_type == DeviceType.CUDA]  # the rest are calls of the host
    ran = sorted((e.time_range.start, e.time_range.end, e.name[:60]) for e in on_device)
    ran = [kernel for kernel in ran if not kernel[2].startswith(NOT_KERNELS)]
    gaps, until, before = [], ran[0][0], ran[0][2]
    for start, end, name in ran:
        if start > until:
            gaps.append(((start - until) / 1000, before, name))
        if end > until:
            until, before = end, name
    span = (until - ran[0][0]) / 1000
    lengths: dict[str, float] = {}
    for bound in (2, 5, 20, 100, 1000, 1e9):
        lengths[f"below {bound:g} us"] = sum(gap[0] for gap in gaps if gap[0] * 1000 < bound) - sum(lengths.values())
    busy = span - sum(gap[0] for gap in gaps)
    return {"span": span, "busy": busy, "idle": lengths, "longest": sorted(gaps, reverse=True)[:10]}


def _by_part(events: list[FunctionEvent], cuda: bool) -> dict[str, Any]:
    events.sort(key=lambda e: e.time_range.start)
    forward: dict[int, str] = {}  # sequence number -> part; of those with one number the last makes the node
    for event in events:
        if event.sequence_nr >= 0 and "evaluate_function" not in event.name and not _is_backward(event):
            forward[event.sequence_nr] = _range_of(event) or OTHER
    parts: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    launches = 0
    for event in events:
        part = _range_of(event) or _part_of_backward(event, forward) or OTHER
        ran = [(k.name, k.duration) for k in event.kernels if not k.name.startswith(NOT_KERNELS)]
        for name, duration in ran if cuda else [(event.name, event.self_cpu_time_total)]:
            kind = "product" if PRODUCT.search(name) else "cast" if CAST.search(name) else "other"
            parts[part][kind] += duration / 1000
            entry = kernels[part, name[:150]]
            entry[0] += duration / 1000
            entry[1] += 1
            launches += 1
    most = sorted(kernels.items(), key=lambda item: -item[1][0])[:60]
    return {
        "parts": {part: dict(kind) for part, kind in sorted(parts.items(), key=lambda item: -sum(item[1].values()))},
        "kernels": [{"part": p, "name": n, "ms": ms, "count": count} for (p, n), (ms, count) in most],
        "launches": launches,
    }


def _range_of(event: FunctionEvent) -> str | None:
    """The innermost range that an operation ran in."""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith(PREFIX):
            return at.name.removeprefix(PREFIX)
        at = at.cpu_parent
    return None


def _is_backward(event: FunctionEvent) -> bool:
    at: FunctionEvent | None = event
    while at is not None:
        if "evaluate_function" in at.name:
            return True
        at = at.cpu_parent
    return False


def _part_of_backward(event: FunctionEvent, forward: dict[int, str]) -> str | None:
    at: FunctionEvent | None = event
    while at is not None:
        if "evaluate_function" in at.name:
            if "AccumulateGrad" in at.name:
                return "adding up gradients"
            return forward.get(at.sequence_nr)
        at = at.cpu_parent
    return None
