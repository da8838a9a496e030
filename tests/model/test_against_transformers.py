"""Our model against transformers' DeepseekV3ForCausalLM: numbers, gradients and directories."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers import DeepseekV3ForCausalLM as TransformersModel

from model import DeepseekV3ForCausalLM, SequenceLayout

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


def chosen_experts(model: TransformersModel, ids: torch.Tensor) -> torch.Tensor:
    """What transformers' routers choose for ids # [B, T], sorted # [B T, L_moe, K]."""
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda module, args, out: chosen.append(out[2])) for gate in gates]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1).sort(-1).values


@pytest.mark.parametrize("case", CASES)
def test_logits_routing_and_gradients(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    ours = make_model(**CASES[case])
    assert (ours.model.layers[1].mlp.gate.e_score_correction_bias < 0).any()
    ours.save_pretrained(tmp_path)
    theirs = TransformersModel.from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")
    ids = torch.randint(0, 40, (3, 90))
    theirs_logits, ours_logits = theirs(ids).logits, ours(ids).logits
    assert (ours_logits - theirs_logits).abs().max() <= 1e-5 * theirs_logits.abs().max()
    packed = ours.forward_packed(ids.flatten(), SequenceLayout.from_batch(*ids.shape), output_routing=True)
    assert packed.routed_experts is not None
    assert torch.equal(packed.routed_experts.sort(-1).values, chosen_experts(theirs, ids))

    probe = torch.randn_like(ours_logits)
    (ours_logits * probe).sum().backward()
    (theirs_logits * probe).sum().backward()
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    ours_grads = {name: p.grad for name, p in ours.named_parameters()}
    assert theirs_grads.keys() == ours_grads.keys()
    for name, grad in ours_grads.items():
        assert relative(grad, theirs_grads[name]) < 1e-4, name


def contents(directory: Path, dtype: str) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor on disk, to the byte; router matrices in `dtype`, as transformers 5.24 saves them in FP32."""
    stored = load_file(directory / "model.safetensors")
    stored |= {name: t.to(getattr(torch, dtype)) for name, t in stored.items() if name.endswith(".mlp.gate.weight")}
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in stored.items()
    }


@pytest.mark.parametrize(("case", "dtype"), [*((case, "float32") for case in CASES), ("v3", "bfloat16")])
def test_directories_both_ways(case: str, dtype: str, make_model: MakeModel, tmp_path: Path) -> None:
    ours = make_model(**CASES[case], num_nextn_predict_layers=1).to(getattr(torch, dtype))
    ours.save_pretrained(tmp_path / "ours")
    TransformersModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    with pytest.warns(
        UserWarning, match="the weights hold no MTP layer"
    ):  # transformers drops it and still promises it
        back = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "theirs")
    back.save_pretrained(tmp_path / "back")

    written = contents(tmp_path / "ours", dtype)
    mtp = {name for name in written if name.startswith("model.layers.3.")}
    assert len(mtp) == sum(name.startswith("model.layers.2.") for name in written) + 6
    assert contents(tmp_path / "theirs", dtype) == {name: written[name] for name in written.keys() - mtp}
    assert contents(tmp_path / "back", dtype) == contents(tmp_path / "theirs", dtype)
    assert back.config == dataclasses.replace(ours.config, num_nextn_predict_layers=0, dtype=dtype)
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours")  # with the MTP layer
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))


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
