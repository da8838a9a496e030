"""Each part against its equation: YaRN, absorbed attention, router, experts."""

from collections.abc import Callable

import pytest
import torch

from model import DeepseekV3Config, DeepseekV3ForCausalLM, SequenceLayout
from model.attention import MultiheadLatentAttention
from model.moe import TopkRouter, grouped_linear
from model.rope import RotaryTables, apply_rope, inverse_frequencies, yarn_ramp_bounds

MakeModel = Callable[..., DeepseekV3ForCausalLM]
MakeConfig = Callable[..., DeepseekV3Config]
V3 = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip


def test_v3_numbers() -> None:
    config = DeepseekV3Config.from_dict(V3)
    assert yarn_ramp_bounds(64, 10000.0, 4096, 32, 1) == (10, 23)
    assert yarn_ramp_bounds(64, 50000.0, 4096, 1, 1) == (19, 20)  # Kimi-K2
    assert config.softmax_scale == pytest.approx(0.1352338, abs=1e-7)
    inverse = inverse_frequencies(config)
    assert inverse[10].item() == pytest.approx(10000 ** (-20 / 64), rel=1e-6)  # untouched up to low
    assert inverse[23].item() == pytest.approx(10000 ** (-46 / 64) / 40, rel=1e-6)  # divided from high on
    cos, _ = RotaryTables(config)(torch.tensor([0]))
    assert cos.dtype == torch.float32 and torch.equal(cos, torch.ones(1, 32))
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    assert model.num_parameters == pytest.approx(671.026e9, rel=1e-5)


def test_rotation_is_of_interleaved_pairs() -> None:
    x, angle = torch.randn(5, 3, 8), torch.rand(5, 4)
    turned = torch.view_as_complex(x.view(5, 3, 4, 2)) * torch.polar(torch.ones(5, 4), angle)[:, None]
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(apply_rope(x, angle.cos(), angle.sin()), expected)


def test_absorbed_attention_equals_naive(make_config: MakeConfig) -> None:
    config, layout = make_config(), SequenceLayout.from_batch(1, 9)
    attention, h = MultiheadLatentAttention(config), torch.randn(9, 32)
    cos, sin = RotaryTables(config)(layout.position_ids)
    q_nope, q_rope, latent = attention.project(h, cos, sin)
    c, k_rope = latent.split((16, 8), dim=-1)
    up_k, up_v = attention.kv_b_proj.weight.view(4, 20, 16).split((8, 12), dim=1)  # [n_h, d_n, r], [n_h, d_v, r]
    q_latent = torch.einsum("thn,hnr->thr", q_nope, up_k)
    scores = torch.einsum("thr,sr->hts", q_latent, c) + torch.einsum("thr,sr->hts", q_rope, k_rope)
    scores = (scores * config.softmax_scale).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    o_latent = torch.einsum("hts,sr->thr", scores.softmax(-1), c)
    absorbed = attention.o_proj(torch.einsum("thr,hvr->thv", o_latent, up_v).flatten(1))
    torch.testing.assert_close(attention(h, cos, sin, layout), absorbed, rtol=1e-5, atol=1e-6)


def test_router_bias_selects_but_does_not_weigh(make_config: MakeConfig) -> None:
    router, x = TopkRouter(make_config()), torch.randn(50, 32)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias[:] = torch.tensor([-3.0, -3, -3, -3, -3, -3, -1, -1])
    routing = router(x)
    assert set(routing.experts.flatten().tolist()) == {6, 7}  # all biases negative: a masked 0 would win instead
    chosen = routing.scores.gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, 2.5 * chosen / chosen.sum(-1, keepdim=True))
    assert routing.counts.tolist() == [0] * 6 + [50, 50]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("counts", [[5, 0, 7, 1], [0, 0, 13, 0], [13, 0, 0, 0]])
def test_grouped_linear(dtype: torch.dtype, counts: list[int]) -> None:
    x, w = torch.randn(13, 16, dtype=dtype), torch.randn(4, 24, 16, dtype=dtype)
    g = torch.randn(13, 24, dtype=dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    results = []
    for path in (grouped_linear, lambda x, w, _: torch.cat([a @ b.t() for a, b in zip(x.split(counts), w)])):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = path(a, b, ends)
        results.append((y, *torch.autograd.grad(y, (a, b), g)))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain)


def test_each_part_changes_the_logits(make_model: MakeModel) -> None:
    ids = torch.randint(0, 40, (2, 40))
    base = make_model()
    expected = base(ids).logits
    for change in ({"rope_scaling": None}, {"n_group": 1, "topk_group": 1}, {"n_shared_experts": 0}):
        other = make_model(**change)
        other.load_state_dict(base.state_dict(), strict="n_shared_experts" not in change)
        assert (other(ids).logits - expected).abs().max() > 0.01, change
    for layer in base.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
    assert (base(ids).logits - expected).abs().max() > 0.01
