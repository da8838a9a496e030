"""LoRA by peft: the adapter loads on transformers' own model, merged weights are base plus adapter, the base stays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from model import DeepseekV3ForCausalLM
from model.checkpoint import save_model
from model.lora import LoraAdapter, adapter_shapes

peft = pytest.importorskip("peft")
MakeModel = Callable[..., DeepseekV3ForCausalLM]
R, ALPHA = 3, 7
OPTIONS: dict[str, Any] = {"r": R, "lora_alpha": ALPHA}
SCALE = ALPHA / R
MIXED = {
    "target_modules": ["q_proj", "self_attn.o_proj"],
    "target_parameters": [
        "kv_b_proj.weight",
        "mlp.up_proj.weight",
        "shared_experts.up_proj.weight",
        "mlp.experts.down_proj",
    ],
}


def adapted(model: DeepseekV3ForCausalLM, base_dir: Path | str = "", **options: Any) -> LoraAdapter:
    """An adapter that does something: B drawn, too."""
    adapter = LoraAdapter(model, OPTIONS | options, base_dir, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return adapter


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(60).view(3, 20) % 40).logits


@pytest.mark.parametrize(
    ("sizes", "targets"),
    [
        ({"num_nextn_predict_layers": 1}, {}),
        ({"q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1}, {}),
        ({"q_lora_rank": None}, MIXED),
    ],
    ids=["every matrix", "no q_lora, two shared experts", "modules and parameters"],
)
def test_peft_model_on_transformers_model_gives_our_logits(
    sizes: dict[str, Any], targets: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(**sizes)
    model.save_pretrained(tmp_path / "base")
    base = logits(model)
    adapter = adapted(model, tmp_path / "base", **targets)
    adapter.save(tmp_path)
    ours = logits(model)
    with adapter.off():
        assert torch.equal(logits(model), base)

    kwargs: dict[str, Any] = {"dtype": torch.float32}
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "base", **kwargs)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    assert (logits(loaded) - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - base).abs().max() > 0.1 * base.abs().max()
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


def test_every_matrix_but_the_routers_has_an_adapter(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(num_nextn_predict_layers=1)
    adapted(model).save(tmp_path)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    stems = {name.split("layers.")[1].rsplit(".lora_", 1)[0] for name in shapes}
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    want = {f"{layer}.self_attn.{name}" for layer in range(3) for name in attention}
    want |= {f"0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    want |= {f"{layer}.mlp.shared_experts.{name}_proj" for layer in (1, 2) for name in ("gate", "up", "down")}
    # both stacked parameters of a module: one wrapper around the other
    want |= {f"{layer}.mlp.experts{inner}" for layer in (1, 2) for inner in ("", ".base_layer")}
    assert stems == want
    experts = "base_model.model.model.layers.1.mlp.experts"
    assert shapes[f"{experts}.base_layer.lora_A.weight"] == (8 * R, 32)  # gate_up_proj [8, 32, 32]
    assert shapes[f"{experts}.lora_A.weight"] == (8 * R, 16)  # down_proj [8, 32, 16]
    assert shapes[f"{experts}.lora_B.weight"] == (32, 8 * R)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(shapes) and all(".lora_" in name for name in trained)


@pytest.mark.parametrize("targets", [{}, MIXED], ids=["parameters", "mixed"])
def test_merged_weights_are_base_plus_adapter(targets: dict[str, Any], make_model: MakeModel) -> None:
    model = make_model(q_lora_rank=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = adapted(model, **targets)
    logits(model)  # must leave no trace
    merged = {name: tensor.clone() for name, tensor in adapter.merged.items()}
    assert merged.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(adapter.merged.base(name), tensor), name
    for name, layer in adapter.merged.layers.items():
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        want = before[name].clone()
        if want.dim() == 2:
            want += SCALE * b @ a
        else:
            for e in range(8):  # B's columns: rank by rank, of each rank every expert
                want[e] += SCALE * b[:, e::8] @ a[e * R : (e + 1) * R]
        torch.testing.assert_close(merged[name], want, rtol=0, atol=1e-6)
        assert (merged[name] - before[name]).abs().max() > 0.01
    for name in merged.keys() - adapter.merged.layers.keys():
        assert torch.equal(merged[name], before[name]), name
    untouched = {
        name for name in merged if name.endswith((".gate.weight", "norm.weight", "bias")) or "layers" not in name
    }
    assert not untouched & adapter.merged.layers.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_model_with_merged_weights_gives_the_same_bits(
    dtype: torch.dtype, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(num_nextn_predict_layers=1).to(dtype)
    adapter = adapted(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    want = logits(model)
    save_model(adapter.merged, tmp_path, max_shard_bytes=20_000)
    plain = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == dtype
    assert torch.equal(logits(plain), want)
    assert torch.equal(plain.mtp_layers[0].eh_proj.weight, adapter.merged["mtp_layers.0.eh_proj.weight"])


def test_gradients_follow_from_those_of_the_merged_weights(make_model: MakeModel, tmp_path: Path) -> None:
    """dB = s dW A^T, dA = s B^T dW, expert by expert; also where activations are computed again."""
    model = make_model()
    adapter = adapted(model)
    save_model(adapter.merged, tmp_path)
    plain = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    model.model.gradient_checkpointing = True
    ids = torch.arange(60).view(3, 20) % 40
    for each in (model, plain):
        each(ids).logits.log_softmax(-1)[..., 7].sum().backward()
    for name, layer in adapter.merged.layers.items():
        a, b, grad = layer.lora_A["default"].weight, layer.lora_B["default"].weight, plain.get_parameter(name).grad
        assert a.grad is not None and b.grad is not None and grad is not None
        grad = grad if grad.dim() == 3 else grad[None]
        count = len(grad)
        for e in range(count):
            rows, columns = slice(e * R, (e + 1) * R), slice(e, None, count)
            for got, want in (
                (b.grad[:, columns], SCALE * grad[e] @ a[rows].T),
                (a.grad[rows], SCALE * b[:, columns].T @ grad[e]),
            ):
                assert (got - want).abs().max() <= 1e-4 * want.abs().max() + 1e-7, name
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"target_modules": ["o_prj"]}, "'o_prj.weight' names nothing; adapters can sit on mlp.down_proj.weight"),
        ({"target_modules": ["gate"]}, "names model.layers.1.mlp.gate.weight; adapters can"),
        ({"target_modules": ["lm_head"]}, "names lm_head.weight"),
        ({"target_parameters": ["weight"]}, "names model.embed_tokens.weight"),
        ({"target_modules": ["mtp_layers.0.self_attn.o_proj"]}, "names nothing"),
        ({"target_modules": ["o_proj"], "target_parameters": ["self_attn.o_proj.weight"]}, "a matrix for the second"),
        ({"target_modules": ["o_proj", "up_proj"]}, "name mlp.up_proj.weight in target_parameters"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be(targets: dict[str, Any], message: str, make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=message) as error:
        adapter_shapes(make_model(num_nextn_predict_layers=1).config, OPTIONS | targets)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_peft_takes_mlp_modules_for_the_routed_experts(make_model: MakeModel) -> None:
    """The reason for the last of these errors. Once this fails, the error may go."""
    config = transformers.DeepseekV3Config(**make_model().config.to_dict())
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(config)
        loaded = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained and all(".mlp.experts." in name for name in trained)


def test_without_peft_one_line_names_the_extra(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"peft is not installed; pip install 'grpo-v3\[lora\]'"):
        adapter_shapes(make_model().config, OPTIONS)
