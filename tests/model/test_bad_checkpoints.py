"""Directories that are broken or do not fit: one line that names file, tensor, what was expected and what was found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import DeepseekV3ForCausalLM
from model.convert import convert_checkpoint

INDEX = "model.safetensors.index.json"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
MakeModel = Callable[..., DeepseekV3ForCausalLM]


@pytest.fixture
def sharded(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path, max_shard_bytes=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


@pytest.fixture
def fp8(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path, max_shard_bytes=20_000, scale_fmt="float")
    return tmp_path


def shard_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def edit(path: Path, **changes: Tensor | None) -> None:
    """Rewrite a shard with other tensors; None takes one out."""
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(directory: Path, *words: object) -> None:
    """Loading and converting end with the same line, and nothing is written."""
    with pytest.raises(ValueError) as loading:
        DeepseekV3ForCausalLM.from_pretrained(directory)
    with pytest.raises(ValueError) as converting:
        convert_checkpoint(directory, directory / "out", None)
    line = str(loading.value)
    assert line == str(converting.value) and "\n" not in line and not (directory / "out").exists()
    assert all(str(word) in line for word in words), line


@pytest.mark.parametrize("kept", [0.5, 0.999, 10, 0])
def test_truncated_shard(kept: float, sharded: Path) -> None:
    path = shard_of(sharded, O_PROJ)
    content = path.read_bytes()
    size = int(kept * len(content)) if isinstance(kept, float) else kept
    path.write_bytes(content[:size])
    refused(sharded, path, "truncated", "should end at byte", f"the file has {size}")
    if isinstance(kept, float):
        refused(sharded, "model.layers.", f"{len(content)}" if kept > 0.9 else "")


def test_shard_that_is_no_safetensors_file(sharded: Path) -> None:
    path = shard_of(sharded, O_PROJ)
    path.write_bytes((9).to_bytes(8, "little") + b"{not json")
    refused(sharded, path, "no safetensors file")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(sharded, path, "no safetensors file", "the file has 43")


@pytest.mark.parametrize("change", [{"dtype": "BF16"}, {"data_offsets": [8, 16]}, {"shape": [7]}])
def test_shard_that_contradicts_itself(change: dict, sharded: Path) -> None:
    path = shard_of(sharded, O_PROJ)
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    header[O_PROJ] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[length:])
    refused(sharded, path, O_PROJ, "expected at bytes", "found")


def test_missing_shard(sharded: Path) -> None:
    path = shard_of(sharded, O_PROJ)
    path.unlink()
    refused(sharded, f"{path} does not exist", INDEX, "model.layers.")


def test_index_names_a_shard_that_never_was(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({O_PROJ: "model-00099-of-00099.safetensors"}))
    refused(sharded, f"{sharded}/model-00099-of-00099.safetensors does not exist", INDEX, O_PROJ)


def test_index_points_to_the_wrong_shard(sharded: Path) -> None:
    other = next(p.name for p in sharded.glob("*.safetensors") if p != shard_of(sharded, O_PROJ))
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({O_PROJ: other}))
    refused(sharded, sharded / other, O_PROJ, "missing", INDEX)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_broken_index(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, sharded / INDEX, "weight_map")


def test_missing_tensor(sharded: Path) -> None:
    edit(shard_of(sharded, O_PROJ), **{O_PROJ: None})
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(O_PROJ))
    refused(sharded, sharded / INDEX, O_PROJ, "missing", "expected shape (32, 48)", "found none")


def test_missing_mtp_tensor(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(num_nextn_predict_layers=1).save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", **{"model.layers.3.eh_proj.weight": None, "model.layers.3.enorm.weight": None})
    refused(tmp_path, "model.layers.3.enorm.weight (and 1 more) missing", "expected shape (32,)", "found none")


def test_wrong_shape(sharded: Path) -> None:
    path = shard_of(sharded, O_PROJ)
    edit(path, **{O_PROJ: torch.zeros(48, 32)})
    refused(sharded, path, O_PROJ, "has shape (48, 32)", "asks for (32, 48)")


def test_tensor_of_another_model(sharded: Path) -> None:
    path, bias = shard_of(sharded, O_PROJ), "model.layers.1.self_attn.o_proj.bias"
    edit(path, **{bias: torch.zeros(32)})
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({bias: path.name}))
    refused(sharded, path, bias, "(32,) is not part of this model")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("quant_method", "compressed-tensors", "fp8"),
        ("fmt", "e5m2", "e4m3"),
        ("weight_block_size", [64, 64], [128, 128]),
        ("weight_block_size", None, [128, 128]),
        ("expert_dtype", "fp4", "fp8"),
        ("scale_fmt", "int8", "float"),
    ],
)
def test_unknown_quantization(key: str, value: object, expected: object, fp8: Path) -> None:
    edit_json(fp8 / "config.json", lambda config: config["quantization_config"].update({key: value}))
    refused(fp8, fp8 / "config.json", f"quantization_config.{key} is {value!r}: expected {expected!r}")


def test_unknown_weight_dtype(sharded: Path) -> None:
    path = shard_of(sharded, O_PROJ)
    edit(path, **{O_PROJ: torch.zeros(32, 48, dtype=torch.int8)})
    refused(sharded, path, O_PROJ, "has dtype I8: expected one of", "BF16")


def test_fp8_scales_that_do_not_fit(fp8: Path) -> None:
    scale = O_PROJ + "_scale_inv"
    path = shard_of(fp8, scale)
    edit(path, **{scale: torch.ones(2, 1)})
    refused(fp8, path, scale, "expected shape (1, 1)", "found shape (2, 1)")
    edit(path, **{scale: None})
    edit_json(fp8 / INDEX, lambda index: index["weight_map"].pop(scale))
    refused(fp8, shard_of(fp8, O_PROJ), scale, "expected shape (1, 1)", "found none")


def test_scale_of_a_weight_that_is_not_fp8(fp8: Path) -> None:
    edit(shard_of(fp8, O_PROJ), **{O_PROJ: torch.zeros(32, 48, dtype=torch.bfloat16)})
    refused(fp8, shard_of(fp8, O_PROJ + "_scale_inv"), O_PROJ + "_scale_inv", "expected float8_e4m3fn, found torch.bf")


def test_groups_that_do_not_divide(sharded: Path) -> None:
    edit_json(sharded / "config.json", lambda config: config.update(n_group=3))
    refused(sharded, sharded / "config.json", "n_group is 3 with n_routed_experts 8", "groups must be equal")


def test_no_weights(sharded: Path) -> None:
    for path in [*sharded.glob("*.safetensors"), sharded / INDEX]:
        path.unlink()
    refused(sharded, sharded / "model.safetensors", "does not exist")
