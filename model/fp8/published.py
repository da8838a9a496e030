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

from model.config import DeepseekV3Config
from model.fp8 import reference
from model.fp8.forms import Recipe, Weight
from model.fp8.modules import Fp8Layer
from model.fp8.quantize import BLOCK, scale_shape
from model.names import SCALE_SUFFIX, to_hf


def computed_state(model: Any, in_fp8: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every (published name, tensor) of a DeepSeek-V3 model, or of a MergedModel (model.lora) around one; codes and
    scales of what is `in_fp8`. Stacked experts are cast as one.
    """
    modules: Any = getattr(model, "named_modules", tuple)()  # a MergedModel has none, and its model no FP8
    config: DeepseekV3Config = model.config
    layers = {
        f"{prefix}.{leaf}": (module, *part)
        for prefix, module in modules
        if isinstance(module, Fp8Layer)
        for leaf, part in module.parts().items()
    }
    for name, tensor in model.state_dict().items():
        tensor, layer, blocks = tensor.detach(), layers.get(name), None
        published = next(to_hf(name, tensor, config))[0]  # an engine has all experts of a layer in FP8, or none
        if published in in_fp8:
            if layer is not None:
                blocks = _blocks(layer[0].recipe, layer[0].codes(layer[1], *layer[2]), layer[3])
            yield from _coded(name, *(blocks or _cast(tensor)), tensor.dim(), config)
        elif layer is not None:
            values = layer[0].values(layer[1], *layer[2])[:, layer[3]]
            yield from to_hf(name, values if tensor.dim() == 3 else values[0], config)
        else:
            yield from to_hf(name, tensor, config)


def _coded(
    name: str, codes: Tensor, scales: Tensor, dims: int, config: DeepseekV3Config
) -> Iterator[tuple[str, Tensor]]:
    """The published pairs of codes # [E, N, K] and scales of an in-memory tensor that has so many dimensions."""
    both = (part if dims == 3 else part[0] for part in (codes, scales))
    for (hf_name, code), (_, scale) in zip(*(to_hf(name, part, config) for part in both), strict=True):
        assert scale.shape == scale_shape(code.shape), f"{hf_name} {code.shape=} {scale.shape=}"
        yield hf_name, code
        yield hf_name + SCALE_SUFFIX, scale


def _blocks(recipe: Recipe, weight: Weight, rows: slice) -> tuple[Tensor, Tensor] | None:
    """(codes # [E, rows, K], scales) of some rows; None where the codes' blocks are others than engines have."""
    start, stop, _ = rows.indices(weight.codes.shape[1])
    if recipe.weight_block != BLOCK or start % BLOCK[0] or (stop % BLOCK[0] and stop != weight.codes.shape[1]):
        return None
    return weight.codes[:, rows], weight.scales[:, start // BLOCK[0] : -(-stop // BLOCK[0])]


def in_blocks(pairs: Iterable[tuple[str, Tensor]], in_fp8: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The published pairs of any model, one at a time, with what is `in_fp8` as codes and scales."""
    for name, tensor in pairs:
        if name not in in_fp8 or tensor.dtype.itemsize == 1:
            yield name, tensor
            continue
        codes, scales = _cast(tensor.detach())
        yield name, codes[0]
        yield name + SCALE_SUFFIX, scales[0]


def _cast(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """[E, N, K] or [N, K] -> codes # [E, N, K], scales."""
    stacked = tensor if tensor.dim() == 3 else tensor[None]
    if stacked.dtype == torch.float16:  # kernels read FP32 and BF16
        stacked = stacked.float()
    return _quantizer(tensor.device)(stacked, Recipe())[:2]


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
