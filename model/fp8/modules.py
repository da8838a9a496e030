"""FP8 in the modules of a model that is built: Linear layers, gated MLPs and stacked experts (arXiv 2412.19437, 3.3).

`to_fp8` puts them in place of the plain ones, around the same parameters under the same names. All three products of a
layer (fprop, dgrad, wgrad) have FP8 operands. What is kept for the backward pass is FP8 as well: the column-wise form
of a layer's input, and the input of SwiGLU, which is computed again. In a BF16 model parameters that train become FP32
ones: master weights that are cast straight to FP8, and have gradients in FP32 and no BF16 copy (ibid., 3.3.2).

Invariant: parameters are never quantised in place. The codes that products read are made from a parameter when it has
changed, so once an optimiser update and not once a micro-batch. What writes to `parameter.data` is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from model.attention import MultiheadLatentAttention
from model.fp8 import reference
from model.fp8.forms import MXFP8, Columns, Recipe, Rows, Weight
from model.fp8.functions import ExpertsFunction, LinearFunction, MLPFunction, Waiting
from model.layers import MLP
from model.moe import Experts, Routing, by_expert, gated_experts

Mode = Literal["off", "emulate", "on"]
RECIPES = {"blockwise": Recipe(), "blockwise_ue8m0": Recipe(ue8m0=True), "mxfp8": MXFP8}


def to_fp8(model: nn.Module, mode: Mode, recipe: str = "blockwise", ops: Any = None) -> None:
    """Makes the linear layers of attention, the MLPs and the experts of a model, MTP layers included, compute in FP8.

    Their parameters become FP32 (frozen ones stay as they are); activations keep the model's dtype. Not the embedding,
    head, router, norms, attention's core, nor eh_proj. mode: "emulate" in plain torch, "on" by
    kernels; "off" does nothing. recipe: a key of RECIPES. ops: instead of the module that the mode names, what has the
    functions of model/fp8/reference.py. Raises ValueError for a model without such layers, and for "on" where kernels
    cannot run.
    """
    if mode == "off":
        return
    if not any(isinstance(module, MultiheadLatentAttention) for module in model.modules()):
        raise ValueError(f"model.fp8 is {mode!r}, but {type(model).__name__} is no DeepSeek-V3 model; set it to off")
    _watch_optimizers()
    ops = ops or (reference if mode == "emulate" else load_kernels(recipe))
    # not inside what was replaced: an MLP computes with its linear layers' parameters itself
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            new: Any = None
            if isinstance(child, Experts):
                new = Fp8Experts(child, ops, RECIPES[recipe])
            elif isinstance(child, MLP):
                new = Fp8MLP(child, ops, RECIPES[recipe])
            elif isinstance(parent, MultiheadLatentAttention) and isinstance(child, nn.Linear):
                new = Fp8Linear(child, ops, RECIPES[recipe])
            if new is not None:
                setattr(parent, name, new.train(child.training))
                for parameter in new.parameters():
                    if parameter.requires_grad:  # else nothing moves it by less than its dtype can hold
                        parameter.data = parameter.data.float()
        if isinstance(parent, MultiheadLatentAttention):
            _share_cast(getattr(parent, "q_proj", None) or parent.q_a_proj, parent.kv_a_proj_with_mqa)


@cache
def _watch_optimizers() -> None:
    """Fused optimisers (AdamW's among them) change parameters without a trace in their version; after a step they leave
    one."""

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                torch.autograd.graph.increment_version(parameter)

    register_optimizer_step_post_hook(stepped)


def load_kernels(recipe: str) -> ModuleType:
    """model/fp8/kernels.py. Raises ValueError where this recipe has none, or they cannot run here."""
    if recipe == "mxfp8":
        raise ValueError("model.fp8_recipe is 'mxfp8', which is emulated only; set model.fp8 to emulate")
    try:
        kernels = import_module("model.fp8.kernels")
    except ImportError as err:
        raise ValueError(f"model.fp8 is 'on', but its kernels do not load ({err}); set it to emulate or off") from err
    kernels.check()
    return kernels


def unquantized(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts activations are not cast: the model multiplies by what its codes stand for, as an engine computes
    that was sent those values (model/fp8/published.py).
    """
    return _switched(model, Fp8Layer, "quantized", False)


@contextmanager
def adding_to_gradients(model: nn.Module) -> Iterator[None]:
    """While it lasts the FP32 weight gradients of experts are added to `.grad` in the product itself, and for two
    micro-batches at a time: these sums are more bytes than what is multiplied.

    The first one's operands wait for the second one's backward pass, or for the end. So `.grad` is complete only after
    that, and hooks of these parameters find what is there by then, or None. After an exception what waits is dropped.
    """
    waiting: Waiting = {}
    with _switched(model, Fp8Experts, "waiting", waiting):
        yield
        while waiting:
            parameter, (ops, grad, x) = waiting.popitem()
            parameter.grad = ops.grouped_wgrad(grad, x, torch.float32, parameter.grad)


@contextmanager
def _switched(model: nn.Module, kind: type, name: str, value: Any) -> Iterator[None]:
    """An attribute of all layers of this kind has that value, and afterwards its own again."""
    layers = [module for module in model.modules() if isinstance(module, kind)]
    before = [getattr(layer, name) for layer in layers]
    for layer in layers:
        setattr(layer, name, value)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            setattr(layer, name, own)


def computed_weight(layer: nn.Linear) -> Tensor:
    """The matrix # [N, K] that a Linear layer multiplies by: its parameter, or what that becomes in FP8."""
    return layer.values("weight", layer.weight)[0] if isinstance(layer, Fp8Linear) else layer.weight.detach()


def computed_gated_weights(mlp: MLP | Experts) -> tuple[Tensor, Tensor]:
    """The same of a gated MLP (gate_up # [2I, d], down # [d, I]), or of stacked experts # [E, ..]."""
    if isinstance(mlp, Experts):
        first, down = (mlp.gate_up_proj,), mlp.down_proj
    else:
        first, down = (mlp.gate_proj.weight, mlp.up_proj.weight), mlp.down_proj.weight
    if isinstance(mlp, Fp8Layer):
        values = mlp.values("gate_up", *first), mlp.values("down", down)
        return values if isinstance(mlp, Experts) else (values[0][0], values[1][0])
    return (torch.cat(first) if len(first) > 1 else first[0]).detach(), down.detach()


def kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of parameters that are FP32 in a model of another dtype, so that a published form of them is rounded."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Fp8Linear | Fp8MLP | Fp8Experts)
        for name, parameter in module.named_parameters()
        if parameter.dtype != module.dtype
    }


def input_cast(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What the layers of a model do to inputs # [M, K] before they multiply; None: nothing, as there is no FP8."""
    return next((module.cast for module in model.modules() if isinstance(module, Fp8Layer)), None)


class Fp8Layer:
    """What the three have in common: how they compute, and their weights' codes."""

    ops: Any
    recipe: Recipe
    quantized: bool
    dtype: torch.dtype  # of the layer that it replaced, and of activations

    def _set(self, ops: Any, recipe: Recipe, like: Tensor) -> None:
        self.ops, self.recipe, self.quantized, self.dtype = ops, recipe, True, like.dtype
        self._codes: dict[str, tuple[Any, Weight]] = {}

    def codes(self, name: str, *parameters: Tensor) -> Weight:
        """Of [E, N, K] or [N, K] parameters, one below the other; made anew where one of them has changed."""
        key = [(p._version, p.data_ptr(), p.dtype) for p in parameters]
        if name not in self._codes or self._codes[name][0] != key:
            # an engine may be first to ask, but what is made in inference mode is of no use in training
            with torch.inference_mode(False), torch.no_grad():
                joined = parameters[0] if len(parameters) == 1 else torch.cat(parameters)
                stacked = joined.detach() if joined.dim() == 3 else joined.detach()[None]
                self._codes[name] = key, self.ops.quantize_weight(stacked, self.recipe)
        return self._codes[name][1]

    def values(self, name: str, *parameters: Tensor) -> Tensor:
        """What the codes stand for, in the dtype of activations # [E, N, K]."""
        return reference.dequantize_weight(self.codes(name, *parameters)).to(self.dtype)

    def parts(self) -> dict[str, tuple[str, tuple[Tensor, ...], slice]]:
        """Of each of its parameters: the name and the parameters of the codes that hold it, and its rows in them."""
        raise AssertionError(type(self))

    def cast(self, x: Tensor) -> Tensor:
        """x # [M, K] as the operand of a product, in its own dtype."""
        return reference.dequantize_rows(self.ops.quantize_rows(x, self.recipe)).to(x.dtype)


class Fp8Linear(Fp8Layer, nn.Linear):
    """A Linear layer without bias."""

    shared: list[tuple[Tensor, int, tuple[Rows, Columns]]] | None = None  # see _share_cast

    def __init__(self, linear: nn.Linear, ops: Any, recipe: Recipe) -> None:
        assert linear.bias is None, "FP8 layers have no bias"
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self._set(ops, recipe, self.weight)

    def parts(self) -> dict[str, tuple[str, tuple[Tensor, ...], slice]]:
        return {"weight": ("weight", (self.weight,), slice(None))}

    def forward(self, x: Tensor) -> Tensor:
        """x # [M, in] -> # [M, out]."""
        if not self.quantized:
            return F.linear(x, self.values("weight", self.weight)[0])
        codes = self.codes("weight", self.weight)
        if not torch.is_grad_enabled():
            return self.ops.grouped_linear(self.ops.quantize_rows(x, self.recipe), codes, None, x.dtype)
        return LinearFunction.apply(x, self.weight, codes, self.ops, self.recipe, self.shared)


def _share_cast(one: nn.Module, other: nn.Module) -> None:
    """Two layers that are given the same numbers in training: whichever is first casts them for both.

    In between the list that they share holds the tensor, its version and its forms, then nothing.
    """
    if isinstance(one, Fp8Linear) and isinstance(other, Fp8Linear):
        one.shared = other.shared = []


class Fp8MLP(Fp8Layer, MLP):
    """A gated MLP; gate_proj and up_proj are one product of an input that is cast once."""

    def __init__(self, mlp: MLP, ops: Any, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self._set(ops, recipe, self.down_proj.weight)

    def parts(self) -> dict[str, tuple[str, tuple[Tensor, ...], slice]]:
        first, inner = (self.gate_proj.weight, self.up_proj.weight), self.gate_proj.out_features
        return {
            "gate_proj.weight": ("gate_up", first, slice(inner)),
            "up_proj.weight": ("gate_up", first, slice(inner, None)),
            "down_proj.weight": ("down", (self.down_proj.weight,), slice(None)),
        }

    def forward(self, x: Tensor) -> Tensor:
        """x # [M, d] -> # [M, d]."""
        first, down = (self.gate_proj.weight, self.up_proj.weight), self.down_proj.weight
        if not self.quantized:
            gate_up, down = computed_gated_weights(self)
            gate, up = (F.linear(x, weight) for weight in gate_up.chunk(2))
            return F.linear(F.silu(gate) * up, down)
        codes, ops, recipe = (self.codes("gate_up", *first), self.codes("down", down)), self.ops, self.recipe
        if torch.is_grad_enabled():
            return MLPFunction.apply(x, down, *first, codes, ops, recipe)
        gate_up = ops.grouped_linear(ops.quantize_rows(x, recipe), codes[0], None, x.dtype)
        return ops.grouped_linear(ops.swiglu_quantize(gate_up, recipe)[0], codes[1], None, x.dtype)


class Fp8Experts(Fp8Layer, Experts):
    """Stacked experts. The weight of an expert multiplies its activations before they are cast."""

    waiting: Waiting | None = None  # see adding_to_gradients

    def __init__(self, experts: Experts, ops: Any, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self._set(ops, recipe, self.down_proj)

    def parts(self) -> dict[str, tuple[str, tuple[Tensor, ...], slice]]:
        return {
            "gate_up_proj": ("gate_up", (self.gate_up_proj,), slice(None)),
            "down_proj": ("down", (self.down_proj,), slice(None)),
        }

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """See Experts."""
        if not self.quantized:
            return gated_experts(x, routing, *computed_gated_weights(self))
        *sorting, weight = by_expert(routing)
        token, places, ends = sorting
        codes = self.codes("gate_up", self.gate_up_proj), self.codes("down", self.down_proj)
        ops, recipe = self.ops, self.recipe
        if torch.is_grad_enabled():
            return ExpertsFunction.apply(
                x, weight, self.gate_up_proj, self.down_proj, sorting, codes, ops, recipe, self
            )
        rows, _ = ops.permute_quantize(x, token, ends, recipe)
        gate_up = ops.grouped_linear(rows, codes[0], ends, x.dtype)
        act, _ = ops.swiglu_quantize(gate_up, recipe, weight)
        return ops.combine(ops.grouped_linear(act, codes[1], ends, x.dtype), places)
