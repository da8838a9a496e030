"""Fused kernels against plain torch: on a GPU where there is one, else by Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from model import DeepseekV3Config, DeepseekV3ForCausalLM, SequenceLayout, attention, layers, moe
from model.layers import RMSNorm
from model.moe import Routing, TopkRouter, by_expert
from model.rope import RotaryTables, apply_rope
from tests.interpreter import INTERPRETED, run_interpreted

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
kernel = pytest.mark.skipif(not GPU and not INTERPRETED, reason="runs in the interpreter, started by another test")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
if GPU or INTERPRETED:
    from model.kernels import norms
    from model.kernels import router as router_kernel
    from model.kernels.adamw import adamw_
    from model.kernels.attention import Widths, attention_rows, restored
    from model.kernels.embedding import embedded
    from model.kernels.experts import collect, combine, gated, gated_rows, spread
    from model.kernels.gradients import added
    from model.kernels.logprobs import chosen_logprobs, logits_gradient_
    from model.kernels.norms import added_norm, front_norm, rms_norm
    from model.kernels.router import Choice, choose


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests run here themselves")
def test_kernels_run_in_the_interpreter() -> None:
    run_interpreted(__file__)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    """To the rounding of the dtype of got."""
    low = got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-2 if low else 1e-5, atol=1e-3 if low else 1e-5)


@kernel
@DTYPES
@pytest.mark.parametrize("vocabulary", [50, 4096, 9001])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities(dtype: torch.dtype, vocabulary: int, temperature: float) -> None:
    logits = (4 * normal(7, vocabulary)).to(dtype)
    target = torch.randint(0, vocabulary, (7,), device=DEVICE)
    target[:2] = torch.tensor([0, vocabulary - 1])
    plain = logits.float().requires_grad_()
    table = torch.log_softmax(plain / temperature, dim=-1)
    want, upstream = table.gather(1, target[:, None])[:, 0], normal(7)
    out = [torch.full((7,), float("nan"), device=DEVICE) for _ in range(3)]
    chosen_logprobs(logits, target, temperature, *out)
    torch.testing.assert_close(out[0], want.detach(), rtol=1e-5, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=table.detach()).entropy()
    torch.testing.assert_close(out[1], entropy, rtol=1e-4, atol=1e-4)
    (want_grad,) = torch.autograd.grad(want, plain, upstream)
    got = logits_gradient_(logits, target, temperature, out[2], upstream)
    assert got is logits
    near(got, want_grad)


@kernel
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw(moments: torch.dtype) -> None:
    """An update from given moments, against algorithm 2 of arXiv 1711.05101 in float64."""
    shape, step, lr, (beta1, beta2), decay, scale = (37, 61), 4, 1e-2, (0.9, 0.95), 0.1, 0.3
    weight, grad = normal(*shape), normal(*shape) * torch.logspace(-6, 0, shape[1], device=DEVICE)
    first, second = (grad * normal(*shape)).to(moments), (grad**2 * normal(*shape).abs()).to(moments)
    w, g, m, v = (t.double() for t in (weight, grad * scale, first, second))
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    want = w * (1 - lr * decay) - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8)
    adamw_(weight, grad, scale, first, second, step, lr, (beta1, beta2), 1e-8, decay)
    torch.testing.assert_close(weight.double(), want, rtol=0, atol=1e-6)
    low = moments == torch.bfloat16
    torch.testing.assert_close(first.double(), m, rtol=2**-7 if low else 1e-4, atol=1e-12)
    torch.testing.assert_close(second.double(), v, rtol=2**-7 if low else 1e-5, atol=1e-15)


@kernel
@DTYPES
def test_rows_go_to_experts_and_back(dtype: torch.dtype) -> None:
    tokens, top, width = 5, 3, 40
    order = torch.randperm(tokens * top, device=DEVICE)
    token = order // top
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(tokens * top, device=DEVICE)).view(tokens, top)
    x, grad = normal(tokens, width, dtype=dtype).requires_grad_(), normal(tokens * top, width, dtype=dtype)
    rows = spread(x, token, places)
    assert torch.equal(rows, x[token])
    near(
        torch.autograd.grad(rows, x, grad)[0],
        torch.zeros(tokens, width, device=DEVICE).index_add(0, token, grad.float()),
    )
    y, upstream = grad.detach().requires_grad_(), x.detach()
    total = collect(y, token, places)
    near(total, torch.zeros(tokens, width, device=DEVICE).index_add(0, token, y.detach().float()))
    assert torch.equal(torch.autograd.grad(total, y, upstream)[0], upstream[token])
    assert combine(y.detach()[:0], places[:0]).shape == (0, width)


@kernel
@DTYPES
@pytest.mark.parametrize("width", [24, 1500])
def test_gated_activation(dtype: torch.dtype, width: int) -> None:
    gate_up, weight, upstream = normal(6, 2 * width, dtype=dtype), normal(6).abs(), normal(6, width, dtype=dtype)
    plain, plain_weight = gate_up.float().requires_grad_(), weight.clone().requires_grad_()
    for routed in (True, False):
        gate, up = plain.chunk(2, -1)
        want = F.silu(gate) * up * (plain_weight[:, None] if routed else 1.0)
        ours = gate_up.clone().requires_grad_()
        routing = weight.clone().requires_grad_()
        got = gated_rows(ours, routing) if routed else gated(*ours.chunk(2, -1))
        assert got.dtype == dtype
        near(got, want)
        wanted = torch.autograd.grad(want, [plain, plain_weight][: 1 + routed], upstream.float())
        found = torch.autograd.grad(got, [ours, routing][: 1 + routed], upstream)
        near(found[0], wanted[0])
        if routed:
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


@kernel
@DTYPES
@pytest.mark.parametrize("parent", [[-1, 0, 0, -1, -1], [-1] * 5])
def test_attention_rows(dtype: torch.dtype, parent: list[int], make_config: Callable[..., DeepseekV3Config]) -> None:
    """Rotation, rows and their gradients against the plain path; a shared prompt is in two rows, one is padded."""
    config = make_config()
    heads, nope, rope, value = 20, config.qk_nope_head_dim, config.qk_rope_head_dim, 16
    widths = Widths(heads, nope, rope, value)
    lengths = [6, 3, 5, 40, 11]
    layout = SequenceLayout.from_segments(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), parent)
    layout = layout.to(DEVICE)
    assert len(layout.buckets) > 1
    tokens, index = len(layout), torch.cat([b.pad_index.flatten() for b in layout.buckets])
    cos, sin = (table.contiguous() for table in RotaryTables(config)(layout.position_ids))
    q, kv = normal(tokens, heads * (nope + rope), dtype=dtype), normal(tokens, heads * (nope + value), dtype=dtype)
    latent = normal(tokens, 7 + rope, dtype=dtype)

    def plain(q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor) -> list[torch.Tensor]:
        q, kv = q.unflatten(-1, (heads, -1)), kv.unflatten(-1, (heads, -1))
        q = torch.cat((q[..., :nope], apply_rope(q[..., nope:], cos, sin)), -1)
        k = torch.cat((kv[..., :nope], apply_rope(k_rope, cos, sin)[:, None].expand(-1, heads, -1)), -1)
        return [x.index_select(0, index) for x in (q, k, kv[..., nope:])]

    def ours(q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor) -> list[torch.Tensor]:
        rows = attention_rows(q, kv, k_rope, cos, sin, layout, widths)  # [B, n_h, L, ..] of each bucket
        return [torch.cat([x.transpose(1, 2).flatten(0, 1) for x in part]) for part in zip(*rows)]

    counts = torch.zeros(len(index), 1, 1, device=DEVICE).index_fill_(0, layout.uses, 1.0)  # padding has no gradient
    upstream = [
        normal(len(index), heads, width).to(dtype) * counts.to(dtype) for width in (nope + rope,) * 2 + (value,)
    ]
    found = []
    for side, exact in ((plain, torch.float32), (ours, dtype)):
        inputs = [x.to(exact).requires_grad_() for x in (q, kv, latent)]
        outputs = side(inputs[0], inputs[1], inputs[2][:, 7:])
        found.append((outputs, torch.autograd.grad(outputs, inputs, [x.to(exact) for x in upstream])))
    for got, want in zip([*found[1][0], *found[1][1]], [*found[0][0], *found[0][1]], strict=True):
        assert got.dtype == dtype
        near(got, want)


@kernel
@DTYPES
@pytest.mark.parametrize("parent", [[-1, 0, 0, -1, -1], [-1] * 5])
def test_tokens_come_back_from_rows(dtype: torch.dtype, parent: list[int]) -> None:
    """Also where heads lie before positions in memory."""
    layout = SequenceLayout.from_segments([0, 6, 9, 14, 54, 65], parent).to(DEVICE)
    rows = [normal(b.shape[0], 3, b.shape[1], 5, dtype=dtype).requires_grad_() for b in layout.buckets]
    assert len(rows) > 1
    got, want = restored(rows, layout), layout.scatter([x.transpose(1, 2) for x in rows]).flatten(1)
    assert torch.equal(got, want)
    upstream = normal(65, 15, dtype=dtype)
    for a, b in zip(*(torch.autograd.grad(x, rows, upstream) for x in (got, want)), strict=True):
        assert torch.equal(a, b)


@kernel
@DTYPES
@pytest.mark.parametrize("rows, width, stride", [(7, 24, 24), (5, 50, 64), (2, 2048, 2100)])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, of rows that stand apart; more rows than programs of the backward pass."""
    monkeypatch.setattr(norms, "PROGRAMS", 3)
    x, weight = normal(rows, stride, dtype=dtype)[:, :width], normal(width, dtype=dtype)
    upstream = normal(rows, width, dtype=dtype)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    want = F.rms_norm(exact[0], (width,), exact[1], 1e-5)
    ours = [t.detach().requires_grad_() for t in (x, weight)]
    got = rms_norm(ours[0], ours[1], 1e-5)
    low = dtype == torch.bfloat16
    tolerance = {"rtol": 2**-6 if low else 1e-5, "atol": 2**-6 if low else 1e-5}
    torch.testing.assert_close(got.double(), want, **tolerance)
    wanted, found = torch.autograd.grad(want, exact, upstream.double()), torch.autograd.grad(got, ours, upstream)
    torch.testing.assert_close(found[0].double(), wanted[0], **tolerance)
    scale = float(wanted[1].abs().max())
    torch.testing.assert_close(found[1].double() / scale, wanted[1] / scale, **tolerance)
    assert rms_norm(x[None], weight, 1e-5).shape == (1, rows, width)


@kernel
@DTYPES
@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("added", [True, False])
def test_a_norm_with_what_is_around_it(
    dtype: torch.dtype, readers: int, added: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum before it, gradients of several readers, and of what goes on past it, against the same in float64."""
    monkeypatch.setattr(norms, "PROGRAMS", 3)
    norm = RMSNorm(50).to(DEVICE, dtype)
    torch.nn.init.normal_(norm.weight)
    x, delta = normal(7, 50, dtype=dtype).requires_grad_(), normal(7, 50, dtype=dtype).requires_grad_()
    inputs = [x, norm.weight, delta][: 2 + added]
    total, normed = added_norm(x, delta if added else None, norm.weight, norm.eps, readers)
    near(total, x + delta if added else x)
    assert len({out.data_ptr() for out in normed}) == 1
    upstream = [normal(7, 50, dtype=dtype) for _ in range(readers + 1)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want_total = exact[0] + exact[2] if added else exact[0]
    want = F.rms_norm(want_total, (50,), exact[1], norm.eps)
    wanted = torch.autograd.grad((want_total, *(want,) * readers), exact, [u.double() for u in upstream])
    found = torch.autograd.grad((total, *normed), inputs, upstream)
    for a, b in zip((*normed, *found), (*(want,) * readers, *wanted), strict=True):
        assert a.dtype == dtype
        # twice rounded, by an interpreter that cuts off
        tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))
    total, normed = added_norm(x, delta if added else None, norm.weight, norm.eps, readers)
    past = torch.autograd.grad(total, inputs, upstream[0], allow_unused=True)
    assert torch.equal(past[0], upstream[0]) and past[1] is None


@kernel
@DTYPES
def test_a_norm_of_the_first_columns(dtype: torch.dtype) -> None:
    x, weight = normal(5, 50 + 12, dtype=dtype).requires_grad_(), normal(50, dtype=dtype)
    upstream = normal(5, 50, dtype=dtype), normal(5, 12, dtype=dtype)
    normed, rest = front_norm(x, weight, 1e-6)
    want = rms_norm(x[:, :50], weight, 1e-6), x[:, 50:]
    assert torch.equal(normed, want[0]) and torch.equal(rest, want[1])
    for part in (slice(0, 2), slice(0, 1), slice(1, 2)):
        got, plain = (
            torch.autograd.grad(y[part], x, upstream[part], retain_graph=True)[0] for y in ((normed, rest), want)
        )
        near(got, plain)


@kernel
@DTYPES
def test_a_norm_adds_to_the_sum_of_its_gradients(dtype: torch.dtype) -> None:
    x, weight = normal(6, 40, dtype=dtype), normal(40, dtype=dtype).requires_grad_()
    rms_norm(x, weight, 1e-6).float().pow(2).sum().backward()
    once, weight.grad = weight.grad, None
    weight.master = torch.zeros(40, device=DEVICE)
    for times in (1, 2):
        rms_norm(x, weight, 1e-6).float().pow(2).sum().backward()
        assert weight.grad is None and once is not None
        near((weight.master.grad / times).to(dtype), once)


@kernel
@DTYPES
def test_gradients_are_added(dtype: torch.dtype) -> None:
    total, x = normal(37, 301), normal(37, 301, dtype=dtype)
    want = total + x.float()
    assert added(total, x) is total and torch.equal(total, want)
    assert torch.equal(added(None, x.t()), x.t().float())


@kernel
@DTYPES
@pytest.mark.parametrize("width", [24, 600])
def test_embedding(dtype: torch.dtype, width: int) -> None:
    """Its gradient by autograd, and added to a sum; one token many times."""
    ids = torch.tensor([3, 0, 3, 8, 3, 0, 3, 5], device=DEVICE)
    weight, upstream = normal(9, width, dtype=dtype).requires_grad_(), normal(8, width, dtype=dtype)
    want = torch.zeros(9, width, device=DEVICE).index_add(0, ids, upstream.float())
    out = embedded(ids, weight)
    assert torch.equal(out, weight[ids])
    out.backward(upstream)
    assert weight.grad is not None  # in BF16 torch rounds every sum
    torch.testing.assert_close(weight.grad.float(), want, rtol=2e-2, atol=5e-2)
    weight.grad, weight.master = None, torch.zeros(9, width, device=DEVICE)
    weight.master.grad = torch.ones(9, width, device=DEVICE)
    embedded(ids, weight).backward(upstream)
    assert weight.grad is None
    torch.testing.assert_close(weight.master.grad, 1 + want, rtol=1e-6, atol=1e-6)


ROUTERS = {  # experts, of a token, groups, groups kept, normalised
    "one token": (8, 2, 1, 1, True),
    "plain": (8, 2, 1, 1, True),
    "odd": (11, 3, 1, 1, False),
    "groups": (24, 4, 4, 2, True),
    "odd groups": (15, 3, 5, 3, True),
}


@kernel
@DTYPES
@pytest.mark.parametrize("case", ROUTERS)
@pytest.mark.parametrize("replayed", [False, True])
def test_router(
    dtype: torch.dtype, case: str, replayed: bool, make_config: Callable[..., DeepseekV3Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Choices, weights, sorting and gradients against the plain router on a CPU in FP32."""
    monkeypatch.setattr(router_kernel, "TILE", 64)
    monkeypatch.setattr(router_kernel, "PROGRAMS", 3)
    tokens, (experts, top, groups, kept, normalised) = 1 if case == "one token" else 21, ROUTERS[case]
    options = {"n_group": groups, "topk_group": kept, "norm_topk_prob": normalised, "routed_scaling_factor": 2.5}
    plain = TopkRouter(make_config(n_routed_experts=experts, num_experts_per_tok=top, **options))
    width = plain.weight.shape[1]
    x, weight = torch.randn(tokens, width).to(dtype), torch.randn(experts, width).to(dtype) / width**0.5
    plain.weight.data, plain.e_score_correction_bias = weight.float(), torch.randn(experts) / 4 - 1
    replay = None
    if replayed:
        replay = torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)])
        replay[::3] = plain(x.float()).experts[::3].flip(1)  # the router's own, in another order
        replay[1::4] = -1
        replay[2::5, 1] = replay[2::5, 0]
    ours = [t.to(DEVICE).requires_grad_() for t in (x, weight)]
    exact = x.float().requires_grad_()
    want = plain(exact, replay)
    choice = Choice(top, groups, kept, normalised, 2.5)
    recorded = None if replay is None else replay.to(DEVICE)
    got = choose(*ours, plain.e_score_correction_bias.to(DEVICE), recorded, choice)
    order = got.experts.sort(1).indices.cpu(), want.experts.sort(1).indices
    assert torch.equal(got.experts.cpu().gather(1, order[0]), want.experts.gather(1, order[1]))
    near(got.weights.cpu().gather(1, order[0]), want.weights.gather(1, order[1]))
    near(got.scores.cpu(), want.scores)
    assert torch.equal(got.counts.cpu(), want.counts)
    if replayed:
        assert want.differs is not None and torch.equal(got.differs.cpu(), want.differs)
    token, places, ends, weights = by_expert(Routing(got.experts, got.weights, got.scores, got.counts))
    assert torch.equal(got.token, token) and torch.equal(got.places, places) and torch.equal(got.ends, ends)
    assert torch.equal(got.row_weights, weights)

    of_rows, of_weights, of_scores = normal(tokens * top), normal(tokens, top), normal(tokens, experts)
    upstream = (of_rows[got.places] + of_weights).cpu().gather(1, order[0])
    back = torch.empty_like(upstream).scatter_(1, order[1], upstream)
    wanted = torch.autograd.grad((want.weights, want.scores), (exact, plain.weight), (back, of_scores.cpu()))
    found = torch.autograd.grad((got.row_weights, got.weights, got.scores), ours, (of_rows, of_weights, of_scores))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        scale = float(b.abs().max())
        near(a.cpu() / scale, b / scale)


@kernel
def test_a_router_adds_to_the_sum_of_its_gradients(make_config: Callable[..., DeepseekV3Config]) -> None:
    x, weight, bias = (normal(*shape, dtype=torch.bfloat16) for shape in ((9, 16), (4, 16), (4,)))
    weight.requires_grad_()
    choice = Choice(2, 1, 1, True, 1.0)
    choose(x, weight, bias.float(), None, choice).row_weights.pow(2).sum().backward()
    once, weight.grad = weight.grad, None
    weight.master = torch.zeros(4, 16, device=DEVICE)
    for times in (1, 2):
        choose(x, weight, bias.float(), None, choice).row_weights.pow(2).sum().backward()
        assert weight.grad is None and once is not None
        near(weight.master.grad.bfloat16() / times, once)


@kernel
@DTYPES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_kernels_is_the_plain_one(
    dtype: torch.dtype, checkpointing: bool, make_model: Callable[..., DeepseekV3ForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Hidden states and every gradient, with rows of several lengths, a shared prompt, and routes that are replayed;
    with gradients added to FP32 sums, twice."""
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter cuts BF16 off where others round")
    model = make_model(num_hidden_layers=2, v_head_dim=16).to(DEVICE, dtype)
    layout = SequenceLayout.from_segments([0, 4, 6, 9, 24, 29], [-1, 0, 0, -1, -1]).to(DEVICE)
    assert len(layout.buckets) > 1
    ids = torch.randint(0, model.config.vocab_size, (29,), device=DEVICE)
    upstream = normal(29, model.config.hidden_size, dtype=dtype)
    model.model.gradient_checkpointing = checkpointing
    with torch.no_grad():
        routes = model.forward_packed(ids, layout, output_routing=True).routed_experts
    assert routes is not None
    found = []
    for fused in (False, True):
        for module in (layers, attention, moe):
            monkeypatch.setattr(module, "usable", lambda x, fused=fused: fused)
        sums = {}
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if fused:
                sums[name] = parameter.master = torch.zeros_like(parameter, dtype=torch.float32)
        for _ in range(2):
            out = model.forward_packed(ids, layout, routes, output_routing=True)
            out.hidden.backward(upstream)
        assert out.expert_counts is not None and out.routes_differ is not None
        grads = {}
        for name, parameter in model.named_parameters():
            parts = [g for g in (parameter.grad, sums[name].grad if fused else None) if g is not None]
            assert len(parts) == (name != "lm_head.weight")
            if parts:
                grads[name] = parts[0].float()
        found.append((out, grads))
    (want, wanted), (got, grads) = found
    assert torch.equal(got.expert_counts, want.expert_counts) and not got.routes_differ.any()
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for a, b in [(got.hidden.detach(), want.hidden.detach()), *((grads[name], wanted[name]) for name in wanted)]:
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-7
