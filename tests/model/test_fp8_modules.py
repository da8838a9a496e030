"""FP8 modules: their numbers against hand computation and FP32, what is cast how often, and what stays as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import DeepseekV3Config, DeepseekV3ForCausalLM, SequenceLayout
from model.fp8 import reference
from model.fp8.forms import Recipe
from model.fp8.modules import RECIPES, Fp8Experts, Fp8Linear, Fp8MLP, _share_cast, to_fp8, unquantized
from model.fp8.published import computed_state
from model.layers import MLP
from model.moe import Experts, Routing, expert_counts
from model.mtp import mtp_loss
from model.names import load_hf_state, stored_in_fp8, to_hf

MakeModel = Callable[..., DeepseekV3ForCausalLM]
FORMAT = 0.041  # relative error of one product, by the Frobenius norm


def error(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None
    return float((got - want).norm() / want.norm())


def linear(n: int, k: int) -> nn.Linear:
    return nn.Linear(k, n, bias=False)


def make_experts(make_config: Callable[..., DeepseekV3Config]) -> tuple[Experts, Tensor, Routing]:
    """Six experts, two of a token's choices each, the last expert without tokens."""
    config = make_config(hidden_size=192, moe_intermediate_size=80, n_routed_experts=8)
    experts = Experts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    choice = torch.stack([torch.randperm(7)[:2] for _ in range(150)])  # [T, K]
    counts = expert_counts(choice[:, None], 8)[0]
    weights = torch.rand(150, 2).requires_grad_()
    return experts, torch.randn(150, 192), Routing(choice, weights, torch.empty(0), counts)


def both(plain: nn.Module, fp8: nn.Module, x: Tensor, *rest: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(output, gradient of x, gradients of the parameters) of the two for the same gradient from above."""
    found = []
    upstream: Tensor | None = None
    for module in (plain, fp8):
        module.zero_grad()
        own = x.clone().requires_grad_()
        out = module(own, *rest)
        upstream = torch.randn_like(out) if upstream is None else upstream
        out.backward(upstream)
        found.append([out.detach(), own.grad, *[p.grad.clone() for p in module.parameters() if p.grad is not None]])
    return found[0], found[1]


def test_linear() -> None:
    plain = linear(320, 200)
    fp8 = Fp8Linear(plain, reference, Recipe())
    assert fp8.weight is plain.weight
    x = torch.randn(131, 200)
    for want, got in zip(*both(plain, fp8, x), strict=True):
        assert 0.03 < error(got, want) < FORMAT
    # by hand
    own, upstream = x.clone().requires_grad_(), torch.randn(131, 320)
    fp8.zero_grad()
    out = fp8(own)
    out.backward(upstream)
    weight, recipe = reference.quantize_weight(plain.weight.detach()[None], Recipe()), Recipe()
    w = reference.dequantize_weight(weight)[0]
    assert torch.equal(out, reference.dequantize_rows(reference.quantize_rows(x, recipe)) @ w.t())
    rows, columns = reference.quantize_both(upstream, None, recipe)
    assert own.grad is not None and plain.weight.grad is not None
    assert torch.equal(own.grad, reference.dequantize_rows(rows) @ w)
    inputs = reference.dequantize_columns(reference.quantize_columns(x, None, recipe))
    assert torch.equal(plain.weight.grad, reference.dequantize_columns(columns).t() @ inputs)
    with torch.no_grad():
        assert torch.equal(fp8(x), out)


def test_gated_mlp() -> None:
    plain = MLP(192, 160)
    fp8 = Fp8MLP(plain, reference, Recipe())
    assert [name for name, _ in fp8.named_parameters()] == [name for name, _ in plain.named_parameters()]
    want, got = both(plain, fp8, torch.randn(140, 192))
    # output: two products and the cast between; gradients: one more of each
    for a, b, bound in zip(want, got, (0.08, 0.1, 0.1, 0.1, 0.08), strict=True):
        assert 0.03 < error(b, a) < bound
    with torch.no_grad():
        x = torch.randn(7, 192)
        assert torch.equal(fp8(x), fp8(x.requires_grad_()))


def test_experts(make_config: Callable[..., DeepseekV3Config]) -> None:
    plain, x, routing = make_experts(make_config)
    fp8 = Fp8Experts(plain, reference, Recipe())
    want, got = both(plain, fp8, x, routing)
    for a, b in zip(want, got, strict=True):
        assert 0.03 < error(b, a) < 0.1
    # by hand, an expert at a time
    recipe, upstream, weights = Recipe(), torch.randn(150, 192), routing.weights.detach()
    own = x.clone().requires_grad_()
    plain.zero_grad()
    routing.weights.grad = None
    out = fp8(own, routing)
    out.backward(upstream)
    want_out, want_x, want_share = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    for e in range(8):
        token, k = (routing.experts == e).nonzero(as_tuple=True)
        up = reference.quantize_weight(plain.gate_up_proj.detach()[e : e + 1], recipe)
        down = reference.quantize_weight(plain.down_proj.detach()[e : e + 1], recipe)
        rows, columns = reference.quantize_both(x[token], None, recipe)
        share = weights[token, k]
        act, kept = reference.swiglu_quantize(reference.grouped_linear(rows, up, None, torch.float32), recipe, share)
        want_out.index_add_(0, token, reference.grouped_linear(act, down, None, torch.float32))
        above, above_columns = reference.quantize_both(upstream[token], None, recipe)
        grad_act = reference.grouped_dgrad(above, down, None, torch.float32)
        act_columns, grad, grad_columns, grad_share = reference.swiglu_backward(kept, grad_act, None, recipe, share)
        want_x.index_add_(0, token, reference.grouped_dgrad(grad, up, None, torch.float32))
        assert grad_share is not None and plain.down_proj.grad is not None and plain.gate_up_proj.grad is not None
        want_share[token, k] = grad_share
        for got_grad, g, inputs in (
            (plain.down_proj.grad[e], above_columns, act_columns),
            (plain.gate_up_proj.grad[e], grad_columns, columns),
        ):
            torch.testing.assert_close(got_grad, reference.grouped_wgrad(g, inputs, torch.float32)[0])
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(own.grad, want_x)
    torch.testing.assert_close(routing.weights.grad, want_share)
    with torch.no_grad():
        assert torch.equal(fp8(x, routing), out)


def counting() -> tuple[Any, Counter[str]]:
    counts: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    names = ("grouped_linear", "grouped_dgrad", "grouped_wgrad", "quantize_weight", "quantize_both")
    ops = vars(reference) | {name: counted(name, getattr(reference, name)) for name in names}
    return SimpleNamespace(**ops), counts


def test_layers_that_share_a_cast_take_each_tensor_as_it_is() -> None:
    """What is kept between the two is not used for another tensor or after a change, and is not kept any longer."""
    ops, counts = counting()
    one, other = (Fp8Linear(linear(96, 256), ops, Recipe()) for _ in range(2))
    alone = [Fp8Linear(linear(96, 256), ops, Recipe()) for _ in range(2)]
    for layer, same in zip((one, other), alone, strict=True):
        same.weight = layer.weight
    _share_cast(one, other)
    x, y = (torch.randn(5, 256) for _ in range(2))
    for casts, first, second in [(1, x, x), (2, x, y), (1, y, x), (1, y, y)]:  # y waits for the third's first
        counts.clear()
        got = one(first), other(second)
        assert counts["quantize_both"] == casts
        want = alone[0](first), alone[1](second)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    counts.clear()
    for layer, same in ((one, x), (other, x.detach())):
        layer(same)
    assert counts["quantize_both"] == 1
    for changed in (x, x.detach()):
        one(x)
        changed += 1
        assert torch.equal(other(x), alone[1](x))
    for layer in (one, other, one):
        layer(x)
    assert torch.equal(other(x[:3]), alone[1](x[:3]))
    leaf, grads = torch.randn(5, 256, requires_grad=True), []
    for a, b in ((one, other), alone):
        hidden = leaf * 2
        grads.append(torch.autograd.grad((a(hidden) * b(hidden)).sum(), (leaf, one.weight, other.weight)))
    assert all(map(torch.equal, *grads))
    assert one.shared == []


def loss_of(model: DeepseekV3ForCausalLM, ids: Tensor) -> Tensor:
    """Of the next token and of the MTP layers."""
    layout = SequenceLayout.from_batch(2, len(ids) // 2)
    hidden = model.forward_packed(ids, layout).hidden
    source = torch.arange(len(ids) // 2 - 1)
    mtp = mtp_loss(model, hidden, ids, layout, source, ids[source + 1], detach=False)
    logits = hidden[source] @ model.head.weight.t()
    return nn.functional.cross_entropy(logits, ids[source + 1]) + mtp.loss


def test_a_step_in_numbers(make_model: MakeModel) -> None:
    """Products: fprop, dgrad and wgrad of five matrices of attention in four layers (one of them MTP's), and of the two
    of a gated MLP: one dense, three shared, three times the routed experts. Weights are cast once for two
    micro-batches, and again after an update. Two matrices of attention share an input, which is cast once."""
    model = make_model(num_nextn_predict_layers=1)
    ops, counts = counting()
    to_fp8(model, "emulate", ops=ops)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)  # leaves no trace in a tensor's version
    products = 5 * 4 + 2 * (1 + 3 + 3)
    for update in range(2):
        for microbatch in range(2):
            loss_of(model, torch.randint(40, (24,))).backward()
            done = 2 * update + microbatch + 1
            assert {counts[f"grouped_{kind}"] for kind in ("linear", "dgrad", "wgrad")} == {done * products}
            assert counts["quantize_weight"] == (update + 1) * products
            assert counts["quantize_both"] == done * (4 * 4 + 1 + 3)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss_of(model, torch.randint(40, (24,)))
    assert counts["grouped_linear"] == 5 * products and counts["grouped_wgrad"] == 4 * products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_model(recipe: str, dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    """Names, parameters and checkpoints are those of the plain model; the numbers are near its own."""
    model = make_model(num_nextn_predict_layers=1, initializer_range=0.1).to(dtype)
    plain, names, ids = copy.deepcopy(model), [name for name, _ in model.named_parameters()], torch.randint(40, (24,))
    before = {name: parameter for name, parameter in model.named_parameters()}
    to_fp8(model, "emulate", recipe)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(plain.state_dict())
    last: Any = model.mtp_layers[0]
    kept = [model.lm_head, last.eh_proj, last.mlp.gate]
    assert not any(isinstance(module, Fp8Linear) for module in kept)
    got, want = loss_of(model, ids), loss_of(plain, ids)
    assert 0 < abs(got.item() - want.item()) < 0.02 * want.item()
    got.backward()
    for name, parameter in model.named_parameters():
        want_dtype = torch.float32 if stored_in_fp8(next(to_hf(name, parameter, model.config))[0]) else dtype
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert parameter.dtype == parameter.grad.dtype == want_dtype, name
    engine = copy.deepcopy(plain)
    load_hf_state(engine, computed_state(model))
    with unquantized(model):
        assert torch.equal(loss_of(model, ids), loss_of(engine, ids))
    assert torch.equal(loss_of(model, ids), got) and not torch.equal(loss_of(engine, ids), want)
    for name, one in (("fp8", model), ("plain", plain)):
        one.save_pretrained(tmp_path / name)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("fp8", "plain"))
    assert a == b


def test_frozen_weights_take_no_more_memory(make_model: MakeModel) -> None:
    """A reference policy's stay BF16, with the codes of FP32 ones of the same values."""
    models, ids = [make_model(initializer_range=0.1).to(torch.bfloat16) for _ in range(2)], torch.randint(40, (24,))
    models[1].load_state_dict(models[0].state_dict())
    models[1].requires_grad_(False)
    for model in models:
        to_fp8(model, "emulate")
    assert {p.dtype for p in models[1].parameters()} == {torch.bfloat16}
    a, b = (model(ids[None]).logits for model in models)
    assert a.dtype == torch.bfloat16 and torch.equal(a, b)


def test_recomputed_layers(make_model: MakeModel) -> None:
    """Gradient checkpointing changes no bit, and a cache first filled by an engine serves training."""
    model, ids = make_model(), torch.randint(40, (24,))
    to_fp8(model, "emulate")
    layout = SequenceLayout.from_batch(2, 12)
    with torch.inference_mode():
        model.forward_packed(ids, layout)
    found = []
    for recompute in (False, True):
        model.model.gradient_checkpointing = recompute
        model.zero_grad()
        model.forward_packed(ids, layout).hidden.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) > 30


def test_what_is_kept_is_fp8() -> None:
    """For the backward pass of a layer: a byte a number of its input, and scales; the input itself can go."""
    layer, sizes = Fp8Linear(linear(64, 256), reference, Recipe()), Counter[torch.dtype]()

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.dtype] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(512, 256, requires_grad=True))
    assert sizes == {torch.float8_e4m3fn: 512 * 256, torch.float32: 512 * 256 // 128, torch.int32: 2}


def test_refusals(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="Sequential is no DeepSeek-V3 model; set it to off"):
        to_fp8(nn.Sequential(linear(8, 8)), "emulate")
    with pytest.raises(ValueError, match=r"mxfp8.*emulated only"):
        to_fp8(make_model(), "on", "mxfp8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"model\.fp8 is 'on'.*set it to emulate"):
            to_fp8(make_model(), "on")
    model = make_model()
    to_fp8(model, "off")
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())


def test_emulation_imports_no_kernels() -> None:
    code = "import torch, sys; before = {*sys.modules}; import model.fp8.modules; print(*{*sys.modules} - before)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert "model.fp8.reference" in found
    assert not [name for name in found if "triton" in name or name == "model.fp8.kernels"]
