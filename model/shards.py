"""Safetensors files and their index: where each tensor lies, from headers alone, and shards written as a stream."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is; its numbers stay on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Every tensor that the index lists (or the single file holds), by published name, file after file.

    Raises ValueError, before any weight is read, for an index or a shard that is absent, broken or truncated, for a
    tensor that is not where the index says, and for a dtype that no DeepSeek-V3 weight has.
    """
    directory = Path(directory)
    listed = _read_index(directory / INDEX)
    found = {}
    for file, names in listed.items():
        path = directory / file
        if not path.is_file():
            wanted = f"{INDEX} puts {names[0]} there" if names else "give a directory with safetensors weights"
            raise ValueError(f"{path} does not exist: {wanted}")
        held = read_header(path)
        absent = next((name for name in names if name not in held), None)
        if absent:
            raise ValueError(f"{path}: {absent} is missing: {INDEX} puts it there, the file does not hold it")
        wanted = set(names or held)
        found |= {name: tensor for name, tensor in held.items() if name in wanted}
    return found


def _read_index(path: Path) -> dict[str, list[str]]:
    """Shards in order, each with the tensors it should hold; without an index the single file, with none named."""
    if not path.is_file():
        return {SINGLE: []}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        listed: dict[str, list[str]] = {file: [] for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            listed[file].append(name)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index with a weight_map ({error!r}): restore the file") from error
    return listed


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, in the order of its bytes.

    Raises ValueError when the file ends before its last tensor does, contradicts itself, or is something else.
    """
    length = path.stat().st_size
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if length < max(start, 8):
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header should end at byte {start}, "
                f"the file has {length}; copy it again"
            )
        try:
            header = json.loads(stream.read(start - 8))
            header.pop("__metadata__", None)
            entries = [(*entry["data_offsets"], name, entry["dtype"], entry["shape"]) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no safetensors file ({error!r}): copy it again") from error
    tensors, position = {}, 0
    for begin, end, name, dtype, shape in sorted(entries):
        if dtype not in DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {dtype}: expected one of {', '.join(DTYPES)}; "
                "convert this quantisation to bfloat16 with the tool that made it"
            )
        expected = (position, position + math.prod(shape) * DTYPES[dtype].itemsize)
        if (begin, end) != expected:
            raise ValueError(f"{path}: {name} {dtype} {shape}: expected at bytes {expected}, found {(begin, end)}")
        if start + end > length:
            raise ValueError(
                f"{path} is truncated: {name} should end at byte {start + end}, the file has {length}; copy it again"
            )
        tensors[name] = StoredTensor(path, tuple(shape), DTYPES[dtype])
        position = end
    return tensors


def write_shards(
    directory: Path,
    layout: Iterable[TensorSpec],
    tensors: Iterator[tuple[str, Tensor]],
    max_shard_bytes: int,
    written: Callable[[str, int, int], None] = lambda file, done, total: None,
) -> None:
    """Write tensors to safetensors files, with an index if there is more than one.

    layout: every tensor, in the order in which `tensors` gives them: what goes where is known before the first comes,
    so only one is in memory at a time. Files are written beside and then renamed, so a crash leaves no torn one; shards
    of an earlier save are removed. written(file, bytes so far, bytes in all) is called after each file.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = done = 0
    for spec in layout:
        if filled and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    count, total = len(shards), sum(spec.nbytes for shard in shards for spec in shard)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(files, shards):
        _write_file(directory / f"{file}.tmp", shard, tensors)
        (directory / f"{file}.tmp").rename(directory / file)
        done += sum(spec.nbytes for spec in shard)
        written(file, done, total)
    for old in directory.glob("model*.safetensors"):
        if old.name not in files:
            old.unlink()  # left by an earlier save with other shards; an index would not list it
    (directory / INDEX).unlink(missing_ok=True)
    if count > 1:
        weight_map = {spec.name: file for file, shard in zip(files, shards) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One safetensors file. safetensors' own writer wants all of its tensors in memory at once.

    Wide dtypes come first, as in that writer, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name)):
        offsets = [position, position := position + spec.nbytes]
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            name, tensor = next(tensors)
            assert TensorSpec(name, tensor.dtype, tuple(tensor.shape)) == spec, f"{name} where {spec} was planned"
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
