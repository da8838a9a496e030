"""Hugging Face model directories, BF16 or in the released FP8 form, read and written as a stream.

FP8 form: `X.weight` holds E4M3 codes and `X.weight_scale_inv` the FP32 factor of each 128x128 block, perhaps in another
shard; the matrices that names.stored_in_fp8 tells, everything else BF16. Reading gives plain weights again, so nobody
else knows about it. Memory: the target, and one tensor at a time.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import ARCHITECTURE, DeepseekV3Config
from model.fp8 import BLOCK, dequantize_blocks, quantize_blocks, scale_shape
from model.names import LAYER, SCALE_SUFFIX, HFModel, from_hf, hf_state, load_hf_state, stored_in_fp8
from model.shards import INDEX, StoredTensor, TensorSpec, find_tensors, write_shards

SCALE_FORMATS = ("float", "ue8m0")  # transformers' names: any FP32 factor, or powers of two (also stored as FP32)
SHARD_BYTES = 5_000_000_000
SKIPPED = ".rotary_emb.inv_freq"  # a buffer that some exports carry; it follows from the config


class Checkpoint:
    """A directory opened for reading: config, index and headers agree with each other; no weight has been read yet.

    Raises ValueError, one line that names file and tensor, for whatever does not fit.
    """

    config: DeepseekV3Config  # num_nextn_predict_layers is what the weights really hold
    tensors: dict[str, StoredTensor]  # by published name, scales among them

    def __init__(self, directory: str | Path, architecture: str = ARCHITECTURE) -> None:
        self.directory = Path(directory)
        self.config = DeepseekV3Config.from_pretrained(directory, architecture)
        self.values: dict[str, Any] = json.loads((self.directory / "config.json").read_text())
        _check_quantization(self.directory / "config.json", self.values.get("quantization_config"))
        self.tensors = {n: t for n, t in find_tensors(directory).items() if not n.endswith(SKIPPED)}
        for name, tensor in self.tensors.items():
            self._check_scale(name, tensor)
        layers = self.config.num_hidden_layers
        if self.config.num_nextn_predict_layers and not any(
            int(layer[1]) >= layers for name in self.tensors if (layer := LAYER.fullmatch(name))
        ):
            warnings.warn(
                f"{directory}: config.json has num_nextn_predict_layers {self.config.num_nextn_predict_layers}, the "
                "weights hold no MTP layer (transformers drops them when it saves): loading without MTP",
                stacklevel=2,
            )
            self.config = dataclasses.replace(self.config, num_nextn_predict_layers=0)

    def _check_scale(self, name: str, tensor: StoredTensor) -> None:
        """An FP8 weight has a scale of the right shape; a scale has an FP8 weight."""
        if name.endswith(SCALE_SUFFIX):
            weight = self.tensors.get(name.removesuffix(SCALE_SUFFIX))
            if weight is None or weight.dtype != torch.float8_e4m3fn:
                found = "none" if weight is None else str(weight.dtype)
                raise ValueError(f"{tensor.file}: {name} scales a weight: expected float8_e4m3fn, found {found}")
        elif tensor.dtype.itemsize == 1:
            scale, expected = self.tensors.get(name + SCALE_SUFFIX), scale_shape(tensor.shape)
            if scale is None or scale.shape != expected:
                found = "none" if scale is None else f"shape {scale.shape}"
                where = tensor.file if scale is None else scale.file
                raise ValueError(
                    f"{where}: {name}{SCALE_SUFFIX} of the FP8 weight {tensor.shape}: expected shape {expected} "
                    f"(blocks of {BLOCK[0]}x{BLOCK[1]}), found {found}"
                )

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """The tensors without the scales of FP8 weights."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.endswith(SCALE_SUFFIX)}

    def check(self, model: HFModel) -> None:
        """Raise ValueError unless the weights are exactly this model's (which may lie on the meta device)."""
        expected = {
            name: tuple(t.shape) for name, t in hf_state(model, exact=True) if from_hf(name, model.config) is not None
        }
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            listing = self.directory / INDEX if (self.directory / INDEX).is_file() else self.directory
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(
                f"{listing}: {missing[0]}{more} missing from the weights: expected shape {expected[missing[0]]}, "
                "found none; use a complete checkpoint"
            )
        for name, stored in self.weights.items():
            if from_hf(name, model.config) is None:
                continue
            if name not in expected:
                raise ValueError(
                    f"{stored.file}: {name} {stored.shape} is not part of this model: check config.json against the "
                    "weights"
                )
            if stored.shape != expected[name]:
                raise ValueError(
                    f"{stored.file}: {name} has shape {stored.shape}: the config asks for {expected[name]}; "
                    "weights and config.json belong to different models"
                )

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every (published name, weight), one at a time, in the order of the files; FP8 comes dequantised, as FP32.

        Other weights are views into the mapped file, which takes no memory of its own.
        """
        opened: dict[Path, Any] = {}

        def get(name: str) -> Tensor:
            file = self.tensors[name].file
            if file not in opened:
                opened[file] = safe_open(file, framework="pt")
            return opened[file].get_tensor(name)

        for name, stored in self.weights.items():
            tensor = get(name)
            yield name, dequantize_blocks(tensor, get(name + SCALE_SUFFIX)) if stored.dtype.itemsize == 1 else tensor


def _check_quantization(path: Path, quantization: dict[str, Any] | None) -> None:
    """ValueError for anything but the released FP8 form."""
    if not quantization:
        return
    for key, known in (
        ("quant_method", ("fp8",)), ("fmt", ("e4m3", None)), ("weight_block_size", (list(BLOCK),)),
        ("scale_fmt", (*SCALE_FORMATS, None)), ("expert_dtype", ("fp8", None)),
    ):  # fmt: skip
        if quantization.get(key) not in known:
            raise ValueError(
                f"{path}: quantization_config.{key} is {quantization.get(key)!r}: expected {known[0]!r}; "
                "convert the weights to bfloat16 with the tool that made them"
            )


def load_weights(model: HFModel, directory: str | Path) -> None:
    """Fill the model from a directory. ValueError, before anything is read, names what does not fit and where."""
    checkpoint = Checkpoint(directory)
    checkpoint.check(model)
    load_hf_state(model, checkpoint.read())


def released_form(weights: Iterable[tuple[str, Tensor]], scale_fmt: str | None) -> Iterator[tuple[str, Tensor]]:
    """Weights as published: BF16, router biases FP32; with scale_fmt, matrices as FP8 codes followed by their scales.

    Quantised from the dtype that comes in: an FP32 weight is rounded once. ValueError for a weight that is not finite.
    """
    for name, tensor in weights:
        if name.endswith(".e_score_correction_bias"):
            yield name, tensor.float()
        elif scale_fmt is None or not stored_in_fp8(name):
            yield name, tensor.to(torch.bfloat16)
        else:
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds a number that is not finite: FP8 has no code for it")
            codes, scale_inv = quantize_blocks(tensor, ue8m0=scale_fmt == "ue8m0")
            yield name, codes
            yield name + SCALE_SUFFIX, scale_inv


def released_layout(shapes: Iterable[tuple[str, Sequence[int]]], scale_fmt: str | None) -> Iterator[TensorSpec]:
    """What `released_form` gives for weights of these names and shapes, in its order."""
    for name, shape in shapes:
        if name.endswith(".e_score_correction_bias"):
            yield TensorSpec(name, torch.float32, tuple(shape))
        elif scale_fmt is None or not stored_in_fp8(name):
            yield TensorSpec(name, torch.bfloat16, tuple(shape))
        else:
            yield TensorSpec(name, torch.float8_e4m3fn, tuple(shape))
            yield TensorSpec(name + SCALE_SUFFIX, torch.float32, scale_shape(shape))


def quantization_config(scale_fmt: str) -> dict[str, Any]:
    """What config.json says of weights in the FP8 form, as in DeepSeek's releases (V3, and V3.1 for ue8m0)."""
    values = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}
    return values | ({"scale_fmt": "ue8m0"} if scale_fmt == "ue8m0" else {})


def save_model(
    model: HFModel,
    directory: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
    scale_fmt: str | None = None,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the weights under published names, and config.json (with the dtype and MTP depth really saved).

    scale_fmt None keeps the model's dtype; "float" or "ue8m0" gives the released FP8 form. `extra` goes into
    config.json last. Raises ValueError for another form, or a weight that FP8 cannot hold.
    """
    if scale_fmt not in (None, *SCALE_FORMATS):
        raise ValueError(f"scale_fmt is {scale_fmt!r}: use {' or '.join(SCALE_FORMATS)}, or None for plain weights")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    if scale_fmt:
        layout = released_layout(((name, tensor.shape) for name, tensor in hf_state(model, exact=True)), scale_fmt)
        write_shards(directory, layout, released_form(hf_state(model, exact=True), scale_fmt), max_shard_bytes)
    else:
        layout = (TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in hf_state(model))
        write_shards(directory, layout, hf_state(model), max_shard_bytes)
    dtype = "bfloat16" if scale_fmt else str(model.state_dict()["model.norm.weight"].dtype).removeprefix("torch.")
    values = dataclasses.replace(model.config, dtype=dtype).to_dict()
    if scale_fmt:
        values["quantization_config"] = quantization_config(scale_fmt)
    (directory / "config.json").write_text(json.dumps({**values, **extra}, indent=2) + "\n")
