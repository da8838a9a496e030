"""The block quantiser against loops over blocks, and FP8 directories against BF16 ones and transformers' own reader."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.checkpoint import Checkpoint, released_form
from model.convert import convert_checkpoint
from model.fp8 import dequantize_blocks, quantize_blocks
from model.names import hf_state, stored_in_fp8

MakeModel = Callable[..., DeepseekV3ForCausalLM]
# Blocks whole and partial (320 = 2.5 blocks; 24 and 96 are less than one).
SIZES = {
    "hidden_size": 320, "intermediate_size": 384, "moe_intermediate_size": 160, "kv_lora_rank": 136, "q_lora_rank": 96,
    "initializer_range": 0.02, "num_nextn_predict_layers": 1,
}  # fmt: skip


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor on disk, codes and scales as they are."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(directory: Path) -> dict[str, Tensor]:
    """Every weight as a reader sees it, in BF16."""
    return {name: tensor.bfloat16() for name, tensor in Checkpoint(directory).read()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("shape", "block"), [((300, 130), (128, 128)), ((7, 5), (128, 128)), ((6, 40), (1, 16))])
def test_quantizer_equals_loops_over_blocks(shape: tuple, block: tuple, ue8m0: bool) -> None:
    weight = torch.randn(shape) * torch.logspace(-3, 2, shape[1])
    codes, scale_inv = quantize_blocks(weight, block, ue8m0)
    restored = dequantize_blocks(codes, scale_inv, block)
    assert scale_inv.shape == (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    assert (codes.dtype, scale_inv.dtype, codes.shape) == (torch.float8_e4m3fn, torch.float32, weight.shape)
    for i, j in torch.cartesian_prod(*map(torch.arange, scale_inv.shape)).tolist():
        part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        scale = weight[part].abs().max() / 448
        if ue8m0:
            scale = torch.tensor(2.0 ** math.ceil(math.log2(scale.item())))
        assert scale_inv[i, j] == scale
        assert same_bits(codes[part].contiguous(), (weight[part] / scale).to(torch.float8_e4m3fn))
        assert torch.equal(restored[part], codes[part].float() * scale)


def test_stacked_matrices_are_quantized_one_by_one() -> None:
    weight = torch.randn(3, 150, 260)
    codes, scale_inv = quantize_blocks(weight)
    for e in range(3):
        alone = quantize_blocks(weight[e])
        assert same_bits(codes[e], alone[0]) and torch.equal(scale_inv[e], alone[1])
    assert torch.equal(dequantize_blocks(codes, scale_inv)[1], dequantize_blocks(codes[1], scale_inv[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e6])
def test_quantizing_again_changes_nothing(dtype: torch.dtype, spread: float) -> None:
    weight = (torch.randn(1000, 600) * spread).to(dtype)
    for ue8m0 in (False, True):
        codes, scale_inv = quantize_blocks(weight, ue8m0=ue8m0)
        restored = dequantize_blocks(codes, scale_inv, dtype=dtype)
        error = (restored.float() - weight.float()).norm() / weight.float().norm()
        assert 0.02 < error < 0.03  # E4M3's own: three bits of mantissa
        again, scale_again = quantize_blocks(restored, ue8m0=ue8m0)
        assert torch.equal(dequantize_blocks(again, scale_again, dtype=dtype), restored)
        if not ue8m0:
            assert same_bits(again, codes) and torch.equal(scale_again, scale_inv)
    # Powers of two: a scale halves where the largest value rounded down to half of what the scale holds.
    ones = torch.full((1, 1), 448 * 1.001)
    codes, scale_inv = quantize_blocks(ones, ue8m0=True)
    assert (codes.item(), scale_inv.item()) == (224, 2)
    assert [x.item() for x in quantize_blocks(dequantize_blocks(codes, scale_inv), ue8m0=True)] == [448, 1]


def test_quantizer_edges() -> None:
    codes, scale_inv = quantize_blocks(torch.zeros(130, 3))
    assert not codes.float().any() and (scale_inv > 0).all()
    # One large value coarsens its own block only: the others keep E4M3's relative error.
    weight = torch.randn(256, 256)
    weight[0, 0] = 1e6
    error = (dequantize_blocks(*quantize_blocks(weight)) - weight).abs()
    assert error[128:].max() < 0.2 and error[:128, 128:].max() < 0.2 < error[1:128, :128].max()
    with pytest.raises(ValueError, match=r"scale_inv has shape \(1, 1\): codes \(130, 3\) need \(2, 1\)"):
        dequantize_blocks(codes, scale_inv[:1])
    # The largest value of a scale's exponent, and one bit more.
    for value, power in ((448.0, 1), (448.0 * (1 + 2**-22), 2), (2.0**-20 * 448, 2.0**-20)):
        assert quantize_blocks(torch.tensor([[value]]), ue8m0=True)[1].item() == power


@pytest.fixture
def model(make_model: MakeModel) -> DeepseekV3ForCausalLM:
    return make_model(**SIZES).to(torch.bfloat16)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_directory(scale_fmt: str, model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, scale_fmt=scale_fmt)
    on_disk, plain = stored(tmp_path), dict(hf_state(model))
    quantized = {name for name, tensor in on_disk.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantized == {
        name for name, tensor in plain.items() if tensor.dim() == 2 and not name.endswith(
            ("embed_tokens.weight", "lm_head.weight", "head.weight", "gate.weight", "eh_proj.weight"))
    }  # fmt: skip
    assert on_disk.keys() - plain.keys() == {name + "_scale_inv" for name in quantized}
    for name, tensor in plain.items():
        if name not in quantized:
            assert same_bits(on_disk[name], tensor), name
            continue
        scale_inv = on_disk[name + "_scale_inv"]
        assert scale_inv.dtype == torch.float32
        error = (dequantize_blocks(on_disk[name], scale_inv) - tensor.float()).norm() / tensor.float().norm()
        assert 0.01 < error < 0.03, name
        assert torch.equal(scale_inv.log2().round().exp2(), scale_inv) == (scale_fmt == "ue8m0")
    assert on_disk["model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 3)  # 144 x 320

    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    expected = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert quantization == expected | ({"scale_fmt": "ue8m0"} if scale_fmt == "ue8m0" else {})

    back = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert back.dtype == torch.bfloat16 and back.config == dataclasses.replace(model.config, dtype="bfloat16")
    master = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, rounded), (_, full) in zip(hf_state(back), hf_state(master)):
        exact = dequantize_blocks(on_disk[name], on_disk[name + "_scale_inv"]) if name in quantized else on_disk[name]
        assert torch.equal(full, exact.float()) and same_bits(rounded, exact.to(rounded.dtype)), name


def test_scale_in_another_shard(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, scale_fmt="float")
    expected, tensors = DeepseekV3ForCausalLM.from_pretrained(tmp_path).state_dict(), stored(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + name.endswith('_scale_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_scales_stored_as_exponents(model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    """One byte a block, as in transformers' own ue8m0 form; they count without a quantization_config too."""
    model.save_pretrained(tmp_path, scale_fmt="ue8m0")
    expected = DeepseekV3ForCausalLM.from_pretrained(tmp_path).state_dict()
    tensors = {
        name: tensor.to(torch.float8_e8m0fnu) if name.endswith("_scale_inv") else tensor
        for name, tensor in stored(tmp_path).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_transformers_reads_our_fp8(scale_fmt: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Through its FineGrainedFP8 quantiser, which dequantises where there is no GPU.

    Sizes are whole blocks or less than one: 5.23 takes the rows of a block to be rows over scale rows, so it refuses
    the 576 rows of V3's kv_a_proj_with_mqa.
    """
    pytest.importorskip("accelerate", reason="transformers' FP8 reader asks for it; in the dev extra")
    sizes = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "kv_lora_rank": 120,
             "q_lora_rank": 96, "initializer_range": 0.02, "num_nextn_predict_layers": 0}  # fmt: skip
    make_model(**sizes).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_bytes=1_000_000, scale_fmt=scale_fmt)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    ours = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    theirs_state, ours_state = theirs.state_dict(), ours.state_dict()
    assert theirs_state.keys() == ours_state.keys()
    for name, tensor in ours_state.items():
        found = theirs_state[name]
        if name.endswith(".mlp.gate.weight"):
            found = found.to(tensor.dtype)  # transformers 5.24 keeps it in FP32
        assert same_bits(found, tensor), name


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_convert_there_and_back(scale_fmt: str, model: DeepseekV3ForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "bf16", max_shard_bytes=2_000_000)
    values = json.loads((tmp_path / "bf16" / "config.json").read_text()) | {"auto_map": {"AutoConfig": "x.y"}}
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(values))
    (tmp_path / "bf16" / "tokenizer.json").write_text("{}")
    seen: list[tuple[str, int, int]] = []
    convert_checkpoint(tmp_path / "bf16", tmp_path / "fp8", scale_fmt, 700_000, written=lambda *a: seen.append(a))
    convert_checkpoint(tmp_path / "fp8", tmp_path / "back", None, 2_000_000)
    convert_checkpoint(tmp_path / "back", tmp_path / "again", scale_fmt, 700_000)
    files = sorted(path.name for path in (tmp_path / "fp8").glob("*.safetensors"))
    assert [file for file, _, _ in seen] == files and len(files) > 2
    assert (
        seen[-1][1]
        == seen[-1][2]
        == sum(math.prod(t.shape) * t.dtype.itemsize for t in Checkpoint(tmp_path / "fp8").tensors.values())
    )
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files and index["metadata"]["total_size"] == seen[-1][2]

    original, back = contents(tmp_path / "bf16"), contents(tmp_path / "back")
    assert original.keys() == back.keys() and "model.layers.3.shared_head.head.weight" in original  # MTP, with copies
    for name, tensor in original.items():
        error = (back[name] - tensor).float().norm() / tensor.float().norm()
        assert error < 0.03 and (error > 0.01) == stored_in_fp8(name), name
    assert all(torch.equal(tensor, back[name]) for name, tensor in contents(tmp_path / "again").items())
    once, twice = stored(tmp_path / "fp8"), stored(tmp_path / "again")
    assert once.keys() == twice.keys()
    assert scale_fmt == "ue8m0" or all(same_bits(once[name], twice[name]) for name in once)  # codes and scales too

    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("bf16", "fp8", "back")]
    assert configs[0] == configs[2] and configs[1].pop("quantization_config")["quant_method"] == "fp8"
    assert configs[1] == configs[0] and (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ValueError, match="is not empty; choose another directory"):
        convert_checkpoint(tmp_path / "bf16", tmp_path / "fp8", None)


def test_convert_from_float32_rounds_once(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(**SIZES)
    model.save_pretrained(tmp_path / "fp32")
    for scale_fmt in ("float", None):
        convert_checkpoint(tmp_path / "fp32", tmp_path / str(scale_fmt), scale_fmt)
        on_disk, expected = stored(tmp_path / str(scale_fmt)), dict(released_form(hf_state(model), scale_fmt))
        assert on_disk.keys() == expected.keys()
        assert all(same_bits(on_disk[name], tensor.contiguous()) for name, tensor in expected.items())
        assert DeepseekV3Config.from_pretrained(tmp_path / str(scale_fmt)).dtype == "bfloat16"
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight holds a number that is not finite"):
        model.save_pretrained(tmp_path / "nan", scale_fmt="float")
    with pytest.raises(ValueError, match="scale_fmt is 'fp4'"):
        model.save_pretrained(tmp_path / "nan", scale_fmt="fp4")
