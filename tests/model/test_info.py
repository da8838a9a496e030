"""Counts from a config alone against published totals, the written-out formula, and parameters on the meta device."""

from collections.abc import Callable

import pytest
import torch

from model import DeepseekV3Config, DeepseekV3ForCausalLM
from model.checkpoint import released_layout
from model.info import info_table, kv_bytes_per_token, model_info, readable, tally
from model.names import hf_state
from model.rope import yarn_ramp_bounds

V3 = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "n_shared_experts": 1, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
ONE_GROUP = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
             "rope_theta": 50000.0, "vocab_size": 163840}  # fmt: skip
KIMI_K2 = V3 | ONE_GROUP | {
    "model_type": "kimi_k2", "num_attention_heads": 64, "n_routed_experts": 384, "max_position_embeddings": 131072,
    "rope_scaling": V3["rope_scaling"] | {"factor": 32, "beta_fast": 1}, "routed_scaling_factor": 2.827,
}  # fmt: skip
MOONLIGHT = V3 | ONE_GROUP | {
    "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
    "num_attention_heads": 16, "q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "n_shared_experts": 2, "rope_scaling": None, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
# total, activated (both embeddings counted), KV bytes a token; in billions as published or computed from papers
PUBLISHED = {
    "v3": (V3, 671.026, 37.552, 70272),
    "moonlight": (MOONLIGHT, 15.960, 2.915, 31104),
    "kimi_k2": (KIMI_K2, 1026.4, 32.862, 70272),
}


def formula(values: dict, experts: int) -> int:
    """All parameters and router biases with this many experts a layer, from the sizes."""
    c = {key: value or 0 for key, value in values.items()}
    d, heads, r, rq = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["q_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    query = d * rq + rq + rq * heads * (nope + rope) if rq else d * heads * (nope + rope)
    attention = query + d * (r + rope) + r + r * heads * (nope + v) + heads * v * d
    moe = (experts + c["n_shared_experts"]) * 3 * d * c["moe_intermediate_size"] + c["n_routed_experts"] * (d + 1)
    layers, dense = c["num_hidden_layers"], c["first_k_dense_replace"]
    return (
        2 * c["vocab_size"] * d + d + layers * (attention + 2 * d)
        + dense * 3 * d * c["intermediate_size"] + (layers - dense) * moe
    )  # fmt: skip


def on_meta(config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str) -> None:
    values, total, activated, kv_bytes = PUBLISHED[name]
    config = DeepseekV3Config.from_dict(values)
    info = model_info(config)
    assert info["parameters"] / 1e9 == pytest.approx(total, abs=0.05 if name == "kimi_k2" else 5e-4)
    assert info["activated"] / 1e9 == pytest.approx(activated, abs=5e-4)
    assert info["parameters"] == formula(values, values["n_routed_experts"])
    assert info["activated"] == formula(values, values["num_experts_per_tok"])
    assert info["kv_bytes_per_token"] == kv_bytes_per_token(config) == kv_bytes
    state = on_meta(config).state_dict()
    counted = {mtp: sum(t.numel() for n, t in state.items() if n.startswith("mtp_layers.") == mtp) for mtp in (0, 1)}
    assert (info["parameters"], info["mtp_parameters"]) == (counted[0], counted[1])


def test_v3_numbers() -> None:
    config = DeepseekV3Config.from_dict(V3)
    info = model_info(config)
    assert info["mtp_parameters"] / 1e9 == pytest.approx(11.610, abs=5e-4)
    assert info["mtp_activated"] / 1e9 == pytest.approx(0.688, abs=5e-4)
    assert config.softmax_scale == pytest.approx(0.1352338, abs=5e-8)
    assert yarn_ramp_bounds(64, config.rope_theta, 4096, 32, 1) == (10, 23)
    shown = {readable(info["parameters"]), readable(info["memory_bytes"]["fp8"], "B")}
    assert shown == {"671.026 B", "673.151 GB"} and readable(288, "B") == "288 B"
    assert info_table(info).row_count == 7


@pytest.mark.parametrize("change", [{}, {"q_lora_rank": None}, {"n_shared_experts": 0}, {"first_k_dense_replace": 9}])
def test_every_part_equals_the_real_model(change: dict, make_config: Callable[..., DeepseekV3Config]) -> None:
    """Widths that are no multiple of a block, two MTP layers, and layers that are all dense."""
    config = make_config(hidden_size=200, moe_intermediate_size=136, num_nextn_predict_layers=2, **change)
    model, parts = on_meta(config), tally(config)
    state = model.state_dict()
    for part, mtp in ((parts.main, False), (parts.mtp, True)):
        own = {name: t for name, t in state.items() if name.startswith("mtp_layers.") == mtp}
        assert part.parameters == sum(t.numel() for t in own.values())
        assert part.biases == sum(t.numel() for name, t in own.items() if name.endswith("bias"))
    both = parts.main + parts.mtp
    copies = (".embed_tokens.weight", ".shared_head.head.weight")  # of each MTP layer: only on disk
    shapes = [(n, t.shape) for n, t in hf_state(model) if not (n.startswith("model.layers.") and n.endswith(copies))]
    for form, scale_fmt in (("bf16", None), ("fp8", "float")):
        assert both.memory[form] == sum(spec.nbytes for spec in released_layout(shapes, scale_fmt))
    assert both.memory["training"] == 16 * model.num_parameters + 4 * both.biases


def test_activated_leaves_out_the_other_experts(make_config: Callable[..., DeepseekV3Config]) -> None:
    config = make_config(num_nextn_predict_layers=1)
    parts, expert = tally(config), 3 * 32 * 16
    assert parts.main.parameters - parts.main_activated.parameters == 2 * (8 - 2) * expert
    assert parts.mtp.parameters - parts.mtp_activated.parameters == (8 - 2) * expert
