"""Our model against transformers' DeepseekV3ForCausalLM: numbers, gradients and directories."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers import DeepseekV3ForCausalLM as TransformersModel

from model import DeepseekV3Config, DeepseekV3ForCausalLM

CASES = {
    "v3": {},
    "no_q_lora": {"q_lora_rank": None},
    "one_group": {"n_group": 1, "topk_group": 1},
    "no_yarn": {"rope_scaling": None, "rope_theta": 50000.0},
    "two_shared": {"n_shared_experts": 2},
    "moonlight": {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "rope_scaling": None,
                  "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446},
    "unnormalised": {"norm_topk_prob": False, "num_experts_per_tok": 4, "topk_group": 3},
    "mscale_differs": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                                        "mscale": 0.7, "mscale_all_dim": 1.3}},
    "odd_widths": {"moe_intermediate_size": 15},
}  # fmt: skip
MakeModel = Callable[..., DeepseekV3ForCausalLM]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    ours = make_model(**CASES[case])
    ours.save_pretrained(tmp_path)
    theirs = TransformersModel.from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")
    ids = torch.randint(0, 40, (3, 90))
    theirs_logits, ours_logits = theirs(ids).logits, ours(ids).logits
    assert relative(ours_logits, theirs_logits) < 1e-5

    probe = torch.randn_like(ours_logits)
    (ours_logits * probe).sum().backward()
    (theirs_logits * probe).sum().backward()
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    ours_grads = {name: p.grad for name, p in ours.named_parameters()}
    assert theirs_grads.keys() == ours_grads.keys()
    for name, grad in ours_grads.items():
        assert relative(grad, theirs_grads[name]) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directory_round_trips(dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    ours = make_model(num_nextn_predict_layers=0).to(dtype)
    ours.save_pretrained(tmp_path / "ours")
    theirs = TransformersModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name

    back = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "theirs")
    assert back.config == DeepseekV3Config.from_pretrained(tmp_path / "ours")
    for name, tensor in ours.state_dict().items():
        other = back.state_dict()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name


@pytest.mark.parametrize("case", ["v3", "no_yarn"])
def test_config_means_the_same_to_transformers(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    make_model(**CASES[case], num_nextn_predict_layers=1).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "DeepseekV3Config"
    assert (config.topk_method, config.scoring_func) == ("noaux_tc", "sigmoid")
    assert config.num_nextn_predict_layers == 1
    assert config.rope_parameters["rope_theta"] == CASES[case].get("rope_theta", 10000.0)
    assert config.rope_parameters["rope_type"] == ("yarn" if case == "v3" else "default")


def test_bfloat16_close(make_model: MakeModel, tmp_path: Path) -> None:
    # One layer: deeper, near-ties in the router flip and the comparison is about luck.
    ours = make_model(num_hidden_layers=2).to(torch.bfloat16)
    ours.save_pretrained(tmp_path)
    theirs = TransformersModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(0, 40, (2, 30))
    difference = (ours(ids).logits - theirs(ids).logits).float().abs()
    assert difference.median() < 0.02 * theirs(ids).logits.float().abs().median()
