"""Hugging Face model directories: config.json and safetensors, sharded when large, read and written as a stream."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.names import HFModel, hf_state, load_hf_state

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def save_model(model: HFModel, directory: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json (with the dtype and MTP depth really saved) and the weights under published names.

    One shard is in flight at a time. Files are written beside and then renamed, so a crash leaves no torn shard.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = str(model.state_dict()["lm_head.weight"].dtype).removeprefix("torch.")
    dataclasses.replace(model.config, dtype=dtype).save_pretrained(directory)
    shards: list[list[str]] = [[]]
    sizes = [0]
    total = 0
    for name, tensor in hf_state(model):
        if shards[-1] and sizes[-1] + tensor.nbytes > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += tensor.nbytes
        total += tensor.nbytes
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    state = hf_state(model)
    for file, names in zip(files, shards):
        tensors: dict[str, Tensor] = {}
        for expected in names:
            name, tensor = next(state)
            assert name == expected, f"{name} where {expected} was planned"
            # The MTP copies share memory with embedding and head, which safetensors refuses.
            tensors[name] = tensor.clone() if name.endswith((".embed_tokens.weight", ".head.weight")) else tensor
        save_file(tensors, directory / f"{file}.tmp", metadata={"format": "pt"})
        (directory / f"{file}.tmp").rename(directory / file)
    for old in directory.glob("model*.safetensors"):
        if old.name not in files:
            old.unlink()  # left by an earlier save with other shards; an index would not list it
    (directory / INDEX).unlink(missing_ok=True)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_weights(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every (published name, tensor on the CPU) of a directory, one at a time.

    Raises ValueError when there are no safetensors, a shard is absent, or the weights are FP8.
    """
    directory = Path(directory)
    if (directory / INDEX).is_file():
        files = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    else:
        files = [SINGLE]
    for file in files:
        if not (directory / file).is_file():
            raise ValueError(f"{directory / file} does not exist: give a directory with safetensors weights")
        with safe_open(directory / file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                tensor = handle.get_tensor(name)
                if tensor.dtype == torch.float8_e4m3fn or name.endswith("weight_scale_inv"):
                    raise ValueError(f"{directory}: {name} is FP8; convert the checkpoint to bfloat16 first")
                yield name, tensor


def load_weights(model: HFModel, directory: str | Path) -> None:
    """Fill the model from a directory. ValueError names what is missing, unexpected or of another shape."""
    try:
        load_hf_state(model, read_weights(directory))
    except ValueError as error:
        raise ValueError(error if str(directory) in str(error) else f"{directory}: {error}") from error
