"""Experts' weight gradients in FP8: two micro-batches at a time, the same bits as one by one, and what waits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import DeepseekV3Config
from model.fp8 import reference
from model.fp8.forms import Recipe
from model.fp8.modules import Fp8Experts, adding_to_gradients, to_fp8
from model.moe import Routing, expert_counts
from tests.model.test_fp8_modules import MakeModel, loss_of, make_experts


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
def test_gradients_are_added_in_the_product(microbatches: int, make_config: Callable[..., DeepseekV3Config]) -> None:
    """Under adding_to_gradients, for two micro-batches at a time, the two matrices in turns; the same bits without."""
    plain, x, routing = make_experts(make_config)
    experts = Fp8Experts(plain, reference, Recipe())
    calls: list[tuple[str, bool, bool]] = []

    def counted(grad: Any, inputs: Any, dtype: torch.dtype, into: Tensor | None = None, also: Any = None) -> Tensor:
        calls.append(("down" if len(grad.codes) == 192 else "gate_up", into is not None, also is not None))
        return reference.grouped_wgrad(grad, inputs, dtype, into, also)

    experts.ops = SimpleNamespace(**{**vars(reference), "grouped_wgrad": counted})
    losses = [lambda n=n: experts((n + 1) * x[n:], cut(routing, n)).square().sum() for n in range(microbatches)]
    parameters = [experts.down_proj, experts.gate_up_proj]
    for loss in losses:
        loss().backward()
    want = [p.grad for p in parameters]
    assert calls == microbatches * [("down", False, False), ("gate_up", False, False)]
    calls.clear()
    experts.zero_grad()
    first: list[Tensor | None] = []
    with adding_to_gradients(experts):
        for loss in losses:
            loss().backward()
            first.append(experts.down_proj.grad)
    one, pair = ("down", False, False), ("gate_up", False, True)
    assert (
        calls
        == {
            1: [one, ("gate_up", False, False)],
            2: [one, pair, ("down", True, False)],
            3: [one, pair, ("down", True, True), ("gate_up", True, False)],
            4: [one, pair, ("down", True, True), ("gate_up", True, True), ("down", True, False)],
        }[microbatches]
    )
    for parameter, total in zip(parameters, want, strict=True):
        assert total is not None and parameter.grad is not None and torch.equal(parameter.grad, total)
    assert all(grad is experts.down_proj.grad for grad in first)
    calls.clear()
    losses[0]().backward()
    assert calls == [("down", False, False), ("gate_up", False, False)]


def cut(routing: Routing, first: int) -> Routing:
    """Of the tokens from the first on."""
    counts = expert_counts(routing.experts[first:, None], 8)[0]
    return Routing(routing.experts[first:], routing.weights[first:], routing.scores, counts)


def test_what_waits_at_the_end(make_config: Callable[..., DeepseekV3Config]) -> None:
    """Nothing of a frozen parameter, nothing after an exception, and nothing of a backward pass that comes later."""
    plain, x, routing = make_experts(make_config)
    experts = Fp8Experts(plain, reference, Recipe())
    loss = lambda: experts(x, routing).square().sum()  # noqa: E731
    down, gate_up = torch.autograd.grad(loss(), [experts.down_proj, experts.gate_up_proj])
    with pytest.raises(KeyError), adding_to_gradients(experts):
        loss().backward()
        raise KeyError
    assert experts.waiting is None and experts.gate_up_proj.grad is None
    assert experts.down_proj.grad is not None and torch.equal(experts.down_proj.grad, down)
    experts.zero_grad()
    with adding_to_gradients(experts):
        later = loss()
    later.backward()
    assert experts.gate_up_proj.grad is not None and torch.equal(experts.gate_up_proj.grad, gate_up)
    experts.zero_grad()
    for frozen, trained, want in (
        (experts.gate_up_proj, experts.down_proj, down),
        (experts.down_proj, experts.gate_up_proj, gate_up),
    ):
        frozen.requires_grad_(False)
        with adding_to_gradients(experts):
            for _ in range(2):
                loss().backward()
        assert frozen.grad is None and trained.grad is not None and torch.equal(trained.grad, want + want)
        frozen.requires_grad_(True)
        experts.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_whole_model(checkpointing: bool, dtype: torch.dtype, make_model: MakeModel) -> None:
    """With MTP layers and with layers that are recomputed; two updates of three micro-batches."""
    model = make_model(num_nextn_predict_layers=1).to(dtype)
    to_fp8(model, "emulate")
    model.model.gradient_checkpointing = checkpointing
    batches = [torch.randint(40, (24,)) for _ in range(3)]
    found: list[dict[str, Tensor]] = []
    for context in (nullcontext, adding_to_gradients, adding_to_gradients):
        with context(model):
            for ids in batches:
                loss_of(model, ids).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert sum(".experts." in name for name in found[0]) == 2 * 3
    for name, want in found[0].items():
        assert all(torch.equal(got[name], want) for got in found[1:]), name
