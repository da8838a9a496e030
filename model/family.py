"""Which implementation a model directory gets: ours for DeepSeek-V3, transformers' for any other architecture.

The one place that tells them apart. Directories are Hugging Face's either way, and names are the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from model.auto import auto_config, empty_auto, load_auto, load_auto_weights, published, save_auto
from model.checkpoint import SHARD_BYTES, load_weights, save_model
from model.config import MODEL_TYPES, DeepseekV3Config
from model.modeling import DeepseekV3ForCausalLM, DeepseekV3PreTrainedModel
from model.names import hf_state

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    AnyConfig = DeepseekV3Config | PreTrainedConfig
    AnyModel = DeepseekV3PreTrainedModel | PreTrainedModel
else:
    AnyConfig = AnyModel = Any


def family_of(directory: str | Path) -> Literal["deepseek_v3", "auto"]:
    """By model_type in config.json. A missing or broken one counts as ours, whose reader says what is wrong."""
    values = _json(Path(directory) / "config.json")
    return "deepseek_v3" if values.get("model_type", "deepseek_v3") in MODEL_TYPES else "auto"


def read_config(directory: str | Path, family: str = "auto") -> AnyConfig:
    """The config of a model directory. `family` deepseek_v3: of no other architecture. Raises ValueError."""
    if family_of(directory) == "deepseek_v3":
        return DeepseekV3Config.from_pretrained(directory)
    if family != "auto":
        kind = _json(Path(directory) / "config.json").get("model_type")
        raise ValueError(
            f"model.family is {family!r}, but {directory} holds a {kind!r} model; set model.family to auto, which "
            "takes any causal language model of transformers"
        )
    return auto_config(directory)


def load_model(directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> AnyModel:
    """The model of a directory; dtype None: the one its config names. Raises ValueError."""
    if family_of(directory) == "deepseek_v3":
        return DeepseekV3ForCausalLM.from_pretrained(directory, dtype=dtype, device=device)
    model: Any = load_auto(directory, dtype)
    return model.to(device)


def empty_model(config: AnyConfig) -> AnyModel:
    """A model of this config, on the default device (torch.device("meta"): without weights)."""
    return DeepseekV3ForCausalLM(config) if isinstance(config, DeepseekV3Config) else empty_auto(config)


def published_state(model: Any, exact: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every (published name, tensor) of a model, or of a MergedModel (model.lora) around one.

    In the model's dtype, router biases in FP32; `exact`: what model.fp8 keeps in FP32 comes so.
    """
    return hf_state(model, exact) if isinstance(model.config, DeepseekV3Config) else published(model)


def published_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint, from the headers of its files; without files, from config.json."""
    shapes = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if shapes:
        return shapes
    with torch.device("meta"):
        model = empty_model(read_config(directory))
    return {name: tuple(tensor.shape) for name, tensor in published_state(model)}


def save_weights(model: Any, directory: str | Path) -> None:
    """Writes a model, or a MergedModel around one, as a model directory without tokenizer."""
    if isinstance(model.config, DeepseekV3Config):
        save_model(model, directory)
    else:
        save_auto(model, directory, SHARD_BYTES)


def fill_weights(model: Any, directory: str | Path) -> None:
    """Fills a model from a directory. Raises ValueError, before it changes, for one that does not fit."""
    if isinstance(model.config, DeepseekV3Config):
        load_weights(model, directory)
    else:
        load_auto_weights(model, directory)


def eos_token_ids(directory: str | Path) -> frozenset[int]:
    """Tokens that end a completion: those of config.json, and of generation_config.json where a chat model has more."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        ids = _json(Path(directory) / name).get("eos_token_id")
        found |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return frozenset(found)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
