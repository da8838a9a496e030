"""What engines are sent of a model in FP8: its very codes, under published names, or the values that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from model import DeepseekV3ForCausalLM
from model.fp8.modules import computed_gated_weights, computed_weight, to_fp8
from model.fp8.published import computed_state, in_blocks
from model.fp8.quantize import dequantize_blocks, quantize_blocks, scale_shape
from model.names import SCALE_SUFFIX, hf_state, stored_in_fp8

BLOCKS = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 4}
BLOCKS |= {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1}


@pytest.fixture
def model(make_model: Callable[..., DeepseekV3ForCausalLM]) -> DeepseekV3ForCausalLM:
    """BF16 with FP32 masters; matrices with partial blocks too (kv_a_proj_with_mqa, o_proj)."""
    made = make_model(**BLOCKS).to(torch.bfloat16)
    to_fp8(made, "emulate")
    return made


def names(model: Any) -> set[str]:
    return {name for name, _ in hf_state(model) if stored_in_fp8(name)}


def test_an_fp8_engine_gets_the_codes_that_layers_multiply_by(model: DeepseekV3ForCausalLM) -> None:
    in_fp8 = names(model)
    held = dict(computed_state(model, in_fp8))
    assert set(held) == {name for name, _ in hf_state(model)} | {name + SCALE_SUFFIX for name in in_fp8}
    layer: Any = model.model.layers[1]
    attention, experts, shared = layer.self_attn, layer.mlp.experts, layer.mlp.shared_experts
    stem = "model.layers.1.mlp"

    def value(name: str) -> torch.Tensor:
        assert held[name].dtype == torch.float8_e4m3fn and held[name + SCALE_SUFFIX].dtype == torch.float32
        return dequantize_blocks(held[name], held[name + SCALE_SUFFIX]).bfloat16()

    assert torch.equal(value("model.layers.1.self_attn.o_proj.weight"), computed_weight(attention.o_proj))
    gate_up, down = computed_gated_weights(experts)
    for e in range(4):
        both = [value(f"{stem}.experts.{e}.{part}_proj.weight") for part in ("gate", "up")]
        assert torch.equal(torch.cat(both), gate_up[e])
        assert torch.equal(value(f"{stem}.experts.{e}.down_proj.weight"), down[e])
    both = [value(f"{stem}.shared_experts.{part}_proj.weight") for part in ("gate", "up")]
    assert torch.equal(torch.cat(both), computed_gated_weights(shared)[0])
    sent = held[f"{stem}.experts.2.up_proj.weight"]  # not a copy: the memory that products read
    assert sent.untyped_storage().data_ptr() == experts._codes["gate_up"][1].codes.untyped_storage().data_ptr()


def test_what_the_engine_has_not_in_fp8_comes_as_values(model: DeepseekV3ForCausalLM) -> None:
    some = {name for name in names(model) if ".experts." in name and ".shared_experts." not in name}
    held, whole = dict(computed_state(model, some)), dict(computed_state(model, names(model)))
    masters = dict(hf_state(model, exact=True))
    for name in masters:
        if name in some:
            assert torch.equal(held[name].view(torch.uint8), whole[name].view(torch.uint8))
        elif stored_in_fp8(name):
            want = dequantize_blocks(whole[name], whole[name + SCALE_SUFFIX])
            assert held[name].dtype == torch.bfloat16 and torch.equal(held[name], want.bfloat16())
            off, rounding = ((a.float() - want).norm() for a in (masters[name], held[name]))
            assert rounding < 0.1 * off  # the parameter itself is much further from what is computed with
        else:
            assert torch.equal(held[name], masters[name])


@pytest.mark.parametrize(
    ("recipe", "changes"), [("mxfp8", {}), ("blockwise", {"moe_intermediate_size": 128, "intermediate_size": 192})]
)
def test_blocks_that_engines_do_not_have_are_made_of_the_masters(
    make_model: Any, recipe: str, changes: dict[str, int]
) -> None:
    """MXFP8's, and those of a gate and an up that lie in one block."""
    model = make_model(**BLOCKS | changes).to(torch.bfloat16)
    to_fp8(model, "emulate", recipe)
    name = "model.layers.0.mlp.up_proj.weight"
    held = dict(in_blocks(computed_state(model, {name}), {name}))
    codes, scales = quantize_blocks(model.get_parameter(name).detach())
    assert model.get_parameter(name).dtype == torch.float32
    assert torch.equal(held[name].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(held[name + SCALE_SUFFIX], scales) and scales.shape == scale_shape(codes.shape)


def test_codes_follow_the_parameters(model: DeepseekV3ForCausalLM) -> None:
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    before = {key: tensor.clone() for key, tensor in computed_state(model, {name}) if key.startswith(name)}
    with torch.no_grad():
        model.get_parameter(name).mul_(2.0)
    after = dict(computed_state(model, {name}))
    assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
    assert torch.equal(after[name + SCALE_SUFFIX], 2 * before[name + SCALE_SUFFIX])
