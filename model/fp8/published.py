"""What engines are sent of a model: the weights that it computes with, under published names.

An engine keeps some matrices in FP8, in blocks of 128 x 128 with FP32 scales, as released checkpoints have them
(`weight` and `weight_scale_inv`). Of a layer in FP8 it gets the very bytes that the layer's products read
(arXiv 2412.19437, 3.3.2); a matrix that nobody has cast yet is cast here, once, so that its bytes are known as well.
What a layer has in FP8 and the engine has not travels as the values of its codes, rounded to the model's dtype: what
the layer multiplies by, to 2^-9, where its parameter would be off by up to 2^-4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from model.fp8 import reference
from model.fp8.forms import Recipe, Weight
from model.fp8.modules import Fp8Layer
from model.fp8.quantize import BLOCK, scale_shape
from model.names import SCALE_SUFFIX, to_hf

BLOCKWISE = Recipe()


def computed_state(model: Any, in_fp8: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every (published name, tensor) of a DeepSeek-V3 model; codes and scales of what is `in_fp8` and cast already."""
    layers = {
        f"{prefix}.{leaf}": (module, *part)
        for prefix, module in model.named_modules()
        if isinstance(module, Fp8Layer)
        for leaf, part in module.parts().items()
    }
    for name, tensor in model.state_dict().items():
        if name not in layers:
            yield from to_hf(name, tensor.detach(), model.config)
            continue
        layer, key, parameters, rows = layers[name]
        published = next(to_hf(name, tensor, model.config))[0]  # an engine has all experts of a layer in FP8, or none
        if published not in in_fp8:
            values = layer.values(key, *parameters)[:, rows]
            yield from to_hf(name, values if tensor.dim() == 3 else values[0], model.config)
        elif blocks := _blocks(layer.recipe, layer.codes(key, *parameters), rows):
            codes, scales = (part if tensor.dim() == 3 else part[0] for part in blocks)
            for (hf_name, code), (_, scale) in zip(
                to_hf(name, codes, model.config), to_hf(name, scales, model.config), strict=True
            ):
                assert scale.shape == scale_shape(code.shape), f"{hf_name} {code.shape=} {scale.shape=}"
                yield hf_name, code
                yield hf_name + SCALE_SUFFIX, scale
        else:
            yield from to_hf(name, tensor.detach(), model.config)


def _blocks(recipe: Recipe, weight: Weight, rows: slice) -> tuple[Tensor, Tensor] | None:
    """(codes # [E, rows, K], scales) of some rows; None where the codes' blocks are others than engines have."""
    start, stop, _ = rows.indices(weight.codes.shape[1])
    if recipe.weight_block != BLOCK or start % BLOCK[0] or (stop % BLOCK[0] and stop != weight.codes.shape[1]):
        return None
    return weight.codes[:, rows], weight.scales[:, start // BLOCK[0] : -(-stop // BLOCK[0])]


def in_blocks(pairs: Iterable[tuple[str, Tensor]], in_fp8: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The pairs with what is `in_fp8` as codes and scales: those that come so already, and others cast here."""
    for name, tensor in pairs:
        if name not in in_fp8 or tensor.dtype.itemsize == 1:
            yield name, tensor
            continue
        weight = _quantizer(tensor.device)(tensor.detach()[None], BLOCKWISE)
        yield name, weight.codes[0]
        yield name + SCALE_SUFFIX, weight.scales[0]


@cache
def _quantizer(device: torch.device) -> Callable[[Tensor, Recipe], Weight]:
    """The kernel where it runs, which is one launch a matrix and not a dozen; the bytes are the same."""
    if device.type == "cuda":
        try:
            kernels = import_module("model.fp8.kernels")
            kernels.check()
        except (ImportError, ValueError):
            return reference.quantize_weight
        return kernels.quantize_weight
    return reference.quantize_weight
