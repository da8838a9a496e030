"""Configs, names, checkpoints and created models: what is written can be read, and errors are one clear line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.convert import convert_checkpoint
from model.create import create_model, encode
from model.names import HFLoader, from_hf, hf_state, load_hf_state

MakeModel = Callable[..., DeepseekV3ForCausalLM]
MakeConfig = Callable[..., DeepseekV3Config]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v2"}, "checkpoint from another architecture: model_type 'deepseek_v2'"),
        ({"architectures": ["LlamaForCausalLM"]}, "checkpoint from another architecture"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax': DeepSeek-V3 needs 'sigmoid'"),
        ({"n_group": 3}, "n_group is 3 with n_routed_experts 8"),
        ({"n_group": 8}, "hold at least 2 experts"),
        ({"topk_group": 5}, "topk_group is 5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"factor": 2}}, "add `rope_type: yarn`"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ],
)
def test_config_errors(change: dict, message: str, make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_config(**change)
    assert "\n" not in str(error.value)


def test_config_missing_sizes() -> None:
    with pytest.raises(ValueError, match=r"config lacks .*hidden_size"):
        DeepseekV3Config.from_dict({"model_type": "deepseek_v3", "vocab_size": 10})


def test_config_reads_both_rope_spellings(make_config: MakeConfig) -> None:
    old = make_config(rope_theta=5000.0)
    values = old.to_dict()
    assert DeepseekV3Config.from_dict(values) == old
    del values["rope_scaling"], values["rope_theta"]  # transformers 5 alone
    assert DeepseekV3Config.from_dict(values) == old
    assert old.num_nextn_predict_layers == 0
    assert make_config(eos_token_id=[3, 4]).eos_token_ids == (3, 4) and old.eos_token_ids == (1,)


def test_published_names(make_model: MakeModel) -> None:
    model = make_model(num_nextn_predict_layers=2)
    pairs = dict(hf_state(model))
    for name in (
        "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.layers.3.eh_proj.weight", "model.layers.4.shared_head.norm.weight", "model.layers.4.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight", "model.layers.4.mlp.experts.0.down_proj.weight", "lm_head.weight",
    ):  # fmt: skip
        assert name in pairs
    stacked = model.model.layers[1].mlp.experts.gate_up_proj
    up = pairs["model.layers.1.mlp.experts.7.up_proj.weight"]
    assert torch.equal(up, stacked[7, 16:]) and up.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    assert from_hf("model.layers.4.embed_tokens.weight", model.config) is None

    torch.manual_seed(5)
    other = DeepseekV3ForCausalLM(model.config)
    load_hf_state(other, reversed(list(pairs.items())))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_loader_reports(make_model: MakeModel) -> None:
    model = make_model()
    pairs = dict(hf_state(model))
    del pairs["model.layers.2.mlp.experts.3.up_proj.weight"]
    loader = HFLoader(model)
    for name, tensor in pairs.items():
        loader.load(name, tensor)
    assert loader.missing == ["model.layers.2.mlp.experts.gate_up_proj"]
    with pytest.raises(ValueError, match="gate_up_proj missing from the weights"):
        loader.finish()
    with pytest.raises(ValueError, match="nonsense not part of this model"):
        load_hf_state(model, [*hf_state(model), ("nonsense", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"lm_head.weight has shape"):
        load_hf_state(model, [("lm_head.weight", torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="given twice"):
        load_hf_state(model, [("lm_head.weight", model.lm_head.weight)] * 2)


def test_sharded_save_and_mtp(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))  # the single file is gone
    back = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    half = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    assert DeepseekV3Config.from_pretrained(tmp_path / "half").dtype == "bfloat16"
    (tmp_path / files[0]).unlink()
    with pytest.raises(ValueError, match=f"{files[0]} does not exist"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)


def test_config_and_weights_in_published_style(make_model: MakeModel, tmp_path: Path) -> None:
    """Kimi-K2's model_type, the old spelling of keys, keys of other tools, and a buffer that some exports carry."""
    model = make_model(q_lora_rank=None, n_group=1, topk_group=1, rms_norm_eps=1e-5).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"], values["dtype"], values["num_nextn_predict_layers"]
    values["rope_scaling"] = {key: value for key, value in values["rope_scaling"].items() if "rope_t" not in key}
    values["rope_scaling"]["type"] = "yarn"
    values |= {
        "model_type": "kimi_k2",
        "torch_dtype": "bfloat16",
        "aux_loss_alpha": 0.001,
        "auto_map": {"AutoModel": "x"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(tmp_path / "model.safetensors") | buffer, tmp_path / "model.safetensors")
    back = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert back.config == dataclasses.replace(model.config, dtype="bfloat16") and back.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values()))
    convert_checkpoint(tmp_path, tmp_path / "fp8", "float")
    converted = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert converted.pop("quantization_config")["weight_block_size"] == [128, 128]
    assert converted == values | {"num_nextn_predict_layers": 0}


def test_directories_that_do_not_fit(make_model: MakeModel, make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    make_config(hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the config asks for"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="another architecture"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def spec(make_config: MakeConfig) -> dict:
    config = {k: v for k, v in make_config().to_dict().items() if k in DeepseekV3Config.__dataclass_fields__}
    del config["vocab_size"]
    tokens = ["<pad>", "<bos>", "<eos>", "<answer>", "</answer>"]
    tokenizer = {"type": "characters", "characters": "0123456789+-= \n", "special_tokens": tokens}
    return {"config": config, "tokenizer": tokenizer}


def test_create_model(spec: dict, tmp_path: Path) -> None:
    model = create_model(spec, tmp_path / "a", seed=3)
    again = create_model(spec, tmp_path / "b", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.lm_head.weight, create_model(spec, tmp_path / "c", seed=4).lm_head.weight)
    config = DeepseekV3Config.from_pretrained(tmp_path / "a")
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_ids) == (20, 0, 1, (2,))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "12 + 3 =\n<answer>15</answer>"
    ids = encode(tokenizer, text)
    assert len(ids) == 13 and ids[9] == 3 and ids[12] == 4
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 2, 0], skip_special_tokens=True) == text
    assert tokenizer.decode([*ids, 2]) == text + "<eos>"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 2, 20)
    with pytest.raises(ValueError, match=r"no token for \['x'\]"):
        encode(tokenizer, "1x")
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("1x")


def test_create_errors(spec: dict, tmp_path: Path) -> None:
    for broken, message in (
        (spec | {"confg": {}}, "did you mean config"),
        (spec | {"config": spec["config"] | {"hiden_size": 3}}, "did you mean hidden_size"),
        (spec | {"config": spec["config"] | {"vocab_size": 3}}, "vocab_size is 3"),
        (spec | {"tokenizer": spec["tokenizer"] | {"type": "bpe"}}, "tokenizer.type is 'bpe'"),
        (spec | {"tokenizer": spec["tokenizer"] | {"characters": "00"}}, r"repeat \['0'\]"),
        (spec | {"tokenizer": spec["tokenizer"] | {"special_tokens": ["<eos>"]}}, "pad_token is '<pad>'"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(broken, tmp_path, seed=0)
    with pytest.raises(ValueError, match="does not exist"):
        create_model(tmp_path / "no.yaml", tmp_path, seed=0)
